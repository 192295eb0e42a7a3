"""Progress and timing of the stages of a run: for terminals, reports and the Prefect UI.

Steps and stages report it (tasks/stage.py and the functions of long stages); flows and the command line observe it.
"""

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

PROGRESS_SECONDS = 0.5
"""Least time between two updates of a progress artifact: each is a request to the server."""


class StageTiming(BaseModel):
    """Duration of a stage in one run."""

    name: str
    """Name of the stage."""
    seconds: float
    """From its start to its end."""
    cached: bool
    """True if its result was there already."""


class Observer(Protocol):
    """Is told of the stages of a run."""

    def started(self, name: str) -> None:
        """A stage begins."""

    def progressed(self, name: str, fraction: float, note: str) -> None:
        """A stage has done this fraction of its work, 0 to 1."""

    def finished(self, timing: StageTiming) -> None:
        """A stage has ended without an error."""


_observers: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every stage within the block."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def report_progress(name: str, fraction: float, note: str = "") -> None:
    """Tell the observers that a stage has done this fraction of its work, 0 to 1."""
    for observer in _observers.get():
        observer.progressed(name, fraction, note)


class Timings:
    """An observer that keeps the timings for the report. earlier: of stages that ran in another process."""

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
    """Tell the observers of a stage's start and end. Gives a function to call if the result was there already."""
    hits: list[bool] = []
    for observer in _observers.get():
        observer.started(name)
    begun = time.perf_counter()
    yield lambda: hits.append(True)
    timing = StageTiming(name=name, seconds=round(time.perf_counter() - begun, 3), cached=bool(hits))
    for observer in _observers.get():
        observer.finished(timing)


def in_flow() -> bool:
    """Return whether this thread runs a Prefect flow, so that tasks and artifacts can belong to its run."""
    return FlowRunContext.get() is not None


class Progress(Protocol):
    """Moves a progress display: a fraction from 0 to 1, and a note that a terminal shows beside it."""

    def __call__(self, fraction: float, note: str = "") -> None: ...


@contextmanager
def progress_artifact(stage: str) -> Iterator[Progress]:
    """Show a progress artifact in the running task or flow; the function that it gives moves it.

    Its description shows the last note. Observers are told too. Outside of a flow only they are.
    """
    key = stage.replace("_", "-")
    artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=stage)) if in_flow() else None
    shown_at = time.monotonic()

    def show(fraction: float, note: str = "") -> None:
        nonlocal shown_at
        report_progress(stage, fraction, note)
        if artifact is not None and (fraction >= 1 or time.monotonic() - shown_at >= PROGRESS_SECONDS):
            shown_at = time.monotonic()
            described = f"{stage}: {note}" if note else None
            update_progress_artifact(artifact, progress=round(100 * fraction, 1), description=described)

    yield show
    show(1.0)
