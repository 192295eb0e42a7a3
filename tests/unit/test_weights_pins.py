"""The declared list of weights: what a pin is, what names a bundle, where its files lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError, WeightsMissing
from tasks.weights.local import environment, folder_of, require
from tasks.weights.pins import Bundle, Source, WeightFile, Weights, declared
from tests.support.own_settings import forget

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
SHA, OTHER_SHA = "1" * 64, "2" * 64


def source(*paths: str, **values: Any) -> Source:
    files = tuple(WeightFile(path=path, bytes=10, sha256=SHA) for path in paths or ("model.safetensors",))
    return Source(**{"repository": "org/name", "revision": COMMIT, "files": files} | values)


@pytest.fixture(autouse=True)
def weights(own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPTURE2MESH_WEIGHTS", str(tmp_path / "weights"))
    forget()
    return tmp_path / "weights"


def test_the_declared_list_has_what_the_pipeline_loads() -> None:
    sources = {source.repository: source for source in declared().sources}
    pipeline = sources["Stable-X/trellis-vggt-v0-2"]
    assert pipeline.revision == "647659a5ad5fbf67e22793e7b5e2cee4b30c5d13"
    paths = pipeline.paths
    assert paths[0] == "pipeline.json"
    models = sorted(path.removesuffix(".safetensors") for path in paths if path.endswith(".safetensors"))
    assert len(models) == 7
    assert sorted(path.removesuffix(".json") for path in paths[1:] if path.endswith(".json")) == models
    dinov2 = sources["dl.fbaipublicfiles.com/dinov2"]
    (checkpoint,) = dinov2.paths
    assert dinov2.path_in_bundle(checkpoint) == "torch/hub/checkpoints/dinov2_vitl14_reg4_pretrain.pth"
    assert all(source.licence for source in sources.values())


def test_the_declared_list_has_no_code() -> None:
    paths = [path for source in declared().sources for path in source.paths]
    assert {Path(path).suffix for path in paths} == {".json", ".safetensors", ".pth"}


def test_the_declared_list_invents_nothing() -> None:
    """Only a lock, which a fetch wrote, knows sizes and digests."""
    files = [file for source in declared().sources for file in source.files]
    assert {(file.bytes, file.sha256) for file in files} == {(None, None)}


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "a//b", "./a"])
def test_a_path_stays_inside(path: str) -> None:
    with pytest.raises(ValueError, match="not a plain path"):
        WeightFile(path=path)


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT.upper()])
def test_only_a_commit_is_a_revision(revision: str) -> None:
    with pytest.raises(ValueError, match="revision"):
        source(revision=revision)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_beside_safetensors_is_refused(pickle: str) -> None:
    with pytest.raises(ValueError, match=f"{pickle} is a pickle"):
        source("model.safetensors", pickle)


def test_a_pickle_without_a_safe_alternative_needs_its_digest() -> None:
    assert source("model.pth", url="https://host/{path}", folder="torch", revision=None).pinned
    unknown = source("model.pth").model_copy(update={"files": (WeightFile(path="model.pth"),)})
    with pytest.raises(InputError, match="what content"):
        Bundle(sources=(unknown,)).entries()


@pytest.mark.parametrize(
    "values",
    [{"revision": None}, {"files": (WeightFile(path="a", bytes=1),)}, {"files": (WeightFile(path="a", sha256=SHA),)}],
)
def test_not_pinned(values: dict[str, Any]) -> None:
    assert source().pinned
    assert not source(**values).pinned


def test_the_digest_names_the_content() -> None:
    digest = Bundle(sources=(source(),)).digest
    assert Bundle(sources=(source(note="a note"),)).digest == digest
    others = [
        source(revision=OTHER_COMMIT),
        source(repository="org/other"),
        source("other.safetensors"),
        source(files=(WeightFile(path="model.safetensors", bytes=10, sha256=OTHER_SHA),)),
        source(revision=None),
    ]
    assert len({digest, *(Bundle(sources=(other,)).digest for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    "ours",
    [
        source(),
        source(files=(WeightFile(path="model.safetensors"),), revision=None),
        source(files=(WeightFile(path="model.safetensors", bytes=10),)),
    ],
)
def test_a_lock_pins_the_same_files_at_the_same_revision(ours: Source) -> None:
    assert Bundle(sources=(ours,)).pinned_by(Bundle(sources=(source(),))) == Bundle(sources=(source(),))


@pytest.mark.parametrize(
    "lock",
    [
        source("other.safetensors"),
        source(revision=OTHER_COMMIT),
        source(repository="org/other"),
        source(files=(WeightFile(path="model.safetensors"),)),
        source(files=(WeightFile(path="model.safetensors", bytes=11, sha256=SHA),)),
    ],
)
def test_a_lock_of_something_else_pins_nothing(lock: Source) -> None:
    ours = Bundle(sources=(source(files=(WeightFile(path="model.safetensors", bytes=10),)),))
    assert ours.pinned_by(Bundle(sources=(lock,))) == ours.pinned_by(None) == ours


def test_a_list_that_is_none_says_where_it_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.json"
    monkeypatch.setenv("CAPTURE2MESH_WEIGHTS_LIST", str(path))
    forget()
    with pytest.raises(InputError, match="CAPTURE2MESH_WEIGHTS_LIST"):
        declared()
    path.write_text(json.dumps({"sources": [{"repository": "org/name", "revision": "main", "files": [{"path": "a"}]}]}))
    with pytest.raises(InputError, match=r"(?s)weights\.json: not a list of weights.*sources\.0\.revision"):
        declared()


def test_the_inference_process_looks_nowhere_else(weights: Path) -> None:
    names = environment(weights)
    assert names["HF_HUB_OFFLINE"] == names["TRANSFORMERS_OFFLINE"] == "1"
    assert {Path(names[name]) for name in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME")} == {
        weights / "hf",
        weights / "hf/hub",
        weights / "torch",
    }


def test_missing_weights_say_what_to_do(weights: Path) -> None:
    wanted = Bundle(sources=(source(),))
    assert folder_of(wanted) == weights / wanted.digest
    with pytest.raises(WeightsMissing, match=r"weights fetch"):
        require(wanted)
    assert not weights.exists()


def test_weights_hold_revisions_and_no_paths() -> None:
    plain = source("model.pth", repository="host/dir", url="https://host/{path}", folder="torch", revision=None)
    weights = Weights.of(Bundle(sources=(source(), plain)))
    assert weights.revisions == {"org/name": COMMIT, "host/dir": plain.pin}
    assert len(plain.pin) == len(SHA)
    assert Weights.model_validate_json(weights.model_dump_json()) == weights
