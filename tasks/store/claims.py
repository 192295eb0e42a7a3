"""Claims on uploads, and their failures: what many runs on many machines have to agree on.

They lie in the store at `<store>/_ledger/claims|failures/<key>`. The key is made of the output and the upload key, so a
new upload, or other parameters, start without failures. Called by the flows, the receivers of uploads and the planning
of datasets.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.errors import (
    Capture2MeshError,
    CaptureRefused,
    CaptureReplaced,
    ExportFailed,
    InferenceFailed,
    InferenceInterrupted,
    MeshRejected,
    PublishedAsset,
    StorageError,
    storage_errors,
)
from tasks.settings import settings
from tasks.store.local_files import locked
from tasks.store.location import Location, parsed_or_none, sha256_of
from tasks.store.results import store

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
RETRY_BASE, RETRY_LIMIT = timedelta(minutes=1), timedelta(hours=1)

log = logging.getLogger(__name__)


class Failure(BaseModel):
    """The failures of one upload."""

    model_config = ConfigDict(frozen=True)

    capture: str
    """URI of the capture."""
    upload_key: str
    """Key of the upload, with engine and parameters."""
    attempts: int
    """Number of all failed attempts."""
    strikes: int
    """Number of attempts that failed by the capture's own fault."""
    final: bool
    """True if it is not tried again until its content changes or a person asks for it."""
    kind: Literal["refused", "failed"]
    """`refused`: the capture does not have what the engine needs."""
    reason: str
    """Message of the last error."""
    folder: str
    """Folder of the rejected mesh below the output; empty if none is published."""
    at: datetime
    """Time of the last failure, UTC."""

    @property
    def retry_at(self) -> datetime:
        """Time of the next try: the wait doubles from RETRY_BASE to RETRY_LIMIT, as a faulty machine needs time."""
        return self.at + min(RETRY_BASE * 2 ** min(self.attempts - 1, 10), RETRY_LIMIT)


def failure_of(output: str, upload_key: str) -> Failure | None:
    """Read the failures of an upload; None if it has none, or they are forgotten."""
    return parsed_or_none(Failure, _failure(output, upload_key).read_or_none())


def record_failure(output: str, upload_key: str, capture: str, error: BaseException) -> Failure:
    """Record one more failure and give all that is known.

    A refused capture is final at once, others are after `settings().attempts` strikes. Faults of the machine, the
    weights or the storage are not the capture's fault and never final.
    """
    before = failure_of(output, upload_key)
    refused = isinstance(error, (CaptureRefused, MeshRejected))
    own = refused or not _of_the_machine(error)
    strikes = (before.strikes if before else 0) + own
    failure = Failure(
        capture=capture,
        upload_key=upload_key,
        attempts=(before.attempts if before else 0) + 1,
        strikes=strikes,
        final=refused or strikes >= settings().attempts,
        kind="refused" if isinstance(error, CaptureRefused) else "failed",
        reason=str(error) or type(error).__name__,
        folder=_folder(error.published, output) if isinstance(error, MeshRejected) else "",
        at=datetime.now(UTC),
    )
    _failure(output, upload_key).write(failure.model_dump_json(indent=1).encode())
    return failure


def forget_failure(output: str, upload_key: str) -> None:
    """Remove the record: the upload works now, or a person asks for another try."""
    _failure(output, upload_key).delete()


@contextmanager
def failures_recorded(output: str, upload_key: str, capture: str) -> Iterator[None]:
    """Record what the block raises as a failure of the upload; if it raises nothing, forget earlier failures."""
    try:
        yield
    except CaptureReplaced:  # this upload is gone
        raise
    except Exception as error:
        record_failure(output, upload_key, capture, error)
        raise
    if failure_of(output, upload_key) is not None:
        forget_failure(output, upload_key)


class Claims:
    """The claims of this process. On object storage a claim is a lease that a thread renews while the process lives."""

    def __init__(self) -> None:
        self._leases: set[_Lease] = set()
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._renewing.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @contextmanager
    def claimed(self, output: str, upload_key: str) -> Iterator[bool]:
        """Claim an upload for the block; gives False if another living process, or another thread, has claimed it."""
        location = _ledger("claims", output, upload_key)
        with _lock(location) if location.local else self._lease(location) as mine:
            yield mine

    @contextmanager
    def _lease(self, location: Location) -> Iterator[bool]:
        lease = _Lease(location)
        if not lease.taken():
            yield False
            return
        self._leases.add(lease)
        try:
            yield True
        finally:
            self._leases.discard(lease)
            lease.end()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            for lease in tuple(self._leases):
                try:
                    lease.renew()
                except StorageError as error:
                    log.warning("claim %s could not be renewed: %s", lease.location.url, error)


class _Lease:
    """An object that its holder writes again and again; it ends LEASE_SECONDS after the last write, by S3's clock."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self._holder, self._count = uuid.uuid4().hex, 0
        self._etag: str | None = None
        self._lock = threading.Lock()

    def taken(self) -> bool:
        """Take it if nobody holds it, or if its holder is dead; gives True if it is taken."""
        if self._written(None):
            return True
        try:
            held = self.location.info()
        except FileNotFoundError:
            return self._written(None)
        age = self.location.now() - held["LastModified"]
        return age.total_seconds() > LEASE_SECONDS and self._written(held["ETag"])

    def renew(self) -> None:
        """Write it again; logs an error if another process has taken it over."""
        with self._lock:
            if self._etag and not self._written(self._etag):
                self._etag = None
                log.error("claim %s was taken over: this process was thought dead", self.location.url)

    def end(self) -> None:
        """Remove it, unless another process has taken it over."""
        with self._lock:
            if self._etag and self._written(self._etag):  # still ours
                self.location.delete()
            self._etag = None

    def _written(self, etag: str | None) -> bool:
        # other content each time: a take-over that read the etag before this write then fails
        self._count += 1
        if not self.location.write_if(etag, f"{self._holder} {self._count}".encode()):
            return False
        self._etag = self.location.etag()
        return True


@contextmanager
def _lock(location: Location) -> Iterator[bool]:
    """A claim in a local store: a lock on a file, which is removed at the end of the work."""
    path = Path(location.path)
    with storage_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, create=True, wait=False) as mine:
        try:
            yield mine
        finally:
            if mine:
                path.unlink(missing_ok=True)


def _of_the_machine(error: BaseException) -> bool:
    """True if the fault is not the capture's, so that a sound machine can do it; unknown errors are the capture's."""
    own = (InferenceFailed, InferenceInterrupted, ExportFailed)
    return isinstance(error, Capture2MeshError) and not isinstance(error, own)


def _folder(published: PublishedAsset, output: str) -> str:
    return published.url.removeprefix(f"{Location.of(output).url}/")


def _failure(output: str, upload_key: str) -> Location:
    return _ledger("failures", output, upload_key)


def _ledger(kind: str, output: str, upload_key: str) -> Location:
    key = sha256_of(f"{Location.of(output).url}\n{upload_key}".encode())
    return store().root / "_ledger" / kind / f"{key}.json"
