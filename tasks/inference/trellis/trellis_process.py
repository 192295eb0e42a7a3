"""The TRELLIS-VGGT model in a process of its own: the only code that imports torch and trellis.

`trellis.py` starts it as a script, by its path, so that upstream's environment has to hold nothing of this project.
Both sides speak through a `Channel`. Beside numpy and Pillow everything is imported when it is asked for.

No file of upstream is changed. What the model does not need is kept from being loaded by putting something else in the
place of the loader while `from_pretrained` runs; steps are observed through attributes of the sampler objects.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import starmap
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GIB = 2**30
PREPARED_SIZE = (518, 518)
# What a transformer block of a flow is called with; others are left as they are
BLOCK = ["x", "mod", "context"]
# At most, of a tensor that blocks move to the GPU again and again: where sequences begin
FEW_VALUES = 64
# A step of the latents' flow takes about five times one of the structure's (measured with 6 and 16 views)
STRUCTURE_STEP_COST, LATENT_STEP_COST = 1, 5
# The bake draws its views from numpy's global generator, which upstream leaves unseeded
BAKE_SEED = 0
PR_SET_PDEATHSIG = 1
# (x, y, z) z-up -> (x, z, -y) y-up, as upstream's to_glb multiplies from the right
Z_UP_TO_Y_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)

# Strengths mean the formula (1 + s) * p - s * n. A fork whose formula is s * p + (1 - s) * n wants one more.
VARIANTS = {0: "estheryang11", 1: "GAP-LAB-CUHK-SZ"}

OUT_OF_MEMORY = re.compile(r"out of memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
DEVICE_LOST = re.compile(r"CUDA error|Cuda error|CUDA driver error|STATUS_EXECUTION_FAILED|STATUS_INTERNAL_ERROR")
NOT_BUILT_FOR_DEVICE = re.compile(r"no kernel image", re.IGNORECASE)
ALLOCATION = re.compile(r"Tried to allocate ([\d.]+) ([KMG])iB")
# What follows in PyTorch's message is how much it caches, and settings to try
ADVICE = " Of the allocated memory"
# Of urllib, huggingface_hub and safetensors; what else says that weights are not there is told by its base class
WEIGHTS_ERRORS = {"URLError", "HTTPError", "RepositoryNotFoundError", "EntryNotFoundError", "SafetensorError"}


@dataclass(frozen=True)
class Message:
    """What goes over a channel: a header that is JSON, and arrays by name."""

    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Channel:
    """Messages over a socket: length, header, then each array's bytes as they lie in memory; no pickles.

    `waiting` is called about every `poll_seconds` in which nothing moves; it raises to give up. EOFError: the other
    side is gone.
    """

    def __init__(self, connection: socket.socket, poll_seconds: float = 0) -> None:
        self._socket = connection
        # The kernel's own timeouts (0: none): with Python's the socket is non-blocking, and an array goes over in
        # hundreds of pieces, each of which has to get the interpreter's lock back from the threads that compute
        timeval = struct.pack("ll", int(poll_seconds), int(poll_seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, timeval)

    def send(self, message: Message, waiting: Callable[[], None] = lambda: None) -> None:
        """Send all of a message."""
        arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
        shapes = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        header = json.dumps({"header": message.header, "arrays": shapes}).encode()
        self._send(memoryview(len(header).to_bytes(8, "big") + header), waiting)
        for array in arrays.values():
            if array.size:
                self._send(array.data.cast("B"), waiting)

    def receive(self, waiting: Callable[[], None] = lambda: None) -> Message:
        """The next message."""
        length = np.empty(8, np.uint8)
        self._receive(length, waiting)
        header = np.empty(int.from_bytes(length.tobytes(), "big"), np.uint8)
        self._receive(header, waiting)
        content = json.loads(header.tobytes())
        arrays = {}
        for name, dtype, shape in content["arrays"]:
            arrays[name] = np.empty(shape, np.dtype(dtype))
            self._receive(arrays[name], waiting)
        return Message(content["header"], arrays)

    def _send(self, data: memoryview, waiting: Callable[[], None]) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:  # the timeout
                waiting()
            except (BrokenPipeError, ConnectionResetError) as error:
                raise EOFError from error

    def _receive(self, array: NDArray[Any], waiting: Callable[[], None]) -> None:
        if not array.size:
            return
        rest = array.data.cast("B")
        while rest:
            try:
                count = self._socket.recv_into(rest, flags=socket.MSG_WAITALL)
            except BlockingIOError:  # the timeout
                waiting()
                continue
            except ConnectionResetError as error:
                raise EOFError from error
            if not count:
                raise EOFError
            rest = rest[count:]


class Fault(Exception):
    """Something that the other side has a type for: OutOfMemory, MissingImport, NoCuda, Unsupported, EmptyResult."""

    def __init__(self, kind: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.kind, self.facts = kind, facts


class Deferred:
    """Stands for a network that most captures do not need: made when it is first called."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = functools.cache(make)

    def __call__(self, *args: Any) -> Any:
        return self._make()(*args)

    def _itself(self, *_: Any) -> Deferred:
        return self

    to = eval = cuda = cpu = _itself


class Model:
    """The loaded pipeline and what is asked of it. `answer` gives what goes back over the channel."""

    def __init__(self, progressed: Callable[[float], None]) -> None:
        self._progressed = progressed
        self._pipeline: Any = None
        self._variant = ""
        self._strength_offset = 0
        self._steps_done = self._steps_total = 0
        self._loading = False

    def answer(self, request: Message) -> Message:
        """Do what is asked; an error becomes an answer that holds strings only, so that nothing keeps its tensors."""
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
            return Message({"kind": "error", **fault_of(error, self._loading)})
        finally:
            self._loading = False

    def release(self) -> None:
        """Give the memory that no tensor holds back to the device."""
        gc.collect()
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
            sys.modules["torch"].cuda.empty_cache()

    def _probe(self, _: Message) -> Message:
        """What this machine has, each package really imported: name -> version, or why it cannot be."""
        wanted = [
            "torch", "trellis.pipelines", "spconv.pytorch", "flash_attn", "xformers.ops", "nvdiffrast.torch",
            "diff_gaussian_rasterization", "fast_simplification",
        ]  # fmt: skip
        found: dict[str, Any] = {name: _imported(name) for name in wanted}
        device = None
        if not found["torch"]["error"]:
            torch = importlib.import_module("torch")
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                device = {"name": torch.cuda.get_device_name(), "free_gib": free / GIB, "total_gib": total / GIB}
        return Message({"kind": "result", "imports": found, "device": device})

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
        self._loading = True
        # made on the GPU: drawing the initial weights on the CPU takes 30 s, only for them to be overwritten
        with torch.device("cuda"), self._lean(torch, pipeline_class):
            pipeline = pipeline_class.from_pretrained(request.header["weights"])
        pipeline._device, pipeline.low_vram = torch.device("cuda"), False
        pipeline.cuda()
        pipeline.VGGT_model.to(pipeline._device)
        self._strength_offset = strength_offset(torch, pipeline)
        self._variant = VARIANTS[self._strength_offset]
        _require_signature(pipeline.run)
        self._observe(pipeline.sparse_structure_sampler, STRUCTURE_STEP_COST)
        self._observe(pipeline.slat_sampler, LATENT_STEP_COST)
        for sampler in (pipeline.sparse_structure_sampler, pipeline.slat_sampler):
            sampler.sample = _replayed(torch, sampler.sample)
        pipeline.sample_slat = _unless_empty(pipeline.sample_slat)
        self._pipeline = pipeline
        gc.collect()
        gc.freeze()  # the model stays: later collections pass over it
        seconds = {"imports": imported - begun, "load": time.perf_counter() - imported}
        return Message({"kind": "result", "variant": self._variant, "seconds": seconds})

    @contextmanager
    def _lean(self, torch: Any, pipeline_class: type) -> Iterator[None]:
        """Within the block, upstream loads nothing that inference does not need, and no network twice.

        BiRefNet is made when a view without a mask needs it; DreamSim, which only the refinement uses, never; DINOv2,
        which two constructors ask for, once.
        """
        module = sys.modules[pipeline_class.__module__]
        segmentation: Any = getattr(module, "AutoModelForImageSegmentation", None)

        def defer(*args: Any, **kwargs: Any) -> Deferred:
            def make() -> Any:
                self._loading = True
                network = segmentation.from_pretrained(*args, **kwargs).to("cuda").eval()
                self._loading = False
                return network

            return Deferred(make)

        def no_dreamsim(*_: Any, **__: Any) -> tuple[Deferred, None]:
            return Deferred(lambda: _refuse("DreamSim is not loaded: this program does not refine")), None

        with ExitStack() as stack:
            stack.enter_context(_substituted(torch.hub, "load", functools.cache(torch.hub.load)))
            if segmentation is not None:
                loader = SimpleNamespace(from_pretrained=defer)
                stack.enter_context(_substituted(module, "AutoModelForImageSegmentation", loader))
            if hasattr(module, "dreamsim"):
                stack.enter_context(_substituted(module, "dreamsim", no_dreamsim))
            yield

    def _observe(self, sampler: Any, cost: int) -> None:
        """Count each step of a sampler: `sample` calls `self.sample_once` once a step, in both variants."""
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
                preprocess_image=False,  # dead: see _prepared
                sparse_structure_sampler_params=self._sampling(asked["ss_steps"], asked["ss_cfg"]),
                slat_sampler_params=self._sampling(asked["slat_steps"], asked["slat_cfg"]),
            )
        ran = time.perf_counter()
        arrays, init = _result(outputs)
        seconds = {"preprocess": prepared - begun, "run": ran - prepared, "fetch": time.perf_counter() - ran}
        peak = torch.cuda.max_memory_allocated() / GIB
        header = {"kind": "result", "variant": self._variant, "gaussian_init": init, "seconds": seconds}
        return Message(header | {"peak_gib": peak}, arrays)

    def _sampling(self, steps: int, strength: float) -> dict[str, Any]:
        return {"steps": steps, "cfg_strength": strength + self._strength_offset}

    def _all_prepared(self, names: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> list[Image.Image]:
        views = [(name, arrays[f"{index}.image"], arrays[f"{index}.mask"]) for index, name in enumerate(names)]
        if any(mask.all() for _, _, mask in views):  # BiRefNet is for one thread
            return list(starmap(self._prepared, views))
        with ThreadPoolExecutor() as pool:  # numpy and Pillow let go of the interpreter's lock
            return list(pool.map(self._prepared, *zip(*views, strict=True)))

    def _prepared(self, name: str, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Image.Image:
        """The view as `run` wants it; a mask that is True everywhere says nothing: BiRefNet makes one."""
        if not mask.any():
            raise Fault("EmptyResult", f"view {name}: its mask has no foreground")
        # upstream takes the alpha channel for the mask if any of it is below 255
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
        with _fast_decimation(post) as decimated_by:
            textured = post.to_glb(
                gaussian, mesh, simplify=asked["simplify"], texture_size=asked["texture_px"], verbose=False
            )
        vertices = np.asarray(textured.vertices, np.float32) @ Z_UP_TO_Y_UP.T
        arrays: dict[str, NDArray[Any]] = {
            "vertices": vertices,
            "faces": np.asarray(textured.faces, np.int32),
            "uv": np.asarray(textured.visual.uv, np.float32),
            "texture": np.asarray(textured.visual.material.baseColorTexture.convert("RGB")),
        }
        if not len(arrays["faces"]):
            raise Fault("EmptyResult", "to_glb: no face is left of the mesh")
        seconds = {"to_glb": time.perf_counter() - begun}
        return Message({"kind": "result", "decimated_by": decimated_by, "seconds": seconds}, arrays)


def strength_offset(torch: Any, pipeline: Any) -> int:
    """What has to be added to a guidance strength of the formula (1 + s) * p - s * n; asked of the samplers themselves.

    With p = 1 and n = 0 a sampler gives 1 + s, or s where one more is wanted.
    """
    strength = 3.0
    offsets = set()
    for sampler in (pipeline.sparse_structure_sampler, pipeline.slat_sampler):
        guided = sampler._inference_model(
            lambda _x, _t, cond, **_: cond,
            torch.zeros(1),
            0.5,
            cond=torch.ones(1),
            neg_cond=torch.zeros(1),
            cfg_strength=strength,
            cfg_interval=(0.0, 1.0),
        )
        offsets.add(1 + strength - float(guided[0]))
    if len(offsets) != 1 or not offsets <= VARIANTS.keys():
        raise Fault("Unsupported", f"the samplers' guidance is of no known variant (offsets {sorted(offsets)})")
    return int(offsets.pop())


def fault_of(error: BaseException, loading: bool = False) -> dict[str, Any]:
    """What the other side is told of an error: its kind, and the first cause, which upstream's handlers may hide."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    chain.reverse()
    message = _told(chain[0])
    if len(chain) > 1:
        message += f" (it surfaced as {_told(error)})"
    for cause in chain:
        if isinstance(cause, Fault):
            return {"fault": cause.kind, "message": str(cause), **cause.facts}
    for cause in chain:
        if type(cause).__name__ == "OutOfMemoryError" or OUT_OF_MEMORY.search(str(cause)):
            return {"fault": "OutOfMemory", "message": message, **_memory(str(cause))}
    for cause in chain:
        if DEVICE_LOST.search(str(cause)) and not NOT_BUILT_FOR_DEVICE.search(str(cause)):
            return {"fault": "DeviceLost", "message": message}
        if isinstance(cause, ImportError):
            return {"fault": "MissingImport", "message": message, "name": cause.name or str(cause)}
        names = {base.__name__ for base in type(cause).__mro__}
        if loading and (isinstance(cause, FileNotFoundError | ConnectionError) or names & WEIGHTS_ERRORS):
            return {"fault": "WeightsMissing", "message": message}
    return {"fault": "Other", "message": message}


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition(ADVICE)[0]}" if lines else type(error).__name__


def _memory(message: str) -> dict[str, float | None]:
    """GiB that were asked for, where the message says it, and GiB that were free."""
    allocation = ALLOCATION.search(message)
    size = {"K": 2**10, "M": 2**20, "G": 2**30}
    needed = float(allocation[1]) * size[allocation[2]] / GIB if allocation else None
    free = sys.modules["torch"].cuda.mem_get_info()[0] / GIB if "torch" in sys.modules else None
    return {"needed_gib": needed, "free_gib": free}


def _cuda() -> Any:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise Fault("NoCuda", f"torch {torch.__version__} sees no CUDA device")
    return torch


def _imported(name: str) -> dict[str, str]:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises is what is asked for here
        return {"version": "", "error": fault_of(error)["message"]}
    package = sys.modules[name.partition(".")[0]]
    return {"version": str(getattr(package, "__version__", "")), "error": ""}


def _require_memory(torch: Any, needed_gib: float) -> None:
    """What other processes hold is not there for us; what this one holds is."""
    free_gib = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    if free_gib < needed_gib:
        message = f"{needed_gib:g} GiB of GPU memory are needed, {free_gib:.1f} GiB are free"
        raise Fault("OutOfMemory", message, needed_gib=needed_gib, free_gib=free_gib)


def _require_signature(run: Callable[..., Any]) -> None:
    wanted = ("image", "seed", "formats", "preprocess_image", "sparse_structure_sampler_params", "slat_sampler_params")
    missing = [name for name in wanted if name not in inspect.signature(run).parameters]
    if missing:
        raise Fault("Unsupported", f"TrellisVGGTTo3DPipeline.run takes no {', '.join(missing)}: an unknown variant")


def _refuse(message: str) -> Any:
    raise Fault("Unsupported", message)


def _unless_empty(sample_slat: Callable[..., Any]) -> Callable[..., Any]:
    """An empty structure fails somewhere inside of SparseTensor: told here as what it is."""

    @functools.wraps(sample_slat)
    def checked(cond: Any, coords: Any, *args: Any, **kwargs: Any) -> Any:
        if not coords.shape[0]:
            raise Fault("EmptyResult", "the model found nothing in the views: no voxel is occupied")
        return sample_slat(cond, coords, *args, **kwargs)

    return checked


def _result(outputs: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a run's outputs, and what its Gaussian is constructed with."""
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


@contextmanager
def _substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _replayed(torch: Any, sample: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler's `sample` whose steps launch a block's kernels all at once, as a CUDA graph.

    Launched one by one from Python they take twice the time that the GPU needs for them. All steps of a sampling have
    the same shapes, so each block of the flow is recorded in its second call and replayed after that: the same kernels,
    so the same values. Nothing of it is kept after the sampling.
    """

    @functools.wraps(sample)
    def replayed(flow: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(torch)
        blocks = [
            block for block in getattr(flow, "blocks", ()) if [*inspect.signature(block.forward).parameters] == BLOCK
        ]
        with _substituted(torch.Tensor, "to", _once(torch)) if blocks else nullcontext():
            for block in blocks:
                block.forward = Block(recorder, block.forward)
            try:
                return sample(flow, *args, **kwargs)
            finally:
                for block in blocks:
                    del block.forward

    return replayed


class Recorder:
    """What the blocks of a sampling share: where their inputs are read from, and the memory in which they work."""

    def __init__(self, torch: Any) -> None:
        self.torch, self.works = torch, True
        self._inputs: list[Any] = []

    def takes(self, given: Sequence[Any]) -> bool:
        """Copy what a block is given to where its kernels read it, if its shape is that of the others."""
        if not self._inputs:
            self._pool, self._stream = self.torch.cuda.graph_pool_handle(), _stream(self.torch)
            self._inputs = [each.clone() for each in given]
        if [(each.shape, each.dtype) for each in given] != [(each.shape, each.dtype) for each in self._inputs]:
            return False
        for buffer, each in zip(self._inputs, given, strict=True):
            buffer.copy_(each)
        return True

    def record(self, compute: Callable[[Sequence[Any]], Any]) -> tuple[Any, Any]:
        """The graph of what `compute` launches, and where its result will be."""
        cuda = self.torch.cuda
        graph = cuda.CUDAGraph()
        self._stream.wait_stream(cuda.current_stream())
        with cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = compute(self._inputs)
            finally:
                graph.capture_end()
        cuda.current_stream().wait_stream(self._stream)
        return graph, result


@functools.cache
def _stream(torch: Any) -> Any:
    """The one that is recorded on: cuBLAS keeps 32 MB for each."""
    return torch.cuda.Stream()


class Block:
    """The `forward` of a transformer block: x is a tensor or sparse, the context one or many."""

    def __init__(self, recorder: Recorder, forward: Callable[..., Any]) -> None:
        self._recorder, self._forward = recorder, forward
        self._graph: Any = None
        self._result: Any = None
        self._warm = False

    def __call__(self, x: Any, mod: Any, context: Any) -> Any:
        many, sparse = isinstance(context, list), hasattr(x, "feats")
        given = [x.feats if sparse else x, mod, *(context if many else [context])]

        def compute(inputs: Sequence[Any]) -> Any:
            first, modulated, *contexts = inputs
            result = self._forward(x.replace(first) if sparse else first, modulated, contexts if many else contexts[0])
            return result.feats if sparse else result

        warm, self._warm = self._warm, True
        if not warm or not self._recorder.works or not self._recorder.takes(given):
            return self._forward(x, mod, context)
        if self._graph is None:
            try:
                self._graph, self._result = self._recorder.record(compute)
            except RuntimeError:  # something in it cannot be recorded, or memory is short
                traceback.print_exc()
                self._recorder.works = False
                return self._forward(x, mod, context)
        self._graph.replay()
        # read by the next block before it is written again
        return x.replace(self._result) if sparse else self._result


def _once(torch: Any) -> Callable[..., Any]:
    """`Tensor.to` that moves the same few values to the GPU once: each time it would wait for all that is launched."""
    to, known = torch.Tensor.to, dict[Any, Any]()

    def moved(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_cuda:
            return to(tensor, *args, **kwargs)
        few = tensor.numel() <= FEW_VALUES
        key = (tensor.dtype, tensor.shape, *tensor.flatten().tolist(), args, *kwargs.items()) if few else None
        if key in known:
            return known[key]
        result = to(tensor, *args, **kwargs)
        if result.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("what is moved to the GPU would be read from the same place at each replay")
        if result.is_cuda and few:
            known[key] = result
        return result

    return moved


@contextmanager
def _fast_decimation(post: ModuleType) -> Iterator[str]:
    """Within the block upstream decimates with fast-simplification where it is there: a quarter of pyvista's time."""
    try:
        fast = importlib.import_module("fast_simplification")
    except ImportError:
        yield "pyvista"
        return

    class PolyData:
        """What upstream uses of pyvista's."""

        def __init__(self, points: NDArray[Any], faces: NDArray[Any]) -> None:
            self.points, self.faces = points, faces

        def decimate(self, reduction: float, progress_bar: bool = False) -> PolyData:
            triangles = np.ascontiguousarray(self.faces.reshape(-1, 4)[:, 1:], np.int32)
            points, triangles = fast.simplify(np.ascontiguousarray(self.points, np.float32), triangles, reduction)
            # float64 comes out, which upstream's hole filling does not take
            return PolyData(points.astype(np.float32), np.insert(triangles, 0, 3, axis=1))

    with _substituted(post, "pv", SimpleNamespace(PolyData=PolyData)):
        yield "fast-simplification"


def serve(channel: Channel) -> None:
    """Answer requests until the other side is gone or says so."""
    model = Model(lambda fraction: channel.send(Message({"kind": "progress", "fraction": fraction})))
    while (request := channel.receive()).header["operation"] != "shutdown":
        answer = model.answer(request)
        lost = answer.header.get("fault") == "DeviceLost"
        channel.send(answer)
        del answer, request
        if not lost:  # the other side ends this process; a lost device answers nothing more
            model.release()


def _end_with(parent: int, descriptor: int) -> None:
    """Never outlive the parent, even in the middle of a CUDA call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        hung_up = select.poll()
        hung_up.register(descriptor, 0)  # nothing but the hang-up
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """`trellis_process.py DESCRIPTOR PARENT`: serve on an inherited socket."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _end_with(parent, descriptor)
    try:
        serve(Channel(socket.socket(fileno=descriptor)))
    except EOFError:
        sys.exit("the parent is gone")


if __name__ == "__main__":
    main()
