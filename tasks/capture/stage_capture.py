"""The stage stage_capture: the files of a capture, each read once and known by its digest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tasks.capture.layout import digest, pair
from tasks.capture.listing import ListedFile, Listing, list_capture
from tasks.capture.views import View, load_views
from tasks.errors import CaptureReplaced, InputError, StorageUnavailable
from tasks.progress import report_progress
from tasks.settings import settings
from tasks.stage import retried, stage
from tasks.store.local_files import write_atomically
from tasks.store.location import FileEntry, Location, read_verified, sha256_of
from tasks.store.results import StoredResult

_PARALLEL_READS = 8


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
            self.leave_scratch()

    def leave_scratch(self) -> None:
        """Remove what was kept there."""
        for entry in self.files:
            (settings().scratch / entry.sha256).unlink(missing_ok=True)


@stage(key=lambda listing: listing, version="1", **retried(3, StorageUnavailable))
def stage_capture(folder: Path, listing: Listing) -> Capture:
    """Read a capture once: the digest of every file. Remote files are kept in the scratch folder.

    Raises CaptureReplaced where it is not what was listed any more.
    """
    location = Location.of(listing.uri)

    def entry(file: ListedFile) -> FileEntry:
        try:
            data = (location / file.path).read()
        except FileNotFoundError as error:
            fault = InputError if location.local else StorageUnavailable
            gone = f"{listing.uri}/{file.path}: the file went away during the run; put it back and run again"
            raise fault(gone) from error
        found = FileEntry(path=file.path, bytes=len(data), sha256=sha256_of(data))
        if not location.local:
            write_atomically(settings().scratch / found.sha256, data)
        return found

    entries = []
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        for read in pool.map(entry, listing.files):
            entries.append(read)
            report_progress("stage_capture", len(entries) / len(listing.files))
    if not listing.same_upload(list_capture(listing.uri)):
        raise CaptureReplaced(f"{listing.uri}: was uploaded anew while it was read; run again when that has ended")
    return Capture(
        uri=listing.uri,
        id=listing.id,
        uploaded_at=listing.uploaded_at,
        files=tuple(entries),
        manifest=listing.manifest,
        others=listing.others,
        links_outside=listing.links_outside,
        digest=digest(entries),
    )
