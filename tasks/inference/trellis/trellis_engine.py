"""The `trellis` engine: TRELLIS-VGGT (ReconViaGen) on CUDA. The registry holds the one that this process uses."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.errors import OutOfMemory
from tasks.geometry.gaussians import Gaussians
from tasks.inference.engine import Engine, Textured
from tasks.inference.gpus import visible_gpus
from tasks.inference.trellis.gpu_models import GpuModels
from tasks.inference.trellis.model_process import Runtime, model_of, runtime_here
from tasks.inference.trellis.process.channel import Message
from tasks.inference.trellis.splats import gaussians_of, splat_ply
from tasks.inference.trellis.trellis_output import TrellisOutput, vertex_colours
from tasks.progress import Progress
from tasks.settings import ExporterName, InferParameters, settings

TRELLIS_VERSION = "2"

log = logging.getLogger(__name__)


class Trellis(Engine):
    """TRELLIS-VGGT on this machine's GPUs. The models stay loaded from one call to the next, until `close`.

    Each GPU that this process sees has a model of its own, started when it is needed. `runtime` is called for every
    request: if it gives another runtime than before, a new process is started.
    """

    needs = Needs(cameras=False, metric_depth=False, min_views=1, masks=True)
    has_weights = True
    closed = False
    shares_model = True
    makes_gaussians = True

    def __init__(self, runtime: Callable[[], Runtime] | None = None) -> None:
        self._runtime = runtime or runtime_here
        self._models: GpuModels | None = None
        self._ask_elsewhere: Callable[[Message], Message] | None = None
        self._lock = threading.Lock()

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
        if here.trellis_device == "cuda" and not visible_gpus():
            return "no NVIDIA GPU here (nvidia-smi lists none, or CUDA_VISIBLE_DEVICES hides them)"
        ours = here.trellis_python == Path(sys.executable) and here.trellis_root is None
        if ours and importlib.util.find_spec("torch") is None:
            return "no `torch` package here; pip install 'capture2mesh[gpu]'"
        return None

    def models_at_once(self) -> int:
        return len(self.models().models)

    def models(self) -> GpuModels:
        """The models of the GPUs that this process sees now, and on the CPU one; the same ones until `close`."""
        with self._lock:
            if self._models is None:
                seen = visible_gpus() if settings().trellis_device == "cuda" else []
                self._models = GpuModels(seen if len(seen) > 1 else [""])
            return self._models

    def most_views(self, parameters: InferParameters) -> int | None:
        return parameters.trellis.max_views

    def reconstruct(self, views: Sequence[View], parameters: InferParameters, progress: Progress) -> TrellisOutput:
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

    def gaussians(self, stored: bytes, tensors: Mapping[str, NDArray[Any]]) -> Gaussians | None:
        return gaussians_of(TrellisOutput.from_safetensors(stored, tensors))

    def splat_ply(self, stored: bytes, transform: NDArray[np.float64]) -> bytes:
        return splat_ply(TrellisOutput.from_safetensors(stored), transform)

    def to_glb(self, stored: bytes, simplify: float = 0.95, texture_px: int = 1024) -> Textured:
        """Upstream's exporter: it decimates, removes hidden faces, and bakes the texture from renders of the gaussians.

        Two results differ in their last bits. It needs nvdiffrast and the gaussian rasteriser, whose licences do not
        allow commercial use.
        """
        output = TrellisOutput.from_safetensors(stored)
        asked = {"gaussian_init": output.gaussian_init, "simplify": simplify, "texture_px": texture_px}
        answer = self.ask(Message({"operation": "to_glb", **asked}, output.tensors()))
        arrays, header = answer.arrays, answer.header
        return Textured(**arrays, decimated_by=header["decimated_by"], measured=header["seconds"])

    def ask(self, request: Message, progress: Progress = lambda fraction, note="": None) -> Message:
        """Ask whichever model is free for `infer` or `to_glb`; an inference loads its weights first."""
        if self._ask_elsewhere is not None:
            return self._ask_elsewhere(request)
        header = dict(request.header)
        operation = header.pop("operation")
        with self.models().free() as model:
            runtime = self._runtime()
            process = model.running(runtime)
            if operation == "infer":
                needed = {"min_free_gib": runtime.min_free_gib(len(header["views"])), "device": runtime.device}
                model.load(needed)
                header |= needed
            seen = partial(progress, note=f"GPU {model.gpu}") if model.gpu else progress
            return process.request(operation, header, request.arrays, seen)

    def use_models_of(self, ask: Callable[[Message], Message]) -> None:
        self._ask_elsewhere = ask

    def close(self) -> None:
        """End the models' processes, which frees their GPU memory."""
        with self._lock:
            models, self._models = self._models, None
        if models is not None:
            models.close()

    def _infer(
        self, views: Sequence[View], parameters: InferParameters, progress: Progress, reduced: bool
    ) -> TrellisOutput:
        names = tuple(view.name for view in views)
        asked = {
            "operation": "infer",
            "views": names,
            "seed": parameters.seed,
            **parameters.trellis.model_dump(include={"ss_steps", "ss_cfg", "slat_steps", "slat_cfg"}),
        }
        arrays: dict[str, NDArray[Any]] = {}
        for index, view in enumerate(views):
            arrays |= {f"{index}.image": view.image, f"{index}.mask": view.mask}
        answer = self.ask(Message(asked, arrays), progress)
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
