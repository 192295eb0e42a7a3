"""The velocity of a flow, computed at once: one CUDA graph for a whole step of each branch. `pipeline.py` uses it.

Launched one by one from Python, a step's kernels take more time than the GPU needs for them. A graph reads the buffers
that it was recorded with: conditions and tables of a new capture are copied into them. So a graph is recorded once for
a shape, not for a capture. On a CPU nothing is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .latent_flow import Pyramid

# Voxels and tokens are padded to multiples of these, so that few shapes occur: about 13,000 voxels have 3,000 tokens
VOXEL_BUCKET, TOKEN_BUCKET = 2048, 512
# Shapes of the latents' flow whose graphs are kept; each holds some tens of megabytes of tables and kernels
KEPT_SHAPES = 8

Compute = Callable[[Tensor, Tensor, list[Tensor] | None], Tensor]


class StepGraphs:
    """A flow's step for one shape: two graphs, with and without the condition, that share their working memory."""

    def __init__(self, compute: Compute, x: Tensor, keys_values: list[Tensor], pool: Any) -> None:
        self._x, self._time = torch.zeros_like(x), torch.zeros(1, device=x.device)
        self._results: dict[bool, Tensor] = {}
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        for conditional in (True, False):
            given = keys_values if conditional else None
            stream = _warming_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the first call sets up libraries, which a graph cannot record
                compute(self._x, self._time, given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._results[conditional] = compute(self._x, self._time, given)
            self._graphs[conditional] = graph

    def velocity(self, x: Tensor, t: float, conditional: bool) -> Tensor:
        """The velocity at time t of 0..1000."""
        self._x.copy_(x)
        self._time.fill_(t)
        self._graphs[conditional].replay()
        return self._results[conditional].clone()  # the next replay of either graph overwrites it


@functools.cache
def _warming_stream() -> torch.cuda.Stream:
    """The one stream for first calls: cuBLAS keeps 32 MB for each stream, for ever."""
    return torch.cuda.Stream()


def on_gpu(tensor: Tensor) -> bool:
    """True where graphs can be recorded."""
    return tensor.device.type == "cuda"


def _refill(buffers: list[Tensor], flow: Any, condition: Tensor) -> None:
    """Copy a condition's keys and values, block by block: two sets of them would take gigabytes."""
    for buffer, block in zip(buffers, flow.blocks, strict=True):
        buffer.copy_(block.cross_attn.keys_values(condition.to(flow.dtype)))


class StructureSteps:
    """The steps of the structure's flow. It has one shape for ever."""

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self._keys_values: list[Tensor] = []
        self._graphs: StepGraphs | None = None

    def begin(self, condition: Tensor, x: Tensor) -> Callable[[Tensor, float, bool], Tensor]:
        """The velocity for a condition (1, S, C) and latents of the shape of x."""
        if not on_gpu(x):
            return _eager(self._flow, self._flow.keys_values(condition))
        if self._graphs is None:
            self._keys_values = self._flow.keys_values(condition)
            self._graphs = StepGraphs(self._flow, x, self._keys_values, torch.cuda.graph_pool_handle())
        else:
            _refill(self._keys_values, self._flow, condition)
        return self._graphs.velocity


class LatentSteps:
    """The steps of the latents' flow, for voxels padded to buckets. Graphs are kept for one number of views."""

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self._keys_values: list[Tensor] = []
        self._shapes: dict[tuple[int, int], tuple[Pyramid, StepGraphs]] = {}
        self._pool: Any = None

    def begin(self, condition: Tensor, coords: Tensor) -> tuple[int, Callable[[Tensor, float, bool], Tensor]]:
        """The number of rows that the latents are padded to, and the velocity for contexts (V, S, C) and voxels."""
        flow = self._flow
        if not on_gpu(coords):
            keys_values, pyramid = flow.keys_values(condition), Pyramid.of(coords, flow.channels)
            return len(coords), _eager(lambda x, t, given: flow(x, t, given, pyramid), keys_values)
        pyramid = Pyramid.of(coords, flow.channels, VOXEL_BUCKET, TOKEN_BUCKET)
        self._hold(condition)
        shape = (pyramid.fine.rows, pyramid.coarse.rows)
        if shape in self._shapes:
            self._shapes[shape][0].refill(pyramid)
        else:
            if len(self._shapes) == KEPT_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            x = torch.zeros(shape[0], flow.in_channels, device=coords.device)
            graphs = StepGraphs(lambda x, t, given: flow(x, t, given, pyramid), x, self._keys_values, self._pool)
            self._shapes[shape] = pyramid, graphs
        return shape[0], self._shapes[shape][1].velocity

    def _hold(self, condition: Tensor) -> None:
        """Keep the condition's keys and values where the graphs read them. Another number of views ends the graphs."""
        if self._keys_values and self._keys_values[0].shape[1] == len(condition):
            _refill(self._keys_values, self._flow, condition)
            return
        self.release()
        self._keys_values = self._flow.keys_values(condition)
        self._pool = torch.cuda.graph_pool_handle()

    def release(self) -> None:
        """Free the graphs and what they hold."""
        self._shapes.clear()
        self._keys_values = []


def _eager(compute: Compute, keys_values: list[Tensor]) -> Callable[[Tensor, float, bool], Tensor]:
    def velocity(x: Tensor, t: float, conditional: bool) -> Tensor:
        time = torch.tensor([t], dtype=torch.float32, device=x.device)
        return compute(x, time, keys_values if conditional else None)

    return velocity
