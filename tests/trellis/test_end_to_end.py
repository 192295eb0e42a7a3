"""The engine on the CPU with tiny random weights: views to gaussians and a mesh, in the model's own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from tasks.inference.trellis.trellis_engine import Trellis
from tests.benchmarks.random_weights import TINY, TINY_CHANNELS, as_bundle, make
from tests.support.tiny_trellis import PARAMETERS, picture, tiny_runtime
from tests.synthetic import make_capture

pytestmark = pytest.mark.trellis


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trellis]:
    runtime = tiny_runtime(tmp_path_factory.mktemp("trellis"))
    made = Trellis(lambda: runtime)
    yield made
    made.close()


def test_views_become_gaussians_and_a_mesh_twice_the_same(engine: Trellis) -> None:
    seen: list[float] = []
    first = engine.reconstruct([picture()], PARAMETERS, seen.append)
    assert len(first.faces) and first.faces.max() < len(first.vertices)
    assert np.abs(first.vertices).max() <= 0.51 and np.isfinite(first.vertices).all()
    assert first.colours is not None and first.colours.shape == first.vertices.shape
    assert first.gaussians["features_dc"].shape[1:] == (1, 3) and len(first.gaussians["xyz"]) % 32 == 0
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) == 5
    again = engine.reconstruct([picture()], PARAMETERS, seen.append)
    assert again.to_safetensors() == first.to_safetensors()
    assert engine.splat_ply(first.to_safetensors(), np.eye(4)).startswith(b"ply")


def test_a_capture_becomes_a_published_asset_on_the_cpu(tmp_path: Path) -> None:
    """The command with this engine, on weights that lie here as a bundle: random ones, so the shape means nothing."""
    make_capture(tmp_path / "sphere", "sphere", views=2, size=64)
    (tmp_path / "sphere" / "transforms.json").unlink()
    make(tmp_path / "weights" / "new", TINY, TINY_CHANNELS, "cpu")
    places = {name: str(tmp_path / name.lower()) for name in ("CAPTURE2MESH_STORE", "CAPTURE2MESH_SCRATCH")}
    places |= {"CAPTURE2MESH_TRELLIS_DEVICE": "cpu", "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    command = [sys.executable, "-m", "flows", "reconstruct", str(tmp_path / "sphere"), str(tmp_path / "out"), "--json"]
    for asked in ("infer.trellis.ss_steps=3", "infer.trellis.slat_steps=2", "export.faces=2000"):
        command += ["--set", asked]
    environment = os.environ | places | as_bundle(tmp_path / "weights" / "new")
    ended = subprocess.run(
        [*command, "--engine", "trellis"], env=environment, stdout=subprocess.PIPE, check=False, timeout=800
    )
    report = json.loads(ended.stdout)
    (published,) = (tmp_path / "out" / "sphere").glob("*/_SUCCESS")
    assert (published.parent / "mesh.glb").stat().st_size > 1000
    assert report["engine"]["name"] == "trellis" and report["weights"]["bundle"]
    assert report["cameras"]["source"] == "none" and not report["mesh"]["metric"]
    assert {"infer", "export_glb", "publish"} <= {stage["name"] for stage in report["stages"]}
    assert ended.returncode == (1 if report["status"] == "failure" else 0)
