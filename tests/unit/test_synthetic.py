"""Synthetic captures and the bundled sample are what they say: the other tests build on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray
from PIL import Image

from tasks.capture.camera import Camera
from tasks.geometry.render import render
from tests.data import make_sample
from tests.synthetic import (
    OBJECT_CENTRE,
    SHAPES,
    chamfer,
    f_score,
    glb_to_capture_frame,
    make_capture,
    psnr,
    shape_mesh,
)

SAMPLE_LIMIT_BYTES = 6_000_000


def read_capture(folder: Path) -> tuple[list[Camera], list[NDArray[np.uint8]], list[NDArray[np.float64]]]:
    """Cameras, views and metric depth maps, read as the format says and not by the product's reader."""
    meta = json.loads((folder / "transforms.json").read_text())
    width, height, fl_x, fl_y, cx, cy = (meta[key] for key in ("w", "h", "fl_x", "fl_y", "cx", "cy"))
    cameras, views, depths = [], [], []
    for frame in meta["frames"]:
        cameras.append(Camera(width, height, fl_x, fl_y, cx, cy, np.array(frame["transform_matrix"])))
        views.append(np.asarray(Image.open(folder / frame["file_path"])))
        depths.append(np.asarray(Image.open(folder / frame["depth_file_path"])) * meta["depth_unit_scale_factor"])
    return cameras, views, depths


def back_projected(camera: Camera, depth: NDArray[np.float64]) -> NDArray[np.float64]:
    seen = depth.ravel() > 0
    return camera.centre + camera.rays()[seen] * depth.ravel()[seen, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_solid_and_exact(shape: str) -> None:
    mesh = shape_mesh(shape)
    assert mesh.is_watertight and mesh.volume > 0
    assert np.abs(SHAPES[shape](mesh.vertices - OBJECT_CENTRE)).max() < 1e-6
    assert np.abs(SHAPES[shape](mesh.triangles_center - OBJECT_CENTRE)).mean() < 2e-5
    assert mesh.extents.max() == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_lies_on_the_true_surface(shape: str, tmp_path: Path) -> None:
    truth = make_capture(tmp_path, shape, views=8, size=64)
    cameras, views, depths = read_capture(tmp_path)
    assert len(cameras) == len(truth.cameras) == 8
    for camera, view, depth in zip(cameras, views, depths, strict=True):
        assert view.shape == (64, 64, 4)
        assert ((view[..., 3] > 0) == (depth > 0)).all()
        points = back_projected(camera, depth) - OBJECT_CENTRE
        assert len(points) > 300
        assert np.abs(SHAPES[shape](points)).max() < 2e-4


def test_a_concave_shape_is_seen_inside() -> None:
    mesh = shape_mesh("concave")
    assert mesh.volume < 0.5 * mesh.convex_hull.volume


def test_views_agree_on_colours(tmp_path: Path) -> None:
    truth = make_capture(tmp_path, "sphere", views=12, size=128)
    (first, *others), views, depths = read_capture(tmp_path)
    points, colours = back_projected(first, depths[0]), views[0][depths[0] > 0][:, :3].astype(float)
    compared = 0
    for camera, view, depth in zip(others, views[1:], depths[1:], strict=True):
        pixels, distance = camera.project(points)
        column, row = np.floor(pixels).astype(int).clip(0, 127).T
        same = np.abs(depth[row, column] - distance) < 0.002
        if same.sum() < 1000:
            continue
        compared += 1
        difference = np.abs(view[row, column, :3][same] - colours[same])
        assert np.median(difference) < 6
    assert compared >= 3
    assert np.std(colours) > 25  # there is something to compare
    assert truth.mesh.is_watertight


def test_faults_are_as_strong_as_asked(tmp_path: Path) -> None:
    faults: dict[str, dict[str, Any]] = {
        "clean": {},
        "noise": {"depth_noise": 0.005},
        "holes": {"depth_holes": 0.2},
        "out": {"depth_outliers": 0.1},
    }
    depth = {}
    for name, fault in faults.items():
        make_capture(tmp_path / name, "sphere", views=4, size=64, **fault)
        depth[name] = np.stack(read_capture(tmp_path / name)[2])
    seen = depth["clean"] > 0
    error = (depth["noise"] / np.where(seen, depth["clean"], 1))[seen] - 1
    assert error.std() == pytest.approx(0.005, rel=0.05) and abs(error.mean()) < 5e-4
    assert (depth["holes"][seen] == 0).mean() == pytest.approx(0.2, abs=0.02)
    assert (depth["out"] != depth["clean"])[seen].mean() == pytest.approx(0.1, abs=0.02)
    assert all((d[~seen] == 0).all() for d in depth.values())


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> list[bytes]:
        make_capture(tmp_path / name, "torus", views=3, size=32, depth_noise=0.01, alpha=False, seed=seed)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))]

    first, again, other = written("a", 1), written("b", 1), written("c", 2)
    assert len(first) == 7
    assert first == again and first != other
    assert Image.open(tmp_path / "a/views/view_000.png").mode == "RGB"


def test_metrics_measure_a_known_difference() -> None:
    small, large = (trimesh.creation.icosphere(subdivisions=5, radius=r) for r in (0.100, 0.101))
    assert chamfer(small, small, 5000) < 1e-9
    assert chamfer(small, large, 5000) == pytest.approx(0.001, rel=0.02)
    assert f_score(small, large, 0.0005, 5000) == 0
    assert f_score(small, large, 0.0015, 5000) == 1
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    mask = np.ones((4, 4), bool)
    assert psnr(black, grey, mask) == pytest.approx(20 * np.log10(5))
    assert psnr(grey, grey, mask) == np.inf


def test_gltf_up_is_the_captures_up() -> None:
    mesh = trimesh.Trimesh([[1, 2, 3], [4, 5, 6], [7, 8, 0]], [[0, 1, 2]], process=False)
    capture = glb_to_capture_frame(mesh).vertices
    x, y, z = capture.T
    assert np.allclose(np.column_stack([x, z, -y]), mesh.vertices)


@pytest.fixture(scope="module")
def sample() -> tuple[list[Camera], list[NDArray[np.uint8]], list[NDArray[np.float64]]]:
    return read_capture(make_sample.FOLDER)


def test_sample_is_complete_and_small(sample: tuple[list[Camera], list, list]) -> None:
    cameras, views, depths = sample
    assert len(cameras) == len(views) == len(depths) == 24
    assert sum(path.stat().st_size for path in make_sample.FOLDER.rglob("*") if path.is_file()) <= SAMPLE_LIMIT_BYTES
    for camera, view, depth in zip(cameras, views, depths, strict=True):
        assert view.shape == (camera.height, camera.width, 4) == (512, 512, 4)
        mask = view[..., 3] > 0
        assert (mask == (depth > 0)).all() and mask.mean() > 0.2
        assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()  # never cut off
    heights = np.array([camera.centre[2] for camera in cameras])
    assert heights.min() < -0.3 and heights.max() > 0.4


def test_sample_is_what_its_script_makes(sample: tuple[list[Camera], list, list]) -> None:
    cameras, views, depths = sample
    mesh, scene = make_sample.mug_scene(cells=100)  # coarse: a quick check
    assert mesh.is_watertight and mesh.volume > 0
    made = make_sample.mug_cameras(mesh)
    for index in (0, 17, 23):  # beside, above, below
        assert np.allclose(cameras[index].camera_to_world, made[index].camera_to_world, atol=1e-4)
        small = cameras[index].resized(128, 128)
        view = render(scene, small, supersample=2)
        stored = np.asarray(Image.fromarray(views[index][..., :3]).resize((128, 128), Image.Resampling.BOX))
        inner = np.asarray(Image.fromarray(views[index][..., 3]).resize((128, 128), Image.Resampling.BOX)) == 255
        assert psnr(view.image, stored, inner & view.mask) > 28
        assert np.abs(make_sample.mug(back_projected(cameras[index], depths[index]))).max() < 2e-4
