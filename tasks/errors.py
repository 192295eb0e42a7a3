"""What can go wrong, as one small hierarchy: the message says what, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class PublishedAsset(Protocol):
    """What has been published, and the URL of its folder."""

    @property
    def url(self) -> str: ...


class Problem(BaseModel):
    """One thing that is wrong with an input: where it is (a file, a view), what it is, and what to do."""

    model_config = ConfigDict(frozen=True)

    where: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.todo}"


class Capture2MeshError(Exception):
    """Base of all errors of this project."""


class InputError(Capture2MeshError):
    """What was asked for cannot be done as it is: the caller has to change something. Never retried."""


class CaptureRefused(InputError):
    """A capture that lacks what the engine needs, with every problem found."""

    def __init__(self, capture: str, problems: Sequence[Problem]) -> None:
        self.capture = capture
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"capture {capture} is refused, {len(self.problems)} problem(s):\n{lines}")

    def __reduce__(self) -> tuple[type[CaptureRefused], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.capture, self.problems)


class CaptureReplaced(InputError):
    """A capture that is uploaded anew while a run reads it: what it has read may be half of each."""


class EngineUnavailable(InputError):
    """The engine that was asked for cannot run on this machine."""


class WeightsMissing(InputError):
    """The weights are not on this machine, and it may not fetch them."""


class WeightsCorrupt(InputError):
    """Weights whose content is not what is pinned."""


class WeightsUnavailable(Capture2MeshError):
    """The weights could not be fetched, whatever the capture that wants them."""


class StorageError(Capture2MeshError):
    """A capture, the store or the output could not be read or written."""


class StorageUnavailable(StorageError):
    """A network or server fault of the storage: worth another try."""


class ServerUnavailable(Capture2MeshError):
    """Prefect's API does not answer: worth another try."""


class InferenceFailed(Capture2MeshError):
    """The engine ran and gave no usable geometry."""


class EmptyResult(InferenceFailed):
    """The model ran and gave nothing usable; it would again."""


class InferenceInterrupted(Capture2MeshError):
    """The inference could not end for a reason that passes: worth another try."""


class OutOfMemory(InferenceInterrupted):
    """The GPU has too little free memory. needed_gib, free_gib: None where nothing says it."""

    def __init__(self, message: str, needed_gib: float | None = None, free_gib: float | None = None) -> None:
        super().__init__(message, needed_gib, free_gib)
        self.needed_gib, self.free_gib = needed_gib, free_gib

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceLost(InferenceInterrupted):
    """The GPU or the model's process is gone; the next inference starts a new one."""


class InferenceTimeout(InferenceInterrupted):
    """The model's process took longer than it may and was ended."""


class ExportFailed(Capture2MeshError):
    """The geometry could not be turned into a textured mesh."""


class MeshRejected(Capture2MeshError):
    """A mesh below the floor: published for inspection (`published` says where), and the run fails."""

    def __init__(self, message: str, published: PublishedAsset) -> None:
        super().__init__(message, published)
        self.published = published

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Faults below `where` become StorageError; what can get better, StorageUnavailable.

    FileNotFoundError and FileExistsError pass: they answer a question.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except PermissionError as error:
        raise StorageError(f"{where}: access denied ({error}); check the permissions or the AWS_* keys") from error
    except OSError as error:
        if where.startswith("/"):
            raise StorageError(f"{where}: {error}; check the disk") from error
        raise StorageUnavailable(f"{where}: {error}; check the network and the endpoint") from error
    except Exception as error:
        # botocore and aiohttp have no common base class with OSError; everything else is a fault of ours
        module = type(error).__module__.partition(".")[0]
        if module not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        kind = StorageError if "Credentials" in type(error).__name__ else StorageUnavailable
        raise kind(f"{where}: {error}; check the endpoint and the AWS_* keys") from error
