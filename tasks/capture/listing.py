"""What lies in a folder or bucket, before anything but manifests is read: one capture, or all of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.capture.layout import (
    DEPTH,
    MANIFEST,
    MARKER,
    VIEWS,
    DeclaredFile,
    belongs,
    capture_of,
    declared_files,
    leaves_folder,
)
from tasks.errors import InputError
from tasks.settings import PIPELINE_VERSION, Parameters
from tasks.store.location import Location
from tasks.store.results import cache_key

_PARALLEL_READS = 16

Found = Mapping[str, dict[str, Any]]
"""Files by path relative to the capture, as fsspec lists them."""


class ListedFile(BaseModel):
    """A file as the storage lists it: `version` changes whenever it is written (ETag, or mtime and ctime)."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: int
    version: str


class Listing(BaseModel):
    """What lies in a capture's folder.

    id: the path below the dataset's root, else the folder's name. manifest: the text of its manifest.json. marker:
    whether `_COMPLETE` is there and nothing is newer (an upload anew has begun then). others: further files in views/
    and depth/. uploaded_at: the newest of all.
    """

    model_config = ConfigDict(frozen=True)

    uri: str
    id: str
    files: tuple[ListedFile, ...]
    manifest: str | None
    marker: bool
    others: tuple[str, ...]
    links_outside: tuple[str, ...]
    uploaded_at: datetime

    def same_upload(self, other: Listing) -> bool:
        """Whether nothing that a reconstruction depends on has been written in between."""
        return (self.files, self.manifest, self.others) == (other.files, other.manifest, other.others)


def list_capture(uri: str, root: str = "") -> Listing:
    """List a capture's folder; raises InputError where none is, or where it does not lie below `root`."""
    location = Location.of(uri)
    found = {path: info for path, info in location.listing().items() if _is_of(path, "")}
    if not found:
        raise InputError(f"{uri}: no capture there; it is a folder with views/, depth/ and transforms.json")
    return _listing(location, _id_below(root, location), found)


def list_captures(root: str) -> list[Listing]:
    """List every capture below a folder or prefix, sorted by id; a capture is what has files in views/ or depth/."""
    location = Location.of(root)
    captures: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for path, info in location.listing().items():
        capture = capture_of(path)
        if capture is not None and not _is_litter(path):
            captures[capture][path[len(capture) + 1 :] if capture else path] = info
    with_views = {
        capture: found
        for capture, found in sorted(captures.items())
        if any(path.startswith((f"{VIEWS}/", f"{DEPTH}/")) for path in found)
    }

    def listed(capture: str) -> Listing:
        folder = location / capture if capture else location
        return _listing(folder, capture or location.name, with_views[capture])

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return list(pool.map(listed, with_views))


def upload_key(listing: Listing, engine: str, parameters: Parameters) -> str:
    """What was uploaded and what is asked for: names the work before anything is read.

    A file that the manifest declares counts by its content, any other by its version in the storage.
    """
    declared = _declared(listing.manifest)
    digests = {file.path: file.sha256 for file in declared if file.sha256 is not None}
    files = [[file.path, file.bytes, digests.get(file.path, file.version)] for file in listing.files]
    # what is declared counts as well: a capture that was refused for a wrong manifest is another once that is right
    return cache_key("upload", PIPELINE_VERSION, [listing.uri, files, declared, engine, parameters])


def _listing(location: Location, name: str, found: Found) -> Listing:
    manifest = _text(location / MANIFEST) if MANIFEST in found else None
    uploaded_at = max(map(_written_at, found.values()))
    content = {path: info for path, info in found.items() if belongs(path)}
    links = _links_outside(Path(location.path), content) if location.local else ()
    return Listing(
        uri=location.url,
        id=name,
        files=tuple(
            ListedFile(path=path, bytes=info["size"], version=_version(info))
            for path, info in content.items()
            if path not in links
        ),
        manifest=manifest,
        marker=MARKER in found and _written_at(found[MARKER]) >= uploaded_at,
        others=tuple(path for path in found if path.startswith((f"{VIEWS}/", f"{DEPTH}/")) and path not in content),
        links_outside=links,
        uploaded_at=uploaded_at,
    )


def _declared(manifest: str | None) -> tuple[DeclaredFile, ...]:
    """What a manifest.json lists; nothing where it is unreadable."""
    try:
        return () if manifest is None else declared_files(manifest)
    except ValueError:
        return ()


def _id_below(root: str, location: Location) -> str:
    above = f"{Location.of(root).path}/" if root else location.path.removesuffix(location.name)
    if not f"{location.path}/".startswith(above):
        raise InputError(f"{location.url}: does not lie below {root}, which its id would be relative to")
    name = location.path[len(above) :] or location.name
    if leaves_folder(name):
        raise InputError(f"{location.url}: `{name}` can be no capture's id; rename the folder")
    return name


def _text(location: Location) -> str | None:
    """None where it went away since it was listed."""
    data = location.read_or_none()
    return None if data is None else data.decode(errors="replace")


def _is_of(path: str, capture: str) -> bool:
    return capture_of(path) == capture and not _is_litter(path)


def _is_litter(path: str) -> bool:
    """What operating systems leave in folders."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _links_outside(root: Path, content: Found) -> tuple[str, ...]:
    """Files that a link, their own or a folder's, takes out of the capture."""
    inside = root.resolve()

    def leaves(path: Path) -> bool:
        try:
            return not path.resolve(strict=True).is_relative_to(inside)
        except (OSError, RuntimeError):  # it leads nowhere, or to itself
            return True

    folder_leaves = lru_cache(leaves)
    return tuple(
        path
        for path, info in content.items()
        if folder_leaves((root / path).parent) or (info.get("islink") and leaves(root / path))
    )


def _version(info: dict[str, Any]) -> str:
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    return f"{info.get('mtime')}-{info.get('created')}"


def _written_at(info: dict[str, Any]) -> datetime:
    written = info.get("LastModified", info.get("mtime", 0.0))
    if isinstance(written, datetime):
        return written.astimezone(UTC)
    return datetime.fromtimestamp(float(written), UTC)
