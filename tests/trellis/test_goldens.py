"""The networks beside upstream's: `make_goldens.py` has stored what upstream's modules give for the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from tasks.inference.trellis.process.network import conditions, decoders, latent_flow, structure_flow  # noqa: E402
from tasks.inference.trellis.process.network.aggregator import Aggregator  # noqa: E402
from tasks.inference.trellis.process.network.cubes import mesh_of  # noqa: E402
from tasks.inference.trellis.process.network.latent_flow import Pyramid  # noqa: E402
from tasks.inference.trellis.process.network.loader import constructed  # noqa: E402
from tasks.inference.trellis.process.network.sampler import Sampling, sample  # noqa: E402
from tasks.inference.trellis.process.network.sparse import Voxels  # noqa: E402
from tests.trellis import golden_rules as rules  # noqa: E402

pytestmark = pytest.mark.trellis

GOLDENS = Path(__file__).parents[1] / "data" / "trellis"
LIMITS = {"fp32": 1e-5, "fp16": 5e-3}
PATCHES, WIDE_LAYERS = 50, (4, 11, 17, 23)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=LIMITS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def golden(precision: str) -> Callable[[str], Any]:
    stored = load_file(GOLDENS / f"{precision}.safetensors")
    return lambda name: stored[name]


@pytest.fixture
def network(precision: str) -> Callable[[str], Any]:
    return lambda name: filled(constructed(name, rules.ARGUMENTS[name] | {"use_fp16": precision == "fp16"}))


def filled(module: Any) -> Any:
    module.load_state_dict(rules.weights(module.state_dict()))
    return module.eval()


def error(got: Any, want: Any) -> float:
    """Relative error in the 2-norm."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def test_structure_flow(network: Any, golden: Any, precision: str) -> None:
    flow, time = network("SparseStructureFlowModel"), torch.tensor([rules.TIME])
    x, keys_values = rules.values("structure", *flow.shape), flow.keys_values(rules.values("context", 1, PATCHES, 96))
    assert error(flow(x, time, keys_values), golden("structure conditional")) < LIMITS[precision]
    assert error(flow(x, time, None), golden("structure unconditional")) < LIMITS[precision]

    def velocity(x: Any, t: float, conditional: bool) -> Any:
        return flow(x, torch.tensor([t]), keys_values if conditional else None)

    sampling = Sampling(
        rules.SAMPLER["steps"], rules.STRENGTH, rules.SAMPLER["cfg_interval"], rules.SAMPLER["rescale_t"]
    )
    assert error(sample(velocity, x, sampling), golden("sampled")) < LIMITS[precision]


@pytest.mark.parametrize("buckets", [(1, 1), (64, 64)], ids=["exact", "padded"])
def test_latent_flow(network: Any, golden: Any, precision: str, buckets: tuple[int, int]) -> None:
    flow, time, coords = network("SLatFlowModel"), torch.tensor([rules.TIME]), rules.voxels()
    pyramid = Pyramid.of(coords, flow.channels, *buckets)
    x = torch.zeros(pyramid.fine.rows, 8)
    x[: len(coords)] = rules.values("latents", len(coords), 8)
    keys_values = flow.keys_values(rules.values("contexts", rules.VIEWS, 1, 30, 96).flatten(0, 1))
    for name, condition in (("conditional", keys_values), ("unconditional", None)):
        velocity = flow(x, time, condition, pyramid)[: len(coords)]
        assert error(velocity, golden(f"latents {name}")) < LIMITS[precision]


def test_conditions(network: Any, golden: Any, precision: str) -> None:
    aggregated, features = (
        rules.values("tokens", 4, rules.VIEWS, 21, 192),
        rules.values("features", rules.VIEWS, 21, 96),
    )
    condition = network("ModulatedMultiViewCond")(list(aggregated), features)
    assert error(condition, golden("structure condition")) < LIMITS[precision]
    aggregated = rules.values("wide tokens", 24, 1, rules.VIEWS, 7, 2048)[list(WIDE_LAYERS), 0]
    features = rules.values("wide features", 1, rules.VIEWS, 7, 1024)[0]
    condition = network("ModulatedSLATMultiViewCond")(list(aggregated), features)
    assert error(condition, golden("latents condition")) < LIMITS[precision]


def test_structure_decoder(network: Any, golden: Any, precision: str) -> None:
    logits = network("SparseStructureDecoder")(rules.values("structure to decode", 1, 8, 4, 4, 4))
    assert error(logits, golden("occupancy")) < LIMITS[precision]


def test_gaussians(network: Any, golden: Any, precision: str) -> None:
    coords = rules.voxels()
    parts = network("SLatGaussianDecoder")(rules.values("latents", len(coords), 8), Voxels(coords))
    for name, tensor in parts.items():
        assert error(tensor[rules.GAUSSIAN_ROWS], golden(f"gaussians {name}")) < LIMITS[precision], name


def test_cube_features(network: Any, golden: Any, precision: str) -> None:
    coords = rules.voxels()
    cubes, features = network("SLatMeshDecoder")(rules.values("latents", len(coords), 8), Voxels(coords))
    assert torch.equal(cubes.to(torch.int16), golden("cube coordinates"))
    assert error(features[rules.FEATURE_ROWS], golden("cube features")) < LIMITS[precision]


def test_vision() -> None:
    stored = load_file(GOLDENS / "fp32.safetensors")
    aggregator = filled(Aggregator(**rules.AGGREGATOR, layers=tuple(range(rules.AGGREGATOR["depth"]))))
    pixels = rules.AGGREGATOR_PIXELS
    images = rules.values("images", rules.VIEWS, 3, pixels, pixels).sigmoid()
    for layer, tokens in enumerate(aggregator(images)):
        assert error(tokens, stored[f"aggregated {layer}"]) < LIMITS["fp32"], layer
    tokens = aggregator.patch_embed(rules.values("normalised images", *images.shape))
    assert error(tokens, stored["vision tokens"]) < LIMITS["fp32"]


def test_mesh_of_cubes() -> None:
    """Every triangle has the same corners in the same order; only the numbers of the vertices may differ."""
    stored = load_file(GOLDENS / "fp32.safetensors")
    mesh = mesh_of(*rules.cubes(), rules.CUBE_GRID)
    assert mesh.vertices.shape == stored["mesh vertices"].shape
    faces = stored["mesh faces"].long()
    torch.testing.assert_close(mesh.vertices[mesh.faces], stored["mesh vertices"][faces], rtol=0, atol=1e-5)
    torch.testing.assert_close(mesh.attributes[mesh.faces], stored["mesh attributes"][faces], rtol=0, atol=1e-5)


def test_each_class_of_the_files_has_a_network() -> None:
    modules = {name: constructed(name, arguments) for name, arguments in rules.ARGUMENTS.items()}
    rooms = (conditions, decoders, latent_flow, structure_flow)
    assert {type(each).__module__ for each in modules.values()} == {room.__name__ for room in rooms}
