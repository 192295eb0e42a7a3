"""The loaded model and its operations: probe, load, infer, to_glb. `serve.py` passes the requests on.

Beside numpy every package is imported when it is needed, so that a missing one becomes an answer.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .channel import Message
from .faults import GIB, Fault, fault_of
from .probe import probe

VARIANT = "plain-torch"


class Model(ABC):
    """A model of the process. `answer` turns a request of the channel into its answer."""

    def __init__(self, progressed: Callable[[float], None]) -> None:
        self._progressed = progressed
        self._loads_weights = False

    def answer(self, request: Message) -> Message:
        """Do what is asked. An error becomes an answer of strings and numbers only, so that it keeps no tensors."""
        operations: dict[str, Callable[[Message], Message]] = {
            "probe": self._probe,
            "load": self._load,
            "infer": self._infer,
            "to_glb": self._to_glb,
        }
        try:
            return operations[request.header["operation"]](request)
        except Exception as error:
            traceback.print_exc()
            return Message({"kind": "error", **fault_of(error, self._loads_weights)})
        finally:
            self._loads_weights = False

    def release(self) -> None:
        """Give the cached memory, which no tensor holds, back to the GPU."""
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()

    def _probe(self, request: Message) -> Message:
        device = request.header["device"]
        return Message({"kind": "result", **probe(device, lambda: self._trial(device))})

    @abstractmethod
    def _trial(self, device: str) -> float:
        """Seconds of the smallest inference on `cuda` or `cpu`; it needs no weights."""

    @abstractmethod
    def _load(self, request: Message) -> Message: ...

    @abstractmethod
    def _infer(self, request: Message) -> Message: ...

    @abstractmethod
    def _to_glb(self, request: Message) -> Message: ...

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Mark that weights are read. The mark stays after an error, for `answer` to see."""
        self._loads_weights = True
        yield
        self._loads_weights = False


class NetworkModel(Model):
    """The networks in plain PyTorch (`network`)."""

    def __init__(self, progressed: Callable[[float], None]) -> None:
        super().__init__(progressed)
        self._pipeline: Any = None
        self._gaussian_init: dict[str, Any] = {}

    def _trial(self, device: str) -> float:
        torch, trial = importlib.import_module("torch"), importlib.import_module(".network.trial", __package__)
        seconds: float = trial.seconds_of_inference(torch.device(device))
        return seconds

    def _load(self, request: Message) -> Message:
        begun = time.perf_counter()
        torch, asked = importlib.import_module("torch"), request.header
        pipeline = importlib.import_module(".network.pipeline", __package__)
        loader = importlib.import_module(".network.loader", __package__)
        imported = time.perf_counter()
        if asked["device"] == "cuda":
            require_memory(cuda(), asked["min_free_gib"])
        with self._loading():
            networks = loader.load(loader.WeightPlaces.of(os.environ), torch.device(asked["device"]))
        self._gaussian_init = networks.gaussian_decoder.gaussian_init
        self._pipeline = pipeline.ViewsToMesh(networks, compiles=asked["device"] == "cuda")
        gc.collect()
        gc.freeze()  # the model stays: later collections need not look at it
        seconds = {"imports": imported - begun, "load": time.perf_counter() - imported}
        return Message({"kind": "result", "variant": VARIANT, "seconds": seconds})

    def _infer(self, request: Message) -> Message:
        asked, torch = request.header, importlib.import_module("torch")
        pipeline = importlib.import_module(".network.pipeline", __package__)
        preprocess = importlib.import_module(".network.preprocess", __package__)
        on_gpu = asked["device"] == "cuda"
        if on_gpu:
            require_memory(torch, asked["min_free_gib"])
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        count = len(asked["views"])
        images = [request.arrays[f"{index}.image"] for index in range(count)]
        masks = [request.arrays[f"{index}.mask"] for index in range(count)]
        unmasked = [name for name, mask in zip(asked["views"], masks, strict=True) if mask.all()]
        if unmasked:
            raise Fault(
                "EmptyResult",
                f"{len(unmasked)} views have no mask ({', '.join(unmasked[:2])}): give them an alpha channel or depth",
            )
        with ThreadPoolExecutor() as pool:  # numpy and torch release Python's global lock
            views = list(pool.map(preprocess.prepared, asked["views"], images, masks))
        prepared = time.perf_counter()
        wanted = pipeline.Request(
            seed=asked["seed"],
            structure_steps=asked["ss_steps"],
            structure_strength=asked["ss_cfg"],
            latent_steps=asked["slat_steps"],
            latent_strength=asked["slat_cfg"],
        )
        try:
            result = self._pipeline.run(views, wanted, self._progressed)
        except torch.OutOfMemoryError:
            self._pipeline.release()  # the graphs of this number of views
            raise
        ran = time.perf_counter()
        gaussians = {name.removeprefix("_"): tensor for name, tensor in result.gaussians.items()}
        arrays = arrays_of(result.mesh.vertices, result.mesh.faces, result.mesh.attributes, gaussians)
        seconds = {"preprocess": prepared - begun, "run": ran - prepared, "fetch": time.perf_counter() - ran}
        peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
        header = {"kind": "result", "variant": VARIANT, "gaussian_init": self._gaussian_init, "seconds": seconds}
        return Message(header | {"peak_gib": peak}, arrays)

    def _to_glb(self, _: Message) -> Message:
        raise Fault(
            "Unsupported", "to_glb needs upstream's package: set CAPTURE2MESH_TRELLIS_ROOT, or export.exporter=native"
        )


def cuda() -> Any:
    """Import torch; raise Fault if it sees no CUDA device, with the reason: none is there, or the driver is too old."""
    torch = importlib.import_module("torch")
    try:
        torch.cuda.init()
    except Exception as error:
        raise Fault("NoCuda", f"torch {torch.__version__} sees no CUDA device: {fault_of(error)['message']}") from error
    return torch


def require_memory(torch: Any, needed_gib: float) -> None:
    """Raise Fault if less GPU memory is free; the memory that this process has reserved counts as free."""
    free_gib = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    if free_gib < needed_gib:
        message = f"{needed_gib:g} GiB of GPU memory are needed, {free_gib:.1f} GiB are free"
        raise Fault("OutOfMemory", message, needed_gib=needed_gib, free_gib=free_gib)


def arrays_of(vertices: Any, faces: Any, attributes: Any, gaussians: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a result. Raises Fault if it is empty or not finite. attributes: None without colours."""
    if not len(vertices) or not len(faces):
        raise Fault("EmptyResult", f"the mesh has {len(vertices)} vertices and {len(faces)} faces")
    if not len(gaussians["xyz"]):
        raise Fault("EmptyResult", "the model gave no gaussians")
    arrays = {"vertices": _floats(vertices)}
    if attributes is not None and attributes.shape[1]:
        arrays["vertex_attrs"] = _floats(attributes)
    arrays |= {f"gaussians.{name}": _floats(tensor) for name, tensor in gaussians.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise Fault("EmptyResult", f"{name}: {np.count_nonzero(~np.isfinite(array))} values are not finite")
    arrays["faces"] = faces.detach().cpu().numpy().astype(np.int32)
    return arrays


def _floats(tensor: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
