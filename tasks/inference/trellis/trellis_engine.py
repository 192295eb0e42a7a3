"""The `trellis` engine: TRELLIS-VGGT (ReconViaGen) on CUDA. The registry holds the one that this process uses."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.errors import OutOfMemory
from tasks.geometry.gaussians import Gaussians
from tasks.inference.engine import Engine, Textured
from tasks.inference.gpus import gpus
from tasks.inference.trellis.model_process import Runtime, TrellisProcess, model_of, runtime_here
from tasks.inference.trellis.process.channel import Message
from tasks.inference.trellis.splats import gaussians_of, splat_ply
from tasks.inference.trellis.trellis_output import TrellisOutput, vertex_colours
from tasks.settings import ExporterName, InferParameters, settings

TRELLIS_VERSION = "2"

log = logging.getLogger(__name__)


class Trellis(Engine):
    """TRELLIS-VGGT on this machine's GPU. The model stays loaded from one call to the next, until `close`.

    `runtime` is called for every request: if it gives another runtime than before, a new process is started.
    """

    needs = Needs(cameras=False, metric_depth=False, min_views=1, masks=True)
    has_weights = True
    closed = False
    shares_model = True
    makes_gaussians = True

    def __init__(self, runtime: Callable[[], Runtime] | None = None) -> None:
        self._runtime = runtime or runtime_here
        self._process: TrellisProcess | None = None
        self._loaded: Message | None = None
        self._lock = threading.Lock()  # one GPU: one capture at a time

    @property
    def version(self) -> str:  # type: ignore[override]  # upstream's package gives other results
        return f"{TRELLIS_VERSION}-{model_of(settings().trellis_root)}"

    @property
    def exports_in_process(self) -> bool:  # type: ignore[override]  # upstream's exporter comes with its checkout
        return settings().trellis_root is not None

    @property
    def exporter(self) -> ExporterName:  # type: ignore[override]
        return "to_glb" if self.exports_in_process else "native"

    def missing(self) -> str | None:
        here = settings()
        if here.trellis_device == "cuda" and not gpus():
            return "no NVIDIA GPU here (nvidia-smi lists none)"
        ours = here.trellis_python == Path(sys.executable) and here.trellis_root is None
        if ours and importlib.util.find_spec("torch") is None:
            return "no `torch` package here; pip install 'capture2mesh[gpu]'"
        return None

    def most_views(self, parameters: InferParameters) -> int | None:
        return parameters.trellis.max_views

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> TrellisOutput:
        """Reconstruct the views. If GPU memory is too small, try again with the same views, then with half of them."""
        failed: list[OutOfMemory] = []
        for attempt in (views, views, views[::2]):
            try:
                return self._infer(attempt, parameters, progress, reduced=len(attempt) < len(views))
            except OutOfMemory as error:
                log.warning("out of GPU memory with %d views: %s", len(attempt), error)
                failed.append(error)
        first = failed[0]
        tried = f"{first} (tried with {len(views)}, {len(views)} and {len(views[::2])} views)"
        raise OutOfMemory(tried, first.needed_gib, first.free_gib) from first

    def colours(self, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        return vertex_colours(tensors)

    def gaussians(self, stored: bytes) -> Gaussians | None:
        return gaussians_of(TrellisOutput.from_safetensors(stored))

    def splat_ply(self, stored: bytes, transform: NDArray[np.float64]) -> bytes:
        return splat_ply(TrellisOutput.from_safetensors(stored), transform)

    def to_glb(self, stored: bytes, simplify: float = 0.95, texture_px: int = 1024) -> Textured:
        """Upstream's exporter: it decimates, removes hidden faces, and bakes the texture from renders of the gaussians.

        Two results differ in their last bits. It needs nvdiffrast and the gaussian rasteriser, whose licences do not
        allow commercial use.
        """
        output = TrellisOutput.from_safetensors(stored)
        asked = {"gaussian_init": output.gaussian_init, "simplify": simplify, "texture_px": texture_px}
        with self._lock:
            answer = self._running().request("to_glb", asked, output.tensors())
        arrays, header = answer.arrays, answer.header
        return Textured(**arrays, decimated_by=header["decimated_by"], measured=header["seconds"])

    def close(self) -> None:
        """End the model's process, which frees its GPU memory."""
        with self._lock:
            if self._process is not None:
                self._process.shutdown()
            self._process = None

    def _infer(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None], reduced: bool
    ) -> TrellisOutput:
        model = parameters.trellis
        names = tuple(view.name for view in views)
        asked = {
            "views": names,
            "seed": parameters.seed,
            **model.model_dump(include={"ss_steps", "ss_cfg", "slat_steps", "slat_cfg"}),
        }
        arrays: dict[str, NDArray[Any]] = {}
        for index, view in enumerate(views):
            arrays |= {f"{index}.image": view.image, f"{index}.mask": view.mask}
        with self._lock:
            process = self._running()
            needed = {"min_free_gib": process.runtime.min_free_gib(len(views)), "device": process.runtime.device}
            if self._loaded is None:
                self._loaded = process.request("load", {"weights": process.runtime.weights} | needed)
                log.info("model loaded: %s", self._loaded.header)
            answer = process.request("infer", asked | needed, arrays, progress)
        header = answer.header
        log.info("inference of %d views: %s, peak %.1f GiB", len(views), header["seconds"], header["peak_gib"])
        return TrellisOutput.of(
            answer.arrays,
            gaussian_init=header["gaussian_init"],
            variant=header["variant"],
            views=names,
            reduced=reduced,
            measured=header["seconds"] | {"peak_gib": header["peak_gib"]},
        )

    def _running(self) -> TrellisProcess:
        """The process to ask; a new one if there is none, it has ended, or the runtime has changed."""
        runtime = self._runtime()
        if self._process is not None and self._process.alive and self._process.runtime == runtime:
            return self._process
        if self._process is not None:
            self._process.kill()
        self._process, self._loaded = TrellisProcess(runtime), None
        return self._process
