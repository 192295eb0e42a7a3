"""The loaded models of this process: one for each GPU that it sees. The `trellis` engine asks whichever is free."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import LifoQueue
from typing import Any

from tasks.errors import DeviceLost
from tasks.inference.trellis.model_process import Runtime, TrellisProcess

LOSSES = 2
"""A GPU whose model was lost so often in a row is left out while there is another: it would take capture after capture,
being free at once. A single loss may be a capture's fault."""

log = logging.getLogger(__name__)


class GpuModel:
    """The model on one GPU. Its process starts when it is first needed, and anew after it has ended.

    gpu: as `CUDA_VISIBLE_DEVICES` takes it; empty: what this process's environment says.
    """

    def __init__(self, gpu: str = "") -> None:
        self.gpu = gpu
        self.losses = 0  # without a success in between
        self.process: TrellisProcess | None = None
        self._loaded = False

    def running(self, runtime: Runtime) -> TrellisProcess:
        """The process to ask; a new one if there is none, it has ended, or the runtime has changed."""
        runtime = replace(runtime, gpu=self.gpu)
        if self.process is not None and self.process.alive and self.process.runtime == runtime:
            return self.process
        if self.process is not None:
            self.process.kill()
        self.process, self._loaded = TrellisProcess(runtime), False
        return self.process

    def load(self, needed: Mapping[str, Any]) -> None:
        """Load the weights in the running process, unless it has; needed: what is told beside their place."""
        assert self.process is not None
        if not self._loaded:
            told = self.process.request("load", {"weights": self.process.runtime.weights, **needed})
            self._loaded = True
            log.info("model loaded: %s", told.header)

    def close(self) -> None:
        """End the process, which frees its GPU memory."""
        if self.process is not None:
            self.process.shutdown()
        self.process = None


class GpuModels:
    """The models of several GPUs; threads share them. gpus: their names as for `GpuModel`, at least one."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self.models = [GpuModel(gpu) for gpu in gpus]
        self._lock = threading.Lock()
        self._free = LifoQueue[GpuModel]()  # the last one used is the first one taken: it is loaded
        for model in reversed(self.models):
            self._free.put(model)

    @contextmanager
    def free(self) -> Iterator[GpuModel]:
        """Wait until a model is free, and have it for the block alone."""
        model = self._free.get()
        try:
            yield model
            model.losses = 0
        except DeviceLost:
            model.losses += 1
            raise
        finally:
            with self._lock:
                if model.losses < LOSSES or len(self.models) == 1:
                    self._free.put(model)
                else:
                    self.models.remove(model)
                    log.error("GPU %s has lost the model %d times in a row: it is not used any more", model.gpu, LOSSES)

    def close(self) -> None:
        """End all processes, each when it is free."""
        closed = [self._free.get() for _ in self.models]
        for model in closed:
            model.close()
            self._free.put(model)
