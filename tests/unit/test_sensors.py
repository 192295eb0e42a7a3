"""Simulated sensors have the noise, steps, shadows and edges that their papers give, and write whole captures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from PIL import Image

from tasks.geometry.render import RayScene
from tests.synthetic import SHAPES
from tests.synthetic.colour_camera import ColourCamera, linear
from tests.synthetic.rooms import make_room_capture
from tests.synthetic.seen import Seen, multipath, seen
from tests.synthetic.sensors import SENSORS, KinectV1, PhoneLidar, RealSenseD435, Sensor, TimeOfFlight
from tests.synthetic.tabletop import OBJECTS, TABLE_RADIUS, make_sensor_capture

GREY = 170  # sRGB


def facing(sensor: Sensor, *planes: tuple[float, float], level: int = GREY, tilt: float = 0.0) -> Seen:
    """Planes at (distance, half width) metres before a camera, one level of grey; the nearest first."""
    parts = []
    for distance, half in planes:
        plane = trimesh.creation.box(bounds=[[-half, -half, -distance - 1e-3], [half, half, -distance]])
        parts.append(plane)
    mesh = trimesh.util.concatenate(parts)
    if tilt:
        turn = trimesh.transformations.rotation_matrix(tilt, [1, 0, 0], [0, 0, -planes[0][0]])
        mesh.apply_transform(turn)
    scene = RayScene(mesh, lambda hits: np.full((len(hits.ray), 3), level, np.float32))
    return seen(scene, mesh, sensor.camera(np.eye(4)))


def errors(sensor: Sensor, distance: float, seed: int = 0) -> NDArray[np.float64]:
    exact = facing(sensor, (distance, 10.0))
    depth = sensor.measure(exact, np.random.default_rng(seed))
    return (depth - exact.depth)[depth > 0].astype(float)


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0, 4.0])
def test_kinects_steps_and_noise_grow_with_the_square_of_the_distance(distance: float) -> None:
    sensor = KinectV1(width=160, height=120)
    exact = facing(sensor, (distance, 10.0), tilt=0.5)  # tilted: all phases of the steps
    depth = sensor.measure(exact, np.random.default_rng(0))
    levels = np.unique(depth[depth > 0])
    levels = levels[np.abs(levels - distance) < 0.03 * distance]
    assert np.median(np.diff(levels)) == pytest.approx(2.85e-3 * distance**2, rel=0.05)  # Khoshelham and Elberink
    expected = 0.0012 + 0.0019 * (distance - 0.4) ** 2  # Nguyen et al.
    assert sensor.axial_sigma(np.float32(distance), np.float32(0)) == pytest.approx(expected)
    assert (depth - exact.depth)[depth > 0].std() == pytest.approx(expected, rel=0.1)
    assert sensor.lateral_sigma(np.float32(0)) == pytest.approx(0.8)


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_realsense_has_intels_rms_error(distance: float) -> None:
    sensor = RealSenseD435(width=160, height=120)
    error = errors(sensor, distance)
    assert error.std() == pytest.approx(distance**2 * 0.08 / (385 * 0.050), rel=0.1)
    assert abs(error.mean()) < 0.2 * error.std()
    field = sensor.measure(facing(sensor, (distance, 10.0)), np.random.default_rng(0))
    beside = (field[:, 1:] - field[:, :-1])[(field[:, 1:] > 0) & (field[:, :-1] > 0)]
    assert beside.std() < 0.6 * error.std()  # neighbours share their window


@pytest.mark.parametrize(
    "sensor", [KinectV1(width=160, height=120, focal=145), RealSenseD435(160, 120, 96, unmatched=1e-9)]
)
def test_shadows_fall_to_the_left_as_wide_as_the_baseline_makes_them(sensor: KinectV1 | RealSenseD435) -> None:
    near, far, half = 0.5, 1.0, 0.08
    exact = facing(sensor, (near, half), (far, 10.0))
    depth = sensor.measure(exact, np.random.default_rng(0))
    middle = depth[exact.camera.height // 2 - 8 : exact.camera.height // 2 + 8]
    left = round(exact.camera.cx - sensor.focal * half / near)
    right = round(exact.camera.cx + sensor.focal * half / near)
    width = sensor.baseline * sensor.focal * (1 / near - 1 / far)
    empty = (middle[:, left - 30 : left + 4] == 0).sum(axis=1)
    assert empty.mean() == pytest.approx(width, abs=2.0)
    assert (middle[:, right + 6 : right + 30] > 0).mean() > 0.9


@pytest.mark.parametrize("sensor", [KinectV1(width=80, height=60), RealSenseD435(80, 60, 100), TimeOfFlight(80, 60)])
def test_dark_and_grazing_surfaces_are_lost(sensor: Sensor) -> None:
    def share(exact: Seen) -> float:
        return float((sensor.measure(exact, np.random.default_rng(0)) > 0)[:, 20:].mean())

    assert share(facing(sensor, (0.6, 10.0))) > 0.95
    assert share(facing(sensor, (0.6, 10.0), level=10)) < 0.1
    if not isinstance(sensor, TimeOfFlight):
        flat = facing(sensor, (0.6, 10.0), tilt=np.radians(87))
        measured = sensor.measure(flat, np.random.default_rng(0))
        assert (measured[flat.angle > np.radians(86)] > 0).mean() < 0.2


def test_realsense_fattens_the_foreground() -> None:
    sensor = RealSenseD435(160, 120, 96, unmatched=1e-9)
    exact = facing(sensor, (0.5, 0.08), (1.0, 10.0))
    depth = sensor.measure(exact, np.random.default_rng(0))
    true, fat = exact.depth < 0.7, (depth > 0) & (depth < 0.7)
    assert 1.02 < fat.sum() / true.sum() < 1.35
    assert not fat[:, round(exact.camera.cx + 96 * 0.16) + 3 :].any()  # two pixels, no further


@pytest.mark.parametrize("sensor", [PhoneLidar(128, 96, 107), TimeOfFlight(128, 96, 101, rejected=0.0)])
def test_pixels_at_edges_lie_between_foreground_and_background(sensor: Sensor) -> None:
    exact = facing(sensor, (0.6, 0.1), (1.2, 10.0))
    depth = sensor.measure(exact, np.random.default_rng(0))
    flying = (depth > 0.66) & (depth < 1.14)
    edge = np.abs(np.diff(exact.depth, axis=1, prepend=exact.depth[:, :1])) > 0.1
    edge |= np.abs(np.diff(exact.depth, axis=0, prepend=exact.depth[:1])) > 0.1
    assert 0.5 * edge.sum() < flying.sum() < 8 * edge.sum()
    rows, columns = np.nonzero(edge)
    for row, column in zip(*np.nonzero(flying), strict=True):
        assert np.hypot(rows - row, columns - column).min() < 4
    assert depth.max() < 1.3 and depth[depth > 0].min() > 0.55


def test_phones_depth_is_smooth_and_enlarged_in_blocks() -> None:
    sensor = PhoneLidar(enlarge=4)
    depth = sensor.deliver(facing(sensor, (0.8, 10.0)), np.random.default_rng(0))
    assert depth.shape == (768, 1024)
    blocks = depth.reshape(192, 4, 256, 4)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert np.allclose(depth, np.rint(depth * 1000) / 1000, atol=1e-6)
    exact = PhoneLidar(step=0.0).deliver(facing(PhoneLidar(), (0.8, 10.0)), np.random.default_rng(0))
    assert np.abs(np.diff(exact, axis=1)).max() < 0.001
    assert (exact - 0.8).std() == pytest.approx(0.003, rel=0.3)


@pytest.mark.parametrize(("distance", "level"), [(0.6, 250), (2.0, 250), (2.0, 120)])
def test_time_of_flight_is_noisier_with_distance_and_dark_surfaces(distance: float, level: int) -> None:
    sensor = TimeOfFlight(128, 96, 504, cyclic=0.0)
    exact = facing(sensor, (distance, 10.0), level=level)
    depth = sensor.measure(exact, np.random.default_rng(0))
    expected = np.hypot(0.0008, 0.0006 * distance**2 / (level / 255) ** 2.2)
    assert (depth - exact.depth)[depth > 0].std() == pytest.approx(expected, rel=0.1)


def test_multipath_pushes_a_concave_corner_away() -> None:
    sensor = TimeOfFlight(96, 96, 90, floor=1e-6, per_amplitude=1e-7, cyclic=0.0, rejected=0.0)
    walls = [trimesh.creation.box(extents=[0.01, 2, 2]) for _ in range(2)]
    for wall, angle in zip(walls, (45, -45), strict=True):
        wall.apply_translation([0, 0, 1.0 - 1e-3])
        wall.apply_transform(trimesh.transformations.rotation_matrix(np.radians(angle), [0, 1, 0]))
        wall.apply_translation([0, 0, -1.2])
    mesh = trimesh.util.concatenate(walls)
    scene = RayScene(mesh, lambda hits: np.full((len(hits.ray), 3), 240, np.float32))
    exact = seen(scene, mesh, sensor.camera(np.eye(4)))
    error = sensor.measure(exact, np.random.default_rng(0)) - exact.depth
    assert exact.depth[48, 48] > exact.depth[48, 20] > 0.3  # the corner is the furthest
    near_corner = error[30:66, 36:60]
    assert 0.003 < np.median(near_corner) < 0.15
    longer = multipath(exact, 100.0, sensor.bounces, np.random.default_rng(0))  # fast modulation hears long ways less
    assert np.median(near_corner) < 0.9 * np.median(longer[30:66, 36:60])
    lone = facing(sensor, (1.0, 10.0), level=240)
    assert np.abs(sensor.measure(lone, np.random.default_rng(0)) - lone.depth).max() < 1e-3


def test_exposure_and_white_balance_stay_in_their_range_and_move() -> None:
    camera = ColourCamera(exposure_drift=0.25, white_balance_drift=0.05)
    gains = camera.gains(200, np.random.default_rng(0))
    stops = np.log2(gains[:, 1])
    assert 0.15 < np.abs(stops).max() <= 0.25 and np.abs(np.diff(stops)).max() < 0.12
    assert np.abs(gains[:, 0] / gains[:, 1] - 1).max() <= 0.05
    assert np.ptp(gains[:, 0] / gains[:, 2]) > 0.05
    grey = np.full((32, 32, 3), 128, np.uint8)
    brighter = camera.picture(grey, np.full(3, 2**0.25), np.random.default_rng(0))
    assert brighter.mean() == pytest.approx(255 * ((128 / 255) ** 2.2 * 2**0.25) ** (1 / 2.2), abs=1)


def test_some_frames_are_blurred() -> None:
    checks = np.kron(np.indices((16, 16)).sum(axis=0) % 2 * 255, np.ones((8, 8)))[..., None].repeat(3, axis=2)
    sharp, soft = (
        ColourCamera(blurred_share=share, blur=0.06).picture(
            checks.astype(np.uint8), np.ones(3), np.random.default_rng(3)
        )
        for share in (0.0, 1.0)
    )
    assert soft.astype(float).std() < 0.9 * sharp.astype(float).std()
    assert linear(soft / 255).mean() == pytest.approx(linear(sharp / 255).mean(), abs=0.02)


@pytest.mark.parametrize("name", SENSORS)
def test_a_capture_of_a_table_is_whole(name: str, tmp_path: Path) -> None:
    sensor = SENSORS[name].shrunk(4)
    truth = make_sensor_capture(tmp_path, "torus", sensor, views=3, bounds=True)
    meta = json.loads((tmp_path / "transforms.json").read_text())
    assert len(meta["frames"]) == len(truth.cameras) == 3
    assert truth.mesh.is_watertight and truth.mesh.extents.max() == pytest.approx(0.25)
    normal, offset = truth.plane[:3], truth.plane[3]
    assert (truth.mesh.vertices @ normal).min() == pytest.approx(offset)
    low, high = np.array(meta["bounds"])
    assert (low < truth.mesh.bounds[0]).all() and (high > truth.mesh.bounds[1]).all()
    for frame, camera in zip(meta["frames"], truth.cameras, strict=True):
        view = Image.open(tmp_path / frame["file_path"])
        units = np.asarray(Image.open(tmp_path / frame["depth_file_path"]))
        assert view.format == "JPEG" and view.mode == "RGB" and view.size == (meta["w"], meta["h"])
        assert units.dtype == np.uint16 and meta["depth_unit_scale_factor"] == 0.001
        small = camera.resized(*units.shape[::-1])
        depth = units.ravel() / 1000
        points = (small.centre + small.rays() * depth[:, None])[depth > 0]
        assert np.linalg.norm(points[:, :2] - truth.mesh.bounds.mean(axis=0)[:2], axis=1).max() < TABLE_RADIUS + 0.1
        assert (np.abs(points[:, 2] - offset) < 0.02).mean() > 0.2  # the table
        assert (points[:, 2] > offset + 0.03).mean() > 0.02  # the object
        assert np.linalg.norm(camera.centre - truth.mesh.bounds.mean(axis=0)) >= 0.5


def test_depth_in_floats_is_written_as_such(tmp_path: Path) -> None:
    make_sensor_capture(tmp_path, "sphere", PhoneLidar(step=0.0).shrunk(4), views=1)
    assert np.load(tmp_path / "depth/view_0000.npy").dtype == np.float32


def test_the_mug_is_among_the_objects() -> None:
    assert set(OBJECTS) == {*SHAPES, "mug"}


def test_a_walk_through_the_room_stays_inside(tmp_path: Path) -> None:
    sensor = KinectV1().shrunk(8)
    truth = make_room_capture(tmp_path, 5, sensor)
    assert len(list((tmp_path / "views").iterdir())) == len(list((tmp_path / "depth").iterdir())) == 5
    for index, camera in enumerate(truth.cameras):
        units = np.asarray(Image.open(tmp_path / f"depth/view_{index:04d}.png"))
        depth = units.ravel() / 1000
        assert (depth > 0).mean() > 0.5
        points = (camera.centre + camera.rays() * depth[:, None])[depth > 0]
        assert ((points > truth.mesh.bounds[0] - 0.3) & (points < truth.mesh.bounds[1] + 0.3)).all()
