"""The traps of the networks: each test fails if the detail that it names is done the obvious way instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn import functional  # noqa: E402

from tasks.inference.trellis.process.faults import Fault  # noqa: E402
from tasks.inference.trellis.process.network import cube_tables, cubes, loader  # noqa: E402
from tasks.inference.trellis.process.network.aggregator import Aggregator  # noqa: E402
from tasks.inference.trellis.process.network.attention import CrossAttention  # noqa: E402
from tasks.inference.trellis.process.network.latent_flow import Pyramid  # noqa: E402
from tasks.inference.trellis.process.network.preprocess import PIXELS, prepared  # noqa: E402
from tasks.inference.trellis.process.network.sampler import Sampling, sample  # noqa: E402
from tasks.inference.trellis.process.network.sparse import PointwiseConv, SubmanifoldConv, Voxels  # noqa: E402
from tasks.inference.trellis.process.network.vision_transformer import VisionTransformer  # noqa: E402
from tests.trellis import golden_rules as rules  # noqa: E402

pytestmark = pytest.mark.trellis


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def filled(module: Any) -> Any:
    module.load_state_dict(rules.weights(module.state_dict()))
    return module.eval()


def test_the_mean_of_children_counts_a_zero() -> None:
    pyramid = Pyramid.of(torch.tensor([[0, 0, 0], [0, 0, 1], [2, 2, 2]]), 12)
    pooled = pyramid.pooled(torch.tensor([[3.0], [6.0], [8.0]]))
    assert pooled.flatten().tolist() == [9 / 3, 8 / 2]


def test_padding_changes_no_real_row() -> None:
    flow, coords = filled(loader.constructed("SLatFlowModel", rules.ARGUMENTS["SLatFlowModel"])), rules.voxels()
    x, time = rules.values("latents", len(coords), 8), torch.tensor([rules.TIME])
    keys_values = flow.keys_values(rules.values("contexts", 2, 30, 96))
    exact = flow(x, time, keys_values, Pyramid.of(coords, flow.channels))
    for filling in (0.0, 5.0):
        pyramid = Pyramid.of(coords, flow.channels, 128, 64)
        rows = functional.pad(x, (0, 0, 0, pyramid.fine.rows - len(coords)), value=filling)
        torch.testing.assert_close(flow(rows, time, keys_values, pyramid)[: len(coords)], exact, rtol=1e-4, atol=1e-5)


def test_a_convolution_of_one_voxel_reads_the_memory_as_in_by_out() -> None:
    conv = filled(PointwiseConv(3, 2))
    x = rules.values("x", 4, 3)
    expected = x @ conv.weight.flatten().reshape(3, 2) + conv.bias
    torch.testing.assert_close(conv(x), expected)
    assert not torch.allclose(conv(x), x @ conv.weight.view(2, 3).t() + conv.bias)


def test_a_convolution_is_that_of_the_dense_grid() -> None:
    conv, coords = filled(SubmanifoldConv(4, 5)), rules.occupied("conv", 6, 0.3)
    x = rules.values("x", len(coords), 4)
    dense = torch.zeros(4, 6, 6, 6)
    dense[:, coords[:, 0], coords[:, 1], coords[:, 2]] = x.t()
    expected = functional.conv3d(dense[None], conv.weight.permute(0, 4, 1, 2, 3), conv.bias, padding=1)[0]
    torch.testing.assert_close(conv(x, Voxels(coords)), expected[:, coords[:, 0], coords[:, 1], coords[:, 2]].t())


def test_registers_have_no_position() -> None:
    made = filled(VisionTransformer(64, 0, 4, 4, 14))
    tokens = made(torch.zeros(1, 3, 56, 56))
    assert torch.equal(tokens[0, 1:5], made.register_tokens[0])
    assert torch.equal(tokens[0, 0], (made.cls_token + made.pos_embed[:, :1])[0, 0])


def test_the_first_view_has_its_own_tokens() -> None:
    made = filled(Aggregator(64, 2, 4, 4, 14, layers=(1,)))
    images = rules.values("images", 2, 3, 56, 56).sigmoid()
    forward, turned = made(images)[0], made(images.flip(0))[0].flip(0)
    assert not torch.allclose(forward, turned, atol=1e-2)
    made.camera_token[:, 1] = made.camera_token[:, 0]
    made.register_token[:, 1] = made.register_token[:, 0]
    torch.testing.assert_close(made(images)[0], made(images.flip(0))[0].flip(0), rtol=1e-3, atol=1e-4)


def test_each_norm_has_its_epsilon() -> None:
    made = Aggregator(64, 1, 4, 4, 14)
    assert {block.norm1.eps for block in [*made.frame_blocks, *made.global_blocks]} == {1e-5}
    assert {block.norm1.eps for block in made.patch_embed.blocks} | {made.patch_embed.norm.eps} == {1e-6}


def test_a_context_of_zeros_gives_the_constant() -> None:
    attention = filled(CrossAttention(64, 32, 4, qk_norm=False))
    x, nothing = rules.values("x", 1, 7, 64), torch.zeros(2, 5, 32)
    torch.testing.assert_close(attention(x, attention.keys_values(nothing)), attention.of_zeros().expand(1, 7, 64))


def test_the_mean_over_views_may_go_before_the_last_layer() -> None:
    attention = filled(CrossAttention(64, 32, 4, qk_norm=False))
    x, contexts = rules.values("x", 1, 7, 64), rules.values("contexts", 3, 5, 32)
    each = torch.stack([attention(x, attention.keys_values(context[None])) for context in contexts])
    torch.testing.assert_close(attention(x, attention.keys_values(contexts)), each.mean(0))


def test_guidance_acts_at_both_ends_of_its_interval() -> None:
    seen = []

    def velocity(x: Any, t: float, conditional: bool) -> Any:
        seen.append((round(t), conditional))
        return torch.full_like(x, 2.0 if conditional else 1.0)

    moved = sample(velocity, torch.zeros(1), Sampling(4, 3.0, (0.5, 1.0), 1.0))
    assert [t for t, conditional in seen if not conditional] == [1000, 750, 500]
    assert float(moved) == -(3 * 0.25 * (4 * 2.0 - 3 * 1.0) + 0.25 * 2.0)


def test_cubes_beside_an_inside_corner_are_passed_too() -> None:
    """A single cube whose corners are all inside has a closed surface, in its unoccupied neighbours."""
    features = torch.zeros(1, 101)
    features[:, cubes.DISTANCE] = -1.0
    mesh = cubes.mesh_of(torch.tensor([[2, 2, 2]]), features, 6)
    edges = np.sort(mesh.faces.numpy()[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    _, counts = np.unique(edges, axis=0, return_counts=True)
    assert len(mesh.faces) == 48 and set(counts) == {2}


def test_the_tables_have_the_known_counts() -> None:
    table = cube_tables.tables(torch.device("cpu"))
    crossed = [sum((case >> a ^ case >> b) & 1 for a, b in cube_tables.EDGES) for case in range(256)]
    assert ((table.vertex_of >= 0).sum(1)).tolist() == crossed
    assert int(table.vertices.max()) == 4
    assert int((table.pinch != 0).any(1).sum()) == 36


def test_two_cubes_that_pinch_at_their_face_are_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(Path(__file__).parents[1] / "data" / "trellis" / "fp32.safetensors")
    plain = cube_tables.CubeTables(*(each.clone() for each in vars(cube_tables.tables(torch.device("cpu"))).values()))
    plain.pinch.zero_()
    monkeypatch.setattr(cubes, "tables", lambda _: plain)
    assert len(cubes.mesh_of(*rules.cubes(), rules.CUBE_GRID).vertices) != len(stored["mesh vertices"])


def test_a_view_is_cut_out_and_centred() -> None:
    image, mask = np.full((100, 200, 3), 255, np.uint8), np.zeros((100, 200), np.bool_)
    mask[30:50, 120:140] = True
    view = prepared("front", image, mask)
    rows, columns = np.nonzero(view[..., 0])
    assert view.shape == (PIXELS, PIXELS, 3)
    assert abs(rows.mean() - PIXELS / 2) < 30 and abs(columns.mean() - PIXELS / 2) < 30
    assert not view[0].any()
    with pytest.raises(Fault, match="front: its mask has no foreground"):
        prepared("front", image, np.zeros_like(mask))


Change = Callable[[dict[str, Any]], None]


def renamed(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("input_layer.bias"), "input_layer.bias missing"),
        (lambda tensors: tensors.update(surplus=torch.zeros(1)), "surplus unknown"),
        (lambda tensors: tensors.update({"input_layer.bias": torch.zeros(3)}), r"\(3,\) instead of \(96,\)"),
        (lambda tensors: tensors.update({"blocks.0.lora_A": torch.zeros(1)}), "LoRA"),
        (renamed("pos_emb", "base_model.pos_emb"), "LoRA"),
    ],
)
def test_weights_of_another_variant_are_refused_by_name(change: Change, message: str) -> None:
    flow = loader.constructed("SparseStructureFlowModel", rules.ARGUMENTS["SparseStructureFlowModel"])
    tensors = rules.weights(flow.state_dict())
    change(tensors)
    with pytest.raises(Fault, match=message):
        loader.filled(flow, tensors, "flow.safetensors")


@pytest.mark.parametrize(("key", "value"), [("share_mod", True), ("pe_mode", "rope"), ("wanted", 1), ("patch_size", 2)])
def test_unknown_arguments_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(Fault, match=f"{key}={value!r} is unknown"):
        loader.constructed("SparseStructureFlowModel", rules.ARGUMENTS["SparseStructureFlowModel"] | {key: value})


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    name = "ModulatedSLATMultiViewCond"
    condition = loader.constructed(name, {"channels": 64, "ctx_channels": 192})
    save_file(rules.weights(condition.state_dict()), tmp_path / "condition.safetensors")
    (tmp_path / "condition.json").write_text(
        json.dumps({"name": name, "args": {"channels": 64, "ctx_channels": 192, "use_fp16": True}})
    )
    read = loader._model(tmp_path / "condition", torch.device("cpu"))
    assert {tensor.dtype for tensor in read.state_dict().values()} == {torch.float32}
    data = (tmp_path / "condition.safetensors").read_bytes()
    (tmp_path / "condition.safetensors").write_bytes(data[:-8])
    with pytest.raises(Fault, match=r"condition.safetensors is damaged \(.*incomplete"):
        loader._model(tmp_path / "condition", torch.device("cpu"))
