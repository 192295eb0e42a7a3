"""The whole chain with the trellis engine on its stand-in: weights, inference, exporters, faults, reuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from tasks.geometry.render import RayScene, render
from tasks.mesh.export import CAPTURE_TO_GLTF
from tests.support.gpu_machine import PIPELINE, REVISION, gpu_environment, views_only
from tests.support.running import (
    STAGES,
    CommandLine,
    Finished,
    assert_published,
    contents_of,
)
from tests.synthetic import make_capture, orbit_cameras, pattern, solid_colours, write_capture

pytestmark = pytest.mark.system

FETCHED = (*STAGES[:3], "fetch_weights", *STAGES[3:])


@dataclass(frozen=True)
class Machine:
    """A machine that seems to have a GPU, with upstream's checkout and with weights on a mirror."""

    flows: CommandLine
    mirror: Path
    log: Path

    def reconstruct(self, capture: Path, engine: str = "trellis", **values: str) -> Finished:
        parameters = {"export__simplify": "0.5"} | values
        return self.flows.run(*self.flows.reconstruct_arguments(capture, **parameters), "--engine", engine)

    def with_faults(self, **faults: object) -> Machine:
        env = {f"STAND_IN_{name}": str(value) for name, value in faults.items()}
        flows = CommandLine(self.flows.folder, self.flows.server, {**self.flows.env, **env})
        return Machine(flows, self.mirror, self.log)

    @property
    def notes(self) -> list[str]:
        """The lines of the stand-in's log."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def runs(self) -> int:
        return sum(line.startswith("run") for line in self.notes)

    @property
    def assets(self) -> list[Path]:
        return [marker.parent for marker in self.flows.output.glob("*/*/_SUCCESS")]


@pytest.fixture
def machine(tmp_path: Path, prefect_server: str) -> Machine:
    env = gpu_environment(tmp_path)
    return Machine(CommandLine(tmp_path / "run", prefect_server, env), tmp_path / "mirror", tmp_path / "log")


EGG = trimesh.creation.icosphere(subdivisions=4)
EGG.apply_scale([0.135, 0.09, 0.12])
EGG.apply_transform(trimesh.transformations.rotation_matrix(0.7, [0, 0, 1]))
EGG.apply_translation([0.4, -0.2, 0.3])


def ellipsoid_capture(folder: Path) -> Path:
    cameras = orbit_cameras(EGG, 8, 128, rng=np.random.default_rng(0))
    scene = RayScene(EGG, solid_colours(pattern))
    renderings = [render(scene, camera) for camera in cameras]
    depths = [rendering.depth for rendering in renderings]
    write_capture(folder, cameras, renderings, depths, alpha=True, depth_scale=0.0001)
    return folder


def test_views_become_a_mesh_and_only_what_changes_is_done_again(
    machine: Machine, capture: Callable[[str], Path]
) -> None:
    ball = views_only(capture("ball"))
    first = machine.reconstruct(ball, formats="obj,ply,splat")
    assert first.code == 0, first.stderr
    report = first.report
    assert (report.status, report.engine.name, report.engine.reason) == ("normal", "trellis", "asked for")
    assert (report.mesh.exporter, report.mesh.decimated_by) == ("to_glb", "fast-simplification")
    assert (report.mesh.metric, report.mesh.texture_coverage) == (False, None)
    assert report.weights is not None and report.weights.revisions == {PIPELINE: REVISION}
    assert first.ran == list(FETCHED)
    (asset,) = machine.assets
    assert_published(contents_of(asset), [entry.path for entry in report.outputs])
    splats = (asset / "splat.ply").read_bytes()
    assert splats.startswith(b"ply\nformat binary_little_endian") and b"property float rot_3\n" in splats

    shutil.rmtree(machine.mirror)  # from here on without a network
    again = machine.reconstruct(ball, formats="obj,ply,splat")
    assert (again.code, again.ran) == (0, []), again.stderr
    assert "fetch_weights" not in {stage.name for stage in again.report.stages}
    larger = machine.reconstruct(ball, export__texture_px="512")
    assert (larger.code, larger.ran) == (0, list(STAGES[4:])), larger.stderr
    assert larger.report.mesh.texture_px == 512
    native = machine.reconstruct(ball, export__exporter="native")
    assert (native.code, native.ran) == (0, list(STAGES[4:])), native.stderr
    assert machine.runs == 1
    other = machine.reconstruct(ball, infer__seed="7")
    assert (other.code, other.ran) == (0, list(STAGES[3:])), other.stderr  # fetch_weights was a hit
    assert machine.runs == 2

    # the stand-in's ellipsoid: half axes .45, .3, .4 along x, y, z in its z-up frame; y-up in the file
    assert native.report.mesh.exporter == "native"
    assert native.report.mesh.extent_m == pytest.approx((0.9, 0.6, 0.8), rel=0.1)
    assert len(machine.assets) == 4
    for asset in machine.assets:
        loaded = trimesh.load_mesh(asset / "mesh.glb")
        assert loaded.extents == pytest.approx((0.9, 0.8, 0.6), rel=0.1)


def test_with_depth_and_cameras_the_mesh_is_metric_and_in_place(machine: Machine, tmp_path: Path) -> None:
    """The capture shows the stand-in's ellipsoid, 0.3 times as large, turned and moved."""
    finished = machine.reconstruct(ellipsoid_capture(tmp_path / "captures" / "egg"))
    assert finished.code == 0, finished.stderr
    report = finished.report
    assert report.mesh.metric and report.registration is not None and report.registration.accepted
    assert report.status == "normal", [check for check in report.checks if not check.passed]
    assert report.registration.residual_m < 0.005
    assert report.mesh.extent_m == pytest.approx(EGG.extents, rel=0.05)
    (asset,) = machine.assets
    loaded = trimesh.load_mesh(asset / "mesh.glb")
    in_capture = loaded.vertices @ CAPTURE_TO_GLTF
    assert (in_capture.min(axis=0) + in_capture.max(axis=0)) / 2 == pytest.approx(EGG.centroid, abs=0.005)
    assert {check.name for check in report.checks} >= {"captured_share", "registered"}


def test_another_object_than_the_captured_one_is_not_moved(machine: Machine, capture: Callable[[str], Path]) -> None:
    folder = capture("torus")
    shutil.rmtree(folder)
    make_capture(folder, "torus", views=8, size=96)
    finished = machine.reconstruct(folder)
    assert finished.code == 0, finished.stderr
    assert (finished.report.status, finished.report.mesh.metric) == ("warning", False)
    assert "registered" in [check.name for check in finished.report.checks if not check.passed]


def test_views_without_masks_are_refused(machine: Machine, capture: Callable[[str], Path]) -> None:
    ball = views_only(capture("ball"))
    for path in (ball / "views").iterdir():
        Image.open(path).convert("RGB").save(path)
    finished = machine.reconstruct(ball)
    assert finished.code == 2 and "without a background" in finished.stderr and "alpha channel" in finished.stderr
    assert machine.runs == 0


@pytest.mark.faults
def test_memory_for_half_of_the_views_is_a_warning_and_not_reused(
    machine: Machine, capture: Callable[[str], Path]
) -> None:
    ball = views_only(capture("ball"))
    reduced = machine.with_faults(OOM_ABOVE=4).reconstruct(ball)
    assert reduced.code == 0, reduced.stderr
    assert (reduced.report.status, reduced.report.capture.views_used) == ("warning", 4)
    assert [check.name for check in reduced.report.checks if not check.passed] == ["views_used"]
    assert reduced.report.warnings == ("4 of 8 views were used: too little free GPU memory for more",)
    whole = machine.reconstruct(ball)
    assert whole.code == 0, whole.stderr
    assert (whole.report.status, whole.report.capture.views_used) == ("normal", 8)
    assert whole.ran[0] == "infer"
    assert len(machine.assets) == 2
    latest = json.loads((machine.flows.output / "ball" / "latest.json").read_text())
    assert json.loads((machine.flows.output / "ball" / latest["report"]).read_text())["status"] == "normal"


@pytest.mark.faults
def test_a_lost_gpu_is_tried_again_in_a_new_process(machine: Machine, capture: Callable[[str], Path]) -> None:
    finished = machine.with_faults(LOST=1, ONCE=machine.log.with_name("lost")).reconstruct(views_only(capture("ball")))
    assert finished.code == 0, finished.stderr
    assert finished.report.status == "normal"
    assert sum(line.startswith("loaded") for line in machine.notes) == 2


@pytest.mark.faults
def test_what_fails_for_good_is_told_with_its_first_cause(machine: Machine, capture: Callable[[str], Path]) -> None:
    finished = machine.with_faults(BUG=1).reconstruct(views_only(capture("ball")))
    assert (finished.code, finished.stdout) == (1, "")
    assert "slat_decoder_gs" in finished.stderr and "Traceback" not in finished.stderr
    assert machine.assets == []


def test_auto_takes_trellis_where_all_of_it_is_there(machine: Machine, capture: Callable[[str], Path]) -> None:
    ball = capture("ball")
    without_weights = machine.reconstruct(ball, "auto")
    assert without_weights.code == 0, without_weights.stderr
    assert without_weights.report.engine.name == "fusion"
    assert without_weights.report.engine.reason == "auto: no trellis on this machine: its weights are not fetched"
    fetched = machine.flows.run("weights", "fetch")
    assert fetched.code == 0, fetched.stderr
    with_weights = machine.reconstruct(ball, "auto")
    assert with_weights.code == 0, with_weights.stderr
    assert with_weights.report.engine.name == "trellis"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"PATH": "/nowhere"}, "no NVIDIA GPU"),
        ({"CAPTURE2MESH_WEIGHTS_MIRROR": "file:///nowhere"}, "model.safetensors"),
    ],
)
def test_a_machine_that_cannot_run_it_says_so(
    machine: Machine, capture: Callable[[str], Path], changes: dict[str, str], told: str
) -> None:
    flows = CommandLine(machine.flows.folder, machine.flows.server, {**machine.flows.env, **changes})
    finished = flows.run(*flows.reconstruct_arguments(views_only(capture("ball"))), "--engine", "trellis")
    assert finished.code != 0 and finished.stdout == ""
    assert told in finished.stderr and "Traceback" not in finished.stderr
    assert machine.notes == [] and machine.assets == []


def test_gaussians_of_fusion_are_refused_before_anything_is_published(
    machine: Machine, capture: Callable[[str], Path]
) -> None:
    finished = machine.reconstruct(capture("ball"), "fusion", export__exporter="to_glb")
    assert (finished.code, finished.stdout) == (2, "")
    assert "use native" in finished.stderr
    assert machine.assets == []
