"""Origins of the weights' bytes: the network, or a mirror at any fsspec URL.

Called by the download (tasks/weights/local.py) and by pinning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Protocol

import httpx

from tasks.errors import (
    Capture2MeshError,
    InputError,
    StorageError,
    StorageUnavailable,
    WeightsCorrupt,
    WeightsMissing,
    storage_errors,
)
from tasks.settings import settings
from tasks.store.location import MEBIBYTE, Location
from tasks.weights.pins import Source, WeightFile

MIRROR_CHUNK = 8 * MEBIBYTE
CONNECT_SECONDS, READ_SECONDS = 10, 60
FRUITLESS_TRIES = 4
PAUSE_SECONDS = 0.25
_TRUE = ("1", "ON", "YES", "TRUE")


class Origin(Protocol):
    """Gives the bytes of weights files."""

    def chunks(self, source: Source, file: WeightFile, start: int) -> Iterator[bytes]:
        """Give a file's bytes from the offset `start` on; raises StorageUnavailable if the connection breaks."""
        ...


class Network:
    """The Hugging Face hub, or the one at `HF_ENDPOINT`, and plain URLs."""

    def __init__(self) -> None:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
            raise WeightsMissing(
                "weights: HF_HUB_OFFLINE is set, so nothing is downloaded; run `capture2mesh weights fetch` with the"
                " network on, or set CAPTURE2MESH_WEIGHTS_MIRROR"
            )
        self._client = httpx.Client(follow_redirects=True, timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS))

    def chunks(self, source: Source, file: WeightFile, start: int) -> Iterator[bytes]:
        url, headers = self._request(source, file)
        if start:
            headers["Range"] = f"bytes={start}-"
        # the requested address, not the one that the hub redirects to: that one is signed
        where = f"{source.repository}/{file.path} ({url})"
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return
                _check(where, response.status_code)
                skip = start if response.status_code != httpx.codes.PARTIAL_CONTENT else 0
                for chunk in response.iter_bytes():
                    if chunk[skip:]:
                        yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
        except httpx.HTTPError as error:
            raise StorageUnavailable(
                f"{where}: {type(error).__name__}; check the network and run again: what has arrived is kept"
            ) from error

    def _request(self, source: Source, file: WeightFile) -> tuple[str, dict[str, str]]:
        plain = {"Accept-Encoding": "identity"}
        if source.url is not None:
            return source.url.format(revision=source.revision, path=file.path), plain
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(source.repository, file.path, revision=source.revision, endpoint=hub_endpoint())
        return url, plain | ({"Authorization": f"Bearer {token}"} if (token := hub_token()) else {})


class Mirror:
    """A copy of the weights at `repository/revision/file` below an fsspec URL."""

    def __init__(self, url: str) -> None:
        self._root = Location.of(url)

    def chunks(self, source: Source, file: WeightFile, start: int) -> Iterator[bytes]:
        location = self._root / source.path_in_mirror(file.path)
        size = location.size()
        if size is None:
            raise InputError(f"{location.url}: the mirror does not have it; copy it there from {source.repository}")
        if size != file.bytes:
            raise WeightsCorrupt(f"{location.url}: {size} bytes, {file.bytes} are pinned; copy it there again")
        while start < size:
            with storage_errors(location.url):
                chunk = location.fs.cat_file(location.path, start=start, end=min(start + MIRROR_CHUNK, size))
            if not chunk:
                return
            yield chunk
            start += len(chunk)


def origin() -> Origin:
    """The mirror at `CAPTURE2MESH_WEIGHTS_MIRROR` if that is set, else the network."""
    mirror = settings().weights_mirror
    return Mirror(mirror) if mirror else Network()


def persistent(origin: Origin, source: Source, file: WeightFile, start: int = 0) -> Iterator[bytes]:
    """Give a file's bytes from `start` on, and continue after a broken connection.

    Raises StorageUnavailable after FRUITLESS_TRIES tries in which nothing arrived.
    """
    fruitless = 0
    while True:
        try:
            for chunk in origin.chunks(source, file, start):
                start += len(chunk)
                fruitless = 0
                yield chunk
            return
        except StorageUnavailable:
            fruitless += 1
            if fruitless == FRUITLESS_TRIES:
                raise
            time.sleep(PAUSE_SECONDS * 2**fruitless)


def hub_token() -> str | None:
    """The hub's token in the environment; a token on the disk is not used."""
    return os.environ.get("HF_TOKEN") or None


def hub_endpoint() -> str | None:
    """The hub's URL in the environment; None for the usual one."""
    return os.environ.get("HF_ENDPOINT")


def refusal(where: str, status: int) -> Capture2MeshError:
    """Make the error for an HTTP status: what it means, and what to do."""
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return InputError(
            f"{where}: access refused (HTTP {status}); accept its terms on the hub and set HF_TOKEN to a token that"
            " may read it, and check the repository's name"
        )
    if status == httpx.codes.NOT_FOUND:
        return InputError(f"{where}: not there (HTTP 404); check {settings().weights_list}")
    if status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or httpx.codes.is_server_error(status):
        return StorageUnavailable(f"{where}: HTTP {status}; run again: what has arrived is kept")
    return StorageError(f"{where}: HTTP {status}")


def _check(where: str, status: int) -> None:
    if not httpx.codes.is_success(status):
        raise refusal(where, status)
