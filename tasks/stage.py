"""Steps and stages: functions that run as retried Prefect tasks; the results of stages are cached in the store.

Every module that does a part of a run decorates its function with `step` or `stage`; the flows call them. The store is
the truth: Prefect keeps no result. A task whose result was there already ends in the state `Cached`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from tasks.errors import InputError
from tasks.progress import in_flow, timed
from tasks.store.results import StoredResult, cache_key, store

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=StoredResult)

RETRY_BASE_SECONDS = 2
RETRY_JITTER = 0.5

UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
"""Options of every Prefect task of this project: Prefect keeps no result of it."""

_CACHED = "Cached"


class Step(Generic[P, R]):
    """A function that runs as a task of the current flow run, with retries.

    Where `found` gives a result, the function does not run, and the task's state is `Cached`. Outside of a flow, in a
    process of a batch, it runs plainly and once: the batch tries its captures again.
    """

    def __init__(self, function: Callable[P, R], found: Callable[P, R | None], **options: Any) -> None:
        self.name = function.__name__

        @functools.wraps(function)
        def body(*args: P.args, **kwargs: P.kwargs) -> Any:
            if (result := found(*args, **kwargs)) is not None:
                return Completed(name=_CACHED, message="the result was there already", data=result)
            return function(*args, **kwargs)

        self._task = task(name=self.name, task_run_name=self.name, **UNCACHED, **options)(body)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run and give the result; raises what the function raised."""
        with timed(self.name) as hit:
            if in_flow():
                result: Any = self._task(*args, return_state=True, **kwargs)
            else:
                result = self._task.fn(*args, **kwargs)
            if isinstance(result, State):
                if result.name == _CACHED:
                    hit()
                result = result.result()
        return result


class Stage(Step[P, S]):
    """A step whose results lie in the store: a function `(folder, *inputs) -> result` that makes its files in `folder`.

    `key` gives what determines the result.
    """

    def __init__(
        self, function: Callable[Concatenate[Path, P], S], key: Callable[P, Any], version: str, **options: Any
    ) -> None:
        self._result_type: type[S] = get_type_hints(function)["return"]
        self._key, self._version = key, version

        @functools.wraps(function)
        def stored_anew(*args: P.args, **kwargs: P.kwargs) -> S:
            key = self.key(*args, **kwargs)
            with store().working_folder(self.name, key) as folder:
                return store().commit(self.name, key, folder, function(folder, *args, **kwargs))

        # Prefect sees the function without its folder
        parameters = list(inspect.signature(function).parameters.values())[1:]
        stored_anew.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        super().__init__(stored_anew, self.stored, version=version, **options)

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The store key of these inputs."""
        return cache_key(self.name, self._version, self._key(*args, **kwargs))

    def stored(self, *args: P.args, **kwargs: P.kwargs) -> S | None:
        """The result for these inputs if the store has it."""
        return store().load(self.name, self.key(*args, **kwargs), self._result_type)

    def made(self, *args: P.args, **kwargs: P.kwargs) -> S | None:
        """The result that a run on another machine has just made, reusable or not."""
        return store().load(self.name, self.key(*args, **kwargs), self._result_type, reusable=False)


def _never(*args: Any, **kwargs: Any) -> None:
    """`found` of a step that runs each time."""


def step(*, found: Callable[..., Any] = _never, **retries: Any) -> Callable[[Callable[P, R]], Step[P, R]]:
    """Make a function a step; `retries` are of `retried`. found: gives the result that is there already, or None."""

    def decorate(function: Callable[P, R]) -> Step[P, R]:
        return Step(function, found, **retries)

    return decorate


def stage(
    *,
    key: Callable[P, Any],
    version: str,
    tags: tuple[str, ...] = (),
    **retries: Any,
) -> Callable[[Callable[Concatenate[Path, P], S]], Stage[P, S]]:
    """Make a function a stage; `retries` are of `retried`. Bump `version` when the function's results change."""

    def decorate(function: Callable[Concatenate[Path, P], S]) -> Stage[P, S]:
        return Stage(function, key, version, tags=list(tags), **retries)

    return decorate


def retried(times: int, *faults: type[BaseException]) -> dict[str, Any]:
    """Task options: try again after `faults`, by default after all but bad input.

    The waits grow exponentially from RETRY_BASE_SECONDS, with jitter.
    """

    def condition(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
        error = state.data if isinstance(state.data, BaseException) else state.result(raise_on_failure=False)
        if isinstance(error, InputError):
            return False
        return isinstance(error, faults or Exception)

    return {
        "retries": times,
        "retry_delay_seconds": exponential_backoff(RETRY_BASE_SECONDS),
        "retry_jitter_factor": RETRY_JITTER,
        "retry_condition_fn": condition,
    }
