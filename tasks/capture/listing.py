"""Listing of the captures in a folder or bucket, one or all of a dataset, of any layout.

No file is read but manifests, and the list of objects in a scene of several.

The flows and tasks.dataset call it before any stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.capture.folder_tree import Folder, is_litter
from tasks.capture.layout import (
    MANIFEST,
    MARKER,
    TRANSFORMS,
    DeclaredFile,
    Reader,
    declared_files,
    leaves_folder,
)
from tasks.capture.layouts import OWN, captures_below, recognised
from tasks.capture.layouts.bop import PART
from tasks.capture.layouts.layout_reader import LayoutReader
from tasks.capture.layouts.unrecognised import told_of_file, told_of_folder
from tasks.errors import InputError
from tasks.settings import PIPELINE_VERSION, Parameters
from tasks.store.location import Location
from tasks.store.results import cache_key

_PARALLEL_READS = 16
_NAMED_AT_MOST = 3

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
    """URL of the folder; of one object in it, with the object's name at its end"""
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
    part: str = ""
    """Name of the object that is meant, of several in the folder"""

    @property
    def folder(self) -> str:
        """URL of the folder that the files are in."""
        return self.uri.removesuffix(f"/{self.part}") if self.part else self.uri

    @property
    def layout(self) -> LayoutReader:
        """The reader of the capture's layout."""
        return recognised(self._tree) or OWN

    @property
    def views(self) -> int:
        """Number of the pictures that may be views."""
        return len(self.layout.pictures(self._tree))

    @property
    def _tree(self) -> Folder:
        return Folder.of(file.path for file in self.files)

    def same_upload(self, other: Listing) -> bool:
        """True if all that a reconstruction depends on is the same in both listings."""
        return (self.files, self.manifest, self.others) == (other.files, other.manifest, other.others)


def list_capture(uri: str, root: str = "") -> Listing:
    """List a capture's folder; raises InputError if there is no capture, or if it is not below `root`."""
    location = Location.of(uri)
    found = _without_litter(location.listing())
    if not found and (listing := _part_of(location, root)) is not None:
        return listing
    _refuse_file(location, found)
    folder = Folder.of(found)
    reader = recognised(folder)
    if reader is None and not {TRANSFORMS, MANIFEST, MARKER} & folder.files.keys():
        raise InputError(f"{uri}: {told_of_folder(folder)}")
    several = () if reader is None else reader.parts(folder, _reader_below(location))
    if several:
        named = ", ".join(f"{location.url}/{part}" for part in several[:_NAMED_AT_MOST])
        more = ", ..." if len(several) > _NAMED_AT_MOST else ""
        raise InputError(f"{uri}: holds {len(several)} objects; name one ({named}{more}), or run `dataset` for all")
    return _listing(location, _id_below(root, location), found, folder, reader or OWN)


def list_captures(root: str) -> list[Listing]:
    """List every capture below a folder or prefix, sorted by id: of each object in a scene of several, one."""
    location = Location.of(root)
    found = _without_litter(location.listing())
    folders = sorted(captures_below(Folder.of(found)), key=lambda folder: folder.path)

    def listed(folder: Folder) -> list[Listing]:
        start = f"{folder.path}/" if folder.path else ""
        inner = {path[len(start) :]: found[path] for path in folder.all_files()}
        place = location / folder.path if folder.path else location
        name = folder.path or location.name
        tree = Folder.of(inner)
        reader = recognised(tree) or OWN
        parts = reader.parts(tree, _reader_below(place))
        if not parts:
            return [_listing(place, name, inner, tree, reader)]
        return [_listing(place, f"{name}/{part}", inner, tree, reader, part) for part in parts]

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return [listing for each in pool.map(listed, folders) for listing in each]


def upload_key(listing: Listing, engine: str, parameters: Parameters) -> str:
    """Key of an upload and the parameters that are asked for: it names the work before any file is read.

    A file that the manifest declares counts by its content, any other by its version in the storage.
    """
    declared = _declared(listing.manifest)
    digests = {file.path: file.sha256 for file in declared if file.sha256 is not None}
    files = [[file.path, file.bytes, digests.get(file.path, file.version)] for file in listing.files]
    # the manifest counts as well: after a correction of a wrong manifest, a refused capture is another upload
    return cache_key("upload", PIPELINE_VERSION, [listing.uri, files, declared, engine, parameters])


def _listing(
    location: Location, name: str, found: Found, folder: Folder, reader: LayoutReader, part: str = ""
) -> Listing:
    """folder: the tree of the files found."""
    content = {path: found[path] for path in sorted(set(reader.content(folder)))}
    others = list(reader.others(folder, content.keys()))
    beside = [path for path in (MANIFEST, MARKER) if path in found]
    uploaded_at = max(_written_at(found[path]) for path in (*content, *others, *beside))
    manifest = _text(location / MANIFEST) if MANIFEST in found else None
    links = _links_outside(Path(location.path), content) if location.local else ()
    return Listing(
        uri=f"{location.url}/{part}" if part else location.url,
        id=name,
        files=tuple(
            ListedFile(path=path, bytes=info["size"], version=_version(info))
            for path, info in content.items()
            if path not in links
        ),
        manifest=manifest,
        marker=MARKER in found and _written_at(found[MARKER]) >= uploaded_at,
        others=tuple(sorted(others)),
        links_outside=links,
        uploaded_at=uploaded_at,
        part=part,
    )


def _part_of(location: Location, root: str) -> Listing | None:
    """The listing of an object in a scene, if the location's name is that of an object in the folder above it."""
    above = Location(location.fs, location.path.rpartition("/")[0], location.local)
    if not (above.path and PART.fullmatch(location.name)):
        return None
    found = _without_litter(above.listing())
    folder = Folder.of(found)
    reader = recognised(folder)
    if reader is None or location.name not in reader.parts(folder, _reader_below(above)):
        return None
    return _listing(above, _id_below(root, location), found, folder, reader, location.name)


def _refuse_file(location: Location, found: Found) -> None:
    """Raise InputError for a path that is a file, or nothing at all."""
    if found:
        return
    try:
        kind = location.info().get("type")
    except FileNotFoundError as error:
        raise InputError(f"{location.url}: no capture there: it does not exist") from error
    if kind == "file":
        raise InputError(f"{location.url}: {told_of_file(location.name)}")


def _reader_below(location: Location) -> Reader:
    return lambda path: (location / path).read()


def _without_litter(found: Found) -> dict[str, dict[str, Any]]:
    return {path: info for path, info in found.items() if not is_litter(path)}


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
