"""A stage as a Prefect task: the store decides what has to run, Prefect records it, an observer hears of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, get_type_hints

from prefect import task
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.filesystems import RemoteFileSystem, WritableFileSystem
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from tasks.errors import InputError
from tasks.progress import in_flow, timed
from tasks.store.location import sha256_of
from tasks.store.results import StoredResult, cache_key, store

P = ParamSpec("P")
R = TypeVar("R", bound=StoredResult)

RETRY_BASE_SECONDS = 2
RETRY_JITTER = 0.5


class Stage(Generic[P, R]):
    """A function `(folder, *inputs) -> result` that runs as a Prefect task unless the store has its result.

    The function makes its files in `folder`; its key says what determines the result.
    """

    def __init__(
        self,
        function: Callable[Concatenate[Path, P], R],
        key: Callable[P, Any],
        version: str,
        options: dict[str, Any],
    ) -> None:
        self.name = function.__name__
        self.result_type: type[R] = get_type_hints(function)["return"]
        self._function, self._key, self._version = function, key, version
        self.task: Task[P, R] = task(
            name=self.name,
            task_run_name=self.name,
            version=version,
            description=inspect.getdoc(function),
            persist_result=True,
            result_serializer="json",
            **options,
        )(self._body())

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The store key of these inputs."""
        return cache_key(self.name, self._version, self._key(*args, **kwargs))

    def stored(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The result for these inputs if the store has it."""
        return store().load(self.name, self.key(*args, **kwargs), self.result_type)

    def made(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The result that a run on another machine has just made, reusable or not."""
        return store().load(self.name, self.key(*args, **kwargs), self.result_type, reusable=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run as a task of the current flow run and give the result; raises what the function raised.

        Outside of one, in a process of a batch, it runs plainly and once: the batch tries its captures again.
        """
        with timed(self.name) as hit:
            found = self.stored(*args, **kwargs)
            if not in_flow():
                if found is not None:
                    hit()
                return found or self._made(*args, **kwargs)
            state: State[R] = self.task.with_options(
                cache_policy=_FixedKey(self.key(*args, **kwargs)),
                refresh_cache=found is None,
                result_storage=_records(),
            )(*args, return_state=True, **kwargs)
            if state.name == "Cached":
                hit()
                if found is not None:
                    return found  # the store is the truth, whatever Prefect's record says
            result = state.result()
        return result

    def _made(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result made anew and stored."""
        key = self.key(*args, **kwargs)
        with store().working_folder(self.name, key) as folder:
            return store().commit(self.name, key, folder, self._function(folder, *args, **kwargs))

    def _body(self) -> Callable[P, Any]:
        """The function as Prefect sees it: without its folder, and with the store around it."""

        @functools.wraps(self._function)
        def body(*args: P.args, **kwargs: P.kwargs) -> Any:
            if (found := self.stored(*args, **kwargs)) is not None:
                return Completed(name="Cached", message="found in the store", data=found)
            return self._made(*args, **kwargs)

        parameters = list(inspect.signature(self._function).parameters.values())[1:]
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        del body.__wrapped__
        return body


def stage(
    *,
    key: Callable[P, Any],
    version: str,
    tags: tuple[str, ...] = (),
    **retries: Any,
) -> Callable[[Callable[Concatenate[Path, P], R]], Stage[P, R]]:
    """Make a function a stage; `retries` are of `retried`. Bump `version` when the function's results change."""

    def decorate(function: Callable[Concatenate[Path, P], R]) -> Stage[P, R]:
        return Stage(function, key, version, {"tags": list(tags), **retries})

    return decorate


def retried(times: int, *faults: type[BaseException]) -> dict[str, Any]:
    """Task options: try again after `faults` (by default all but bad input), waiting longer each time, with jitter."""

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


UNCACHED: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


class _FixedKey(CachePolicy):
    """Prefect's record of a result has the key of the store's entry."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def compute_key(self, *args: Any, **kwargs: Any) -> str:
        return self.key


@lru_cache
def _records() -> WritableFileSystem | Path:
    """Where Prefect keeps its records: beside the results, so that whoever shares the store shares them."""
    location = store().root / "_records"
    if location.local:
        return Path(location.path)
    slug = f"capture2mesh-records-{sha256_of(location.url.encode())[:12]}"
    block = RemoteFileSystem(basepath=location.url)
    block.save(slug, overwrite=True)
    return block
