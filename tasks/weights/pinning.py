"""Pin the declared list: record revisions, sizes and digests as they are published now. Nothing is guessed.

Called by `weights pin` of the command line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from tasks.errors import InputError, StorageUnavailable
from tasks.store.local_files import write_atomically
from tasks.weights.origins import Network, hub_endpoint, hub_token, persistent, refusal
from tasks.weights.pins import Bundle, Source, WeightFile, declared

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# the HTTP libraries of the versions of huggingface_hub
_TRANSPORTS = ("requests", "httpx", "httpx2")


def pin(path: Path, update: bool = False, told: Callable[[str], None] = lambda line: None) -> Bundle:
    """Write the pins that are missing into the list at `path`; `told` gets a line for each step.

    update: also pin everything on the hub again, at its newest revision.
    """
    network = Network()
    sources = []
    for source in declared(path).sources:
        if source.pinned and not (update and source.on_hub):
            sources.append(source)
            continue
        told(f"{source.repository} ...")
        sources.append(_from_hub(network, source, update) if source.on_hub else _from_url(network, source))
        told(f"{source.repository} at {sources[-1].revision or 'its URL'}: {len(source.files)} file(s) pinned")
    pinned = Bundle(sources=tuple(sources))
    write_atomically(path, pinned.model_dump_json(indent=2, exclude_unset=True).encode() + b"\n")
    return pinned


def _from_hub(network: Network, source: Source, update: bool) -> Source:
    """Pin by the hub's metadata; small files have no sha256 there, so they are downloaded."""
    info = _model_info(source.repository, None if update else source.revision)
    published = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    try:
        source.refuse_pickles(list(published))
    except ValueError as error:
        raise InputError(str(error)) from error
    lacking = [file.path for file in source.files if file.path not in published]
    if lacking:
        raise InputError(
            f"{source.repository} at {info.sha}: has no {', '.join(lacking)}; correct the list. It has:"
            f" {', '.join(sorted(published))}"
        )
    at = source.model_copy(update={"revision": info.sha})
    return at.model_copy(update={"files": tuple(_file(network, at, published[file.path]) for file in source.files)})


def _file(network: Network, source: Source, published: RepoSibling) -> WeightFile:
    if published.lfs is not None:
        return WeightFile(path=published.rfilename, bytes=published.lfs["size"], sha256=published.lfs["sha256"])
    data = b"".join(persistent(network, source, WeightFile(path=published.rfilename)))
    # git names a small file by this sha1; it shows whether the file arrived whole
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if blob != published.blob_id:
        raise StorageUnavailable(f"{source.repository}/{published.rfilename}: it did not arrive whole; run again")
    return WeightFile(path=published.rfilename, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _from_url(network: Network, source: Source) -> Source:
    """Pin by the served content: plain URLs have no metadata."""
    if source.has_revisions and source.revision is None:
        raise InputError(f"{source.repository}: write the commit that you want as its `revision` into the list")
    files = []
    for file in source.files:
        digest, size = hashlib.sha256(), 0
        for chunk in persistent(network, source, file):
            digest.update(chunk)
            size += len(chunk)
        files.append(WeightFile(path=file.path, bytes=size, sha256=digest.hexdigest()))
    return source.model_copy(update={"files": tuple(files)})


def _model_info(repository: str, revision: str | None) -> ModelInfo:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=hub_endpoint(), token=hub_token() or False, library_name="capture2mesh")
    where = f"{repository} at {revision or 'its newest revision'}"
    try:
        return api.model_info(repository, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else httpx.codes.BAD_GATEWAY
        raise refusal(where, status) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _TRANSPORTS:
            raise
        raise StorageUnavailable(f"{where}: {type(error).__name__}; check the network and HF_ENDPOINT") from error
