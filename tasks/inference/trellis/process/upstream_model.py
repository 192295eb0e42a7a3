"""Upstream's pipeline in the model's process: what runs where CAPTURE2MESH_TRELLIS_ROOT names upstream's checkout.

It has upstream's exporter, `to_glb`. `serve.py` chooses it.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .channel import Message
from .faults import GIB, Fault
from .graphs import replayed
from .model import Model, arrays_of, cuda, require_memory
from .upstream import VARIANTS, fast_decimation, lean, require_signature, strength_offset, unless_empty

PREPARED_SIZE = (518, 518)
# A step of the latents' flow takes about five times as long as one of the structure's (measured with 6 and 16 views)
STRUCTURE_STEP_COST, LATENT_STEP_COST = 1, 5
# The bake draws its views from numpy's global generator, which upstream does not seed
BAKE_SEED = 0
# From y-up (x, z, -y) back to z-up (x, y, z), multiplied from the right: the inverse of what upstream's to_glb does
Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


class UpstreamModel(Model):
    """Upstream's pipeline, its blocks replayed as CUDA graphs."""

    def __init__(self, progressed: Callable[[float], None]) -> None:
        super().__init__(progressed)
        self._pipeline: Any = None
        self._variant = ""
        self._strength_offset = 0
        self._steps_done = self._steps_total = 0

    def _trial(self, device: str) -> float:
        """Upstream's networks are not known without weights: attention in half precision stands for them."""
        begun, torch = time.perf_counter(), importlib.import_module("torch")
        tokens = torch.ones(1, 1, 16, 64, dtype=torch.float16, device=device)
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).cpu()
        return time.perf_counter() - begun

    def _load(self, request: Message) -> Message:
        begun = time.perf_counter()
        torch = cuda()
        pipelines = importlib.import_module("trellis.pipelines")
        pipeline_class = getattr(pipelines, "TrellisVGGTTo3DPipeline", None)
        if pipeline_class is None:
            raise Fault(
                "Unsupported",
                f"the trellis package at {pipelines.__file__} has no TrellisVGGTTo3DPipeline: it is not ReconViaGen's",
            )
        imported = time.perf_counter()
        require_memory(torch, request.header["min_free_gib"])
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
        require_memory(torch, asked["min_free_gib"])
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
        arrays, init = _result_of(outputs)
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
        torch, asked = cuda(), request.header
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


def _result_of(outputs: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the arrays of a run's outputs, and the arguments with which its Gaussian is constructed."""
    for name in ("mesh", "gaussian"):
        if not outputs.get(name):
            raise Fault("EmptyResult", f"the model gave no {name}")
    mesh, gaussian = outputs["mesh"][0], outputs["gaussian"][0]
    if not mesh.success:
        raise Fault("EmptyResult", f"the mesh has {len(mesh.vertices)} vertices and {len(mesh.faces)} faces")
    names = ("xyz", "features_dc", "features_rest", "scaling", "rotation", "opacity")
    tensors = {name: getattr(gaussian, f"_{name}", None) for name in names}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return arrays_of(mesh.vertices, mesh.faces, mesh.vertex_attrs, given), gaussian.init_params
