"""Many captures in one run with one model load. Workers run the flow; `reconstruct-dataset` works through its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from prefect import flow, runtime, task

from flows.events import OutcomeName, emit_outcome
from flows.gpu import gpu_slots
from flows.workshop import Outcome, Workshop
from tasks.capture.completeness import StorageState, awaited
from tasks.dataset.plan import Planned, plan
from tasks.dataset.upload import Upload
from tasks.errors import Capture2MeshError
from tasks.inference.registry import ENGINES, EngineChoice, require_engine, resolve_engine
from tasks.progress import in_flow, progress_artifact, timed
from tasks.settings import EngineName, Parameters, settings
from tasks.stage import UNCACHED
from tasks.store.location import Location

ELSEWHERE_SECONDS = 2  # between two looks at the captures that other runs have
HOUR = 3600
PROGRESS = "captures"  # key of the progress artifact

EVENTS: dict[str, OutcomeName] = {
    "normal": "reconstructed",
    "warning": "reconstructed",
    "failure": "rejected",
    "refused": "rejected",
    "failed": "failed",
}


def _run_name() -> str:
    return Location.of(runtime.flow_run.parameters["dataset"]).name


@flow(name="batch", flow_run_name=_run_name)
def batch(
    dataset: str,
    output: str,
    engine: EngineName = "auto",
    parameters: Parameters = Parameters(),
    uploads: bool = False,
) -> dict[str, int]:
    """Reconstruct all that is pending in a dataset, in one run; gives the number of captures in each state.

    Args:
        dataset: Folder or URL above the captures, or a list of captures (.txt, .csv, .jsonl)
        output: Folder or URL below which the assets are published
        engine: The engine to run
        parameters: Parameters of the results
        uploads: Captures may be half uploaded; those are left for later
    """
    choice = resolve_engine(engine)
    state = StorageState.of(Location.of(dataset)) if uploads else None
    pending = plan(dataset, output, choice, parameters).pending
    if state is not None:
        needed = ENGINES[choice.name].needs.min_views
        quiet = settings().quiet_seconds
        pending = tuple(each for each in pending if each.listing and not awaited(each.listing, state, quiet, needed))
    return work_through(pending, choice, parameters)


def work_through(captures: Sequence[Planned], engine: EngineChoice, parameters: Parameters) -> dict[str, int]:
    """Reconstruct captures; gives the number of captures in each state.

    A failure that may pass is tried again at the end. Captures of other runs are waited for: those runs may be dead.
    """
    if not captures:
        return {}
    require_engine(engine)
    ended, tries, begun = dict[str, Outcome](), Counter[str](), time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(timed(PROGRESS))
        show = stack.enter_context(progress_artifact(PROGRESS))
        stack.enter_context(gpu_slots(engine, ENGINES[engine.name].models_at_once()))
        workshop = stack.enter_context(Workshop(engine, parameters))
        left = tuple(captures)
        while left:
            for outcome in workshop.reconstruct(left):
                ended[outcome.planned.id] = outcome
                tries[outcome.planned.id] += outcome.failed
                _tell(outcome)
                pace = _pace(len(ended), len(captures), time.monotonic() - begun)
                lanes = [f"{gpu}: {at_work}" for gpu, at_work in sorted(workshop.lanes.items())]
                note = [pace, f"{outcome.planned.id} {outcome.state}", *lanes]
                show(len(ended) / len(captures), "; ".join(note))
            left = tuple(
                planned
                for planned in left
                if (ended[planned.id].failed or ended[planned.id].state == "elsewhere")
                and tries[planned.id] < settings().attempts
                and _is_left(planned.upload)
            )
            if left and all(ended[planned.id].state == "elsewhere" for planned in left):
                time.sleep(ELSEWHERE_SECONDS)
    states = [outcome.state for outcome in ended.values()]
    return {state: states.count(state) for state in sorted(set(states))}


@task(name="reconstructed", task_run_name="{capture}", **UNCACHED)
def reconstructed(capture: str, state: str, reason: str) -> None:
    """A capture of a batch has ended: the UI lists this task."""
    if reason:
        raise Capture2MeshError(f"{capture}: {state}: {reason}")


def _tell(outcome: Outcome) -> None:
    """A task run and an event for a capture that has ended."""
    if outcome.state not in EVENTS or not in_flow():
        return
    reconstructed(outcome.planned.id, outcome.state, outcome.reason, return_state=True)
    report = f"{outcome.url}/report.json" if outcome.url else ""
    emit_outcome(outcome.planned.upload, EVENTS[outcome.state], report, outcome.reason)


def _is_left(upload: Upload) -> bool:
    """True if there is still something to do: it is neither published nor given up, by this run or another."""
    if upload.published() is not None:
        return False
    failure = upload.failure()
    return failure is None or not failure.final


def _pace(done: int, total: int, seconds: float) -> str:
    """How fast the batch works, and how long it will take."""
    left = seconds / done * (total - done)
    return f"{done} of {total}, {done / seconds * HOUR:.0f} an hour, {left / 60:.0f} min left"
