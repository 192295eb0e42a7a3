"""stage_capture and validate_capture: what was uploaded, by content, and whether it can be reconstructed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.capture.checks import RULES_VERSION, CaptureReport, Needs, examine
from tasks.capture.layout import DEPTH, MANIFEST, VIEWS, belongs, declared_digests, digest, pair
from tasks.capture.sheet import CONTACT_SHEET, contact_sheet
from tasks.capture.views import View, load_views
from tasks.errors import InputError, Problem, StorageUnavailable
from tasks.settings import PIPELINE_VERSION, Parameters, settings
from tasks.stage import report_progress, retried, stage
from tasks.storage import FileEntry, Location, read_verified, sha256_of, write_atomically
from tasks.store import StoredResult, cache_key

_PARALLEL_READS = 8


class ListedFile(BaseModel):
    """A file as the storage lists it: `version` changes whenever it is written (ETag, or mtime and ctime)."""

    model_config = ConfigDict(frozen=True)

    path: str
    bytes: int
    version: str


class Listing(BaseModel):
    """What lies in a capture's folder, before anything but its manifest is read."""

    model_config = ConfigDict(frozen=True)

    uri: str
    files: tuple[ListedFile, ...]
    manifest: str | None
    others: tuple[str, ...]
    links_outside: tuple[str, ...]
    uploaded_at: datetime


class Capture(StoredResult):
    """A capture by content. Its files stay where they are; `read` gives their bytes, verified."""

    uri: str
    id: str
    uploaded_at: datetime
    files: tuple[FileEntry, ...]
    manifest: str | None
    others: tuple[str, ...]
    links_outside: tuple[str, ...]
    digest: str

    def read(self, path: str) -> bytes:
        """One file of the capture; raises InputError or StorageUnavailable where its content has changed."""
        entry = next(entry for entry in self.files if entry.path == path)
        return read_verified(Location.of(self.uri) / path, entry, settings().scratch)

    @property
    def view_names(self) -> tuple[str, ...]:
        return tuple(view.name for view in pair(entry.path for entry in self.files).views)

    def views(self, names: Sequence[str] | None = None) -> list[View]:
        """The decoded views, all or those named."""
        return load_views([entry.path for entry in self.files], self.read, names)

    @contextmanager
    def in_scratch(self) -> Iterator[None]:
        """Within the block, what was read of a remote capture is kept in the scratch folder; then it is removed."""
        try:
            yield
        finally:
            for entry in self.files:
                (settings().scratch / entry.sha256).unlink(missing_ok=True)


def list_capture(uri: str) -> Listing:
    """List a capture's folder; raises InputError where nothing is."""
    location = Location.of(uri)
    found = {path: info for path, info in location.listing().items() if not _is_litter(path)}
    if not found:
        raise InputError(f"{uri}: no capture there; it is a folder with views/, depth/ and transforms.json")
    manifest = (location / MANIFEST).read().decode(errors="replace") if MANIFEST in found else None
    content = {path: info for path, info in found.items() if belongs(path)}
    links = tuple(path for path in content if location.local and _links_outside(Path(location.path), path))
    return Listing(
        uri=location.url,
        files=tuple(
            ListedFile(path=path, bytes=info["size"], version=_version(info))
            for path, info in content.items()
            if path not in links
        ),
        manifest=manifest,
        others=tuple(path for path in found if path.startswith((f"{VIEWS}/", f"{DEPTH}/")) and path not in content),
        links_outside=links,
        uploaded_at=max(map(_written_at, found.values())),
    )


def upload_key(listing: Listing, engine: str, parameters: Parameters) -> str:
    """What was uploaded and what is asked for: names the work before anything is read.

    A file that the manifest declares counts by its content, any other by its version in the storage.
    """
    declared = declared_digests(listing.manifest) if listing.manifest is not None else {}
    files = [[file.path, file.bytes, declared.get(file.path, file.version)] for file in listing.files]
    return cache_key("upload", PIPELINE_VERSION, [listing.uri, files, engine, parameters])


@stage(key=lambda listing: listing, version="1", **retried(3, StorageUnavailable))
def stage_capture(folder: Path, listing: Listing) -> Capture:
    """Read a capture once: the digest of every file. Remote files are kept in the scratch folder."""
    location = Location.of(listing.uri)

    def entry(file: ListedFile) -> FileEntry:
        data = (location / file.path).read()
        found = FileEntry(path=file.path, bytes=len(data), sha256=sha256_of(data))
        if not location.local:
            write_atomically(settings().scratch / found.sha256, data)
        return found

    entries = []
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        for read in pool.map(entry, listing.files):
            entries.append(read)
            report_progress("stage_capture", len(entries) / len(listing.files))
    return Capture(
        uri=listing.uri,
        id=location.name,
        uploaded_at=listing.uploaded_at,
        files=tuple(entries),
        manifest=listing.manifest,
        others=listing.others,
        links_outside=listing.links_outside,
        digest=digest(entries),
    )


def _validation_key(capture: Capture, needs: Needs) -> Any:
    return [capture.digest, capture.manifest, capture.others, capture.links_outside, needs]


@stage(key=_validation_key, version=RULES_VERSION)
def validate_capture(folder: Path, capture: Capture, needs: Needs) -> CaptureReport:
    """Refuse a capture that lacks what the engine needs, with every problem; picture the views of a good one."""
    links = [
        Problem(where=path, what="is a link that leaves the capture folder", todo="put the file itself there")
        for path in capture.links_outside
    ]
    report = examine(capture.uri, capture.files, capture.read, needs, capture.manifest, capture.others, links)
    (folder / CONTACT_SHEET).write_bytes(contact_sheet(capture.views()))
    return report


def _is_litter(path: str) -> bool:
    """What operating systems leave in folders."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _links_outside(root: Path, path: str) -> bool:
    return not (root / path).resolve().is_relative_to(root.resolve())


def _version(info: dict[str, Any]) -> str:
    if "ETag" in info:
        return str(info["ETag"]).strip('"')
    return f"{info.get('mtime')}-{info.get('created')}"


def _written_at(info: dict[str, Any]) -> datetime:
    written = info.get("LastModified", info.get("mtime", 0.0))
    if isinstance(written, datetime):
        return written.astimezone(UTC)
    return datetime.fromtimestamp(float(written), UTC)
