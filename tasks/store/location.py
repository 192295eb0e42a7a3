"""Locations: folders and buckets behind one interface, by fsspec; and the files that manifests list.

Used by everything that reads or writes captures, the store, the output or the weights. Faults of the storage are raised
as errors of this project.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import InputError, StorageError, StorageUnavailable, storage_errors
from tasks.store.local_files import write_atomically

MEBIBYTE = 2**20

# s3fs: its listing cache hides new uploads of others, and with its default block size a file of 1 GiB needs 1 GiB of
# memory. Endpoint, region and keys come from the standard AWS_* environment variables.
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "default_block_size": 8 * MEBIBYTE,
    "max_concurrency": 4,
    "config_kwargs": {
        "retries": {"max_attempts": 10, "mode": "standard"},
        "connect_timeout": 5,
        "read_timeout": 60,
        "max_pool_connections": 32,
    },
}
_UPLOAD_CHUNK = 16 * MEBIBYTE
# S3's answers to a conditional write that came too late
_LOST_WRITE = ("PreconditionFailed", "ConditionalRequestConflict")

M = TypeVar("M", bound=BaseModel)


class FileEntry(BaseModel):
    """One file of a manifest."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Relative to the manifest's folder, with `/` between its parts."""
    bytes: int = Field(ge=0)
    """Size of the content."""
    sha256: str
    """Digest of the content, 64 hex digits."""


class Manifest(BaseModel):
    """A list of files; every manifest of the project has this shape."""

    schema_: Literal[1] = Field(1, alias="schema")
    """Version of the shape."""
    files: tuple[FileEntry, ...]
    """The files below the manifest's folder, without the manifest."""


def sha256_of(data: bytes) -> str:
    """Digest of the data, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def entries_of(folder: Path) -> tuple[FileEntry, ...]:
    """Entries of all files below a local folder, sorted by path."""
    return tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )


def file_sha256(path: Path) -> str:
    """Digest of a local file's content, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Location:
    """A file or folder on any fsspec file system."""

    fs: fsspec.AbstractFileSystem
    """The file system that it is on."""
    path: str
    """Path on the file system, without protocol; absolute if it is local."""
    local: bool
    """True for a path of this machine."""

    @staticmethod
    def of(url: str | Path) -> Location:
        """Give the location of a local path or of an fsspec URL; raises InputError for an unknown protocol."""
        text = str(url)
        options = S3_OPTIONS if text.startswith(("s3://", "s3a://")) else {}
        try:
            fs, path = fsspec.core.url_to_fs(text, **options)
        except (ValueError, ImportError) as error:
            raise InputError(f"{text}: {error}; use a folder or a URL such as s3://bucket/prefix") from error
        local = "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)
        return Location(fs, os.path.abspath(path) if local else path.rstrip("/"), local)

    @property
    def url(self) -> str:
        """The local path, or the URL with its protocol."""
        return self.path if self.local else self.fs.unstrip_protocol(self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path}/{name}", self.local)

    def read(self) -> bytes:
        """Read the whole file; raises FileNotFoundError if there is none."""
        with storage_errors(self.url):
            data: bytes = self.fs.cat_file(self.path)
            return data

    def read_or_none(self) -> bytes | None:
        """Read the whole file; None if there is none."""
        try:
            return self.read()
        except FileNotFoundError:
            return None

    def info(self) -> dict[str, Any]:
        """Read fsspec's metadata of the file: `size`, on S3 also `ETag` and `LastModified`."""
        with storage_errors(self.url):
            info: dict[str, Any] = self.fs.info(self.path)
            return info

    def size(self) -> int | None:
        """Size of the file in bytes; None if there is none."""
        try:
            return int(self.info()["size"])
        except FileNotFoundError:
            return None

    def etag(self) -> str | None:
        """S3's version of the object, for `write_if`; None if there is none."""
        try:
            return str(self.info()["ETag"])
        except FileNotFoundError:
            return None

    def listing(self) -> dict[str, dict[str, Any]]:
        """Metadata of the files below, by relative path; empty if there are none."""
        with storage_errors(self.url):
            try:
                found = self.fs.find(self.path, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(self.path) + 1 :]: info for path, info in sorted(found.items()) if path != self.path}

    def now(self) -> datetime:
        """The time by the storage's own clock, which also sets the times of its files."""
        if not self._s3:
            return datetime.now(UTC)
        bucket, _, prefix = self.path.partition("/")
        with storage_errors(self.url):
            answer = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])

    def open_uploads(self) -> list[str]:
        """URLs of the objects below whose multipart upload has begun but not ended."""
        if not self._s3:
            return []
        bucket, _, prefix = self.path.partition("/")
        found: list[str] = []
        page: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        with storage_errors(self.url):
            while True:
                answer = self.fs.call_s3("list_multipart_uploads", **page)
                found += [self.fs.unstrip_protocol(f"{bucket}/{each['Key']}") for each in answer.get("Uploads", ())]
                if not answer.get("IsTruncated"):
                    return found
                page |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    @property
    def _s3(self) -> bool:
        return hasattr(self.fs, "call_s3")

    def write(self, data: bytes) -> None:
        """Write one file or object, whole or not at all."""
        with storage_errors(self.url):
            if self.local:
                write_atomically(Path(self.path), data)
            else:
                self.fs.pipe_file(self.path, data)

    def write_if(self, etag: str | None, data: bytes) -> bool:
        """Write an object of S3 if it is still the version `etag`, or, for None, if there is none yet.

        Gives True if it is written, False if another write or a removal came first.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        try:
            with storage_errors(self.url):
                self.fs.pipe_file(self.path, data, **condition)
        except FileNotFoundError:
            if etag is None:
                raise
            return False
        except (StorageError, FileExistsError) as error:
            if not _precondition_failed(error):
                raise
            return False
        return True

    def upload(self, source: Path) -> None:
        """Write the content of a local file, in parts if it is large."""
        with storage_errors(self.url):
            self.fs.put_file(str(source), self.path, chunksize=_UPLOAD_CHUNK)

    def delete(self) -> None:
        """Remove a file; does nothing if there is none."""
        with storage_errors(self.url), suppress(FileNotFoundError):
            self.fs.rm_file(self.path)


def parsed_or_none(kind: type[M], data: bytes | None) -> M | None:
    """Parse the content of a JSON file; None if there is no content, or it does not fit the model."""
    try:
        return kind.model_validate_json(data or b"")
    except ValidationError:
        return None


def _precondition_failed(error: BaseException | None) -> bool:
    """True if a conditional write lost: s3fs raises OSError(22) or FileExistsError with S3's answer as the cause."""
    while error is not None:
        code = getattr(error, "response", {}).get("Error", {}).get("Code")
        if isinstance(error, FileExistsError) or code in _LOST_WRITE:
            return True
        error = error.__cause__
    return False


def read_verified(location: Location, entry: FileEntry, scratch: Path | None = None) -> bytes:
    """Read a file and check it against the digest of its entry; remote files are kept in `scratch`.

    If the content differs, raises StorageUnavailable for a remote file (an interrupted transfer) and InputError for a
    local one (it was edited).
    """
    fault = InputError if location.local else StorageUnavailable
    kept = scratch / entry.sha256 if scratch is not None and not location.local else None
    if kept is not None and kept.is_file() and sha256_of(data := kept.read_bytes()) == entry.sha256:
        return data
    try:
        data = location.read()
    except FileNotFoundError as error:
        raise fault(f"{location.url}: the file went away during the run; put it back and run again") from error
    if sha256_of(data) != entry.sha256:
        raise fault(f"{location.url}: the file changed during the run; run again")
    if kept is not None:
        write_atomically(kept, data)
    return data
