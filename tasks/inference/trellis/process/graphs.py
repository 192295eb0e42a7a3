"""CUDA graphs: a sampler's steps launch their kernels in one call instead of one by one. `model.py` applies it.

Launched one by one from Python, the kernels take twice the time that the GPU needs for them. All steps of one sampling
have the same shapes, so each transformer block is recorded in its second call and replayed afterwards: the same
kernels, so the same values.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from .upstream import substituted

# The parameters of a transformer block's `forward`; blocks with other parameters are not recorded
BLOCK = ["x", "mod", "context"]
# Largest number of values of a tensor that is moved to the GPU once and kept, such as the starts of sequences
FEW_VALUES = 64


def replayed(torch: Any, sample: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sampler's `sample` whose blocks are recorded and replayed. Nothing is kept after a sampling."""

    @functools.wraps(sample)
    def sample_with_graphs(flow: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(torch)
        blocks = [
            block for block in getattr(flow, "blocks", ()) if [*inspect.signature(block.forward).parameters] == BLOCK
        ]
        with substituted(torch.Tensor, "to", moved_once(torch)) if blocks else nullcontext():
            for block in blocks:
                block.forward = Block(recorder, block.forward)
            try:
                return sample(flow, *args, **kwargs)
            finally:
                for block in blocks:
                    del block.forward

    return sample_with_graphs


class Recorder:
    """Records graphs. The blocks of a sampling share it: the buffers of their inputs and the memory they work in.

    works: False once a recording has failed; then no block is recorded any more.
    """

    def __init__(self, torch: Any) -> None:
        self.torch, self.works = torch, True
        self._inputs: list[Any] = []

    def takes(self, given: Sequence[Any]) -> bool:
        """Copy a block's inputs to the buffers that the kernels read; False if their shapes are not the buffers'."""
        if not self._inputs:
            self._pool, self._stream = self.torch.cuda.graph_pool_handle(), _stream(self.torch)
            self._inputs = [each.clone() for each in given]
        if [(each.shape, each.dtype) for each in given] != [(each.shape, each.dtype) for each in self._inputs]:
            return False
        for buffer, each in zip(self._inputs, given, strict=True):
            buffer.copy_(each)
        return True

    def record(self, compute: Callable[[Sequence[Any]], Any]) -> tuple[Any, Any]:
        """Return the graph of the kernels that `compute` launches, and the tensor that will hold its result."""
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
    """Return the one stream for recordings: cuBLAS keeps 32 MB for each stream."""
    return torch.cuda.Stream()


class Block:
    """The `forward` of a transformer block. x: a tensor or a sparse tensor. context: one tensor or a list of them."""

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
            except RuntimeError:  # an operation that cannot be recorded, or too little memory
                traceback.print_exc()
                self._recorder.works = False
                return self._forward(x, mod, context)
        self._graph.replay()
        # the next block reads the result before the next replay overwrites it
        return x.replace(self._result) if sparse else self._result


def moved_once(torch: Any) -> Callable[..., Any]:
    """Return a `Tensor.to` that moves equal small tensors to the GPU once: each move waits for all launched kernels."""
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
            raise RuntimeError("a tensor moved to the GPU during a recording would be the same at each replay")
        if result.is_cuda and few:
            known[key] = result
        return result

    return moved
