"""The second sample in small: an object on a table, seen by a noisy sensor, without alpha or bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.mesh.convert import load_glb
from tests.data.make_tabletop_sample import make_tabletop_sample
from tests.support.running import CommandLine
from tests.synthetic import chamfer, glb_to_capture_frame
from tests.synthetic.sensors import RealSenseD435


def test_the_object_on_the_table_is_found_and_closed(tmp_path: Path, prefect_server: str) -> None:
    truth = make_tabletop_sample(tmp_path / "hen", RealSenseD435().shrunk(2), cells=90)
    command = CommandLine(tmp_path, prefect_server)
    finished = command.reconstruct(truth.folder, export__faces="6000", infer__fusion__max_voxels="128")
    assert finished.code == 0, finished.stderr
    report = finished.report
    assert report.status in ("normal", "warning")
    assert report.subject.startswith("object: box of")
    assert report.mesh.watertight and report.mesh.components == 1

    (path,) = command.output.glob("hen/*/mesh.glb")
    mesh = glb_to_capture_frame(load_glb(path.read_bytes()))
    diagonal = float(np.linalg.norm(truth.mesh.extents))
    assert chamfer(mesh, truth.mesh) < 0.01 * diagonal
    np.testing.assert_allclose(mesh.bounds, truth.mesh.bounds, atol=0.005)
