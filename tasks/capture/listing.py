"""Listing of the captures in a folder or bucket, one or all of a dataset; no file but manifests is read.

The flows and tasks.dataset call it before any stage.
"""

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
    """A file as the storage lists it; `version` changes whenever the file is written."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative to the capture"""
    bytes: int
    """Size"""
    version: str
    """ETag, or mtime and ctime"""


class Listing(BaseModel):
    """The content of a capture's folder."""

    model_config = ConfigDict(frozen=True)

    uri: str
    """URL of the folder"""
    id: str
    """Path below the dataset's root, else the folder's name"""
    files: tuple[ListedFile, ...]
    """The capture's content"""
    manifest: str | None
    """Text of its manifest.json"""
    marker: bool
    """True if `_COMPLETE` is there and no file is newer (a newer file belongs to another upload)"""
    others: tuple[str, ...]
    """Paths of further files in views/ and depth/"""
    links_outside: tuple[str, ...]
    """Paths of links that lead out of the folder"""
    uploaded_at: datetime
    """Time of the newest file, UTC"""

    def same_upload(self, other: Listing) -> bool:
        """True if all that a reconstruction depends on is the same in both listings."""
        return (self.files, self.manifest, self.others) == (other.files, other.manifest, other.others)


def list_capture(uri: str, root: str = "") -> Listing:
    """List a capture's folder; raises InputError if there is no capture, or if it is not below `root`."""
    location = Location.of(uri)
    found = {path: info for path, info in location.listing().items() if _is_of(path, "")}
    if not found:
        raise InputError(f"{uri}: no capture there; a capture is a folder with views/, depth/ and transforms.json")
    return _listing(location, _id_below(root, location), found)


def list_captures(root: str) -> list[Listing]:
    """List every capture below a folder or prefix, sorted by id: every folder with files in views/ or depth/."""
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
    """Key of an upload and the parameters that are asked for: it names the work before any file is read.

    A file that the manifest declares counts by its content, any other by its version in the storage.
    """
    declared = _declared(listing.manifest)
    digests = {file.path: file.sha256 for file in declared if file.sha256 is not None}
    files = [[file.path, file.bytes, digests.get(file.path, file.version)] for file in listing.files]
    # the manifest counts as well: after a correction of a wrong manifest, a refused capture is another upload
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
    """The files that a manifest.json lists; none if it cannot be read."""
    try:
        return () if manifest is None else declared_files(manifest)
    except ValueError:
        return ()


def _id_below(root: str, location: Location) -> str:
    above = f"{Location.of(root).path}/" if root else location.path.removesuffix(location.name)
    if not f"{location.path}/".startswith(above):
        raise InputError(f"{location.url}: is not below {root}, so it has no id there")
    name = location.path[len(above) :] or location.name
    if leaves_folder(name):
        raise InputError(f"{location.url}: `{name}` cannot be the id of a capture; rename the folder")
    return name


def _text(location: Location) -> str | None:
    """Text of a file; None if it has been removed since it was listed."""
    data = location.read_or_none()
    return None if data is None else data.decode(errors="replace")


def _is_of(path: str, capture: str) -> bool:
    return capture_of(path) == capture and not _is_litter(path)


def _is_litter(path: str) -> bool:
    """True for files that operating systems leave in folders."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _links_outside(root: Path, content: Found) -> tuple[str, ...]:
    """Paths of files that are outside of the capture, because they or their folder are a link."""
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
