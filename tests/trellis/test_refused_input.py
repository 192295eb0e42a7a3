"""Input that the engine cannot use, and what the model's process answers: one clear sentence, and the kind of fault.

The networks are the smallest ones, in this process: an inference takes less than a second.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from tasks.errors import EmptyResult, EngineUnavailable, InferenceFailed, InputError, WeightsCorrupt  # noqa: E402
from tasks.inference.trellis.model_process import TrellisProcess  # noqa: E402
from tasks.inference.trellis.process.channel import Message  # noqa: E402
from tasks.inference.trellis.process.model import NetworkModel  # noqa: E402
from tasks.inference.trellis.process.network import loader, preprocess, trial  # noqa: E402
from tasks.inference.trellis.process.network.pipeline import ViewsToMesh  # noqa: E402
from tests.benchmarks.random_weights import TINY, TINY_CHANNELS, make  # noqa: E402

pytestmark = pytest.mark.trellis

ASKED = {"device": "cpu", "min_free_gib": 0, "seed": 1, "ss_steps": 2, "ss_cfg": 1.0, "slat_steps": 2, "slat_cfg": 1.0}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> NetworkModel:
    monkeypatch.setattr(preprocess, "PIXELS", trial.PIXELS)
    torch.manual_seed(0)
    networks = trial.networks(torch.device("cpu"))
    made = NetworkModel(lambda _: None)
    made._pipeline, made._gaussian_init = ViewsToMesh(networks), networks.gaussian_decoder.gaussian_init
    return made


def infer(model: NetworkModel, *sizes: tuple[int, int], foreground: bool = True) -> Message:
    """The answer to views of these sizes, which show a square."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for index, (height, width) in enumerate(sizes):
        mask = np.zeros((height, width), np.bool_)
        mask[10:30, 10:30] = foreground
        arrays |= {f"{index}.image": rng.integers(0, 255, (height, width, 3), np.uint8), f"{index}.mask": mask}
    names = [f"view_{index}" for index in range(len(sizes))]
    return model.answer(Message({"operation": "infer", "views": names, **ASKED}, arrays))


def fault(answer: Message) -> tuple[str, str]:
    """Kind and message of an error."""
    return answer.header["fault"], answer.header["message"]


@pytest.mark.parametrize(
    "sizes",
    [[(40, 40)], [(40, 40), (40, 64), (33, 200)], [(40, 40)] * 64],
    ids=["one view", "mixed sizes", "64 views"],
)
def test_any_number_and_sizes_of_views_are_taken(model: NetworkModel, sizes: list[tuple[int, int]]) -> None:
    answer = infer(model, *sizes)
    assert answer.header["kind"] == "result", answer.header
    assert len(answer.arrays["faces"]) and len(answer.arrays["gaussians.xyz"])


def test_a_view_without_foreground_is_named(model: NetworkModel) -> None:
    assert fault(infer(model, (40, 40), foreground=False)) == ("EmptyResult", "view view_0: its mask has no foreground")


def test_views_without_masks_are_named(model: NetworkModel) -> None:
    views = {"0.image": np.zeros((9, 9, 3), np.uint8), "0.mask": np.ones((9, 9), np.bool_)}
    answer = model.answer(Message({"operation": "infer", "views": ["front"], **ASKED}, views))
    assert fault(answer) == ("EmptyResult", "1 views have no mask (front): give them an alpha channel or depth")


def networks_of(model: NetworkModel) -> loader.Networks:
    networks: loader.Networks = model._pipeline._networks
    return networks


def test_an_empty_structure_is_told(model: NetworkModel) -> None:
    networks_of(model).structure_decoder.out_layer[-1].bias.data.fill_(-1.0)
    kind, message = fault(infer(model, (40, 40)))
    assert (kind, message) == ("EmptyResult", "the model found nothing in the views: no voxel is occupied")


@pytest.mark.parametrize(
    ("network", "told"),
    [
        ("structure_flow", "the model's latents of the structure are not finite"),
        ("latent_flow", "the model's structured latents are not finite"),
        ("gaussian_decoder", "gaussians.xyz: 768 values are not finite"),
    ],
)
def test_numbers_that_overflow_are_told(model: NetworkModel, network: str, told: str) -> None:
    getattr(networks_of(model), network).out_layer.bias.data.fill_(torch.nan)
    kind, message = fault(infer(model, (40, 40)))
    assert kind == "EmptyResult" and message.startswith(told)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder / "weights", TINY, TINY_CHANNELS, "cpu")
    return folder / "weights"


@pytest.fixture
def places(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> loader.WeightPlaces:
    """Places of weights that a test may change, and that the model loads."""
    shutil.copytree(weights, tmp_path / "weights")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "weights" / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "weights" / "torch"))
    return loader.WeightPlaces.of(os.environ)


def load(device: str = "cpu") -> Message:
    return NetworkModel(lambda _: None).answer(Message({"operation": "load", "device": device, "min_free_gib": 0}))


def test_weights_of_another_variant_are_told(places: loader.WeightPlaces) -> None:
    described = places.pipeline / "ckpts" / "ss_vggt_cond.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"name": "SparseStructureEncoder"}))
    kind, message = fault(load())
    assert (kind, message) == (
        "Unsupported",
        "the weights are of another variant: class SparseStructureEncoder is unknown",
    )


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["half", "nothing"])
@pytest.mark.parametrize("network", ["geometry", "features"])
def test_a_truncated_file_is_named(places: loader.WeightPlaces, network: str, kept: float) -> None:
    file: Path = getattr(places, network)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])
    kind, message = fault(load())
    assert kind == "WeightsCorrupt" and message.startswith(f"{file.name} is damaged (") and "\n" not in message


def test_a_missing_file_is_named(places: loader.WeightPlaces) -> None:
    places.geometry.unlink()
    kind, message = fault(load())
    assert kind == "WeightsMissing" and str(places.geometry) in message


def test_the_safe_twin_of_dinov2_is_read_where_it_is_there(places: loader.WeightPlaces) -> None:
    tensors = torch.load(places.features, weights_only=True)
    save_file(tensors, places.features.with_suffix(".safetensors"))
    places.features.write_bytes(b"not even a pickle")
    assert load().header["kind"] == "result"


def test_no_gpu_and_a_driver_that_is_too_old_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = "The NVIDIA driver on your system is too old (found version 11040)."

    def refuse() -> None:
        raise RuntimeError(old)

    monkeypatch.setattr(torch.cuda, "init", refuse)
    kind, message = fault(load("cuda"))
    assert (
        kind == "NoCuda"
        and message.startswith("torch ")
        and message.endswith(f"sees no CUDA device: RuntimeError: {old}")
    )


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("EmptyResult", EmptyResult),
        ("Unsupported", EngineUnavailable),
        ("WeightsCorrupt", WeightsCorrupt),
        ("NoCuda", EngineUnavailable),
        ("Other", InferenceFailed),
    ],
)
def test_each_kind_has_its_error(kind: str, raised: type[Exception]) -> None:
    """Errors of the input end the command with status 2, others with 1."""
    asked: Any = TrellisProcess.__new__(TrellisProcess)
    with pytest.raises(raised, match="engine trellis: why") as error:
        asked._raise({"fault": kind, "message": "why"})
    assert isinstance(error.value, InputError) is (kind not in ("EmptyResult", "Other"))
