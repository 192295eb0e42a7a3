"""Blocks are recorded and replayed, with a stand-in for CUDA's graphs that notes and repeats the computations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tasks.inference.trellis.process.graphs import FEW_VALUES, moved_once, replayed

recording: list[list[Callable[[], object]]] = []


class Tensor:
    """An array; while a graph is recorded, computations with it are added to the graph."""

    def __init__(self, values: Any, is_cuda: bool = True) -> None:
        self.values, self.is_cuda = np.array(values, np.float64), is_cuda
        self.shape, self.dtype = self.values.shape, self.values.dtype

    def clone(self) -> Tensor:
        return Tensor(self.values)

    def copy_(self, other: Tensor) -> None:
        self.values[...] = other.values

    def numel(self) -> int:
        return self.values.size

    def flatten(self) -> Tensor:
        return Tensor(self.values.ravel())

    def tolist(self) -> list[float]:
        return self.values.tolist()

    def to(self, device: str) -> Tensor:
        return Tensor(self.values, device == "cuda")

    def __add__(self, other: Tensor) -> Tensor:
        result = Tensor(self.values + other.values)
        for tape in recording:
            tape.append(lambda: np.add(self.values, other.values, out=result.values))
        return result


class Sparse:
    def __init__(self, feats: Tensor) -> None:
        self.feats = feats

    def replace(self, feats: Tensor) -> Sparse:
        return Sparse(feats)


class Graph:
    broken = False

    def capture_begin(self, **_: Any) -> None:
        self.tape: list[Callable[[], object]] = []
        recording.append(self.tape)

    def capture_end(self) -> None:
        recording.clear()
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self) -> None:
        for compute in self.tape:
            compute()


class Adding:
    """A block that adds its inputs."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(self, x: Any, mod: Tensor, context: Any) -> Any:
        self.calls += 1
        result = (x.feats if isinstance(x, Sparse) else x) + mod
        for each in context if isinstance(context, list) else [context]:
            result = result + each
        return x.replace(result) if isinstance(x, Sparse) else result


@pytest.fixture
def torch() -> Iterator[Any]:
    waits = SimpleNamespace(wait_stream=lambda _: None)
    cuda = SimpleNamespace(
        graph_pool_handle=tuple,
        Stream=lambda: waits,
        stream=lambda _: nullcontext(),
        current_stream=lambda: waits,
        CUDAGraph=type("Graph", (Graph,), {}),
        is_current_stream_capturing=lambda: bool(recording),
    )
    yield type("torch", (), {"cuda": cuda, "Tensor": type("Tensor", (Tensor,), {})})
    recording.clear()


def sampled(torch: Any, blocks: list[Adding], steps: list[tuple[Any, Tensor, Any]]) -> list[Any]:
    """Return the results of a sampler, step by step, whose flow consists of these blocks."""

    def values(result: Any) -> list[float]:
        return (result.feats if isinstance(result, Sparse) else result).tolist()

    def sample(flow: Any) -> list[Any]:
        results = []
        for x, modulation, context in steps:
            for block in flow.blocks:
                x = block.forward(x, modulation, context)
            results.append(values(x))
        return results

    return replayed(torch, sample)(SimpleNamespace(blocks=blocks))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_steps_are_replayed_with_their_own_inputs(kind: str, torch: Any) -> None:
    blocks = [Adding(), Adding()]
    steps: list[tuple[Any, Tensor, Any]] = []
    for step in range(5):
        x, modulation, context = Tensor([step, 10 * step]), Tensor([1, 2]), Tensor([step, 0])
        steps.append((x, modulation, context) if kind == "dense" else (Sparse(x), modulation, [context, context]))
    contexts = 1 if kind == "dense" else 2
    expected = [[step + 2 * (1 + contexts * step), 10 * step + 4] for step in range(5)]
    assert sampled(torch, blocks, steps) == expected
    assert [block.calls for block in blocks] == [2, 2]  # one to warm up, one to record
    assert all("forward" not in vars(block) for block in blocks)


def test_another_shape_is_computed_without_a_graph(torch: Any) -> None:
    block = Adding()
    steps = [(Tensor([n] * size), Tensor([1] * size), Tensor([1] * size)) for n, size in enumerate((2, 2, 3, 2, 3))]
    assert sampled(torch, [block], steps) == [[2, 2], [3, 3], [4, 4, 4], [5, 5], [6, 6, 6]]
    assert block.calls == 4


def test_a_block_that_cannot_be_recorded_is_computed_without_a_graph(
    torch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.cuda.CUDAGraph.broken = True
    blocks = [Adding(), Adding()]
    steps = [(Tensor([n]), Tensor([1]), Tensor([1])) for n in range(4)]
    assert sampled(torch, blocks, steps) == [[4], [5], [6], [7]]
    assert [block.calls for block in blocks] == [5, 4]  # it is tried once
    assert "not permitted" in capfd.readouterr().err


def test_a_block_of_another_kind_is_left_alone(torch: Any) -> None:
    class Other(Adding):
        def forward(self, x: Any, t: Any, condition: Any) -> Any:
            return super().forward(x, t, condition)

    block = Other()
    assert sampled(torch, [block], [(Tensor([n]), Tensor([1]), Tensor([1])) for n in range(4)]) == [[2], [3], [4], [5]]
    assert block.calls == 4


def test_blocks_are_themselves_again_after_an_error(torch: Any) -> None:
    block, to = Adding(), torch.Tensor.to
    with pytest.raises(ValueError, match="operands"):
        sampled(torch, [block], [(Tensor([1, 2, 3]), Tensor([1, 2]), Tensor([1]))])
    assert "forward" not in vars(block) and torch.Tensor.to is to


def test_few_values_go_to_the_gpu_once(torch: Any) -> None:
    move = moved_once(torch)
    lengths = [Tensor([0, 7], is_cuda=False), Tensor([0, 7], is_cuda=False), Tensor([0, 8], is_cuda=False)]
    moved = [move(each, "cuda") for each in lengths]
    assert moved[0] is moved[1] is not moved[2] and moved[2].tolist() == [0, 8]
    many = [Tensor(np.zeros(FEW_VALUES + 1), is_cuda=False) for _ in range(2)]
    assert move(many[0], "cuda") is not move(many[1], "cuda")
    assert move(lengths[0], "cpu") is not move(lengths[1], "cpu")  # a copy of its own, which may be changed
    assert move(moved[0], "cpu").tolist() == [0, 7]


def test_a_block_that_moves_new_values_at_each_step_is_not_recorded(
    torch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """A graph would read the values of the recording again."""

    class Moving(Adding):
        def forward(self, x: Any, mod: Tensor, context: Any) -> Any:
            return super().forward(x, mod, context) + torch.Tensor.to(Tensor([self.calls], is_cuda=False), "cuda")

    steps = [(Tensor([0]), Tensor([0]), Tensor([0])) for _ in range(3)]
    assert sampled(torch, [Moving()], steps) == [[1], [3], [4]]  # the second is computed twice
    assert "at each replay" in capfd.readouterr().err
