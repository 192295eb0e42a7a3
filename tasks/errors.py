"""The errors of this project. A message says what is wrong, where, and what to do.

Used in all packages. The class decides about retries, the exit code, and what counts as the capture's fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from pydantic import BaseModel, ConfigDict


class PublishedAsset(Protocol):
    """A published asset, as far as an error needs to know it."""

    @property
    def url(self) -> str:
        """URL of its folder."""
        ...


class Problem(BaseModel):
    """One thing that is wrong with an input."""

    model_config = ConfigDict(frozen=True)

    where: str
    """The file or the view."""
    what: str
    """The fault."""
    todo: str
    """How to correct it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.todo}"


_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_EXAMPLES = 2


def grouped(problems: Sequence[Problem]) -> tuple[str, ...]:
    """One line for each kind of problem, with a count and examples. Two are of one kind if only numbers differ."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kind = _NUMBER.sub("#", problem.what), _NUMBER.sub("#", problem.todo)
        kinds.setdefault(kind, []).append(problem)
    lines = []
    for alike in kinds.values():
        if len(alike) == 1:
            lines.append(str(alike[0]))
            continue
        examples = ", ".join(problem.where for problem in alike[:_EXAMPLES])
        more = ", ..." if len(alike) > _EXAMPLES else ""
        lines.append(f"{len(alike)} files ({examples}{more}): {alike[0].what}; {alike[0].todo}")
    return tuple(lines)


class Capture2MeshError(Exception):
    """Base of all errors of this project."""


class InputError(Capture2MeshError):
    """The input or the request has to be changed. Never retried."""


class CaptureRefused(InputError):
    """The capture does not have what the engine needs; carries every problem that was found."""

    def __init__(self, capture: str, problems: Sequence[Problem]) -> None:
        self.capture = capture
        self.problems = tuple(problems)
        kinds = grouped(self.problems)
        lines = "\n".join(f"  - {line}" for line in kinds)
        super().__init__(f"capture {capture} is refused, {len(kinds)} problem(s):\n{lines}")

    def __reduce__(self) -> tuple[type[CaptureRefused], tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.capture, self.problems)


class CaptureReplaced(InputError):
    """The capture was uploaded again while a run read it; the run may have read files of both uploads."""


class EngineUnavailable(InputError):
    """The requested engine cannot run on this machine."""


class WeightsMissing(InputError):
    """The weights are not on this machine, and it may not download them."""


class WeightsCorrupt(InputError):
    """The content of a weights file differs from its pin."""


class WeightsUnavailable(Capture2MeshError):
    """The weights could not be downloaded; this does not depend on the capture."""


class StorageError(Capture2MeshError):
    """A capture, the store or the output could not be read or written."""


class StorageUnavailable(StorageError):
    """A network or server fault of the storage; another try may succeed."""


class ServerUnavailable(Capture2MeshError):
    """Prefect's API does not answer; another try may succeed."""


class InferenceFailed(Capture2MeshError):
    """The engine ran but gave no usable geometry."""


class EmptyResult(InferenceFailed):
    """The model ran but gave nothing usable; another try would give the same."""


class InferenceInterrupted(Capture2MeshError):
    """The inference was interrupted for a reason that passes; another try may succeed."""


class OutOfMemory(InferenceInterrupted):
    """The GPU has too little free memory. needed_gib, free_gib: in GiB, None if unknown."""

    def __init__(self, message: str, needed_gib: float | None = None, free_gib: float | None = None) -> None:
        super().__init__(message, needed_gib, free_gib)
        self.needed_gib, self.free_gib = needed_gib, free_gib

    def __str__(self) -> str:
        return str(self.args[0])


class DeviceLost(InferenceInterrupted):
    """The GPU or the model's process is gone; the next inference starts a new process."""


class InferenceTimeout(InferenceInterrupted):
    """The model's process exceeded its time limit and was ended."""


class ExportFailed(Capture2MeshError):
    """The geometry could not be made into a textured mesh."""


class MeshRejected(Capture2MeshError):
    """The mesh is below the floor: it is published for inspection (`published`), and the run fails."""

    def __init__(self, message: str, published: PublishedAsset) -> None:
        super().__init__(message, published)
        self.published = published

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Raise the faults of a storage as StorageError, or as StorageUnavailable if another try may succeed.

    where: path or URL for the message. FileNotFoundError and FileExistsError pass: they are answers, not faults.
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
