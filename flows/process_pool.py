"""A pool of processes for the CPU part of a batch. The workshop of a batch runs its captures in it.

When a process is killed, its capture loses one try, and the batch goes on in a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from queue import Empty, SimpleQueue
from typing import ParamSpec, TypeVar

from tasks.errors import InferenceInterrupted

P = ParamSpec("P")
R = TypeVar("R")

_TRIES = 2
_POLL_SECONDS = 0.2
_ENVIRONMENT = {
    # threads of numeric libraries: the processes are the parallelism
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # glibc: one arena, so that memory freed by one thread serves the next; otherwise each capture adds some 200 MB,
    # up to 1.5 GB
    "MALLOC_ARENA_MAX": "1",
}
_starting = threading.Lock()


class Processes:
    """Runs functions in other processes, which end with this one, however it ends."""

    def __init__(self, count: int) -> None:
        self._count, self._ended = count, threading.Event()
        # a pool is broken as a whole when one of its processes is killed: each process is a pool of its own
        self._free = SimpleQueue[ProcessPoolExecutor]()
        for _ in range(count):
            self._free.put(_process())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        pools: list[ProcessPoolExecutor] = []
        while len(pools) < self._count:
            if kind is not None:  # nothing waits for their results any more
                for process in multiprocessing.active_children():
                    process.kill()
            with suppress(Empty):
                pools.append(self._free.get(timeout=_POLL_SECONDS))
        for process in multiprocessing.active_children():  # idle now; a shutdown would end them one by one, slowly
            process.kill()
        for pool in pools:
            pool.shutdown()
            self._free.put(pool)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function in a process, as soon as one is free, and give its result; raises what the function raised.

        If the process is killed, the function runs once more in a new one. Raises InferenceInterrupted if that is
        killed as well.
        """
        pool = self._free.get()
        try:
            for _ in range(_TRIES):
                if self._ended.is_set():
                    break
                try:
                    with _limited():  # the first call of a pool starts its process
                        future = pool.submit(function, *args, **kwargs)
                    return future.result()
                except BrokenProcessPool:
                    pool = _process()
        finally:
            self._free.put(pool)
        raise InferenceInterrupted(
            "a process of the batch was killed while it worked on this capture; is there too little memory?"
        )


@contextmanager
def _limited() -> Iterator[None]:
    """Processes started within the block get the limits of `_ENVIRONMENT`; later ones, as the model's, do not."""
    with _starting:
        added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def _process() -> ProcessPoolExecutor:
    """A pool of one process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """In a process of the pool: end it when its parent ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
