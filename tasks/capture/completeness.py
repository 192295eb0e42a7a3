"""Whether a capture has been uploaded completely: by its manifest, else its marker, else because it has gone quiet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from tasks.capture.layout import MANIFEST, MARKER, belongs, declared_files, pair
from tasks.capture.listing import Listing
from tasks.store.location import Location

_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class StorageState:
    """What a storage says of itself: the time, and the URLs of objects whose multipart upload has not ended.

    Asked for before captures are listed: an upload that ends in between is then still seen as open.
    """

    now: datetime
    open_uploads: frozenset[str] = frozenset()

    @staticmethod
    def of(location: Location) -> StorageState:
        """The state of the storage below a folder or prefix."""
        return StorageState(now=location.now(), open_uploads=frozenset(location.open_uploads()))


def awaited(listing: Listing, state: StorageState, quiet_seconds: float, min_views: int) -> str | None:
    """What is still to come before the capture can be worked on; None: it is complete."""
    if listing.manifest is not None:
        return _awaited_by_manifest(listing, listing.manifest)
    if listing.marker:
        return None
    views = len(pair(file.path for file in listing.files).views)
    if views < min_views:
        return f"views: {views} of at least {min_views} (or {MANIFEST}, or {MARKER})"
    below = f"{listing.uri}/"
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
    # a listing holds the capture's content only; what else a manifest names is not waited for
    wanted = [file for file in declared if belongs(file.path)]
    missing = [file.path for file in wanted if file.path not in sizes or file.bytes not in (None, sizes[file.path])]
    return f"what {MANIFEST} lists: {_named(missing)}" if missing else None


def _named(paths: Collection[str]) -> str:
    (*shown,) = list(paths)[:_NAMED_AT_MOST]
    more = len(paths) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
