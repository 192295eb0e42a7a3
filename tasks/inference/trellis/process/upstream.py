"""Changes to upstream's package (ReconViaGen's `trellis`) while it runs; no file of it is changed. For `model.py`.

Functions and classes of upstream are replaced within a `with` block, or by attributes of its objects.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault

# Upstream's variants, by the number that has to be added to a guidance strength of the formula (1 + s) * p - s * n. The
# second variant computes s * p + (1 - s) * n, so its strength is one more.
VARIANTS = {0: "estheryang11", 1: "GAP-LAB-CUHK-SZ"}


@contextmanager
def substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute within the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class Deferred:
    """A network that is made at its first call: most captures do not need it."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = functools.cache(make)

    def __call__(self, *args: Any) -> Any:
        return self._make()(*args)

    def _itself(self, *_: Any) -> Deferred:
        return self

    to = eval = cuda = cpu = _itself


@contextmanager
def lean(torch: Any, pipeline_class: type, loading: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within the block, upstream loads only the networks that inference needs, and each of them once.

    BiRefNet is loaded when a view without a mask needs it, inside of `loading()`. DreamSim is never loaded: only the
    refinement uses it. DINOv2, which two constructors ask for, is loaded once.
    """
    module = sys.modules[pipeline_class.__module__]
    segmentation: Any = getattr(module, "AutoModelForImageSegmentation", None)

    def defer(*args: Any, **kwargs: Any) -> Deferred:
        def make() -> Any:
            with loading():
                return segmentation.from_pretrained(*args, **kwargs).to("cuda").eval()

        return Deferred(make)

    def no_dreamsim(*_: Any, **__: Any) -> tuple[Deferred, None]:
        def refuse() -> Any:
            raise Fault("Unsupported", "DreamSim is not loaded: this program does not refine")

        return Deferred(refuse), None

    with ExitStack() as stack:
        stack.enter_context(substituted(torch.hub, "load", functools.cache(torch.hub.load)))
        if segmentation is not None:
            loader = SimpleNamespace(from_pretrained=defer)
            stack.enter_context(substituted(module, "AutoModelForImageSegmentation", loader))
        if hasattr(module, "dreamsim"):
            stack.enter_context(substituted(module, "dreamsim", no_dreamsim))
        yield


def strength_offset(torch: Any, pipeline: Any) -> int:
    """Find the variant: compute the number that is added to a guidance strength (`VARIANTS`) from the samplers.

    With p = 1 and n = 0 a sampler gives 1 + s in the first variant, s in the second. Raises Fault for any other.
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
        raise Fault("Unsupported", f"the samplers' guidance is not of a known variant (offsets {sorted(offsets)})")
    return int(offsets.pop())


def require_signature(run: Callable[..., Any]) -> None:
    """Raise Fault if the pipeline's `run` lacks a parameter that the model passes."""
    wanted = ("image", "seed", "formats", "preprocess_image", "sparse_structure_sampler_params", "slat_sampler_params")
    missing = [name for name in wanted if name not in inspect.signature(run).parameters]
    if missing:
        raise Fault(
            "Unsupported", f"TrellisVGGTTo3DPipeline.run does not take {', '.join(missing)}: an unknown variant"
        )


def unless_empty(sample_slat: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `sample_slat` that raises Fault for an empty structure; upstream's own message would not say it."""

    @functools.wraps(sample_slat)
    def checked(cond: Any, coords: Any, *args: Any, **kwargs: Any) -> Any:
        if not coords.shape[0]:
            raise Fault("EmptyResult", "the model found nothing in the views: no voxel is occupied")
        return sample_slat(cond, coords, *args, **kwargs)

    return checked


@contextmanager
def fast_decimation(post: ModuleType) -> Iterator[str]:
    """Within the block, upstream's postprocessing decimates with fast-simplification: a quarter of pyvista's time.

    Gives the name of the library; pyvista if fast-simplification is not installed.
    """
    try:
        fast = importlib.import_module("fast_simplification")
    except ImportError:
        yield "pyvista"
        return

    class PolyData:
        """The part of pyvista's class that upstream uses."""

        def __init__(self, points: NDArray[Any], faces: NDArray[Any]) -> None:
            self.points, self.faces = points, faces

        def decimate(self, reduction: float, progress_bar: bool = False) -> PolyData:
            triangles = np.ascontiguousarray(self.faces.reshape(-1, 4)[:, 1:], np.int32)
            points, triangles = fast.simplify(np.ascontiguousarray(self.points, np.float32), triangles, reduction)
            # upstream's hole filling does not take the float64 that comes out
            return PolyData(points.astype(np.float32), np.insert(triangles, 0, 3, axis=1))

    with substituted(post, "pv", SimpleNamespace(PolyData=PolyData)):
        yield "fast-simplification"
