"""The part of torch that the engine and the stand-in of trellis use. Tensors are numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import faults
import numpy as np

__version__ = "2.11.0+standin"
float16, float32, int32, int64 = np.float16, np.float32, np.int32, np.int64
version = SimpleNamespace(cuda="13.0")
GIB = 2**30
state = SimpleNamespace(device="cpu", grad=True, rng=np.random.default_rng())


class OutOfMemoryError(RuntimeError):
    """As torch.cuda.OutOfMemoryError."""


class Tensor(np.ndarray):
    """A numpy array with torch's method names. On the GPU it refuses to become an array, as torch's tensor does."""

    place = "cpu"

    def __array_finalize__(self, origin: Any) -> None:
        self.place = getattr(origin, "place", "cpu")

    def to(self, device: Any) -> Tensor:
        moved = self.view(Tensor)
        moved.place = str(device)
        return moved

    def cuda(self) -> Tensor:
        return self.to("cuda")

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def detach(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return self.astype(np.float32)

    def long(self) -> Tensor:
        return self.astype(np.int64)

    def numpy(self) -> np.ndarray:
        if self.place != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return np.array(self)


def tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    array = np.array(data, dtype)
    return (
        (array.astype(np.float32) if dtype is None and array.dtype == np.float64 else array)
        .view(Tensor)
        .to(str(device or state.device))
    )


def zeros(*shape: int) -> Tensor:
    return tensor(np.zeros(shape, np.float32))


def ones(*shape: int, dtype: Any = np.float32, device: Any = None) -> Tensor:
    return tensor(np.ones(shape, dtype), device=device)


def randn(*shape: int) -> Tensor:
    return tensor(state.rng.standard_normal(shape, np.float32))


def manual_seed(seed: int) -> None:
    state.rng = np.random.default_rng(seed)


class device:  # noqa: N801  (torch's name)
    """A device, and a block in which tensors and modules are made on it."""

    def __init__(self, name: str) -> None:
        self.type = name

    def __str__(self) -> str:
        return self.type

    def __enter__(self) -> None:
        self._before, state.device = state.device, self.type

    def __exit__(self, *_: object) -> None:
        state.device = self._before


@contextmanager
def no_grad() -> Iterator[None]:
    before, state.grad = state.grad, False
    try:
        yield
    finally:
        state.grad = before


def _load_from_hub(repository: str, model: str, source: str = "github", pretrained: bool = True) -> Any:
    faults.note(f"hub {model} from {source}")
    if faults.asked("NO_DINO"):
        where = "hubconf.py" if source == "local" else "https://github.com"
        raise FileNotFoundError(f"{repository}/{where}: no such file")
    from trellis.models import Network

    return Network(model)


def _init_cuda() -> None:
    if faults.asked("NO_CUDA"):
        raise RuntimeError("No CUDA GPUs are available")
    if faults.asked("OLD_DRIVER"):
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")


def _free() -> int:
    return int(float(faults.setting("FREE_GIB", "70")) * GIB)


hub = SimpleNamespace(load=_load_from_hub, get_dir=lambda: "hub")
nn = SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=lambda queries, keys, values: values))
cuda = SimpleNamespace(
    is_available=lambda: not faults.asked("NO_CUDA"),
    init=_init_cuda,
    mem_get_info=lambda: (_free(), 80 * GIB),
    get_device_name=lambda: "Stand-in GPU",
    memory_reserved=lambda: 0,
    max_memory_allocated=lambda: 3 * GIB,
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: faults.note("empty_cache"),
    OutOfMemoryError=OutOfMemoryError,
)

Model = Callable[..., Any]
