"""Completeness of uploads: by the manifest, else by the marker, else because nothing has changed for some time.

The flows that look for new captures call `awaited`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from tasks.capture.layout import MANIFEST, MARKER, declared_files
from tasks.capture.layouts import content_of
from tasks.capture.listing import Listing
from tasks.store.location import Location

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class StorageState:
    """The state of a storage, to be asked for before captures are listed: what ends in between still counts as open."""

    now: datetime
    """Time by the storage's clock"""
    open_uploads: frozenset[str] = frozenset()
    """URLs of objects whose multipart upload has not ended"""

    @staticmethod
    def of(location: Location) -> StorageState:
        """The state of the storage below a folder or prefix."""
        return StorageState(now=location.now(), open_uploads=frozenset(location.open_uploads()))


def awaited(listing: Listing, state: StorageState, quiet_seconds: float, min_views: int) -> str | None:
    """The part of a capture that is still to come, in words; None if the capture is complete.

    quiet_seconds: without manifest and marker, it is complete after so many seconds without a change.
    """
    if listing.manifest is not None:
        return _awaited_by_manifest(listing, listing.manifest)
    if listing.marker:
        return None
    if listing.views < min_views:
        return f"views: {listing.views} of at least {min_views} (or {MANIFEST}, or {MARKER})"
    below = f"{listing.folder}/"
    if unfinished := [url.removeprefix(below) for url in sorted(state.open_uploads) if url.startswith(below)]:
        return f"the end of the upload of {_named(unfinished)}"
    quiet_at = listing.uploaded_at + timedelta(seconds=quiet_seconds)
    if state.now < quiet_at:
        return f"{MANIFEST}, {MARKER}, or no change until {quiet_at:%Y-%m-%d %H:%M:%S} UTC"
    return None


def _awaited_by_manifest(listing: Listing, manifest: str) -> str | None:
    try:
        declared = declared_files(manifest)
    except ValidationError as error:
        return f"a {MANIFEST} that can be read ({error.errors(include_url=False)[0]['msg']})"
    sizes = {file.path: file.bytes for file in listing.files}
    # a listing holds the capture's content only; other files of a manifest are not waited for
    content = content_of({*sizes, *(file.path for file in declared)})
    wanted = [file for file in declared if file.path in content]
    missing = [file.path for file in wanted if file.path not in sizes or file.bytes not in (None, sizes[file.path])]
    return f"what {MANIFEST} lists: {_named(missing)}" if missing else None


def _named(paths: Collection[str]) -> str:
    (*shown,) = list(paths)[:_NAMED_AT_MOST]
    more = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
