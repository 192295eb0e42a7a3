"""How far the stages of a run have come, and how long they took: for terminals, reports and the Prefect UI."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from pydantic import BaseModel

# each update is a request to the server
PROGRESS_SECONDS = 0.5


class StageTiming(BaseModel):
    """How long a stage took in one run, in seconds, and whether its result was there already."""

    name: str
    seconds: float
    cached: bool


class Observer(Protocol):
    """Who wants to hear of the stages of a run."""

    def started(self, name: str) -> None: ...
    def progressed(self, name: str, fraction: float, note: str) -> None: ...
    def finished(self, timing: StageTiming) -> None: ...


_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Within the block, `observer` hears of every stage."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def report_progress(name: str, fraction: float, note: str = "") -> None:
    """Tell the observers that a stage has come this far, 0 to 1."""
    for observer in _observers.get():
        observer.progressed(name, fraction, note)


class Timings:
    """An observer that keeps what the report says of the stages; `earlier` are those that ran elsewhere."""

    def __init__(self, earlier: Sequence[StageTiming] = ()) -> None:
        self.stages = list(earlier)
        self._earlier = {stage.name for stage in earlier}

    def started(self, name: str) -> None:
        """Nothing to keep yet."""

    def progressed(self, name: str, fraction: float, note: str) -> None:
        """Only the end counts."""

    def finished(self, timing: StageTiming) -> None:
        if timing.name not in self._earlier:
            self.stages.append(timing)


@contextmanager
def timed(name: str) -> Iterator[Callable[[], None]]:
    """Tell the observers of a stage from its start to its end; call what it gives when the result was there already."""
    hits: list[bool] = []
    for observer in _observers.get():
        observer.started(name)
    begun = time.perf_counter()
    yield lambda: hits.append(True)
    timing = StageTiming(name=name, seconds=round(time.perf_counter() - begun, 3), cached=bool(hits))
    for observer in _observers.get():
        observer.finished(timing)


def in_flow() -> bool:
    """Whether a Prefect flow runs here."""
    return FlowRunContext.get() is not None


class Progress(Protocol):
    """Moves a progress display: 0 to 1, and what a terminal says beside it."""

    def __call__(self, fraction: float, note: str = "") -> None: ...


@contextmanager
def progress_artifact(stage: str) -> Iterator[Progress]:
    """A progress artifact of the running task or flow, moved by the function it gives (0 to 1, and a note for who sees
    the terminal); observers hear of it too."""
    key = stage.replace("_", "-")
    artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=stage)) if in_flow() else None
    shown_at = time.monotonic()

    def show(fraction: float, note: str = "") -> None:
        nonlocal shown_at
        report_progress(stage, fraction, note)
        if artifact is not None and (fraction >= 1 or time.monotonic() - shown_at >= PROGRESS_SECONDS):
            shown_at = time.monotonic()
            update_progress_artifact(artifact, progress=round(100 * fraction, 1))

    yield show
    show(1.0)
