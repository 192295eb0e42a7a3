"""The pinned bundle: which files of which revisions the TRELLIS engine loads, by content (`infra/weights.json`).

What is not pinned has `null`; it is never guessed, only recorded from where the files are published (`pinning`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import InputError
from tasks.settings import settings
from tasks.store.location import FileEntry, sha256_of
from tasks.store.results import cache_key

LAYOUT_VERSION = "1"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFE = ".safetensors"
REVISION_FIELD = "{revision}"

Part = Literal["required", "masks"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# a branch or a tag would move: only a commit is a pin
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightFile(_Declared):
    """A file of a source; without size and digest it is not pinned."""

    path: str
    bytes: int | None = Field(None, ge=0)
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _is_inside(self) -> WeightFile:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts or str(path) != self.path:
            raise ValueError(f"{self.path}: not a plain path inside its repository")
        return self


class Source(_Declared):
    """Files of one revision of a Hugging Face repository or, with `url` and `folder`, of another place.

    `url` is a template with `{path}` and, where the place has revisions, `{revision}`; `folder` is in the bundle.
    """

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    note: str | None = None
    part: Part = "required"
    url: str | None = None
    folder: str | None = None
    revision: Commit | None = None
    files: tuple[WeightFile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_consistent(self) -> Source:
        if (self.url is None) != (self.folder is None):
            raise ValueError(f"{self.repository}: `url` and `folder` belong together")
        self.refuse_pickles([file.path for file in self.files])
        return self

    @property
    def on_hub(self) -> bool:
        return self.url is None

    @property
    def has_revisions(self) -> bool:
        return self.url is None or REVISION_FIELD in self.url

    @property
    def pinned(self) -> bool:
        known = all(file.sha256 is not None and file.bytes is not None for file in self.files)
        return known and (self.revision is not None or not self.has_revisions)

    @property
    def pin(self) -> str:
        """What names the content: the commit or, where there are no revisions, the digests of the files."""
        return self.revision or sha256_of(" ".join(file.sha256 or "" for file in self.files).encode())

    def refuse_pickles(self, published: Sequence[str]) -> None:
        """Raise ValueError where a pickle, which can run code, is declared although the same weights are safe."""
        pickles = [file.path for file in self.files if file.path.endswith(PICKLES)]
        if pickles and any(path.endswith(SAFE) for path in published):
            raise ValueError(f"{self.repository}: {pickles[0]} is a pickle; take the {SAFE} file beside it")

    def path_in_bundle(self, path: str) -> str:
        """Where a file lies below the bundle's folder: in a Hugging Face cache, or in `folder`."""
        if self.folder is not None:
            return f"{self.folder}/{path}"
        return f"{self._cache}/snapshots/{self.revision}/{path}"

    def path_in_mirror(self, path: str) -> str:
        """`repository/revision/file`; where there are no revisions, `repository/file`."""
        return "/".join(filter(None, (self.repository, self.revision, path)))

    @property
    def references(self) -> dict[str, bytes]:
        """Small files of the bundle: what `main` is, to code that asks the cache for no revision."""
        return {f"{self._cache}/refs/main": str(self.revision).encode()} if self.on_hub else {}

    @property
    def _cache(self) -> str:
        return f"hf/hub/models--{self.repository.replace('/', '--')}"


class Bundle(_Declared):
    """All that the pipeline loads."""

    sources: tuple[Source, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """Names the bundle; known without any download."""
        content = [
            [source.repository, source.revision, [[file.path, file.sha256] for file in source.files]]
            for source in self.sources
        ]
        return cache_key("weights", LAYOUT_VERSION, content)

    @property
    def unpinned(self) -> tuple[Source, ...]:
        return tuple(source for source in self.sources if not source.pinned)

    def only(self, *parts: Part) -> Bundle:
        return Bundle(sources=tuple(source for source in self.sources if source.part in parts))

    def entries(self) -> tuple[FileEntry, ...]:
        """Every file of the local folder; raises InputError where something is not pinned."""
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
        return {path: data for source in self.sources for path, data in source.references.items()}

    def refuse_unpinned(self) -> None:
        if self.unpinned:
            names = "".join(f"\n  - {source.repository}" for source in self.unpinned)
            raise InputError(
                f"weights: not pinned, so nothing is downloaded:{names}\n"
                f"run `python -m flows weights pin` on a machine that reaches them and commit {settings().weights_list}"
            )


class Weights(BaseModel):
    """Which weights: the digest of the pin list and the revisions in it. Where they lie is each machine's affair."""

    model_config = ConfigDict(frozen=True)

    bundle: str
    revisions: dict[str, str]

    @staticmethod
    def of(bundle: Bundle) -> Weights:
        """Known before any download."""
        return Weights(bundle=bundle.digest, revisions={source.repository: source.pin for source in bundle.sources})


def declared(path: Path | None = None) -> Bundle:
    """The declared list, with every part; raises InputError where it is not one."""
    path = path or settings().weights_list
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; CAPTURE2MESH_WEIGHTS_LIST names the list of weights") from error
    except ValidationError as error:
        reasons = "".join(f"\n  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: not a list of weights:{reasons}") from error


def bundle(masks: bool = False) -> Bundle:
    """What has to be there to infer; with `masks`, the network that makes them where alpha and depth do not."""
    return declared().only("required", "masks") if masks else declared().only("required")
