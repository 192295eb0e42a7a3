"""The book-keeping around CUDA graphs, with a recorder in their place: what is recorded anew, and what is copied."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from tasks.inference.trellis.process.network import loader, step_graphs  # noqa: E402
from tests.trellis import golden_rules as rules  # noqa: E402

pytestmark = pytest.mark.trellis


class Recorded:
    """Computes what a graph would replay: with the buffers that it was made with."""

    made = 0

    def __init__(self, compute: Any, x: Any, keys_values: Any, pool: object) -> None:
        Recorded.made += 1
        self._compute, self._keys_values, self._shape = compute, keys_values, x.shape

    def velocity(self, x: Any, t: float, conditional: bool) -> Any:
        assert x.shape == self._shape
        return self._compute(x, torch.tensor([t]), self._keys_values if conditional else None)


def test_a_second_capture_of_the_same_shape_is_copied_into_the_first_ones_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_graphs, "StepGraphs", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(step_graphs, "VOXEL_BUCKET", 1024)
    flow = loader.constructed("SLatFlowModel", rules.ARGUMENTS["SLatFlowModel"])
    flow.load_state_dict(rules.weights(flow.state_dict()))
    steps, exact = step_graphs.LatentSteps(flow), step_graphs.LatentSteps(flow)
    Recorded.made = 0
    with torch.no_grad():
        for name, views, recordings in (("first", 2, 1), ("second", 2, 1), ("third", 3, 2)):
            coords, condition = rules.occupied(name, rules.GRID, 0.1), rules.values(name, views, 9, 96)
            x = rules.values(f"{name} latents", len(coords), 8)
            monkeypatch.setattr(step_graphs, "on_gpu", lambda tensor: True)
            rows, velocity = steps.begin(condition, coords)
            monkeypatch.setattr(step_graphs, "on_gpu", lambda tensor: False)
            _, expected = exact.begin(condition, coords)
            assert Recorded.made == recordings
            padded = torch.nn.functional.pad(x, (0, 0, 0, rows - len(coords)))
            for conditional in (True, False):
                got = velocity(padded, 500.0, conditional)[: len(coords)]
                torch.testing.assert_close(got, expected(x, 500.0, conditional), rtol=1e-4, atol=1e-5)
