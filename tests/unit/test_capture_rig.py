"""Cameras of known rigs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tasks.capture.layouts import read_layout
from tasks.capture.rig import rig
from tasks.errors import InputError

NAMES = ("front", "right", "back", "left", "top", "bottom")


def folder_with(folder: Path, *names: str) -> Path:
    (folder / "views").mkdir()
    for name in names:
        (folder / "views" / f"{name}.png").touch()
    return folder


def poses(folder: Path) -> dict[str, np.ndarray]:
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    layout = read_layout(paths, lambda path: (folder / path).read_bytes())
    assert not layout.camera_problems
    return {name: frame.camera_to_world for name, frame in layout.cameras.frames.items()}


def test_axes6(tmp_path: Path) -> None:
    written = rig(folder_with(tmp_path, *NAMES), "axes6", distance_m=2.0, fov_deg=40)
    assert written == tmp_path / "transforms.json"
    assert json.loads(written.read_text())["camera_angle_x"] == pytest.approx(math.radians(40))
    found = poses(tmp_path)
    eyes = {name: pose[:3, 3].tolist() for name, pose in found.items()}
    assert eyes == {
        "front": [0, -2, 0],
        "right": [2, 0, 0],
        "back": [0, 2, 0],
        "left": [-2, 0, 0],
        "top": [0, 0, 2],
        "bottom": [0, 0, -2],
    }
    for pose in found.values():
        np.testing.assert_allclose(pose[:3, :3] @ [0, 0, -2], -pose[:3, 3], atol=1e-12)
    for name, right, up in (
        ("front", [1, 0, 0], [0, 0, 1]),
        ("top", [1, 0, 0], [0, 1, 0]),
        ("bottom", [1, 0, 0], [0, -1, 0]),
    ):
        np.testing.assert_allclose(found[name][:3, :2].T, [right, up], atol=1e-12)


@pytest.mark.parametrize(("clockwise", "x"), [(False, 1), (True, -1)])
def test_turntable(tmp_path: Path, clockwise: bool, x: int) -> None:
    folder = folder_with(tmp_path, "a", "b", "c", "d")
    rig(folder, "turntable", distance_m=2.0, fov_deg=40, elevation_deg=30, clockwise=clockwise)
    found = poses(folder)
    level, height = 2 * math.cos(math.radians(30)), 1.0
    np.testing.assert_allclose(found["a"][:3, 3], [0, -level, height], atol=1e-12)
    np.testing.assert_allclose(found["b"][:3, 3], [x * level, 0, height], atol=1e-12)
    for pose in found.values():
        assert pose[2, 0] == pytest.approx(0)
        assert pose[2, 1] > 0


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    rig(folder_with(tmp_path, "a"), "turntable", distance_m=1, fov_deg=40)
    assert {path.name for path in tmp_path.iterdir()} == {"views", "transforms.json"}
    assert (tmp_path / "transforms.json").stat().st_mode & 0o777 == 0o644


def test_cameras_that_are_there_are_kept(tmp_path: Path) -> None:
    (folder_with(tmp_path, "a") / "transforms.json").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        rig(tmp_path, "turntable", distance_m=1, fov_deg=40)
    assert (tmp_path / "transforms.json").read_text() == "precious"


def test_axes6_needs_its_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: bottom, top; not of the rig: a"):
        rig(folder_with(tmp_path, "a", *NAMES[:4]), "axes6", distance_m=1, fov_deg=40)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ({"distance_m": 0}, "distance"),
        ({"distance_m": math.inf}, "distance"),
        ({"fov_deg": 180}, "field of view"),
        ({"fov_deg": math.nan}, "field of view"),
        ({"elevation_deg": 90}, "elevation"),
    ],
)
def test_impossible_numbers(tmp_path: Path, numbers: dict[str, float], what: str) -> None:
    with pytest.raises(InputError, match=what):
        rig(folder_with(tmp_path, "a"), "turntable", **({"distance_m": 1.0, "fov_deg": 40.0} | numbers))


def test_a_folder_without_views(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PNG or JPEG view"):
        rig(tmp_path, "turntable", distance_m=1, fov_deg=40)
