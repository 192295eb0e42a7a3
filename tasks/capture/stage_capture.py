"""The stage stage_capture, the first of every flow: reads each file of a capture once and computes its digest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.images import decode_picture
from tasks.capture.layout import digest, pair
from tasks.capture.listing import ListedFile, Listing, list_capture
from tasks.capture.views import View, decoded_views
from tasks.errors import CaptureReplaced, InputError, StorageUnavailable
from tasks.progress import report_progress
from tasks.settings import settings
from tasks.stage import retried, stage
from tasks.store.local_files import write_atomically
from tasks.store.location import FileEntry, Location, read_verified, sha256_of
from tasks.store.results import StoredResult

_PARALLEL_READS = 8


class Capture(StoredResult):
    """A capture by content. Its files stay in their place; `read` gives their bytes, verified."""

    uri: str
    """URL of its folder"""
    id: str
    """Path below the dataset's root, else the folder's name"""
    uploaded_at: datetime
    """Time of the newest file, UTC"""
    files: tuple[FileEntry, ...]
    """Its content: path relative to the capture, bytes, sha256"""
    manifest: str | None
    """Text of its manifest.json"""
    others: tuple[str, ...]
    """Paths of further files in views/ and depth/"""
    links_outside: tuple[str, ...]
    """Paths of links that lead out of the folder"""
    digest: str
    """The capture digest, sha256 in hexadecimal"""

    def read(self, path: str) -> bytes:
        """Bytes of one file; raises InputError or StorageUnavailable if its content has changed."""
        return read_verified(Location.of(self.uri) / path, self.entries[path], settings().scratch)

    @cached_property
    def entries(self) -> dict[str, FileEntry]:
        """The files by path."""
        return {entry.path: entry for entry in self.files}

    @cached_property
    def images(self) -> dict[str, str]:
        """The path of each view's image by the view's name, sorted."""
        return {view.name: view.image for view in pair(self.entries).views}

    @property
    def view_names(self) -> tuple[str, ...]:
        """Names of all views, sorted."""
        return tuple(self.images)

    def views(self, names: Sequence[str] | None = None, placed: Mapping[str, Camera] | None = None) -> Iterator[View]:
        """The decoded views, all or those named, one by one: few are in memory at once.

        placed: the cameras by view name, instead of the capture's own.
        """
        return decoded_views(self.entries, self.read, names, placed)

    def sharpness(self, name: str) -> float:
        """Sharpness of a view's whole image, as `masks.sharpness` measures it."""
        path = self.images[name]
        image = decode_picture(path, self.read(path), settings().max_pixels).rgb
        return masks.sharpness(image, np.ones(image.shape[:2], bool))

    @contextmanager
    def in_scratch(self) -> Iterator[None]:
        """Keep the files that are read of a remote capture in the scratch folder until the block ends."""
        try:
            yield
        finally:
            self.leave_scratch()

    def leave_scratch(self) -> None:
        """Remove the capture's files from the scratch folder."""
        for entry in self.files:
            (settings().scratch / entry.sha256).unlink(missing_ok=True)


@stage(key=lambda listing: listing, version="1", **retried(3, StorageUnavailable))
def stage_capture(folder: Path, listing: Listing) -> Capture:
    """Read a capture once: the digest of every file. Remote files are kept in the scratch folder.

    Raises CaptureReplaced if its files are no longer those of the listing.
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
