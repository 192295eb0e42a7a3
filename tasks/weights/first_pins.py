"""The first pins of a list of weights: revisions, sizes and digests as the hub publishes them now. Nothing is guessed.

Called by the download (local.py) if no lock file says what the content is.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import httpx

from tasks.errors import InputError, StorageUnavailable
from tasks.settings import settings
from tasks.weights.origins import Network, hub_endpoint, hub_token, persistent, refusal
from tasks.weights.pins import Bundle, Source, WeightFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# the HTTP libraries of the versions of huggingface_hub
_TRANSPORTS = ("requests", "httpx", "httpx2")


def published_pins(bundle: Bundle) -> Bundle:
    """Pin what the hub has metadata of, at the declared revision or at the newest one.

    Other places have no metadata: their files are pinned by the content that arrives.
    """
    if mirror := settings().weights_mirror:
        raise InputError(
            f"{mirror}: a mirror does not say which content is right; copy the file weights.lock.json of a machine that"
            f" has fetched from the hub to {settings().weights_lock}"
        )
    network = Network()
    return Bundle(
        sources=tuple(
            _from_hub(network, source) if source.on_hub and not source.pinned else source for source in bundle.sources
        )
    )


def _from_hub(network: Network, source: Source) -> Source:
    info = _model_info(source.repository, source.revision)
    published = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    try:
        source.refuse_pickles(list(published))
    except ValueError as error:
        raise InputError(str(error)) from error
    lacking = [path for path in source.paths if path not in published]
    if lacking:
        raise InputError(
            f"{source.repository} at {info.sha}: has no {', '.join(lacking)}; correct {settings().weights_list}."
            f" It has: {', '.join(sorted(published))}"
        )
    at = source.model_copy(update={"revision": info.sha})
    return at.model_copy(update={"files": tuple(_file(network, at, published[path]) for path in source.paths)})


def _file(network: Network, source: Source, published: RepoSibling) -> WeightFile:
    """Pin a file; small files have no sha256 in the metadata, so they are downloaded and compared with git's sha1."""
    if published.lfs is not None:
        return WeightFile(path=published.rfilename, bytes=published.lfs["size"], sha256=published.lfs["sha256"])
    data = b"".join(persistent(network, source, WeightFile(path=published.rfilename)))
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if blob != published.blob_id:
        raise StorageUnavailable(
            f"{source.repository}/{published.rfilename}: what is served is not what the hub lists; run again"
        )
    return WeightFile(path=published.rfilename, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


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
