"""The loaded model and its operations: probe, load, infer, to_glb. `serve.py` passes the requests on.

Beside numpy and Pillow every package is imported when it is needed, so that a missing one becomes an answer.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import starmap
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .channel import Message
from .faults import GIB, Fault, fault_of
from .graphs import replayed
from .probe import probe
from .upstream import VARIANTS, fast_decimation, lean, require_signature, strength_offset, unless_empty

PREPARED_SIZE = (518, 518)
# A step of the latents' flow takes about five times as long as one of the structure's (measured with 6 and 16 views)
STRUCTURE_STEP_COST, LATENT_STEP_COST = 1, 5
# The bake draws its views from numpy's global generator, which upstream does not seed
BAKE_SEED = 0
# From y-up (x, z, -y) back to z-up (x, y, z), multiplied from the right: the inverse of what upstream's to_glb does
Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


class Model:
    """Upstream's pipeline. `answer` turns a request of the channel into its answer."""

    def __init__(self, progressed: Callable[[float], None]) -> None:
        self._progressed = progressed
        self._pipeline: Any = None
        self._variant = ""
        self._strength_offset = 0
        self._steps_done = self._steps_total = 0
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

    def _probe(self, _: Message) -> Message:
        return Message({"kind": "result", **probe()})

    def _load(self, request: Message) -> Message:
        begun = time.perf_counter()
        torch = _cuda()
        pipelines = importlib.import_module("trellis.pipelines")
        pipeline_class = getattr(pipelines, "TrellisVGGTTo3DPipeline", None)
        if pipeline_class is None:
            raise Fault(
                "Unsupported",
                f"the trellis package at {pipelines.__file__} has no TrellisVGGTTo3DPipeline: it is not ReconViaGen's",
            )
        imported = time.perf_counter()
        _require_memory(torch, request.header["min_free_gib"])
        with self._loading():
            # made on the GPU: on the CPU it takes 30 s to draw the initial weights, which are overwritten afterwards
            with torch.device("cuda"), lean(torch, pipeline_class, self._loading):
                pipeline = pipeline_class.from_pretrained(request.header["weights"])
            pipeline._device, pipeline.low_vram = torch.device("cuda"), False
            pipeline.cuda()
            pipeline.VGGT_model.to(pipeline._device)
        self._strength_offset = strength_offset(torch, pipeline)
        self._variant = VARIANTS[self._strength_offset]
        require_signature(pipeline.run)
        self._observe(pipeline.sparse_structure_sampler, STRUCTURE_STEP_COST)
        self._observe(pipeline.slat_sampler, LATENT_STEP_COST)
        for sampler in (pipeline.sparse_structure_sampler, pipeline.slat_sampler):
            sampler.sample = replayed(torch, sampler.sample)
        pipeline.sample_slat = unless_empty(pipeline.sample_slat)
        self._pipeline = pipeline
        gc.collect()
        gc.freeze()  # the model stays: later collections need not look at it
        seconds = {"imports": imported - begun, "load": time.perf_counter() - imported}
        return Message({"kind": "result", "variant": self._variant, "seconds": seconds})

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Mark that weights are read. The mark stays after an error, for `answer` to see."""
        self._loads_weights = True
        yield
        self._loads_weights = False

    def _observe(self, sampler: Any, cost: int) -> None:
        """Count the steps of a sampler: in both variants `sample` calls `self.sample_once` for each step."""
        sample_once = sampler.sample_once

        def observed(*args: Any, **kwargs: Any) -> Any:
            result = sample_once(*args, **kwargs)
            self._steps_done += cost
            self._progressed(min(1.0, self._steps_done / self._steps_total))
            return result

        sampler.sample_once = observed

    def _infer(self, request: Message) -> Message:
        asked, torch = request.header, importlib.import_module("torch")
        _require_memory(torch, asked["min_free_gib"])
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        images = self._all_prepared(asked["views"], request.arrays)
        prepared = time.perf_counter()
        self._steps_done = 0
        self._steps_total = STRUCTURE_STEP_COST * asked["ss_steps"] + LATENT_STEP_COST * asked["slat_steps"]
        with torch.no_grad():
            outputs, _, _ = self._pipeline.run(
                image=images,
                seed=asked["seed"],
                formats=["gaussian", "mesh"],
                preprocess_image=False,  # upstream ignores it: _prepared has done it
                sparse_structure_sampler_params=self._sampling(asked["ss_steps"], asked["ss_cfg"]),
                slat_sampler_params=self._sampling(asked["slat_steps"], asked["slat_cfg"]),
            )
        ran = time.perf_counter()
        arrays, init = _arrays_of(outputs)
        seconds = {"preprocess": prepared - begun, "run": ran - prepared, "fetch": time.perf_counter() - ran}
        peak = torch.cuda.max_memory_allocated() / GIB
        header = {"kind": "result", "variant": self._variant, "gaussian_init": init, "seconds": seconds}
        return Message(header | {"peak_gib": peak}, arrays)

    def _sampling(self, steps: int, strength: float) -> dict[str, Any]:
        return {"steps": steps, "cfg_strength": strength + self._strength_offset}

    def _all_prepared(self, names: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> list[Image.Image]:
        views = [(name, arrays[f"{index}.image"], arrays[f"{index}.mask"]) for index, name in enumerate(names)]
        if any(mask.all() for _, _, mask in views):  # BiRefNet must be called from one thread only
            return list(starmap(self._prepared, views))
        with ThreadPoolExecutor() as pool:  # numpy and Pillow release Python's global lock
            return list(pool.map(self._prepared, *zip(*views, strict=True)))

    def _prepared(self, name: str, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Image.Image:
        """Return the view as `run` takes it. A mask that is True everywhere is unknown: BiRefNet makes one."""
        if not mask.any():
            raise Fault("EmptyResult", f"view {name}: its mask has no foreground")
        # upstream uses the alpha channel as the mask if any value of it is below 255
        source = Image.fromarray(image if mask.all() else np.dstack([image, mask * np.uint8(255)]))
        prepared: Image.Image = self._pipeline.preprocess_image(source)
        if prepared.mode != "RGBA" or prepared.size != PREPARED_SIZE:
            raise Fault("EmptyResult", f"view {name}: no foreground found in it")
        return prepared

    def _to_glb(self, request: Message) -> Message:
        torch, asked = _cuda(), request.header
        post = importlib.import_module("trellis.utils.postprocessing_utils")
        gaussian_class = importlib.import_module("trellis.representations").Gaussian
        tensors = {name: torch.tensor(array, device="cuda") for name, array in request.arrays.items()}
        gaussian = gaussian_class(**asked["gaussian_init"])
        for name, tensor in tensors.items():
            if name.startswith("gaussians."):
                setattr(gaussian, name.replace("gaussians.", "_"), tensor)
        mesh = SimpleNamespace(vertices=tensors["vertices"], faces=tensors["faces"].long())
        np.random.seed(BAKE_SEED)  # noqa: NPY002
        torch.manual_seed(BAKE_SEED)
        begun = time.perf_counter()
        with fast_decimation(post) as decimated_by:
            textured = post.to_glb(
                gaussian, mesh, simplify=asked["simplify"], texture_size=asked["texture_px"], verbose=False
            )
        arrays: dict[str, NDArray[Any]] = {
            "vertices": np.asarray(textured.vertices, np.float32) @ Y_UP_TO_Z_UP,
            "faces": np.asarray(textured.faces, np.int32),
            "uv": np.asarray(textured.visual.uv, np.float32),
            "texture": np.asarray(textured.visual.material.baseColorTexture.convert("RGB")),
        }
        if not len(arrays["faces"]):
            raise Fault("EmptyResult", "to_glb: no face is left of the mesh")
        seconds = {"to_glb": time.perf_counter() - begun}
        return Message({"kind": "result", "decimated_by": decimated_by, "seconds": seconds}, arrays)


def _cuda() -> Any:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Fault("NoCuda", f"torch {torch.__version__} sees no CUDA device")
    return torch


def _require_memory(torch: Any, needed_gib: float) -> None:
    """Raise Fault if less GPU memory is free; the memory that this process has reserved counts as free."""
    free_gib = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    if free_gib < needed_gib:
        message = f"{needed_gib:g} GiB of GPU memory are needed, {free_gib:.1f} GiB are free"
        raise Fault("OutOfMemory", message, needed_gib=needed_gib, free_gib=free_gib)


def _arrays_of(outputs: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays of a run's outputs, and the arguments with which its Gaussian is constructed."""
    for name in ("mesh", "gaussian"):
        if not outputs.get(name):
            raise Fault("EmptyResult", f"the model gave no {name}")
    mesh, gaussian = outputs["mesh"][0], outputs["gaussian"][0]
    if not mesh.success or not len(mesh.vertices) or not len(mesh.faces):
        raise Fault("EmptyResult", f"the mesh has {len(mesh.vertices)} vertices and {len(mesh.faces)} faces")
    arrays = {"vertices": _floats(mesh.vertices)}
    if mesh.vertex_attrs is not None:
        arrays["vertex_attrs"] = _floats(mesh.vertex_attrs)
    for name in ("xyz", "features_dc", "features_rest", "scaling", "rotation", "opacity"):
        tensor = getattr(gaussian, f"_{name}", None)
        if tensor is not None:
            arrays[f"gaussians.{name}"] = _floats(tensor)
    if not len(arrays["gaussians.xyz"]):
        raise Fault("EmptyResult", "the model gave no gaussians")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise Fault("EmptyResult", f"{name}: {np.count_nonzero(~np.isfinite(array))} values are not finite")
    arrays["faces"] = mesh.faces.detach().cpu().numpy().astype(np.int32)
    return arrays, gaussian.init_params


def _floats(tensor: Any) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array
