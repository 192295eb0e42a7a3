"""The bundle of weights: the files that the TRELLIS engine loads, by revision and content.

`weights.json` beside this module lists the files. A lock file holds the same list with the revision, size and digest of
every file: pins are never guessed, only recorded from the published files (first_fetch.py). Read by the engines, whose
keys and reports name the bundle, and by the download.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import InputError
from tasks.settings import settings
from tasks.store.location import FileEntry, sha256_of
from tasks.store.results import cache_key

LAYOUT_VERSION = "1"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFE = ".safetensors"
REVISION_FIELD = "{revision}"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# a branch or a tag can move: only a commit is a pin
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightFile(_Declared):
    """A file of a source; without size and digest it is not pinned."""

    path: str
    """Relative to the repository."""
    bytes: int | None = Field(None, ge=0)
    """Size of the content; None if it is not pinned."""
    sha256: Sha256 | None = None
    """Digest of the content, 64 hex digits; None if it is not pinned."""

    @model_validator(mode="after")
    def _is_inside(self) -> WeightFile:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or str(path) != self.path:
            raise ValueError(f"{self.path}: not a plain path inside its repository")
        return self


class Source(_Declared):
    """Files of one revision of a Hugging Face repository or, with `url` and `folder`, of another place."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Name on the hub, or a name of the other place."""
    note: str | None = None
    """Remark for readers of the list."""
    licence: str | None = None
    """Terms of the files, as far as public sources tell them."""
    url: str | None = None
    """Template of the files' URLs, with `{path}` and, if the place has revisions, `{revision}`; None for the hub."""
    folder: str | None = None
    """Folder of the files in the bundle; None for the hub's files, which lie in its cache."""
    revision: Commit | None = None
    """Commit, 40 hex digits; None if it is not pinned, or the place has no revisions."""
    files: tuple[WeightFile, ...] = Field(min_length=1)
    """The files that are loaded, and no others."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Source:
        if (self.url is None) != (self.folder is None):
            raise ValueError(f"{self.repository}: `url` and `folder` belong together")
        self.refuse_pickles(self.paths)
        return self

    @property
    def paths(self) -> list[str]:
        """The files' paths, in the order of the list."""
        return [file.path for file in self.files]

    @property
    def total_bytes(self) -> int:
        """Size of all files that are pinned."""
        return sum(file.bytes or 0 for file in self.files)

    @property
    def on_hub(self) -> bool:
        """True for a Hugging Face repository."""
        return self.url is None

    @property
    def has_revisions(self) -> bool:
        """True if the place keeps several revisions."""
        return self.url is None or REVISION_FIELD in self.url

    @property
    def pinned(self) -> bool:
        """True if the revision and the content of every file are known."""
        known = all(file.sha256 is not None and file.bytes is not None for file in self.files)
        return known and (self.revision is not None or not self.has_revisions)

    @property
    def pin(self) -> str:
        """The commit or, without revisions, a digest of the files' digests."""
        return self.revision or sha256_of(" ".join(file.sha256 or "" for file in self.files).encode())

    def pinned_by(self, lock: Source | None) -> Source:
        """This source with the pins of its twin in a lock; unchanged if it is pinned, or the twin is of other files."""
        if self.pinned or lock is None or not lock.pinned or lock.paths != self.paths:
            return self
        if self.revision not in (None, lock.revision) or self.url != lock.url or not self._content_agrees(lock):
            return self
        return self.model_copy(update={"revision": lock.revision, "files": lock.files})

    def _content_agrees(self, lock: Source) -> bool:
        return all(
            ours.sha256 in (None, theirs.sha256) and ours.bytes in (None, theirs.bytes)
            for ours, theirs in zip(self.files, lock.files, strict=True)
        )

    def refuse_pickles(self, published: Sequence[str]) -> None:
        """Raise ValueError if a pickle, which can run code, is declared although a safe file is published beside it."""
        pickles = [file.path for file in self.files if file.path.endswith(PICKLES)]
        if pickles and any(path.endswith(SAFE) for path in published):
            raise ValueError(f"{self.repository}: {pickles[0]} is a pickle; take the {SAFE} file beside it")

    def path_in_bundle(self, path: str) -> str:
        """The path of a file below the bundle's folder: in a Hugging Face cache, or in `folder`."""
        if self.folder is not None:
            return f"{self.folder}/{path}"
        return f"{self._cache}/snapshots/{self.revision}/{path}"

    def path_in_mirror(self, path: str) -> str:
        """The path of a file in a mirror: `repository/revision/file`, without revisions `repository/file`."""
        return "/".join(filter(None, (self.repository, self.revision, path)))

    @property
    def references(self) -> dict[str, bytes]:
        """Small files of the bundle that name the revision of `main`, for code that asks the cache for no revision."""
        return {f"{self._cache}/refs/main": str(self.revision).encode()} if self.on_hub else {}

    @property
    def _cache(self) -> str:
        return f"hf/hub/models--{self.repository.replace('/', '--')}"


class Bundle(_Declared):
    """All weights that an inference loads."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """The repositories and other places that have them."""

    @property
    def digest(self) -> str:
        """The key of the bundle, 64 hex digits; known without any download."""
        content = [
            [source.repository, source.revision, [[file.path, file.sha256] for file in source.files]]
            for source in self.sources
        ]
        return cache_key("weights", LAYOUT_VERSION, content)

    @property
    def unpinned(self) -> tuple[Source, ...]:
        """The sources that are not pinned."""
        return tuple(source for source in self.sources if not source.pinned)

    def pinned_by(self, lock: Bundle | None) -> Bundle:
        """This list with the pins of a lock, for the sources that the lock has with the same files and revision."""
        pins = {} if lock is None else {source.repository: source for source in lock.sources}
        return Bundle(sources=tuple(source.pinned_by(pins.get(source.repository)) for source in self.sources))

    def entries(self) -> tuple[FileEntry, ...]:
        """List every file of the local folder; raises InputError if something is not pinned."""
        self.refuse_unpinned()
        files = [
            FileEntry(path=source.path_in_bundle(file.path), bytes=file.bytes or 0, sha256=file.sha256 or "")
            for source in self.sources
            for file in source.files
        ]
        references = [
            FileEntry(path=path, bytes=len(data), sha256=sha256_of(data)) for path, data in self.references.items()
        ]
        return tuple(sorted([*files, *references], key=lambda entry: entry.path))

    @property
    def references(self) -> dict[str, bytes]:
        """The small files of all sources, by path."""
        return {path: data for source in self.sources for path, data in source.references.items()}

    def refuse_unpinned(self) -> None:
        """Raise InputError if something is not pinned."""
        if self.unpinned:
            names = "".join(f"\n  - {source.repository}" for source in self.unpinned)
            raise InputError(
                f"weights: neither {settings().weights_lock} nor {local_lock()} says what content these have:{names}\n"
                "run `capture2mesh weights fetch` on a machine that reaches the hub, or copy its lock file here"
            )


class Weights(BaseModel):
    """The weights of an inference, by content; each machine has its own folder for them."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    """Key of the bundle, 64 hex digits."""
    revisions: dict[str, str]
    """Commit, or digest of the files, of each repository."""

    @staticmethod
    def of(bundle: Bundle) -> Weights:
        """The weights of a bundle, which need not be downloaded; raises InputError if something is not pinned."""
        bundle.refuse_unpinned()
        return Weights(bundle=bundle.digest, revisions={source.repository: source.pin for source in bundle.sources})


def declared() -> Bundle:
    """Read the list at CAPTURE2MESH_WEIGHTS_LIST; raises InputError if it is not a list of weights."""
    path = settings().weights_list
    if (found := _read(path)) is None:
        raise InputError(f"{path}: is not there; CAPTURE2MESH_WEIGHTS_LIST names the list of weights")
    return found


def bundle() -> Bundle:
    """The bundle that an inference loads: the list, with the pins of the lock file at CAPTURE2MESH_WEIGHTS_LOCK.

    What that lock does not pin is pinned by the lock beside the weights, if it does. The rest is not pinned.
    """
    return declared().pinned_by(_read(settings().weights_lock)).pinned_by(_read(local_lock()))


def local_lock() -> Path:
    """The lock file beside the weights of this machine, which the first fetch writes."""
    return settings().weights / "weights.lock.json"


def lock_text(pinned: Bundle) -> str:
    """The content of a lock file."""
    return pinned.model_dump_json(indent=2, exclude_none=True) + "\n"


def _read(path: Path) -> Bundle | None:
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        reasons = "".join(f"\n  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: not a list of weights:{reasons}") from error
