"""The probe of the model's process, with the real torch on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.doctor import findings
from tasks.errors import WeightsMissing
from tasks.inference.trellis.model_process import Runtime
from tasks.store.location import Location

pytestmark = pytest.mark.trellis


def missing() -> str:
    raise WeightsMissing("weights: not here")


def test_the_doctor_says_why_torch_has_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = {each.name: each for each in findings(Runtime("w", tmp_path), missing, Location.of(tmp_path / "store"))}
    assert found["torch"].ok and found["safetensors"].ok
    assert not found["CUDA"].ok and "torch" in found["CUDA"].found and found["CUDA"].todo
    assert "GPU" not in found and "trial inference" not in found


def test_the_doctor_tries_the_smallest_inference_on_the_cpu(tmp_path: Path) -> None:
    runtime = Runtime("w", tmp_path, device="cpu")
    found = {each.name: each for each in findings(runtime, missing, Location.of(tmp_path / "store"))}
    assert found["trial inference"].ok and "smallest inference on the CPU took" in found["trial inference"].found
    assert "CUDA" not in found and "NVIDIA driver" not in found
