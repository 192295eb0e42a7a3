"""transforms.json: what is read from it, and every way in which it can be wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tasks.capture.layout import pair
from tasks.capture.transforms import Cameras, load_cameras, parse_transforms
from tasks.errors import Problem

LAYOUT = pair(["views/a.png", "views/b.png", "depth/a.png", "depth/other.png", "transforms.json"])
POSE = np.eye(4).tolist()
FRAME = {"file_path": "views/a.png", "transform_matrix": POSE}


def parse(frame: dict[str, Any] | None = None, **top: Any) -> tuple[Cameras, list[Problem]]:
    content = {"fl_x": 50.0, "frames": [FRAME | (frame or {})]} | top
    return parse_transforms(json.dumps(content).encode(), LAYOUT)


def camera(frame: dict[str, Any] | None = None, **top: Any) -> Any:
    cameras, problems = parse(frame, **top)
    assert not problems
    return cameras.frames["a"].camera(100, 80)


def test_intrinsics_have_sensible_defaults() -> None:
    found = camera()
    assert (found.width, found.height, found.fl_x, found.fl_y, found.cx, found.cy) == (100, 80, 50, 50, 50, 40)
    assert found.distortion == (0, 0, 0, 0)


def test_a_frames_intrinsics_win_over_the_top_levels() -> None:
    found = camera({"fl_x": 70, "k1": 0.1}, fl_y=60, k1=0.2, k2=0.3, cx=49, p1=0.01)
    assert (found.fl_x, found.fl_y, found.cx) == (70, 60, 49)
    assert found.distortion == (0.1, 0.3, 0.01, 0)


def test_focal_length_by_field_of_view() -> None:
    assert camera(fl_x=None, camera_angle_x=math.pi / 2).fl_x == pytest.approx(50)
    assert camera(fl_x=None, camera_angle_x=math.pi / 2).fl_y == pytest.approx(50)
    assert camera(fl_x=None, camera_angle_x=math.pi / 2, camera_angle_y=math.pi / 2).fl_y == pytest.approx(40)


@pytest.mark.parametrize("path", ["views/a.png", "./views/a.png", "views/a", "views/a.jpg"])
def test_frames_are_matched_by_stem(path: str) -> None:
    assert "a" in parse({"file_path": path})[0].frames


def test_depth_file_path_is_respected() -> None:
    cameras, problems = parse({"depth_file_path": "./depth/other.png"})
    assert not problems
    assert cameras.frames["a"].depth == "depth/other.png"


def test_depth_keys_and_bounds() -> None:
    cameras, problems = parse(depth_unit_scale_factor=0.01, depth_near=1, depth_far=3, bounds=[[0, 0, 0], [1, 2, 3]])
    assert not problems
    assert (cameras.depth_unit, cameras.depth_range) == (0.01, (1, 3))
    np.testing.assert_array_equal(cameras.bounds, [[0, 0, 0], [1, 2, 3]])


def test_no_transforms() -> None:
    cameras, problems = load_cameras(pair(["views/a.png"]), lambda path: b"")
    assert not cameras.frames
    assert not problems
    assert cameras.depth_unit == 0.001


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{\n "frames": [1,,]\n}', "line 2, column 15"),
        (b'{"frames": [], "fl_x": NaN}', "NaN is not a number"),
        (b'{"frames": [], "fl_x": -Infinity}', "-Infinity is not a number"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"fl_x": ' + b"1" * 5000 + b', "frames": []}', "cannot be read"),
        (b"[]", "is wrong"),
        (b"{}", "Field required"),
        (b'{"frames": 3}', "is wrong"),
    ],
)
def test_what_is_no_transforms_json(data: bytes, what: str) -> None:
    cameras, problems = parse_transforms(data, LAYOUT)
    assert not cameras.frames
    assert [what in str(problem) for problem in problems] == [True]


ROTATED = np.array([[0.6, 0.8, 0, 0], [-0.8, 0.6, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("frame", "top", "what"),
    [
        ({"transform_matrix": POSE[:3]}, {}, "not 4 x 4"),
        ({"transform_matrix": [[1, 2], [3]]}, {}, "not 4 x 4"),
        ({"transform_matrix": (ROTATED * 0).tolist()}, {}, "last row"),
        ({"transform_matrix": (ROTATED * [1, 1, 0, 1]).tolist()}, {}, "singular"),
        ({"transform_matrix": (ROTATED * [1.1, 1, 1, 1]).tolist()}, {}, "not rigid"),
        ({"transform_matrix": (ROTATED * [-1, 1, 1, 1]).tolist()}, {}, "mirrors"),
        ({"transform_matrix": ROTATED.T.tolist()}, {}, "last row"),
        ({"transform_matrix": (ROTATED * [[1], [1], [1], [1e5]]).tolist()}, {}, "beyond"),
        ({"transform_matrix": [[1e999] * 4] * 4}, {}, "Infinity"),
        ({"transform_matrix": "x"}, {}, "transform_matrix"),
        ({"file_path": "views/c.png"}, {}, "not a view of the capture"),
        ({"file_path": "images/a.png"}, {}, "not a view of the capture"),
        ({"file_path": "/views/a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "views/../../a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "https://host/views/a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "views\\a.png"}, {}, "leaves the capture folder"),
        ({"depth_file_path": "../a.png"}, {}, "leaves the capture folder"),
        ({"depth_file_path": "depth/none.png"}, {}, "not a depth map of the capture"),
        ({"fl_x": 0}, {}, "greater than 0"),
        ({"w": 0}, {}, "greater than 0"),
        ({}, {"fl_x": None}, "no focal length"),
        ({}, {"camera_model": "OPENCV_FISHEYE"}, "not supported"),
        ({"is_fisheye": True}, {}, "not supported"),
        ({}, {"k3": 0.1}, "k3"),
        ({}, {"depth_near": 1}, "not both"),
        ({}, {"depth_near": 2, "depth_far": 1}, "not below"),
        ({}, {"bounds": [[0, 0, 0], [1, 1, 0]]}, "corner"),
        ({}, {"bounds": [0, 1]}, "bounds"),
        ({}, {"depth_unit_scale_factor": 0}, "depth_unit_scale_factor"),
    ],
)
def test_what_is_wrong_is_told(frame: dict[str, Any], top: dict[str, Any], what: str) -> None:
    _, problems = parse(frame, **top)
    assert any(what in str(problem) for problem in problems), [*map(str, problems)]
    assert all(problem.where.startswith("transforms.json") for problem in problems)


def test_a_wrong_frame_leaves_the_others() -> None:
    wrong = FRAME | {"transform_matrix": []}
    cameras, problems = parse(frames=[wrong, {"file_path": "views/b.png", "transform_matrix": POSE}])
    assert [*cameras.frames] == ["b"]
    assert cameras.named == {"a", "b"}
    assert [problem.where for problem in problems] == ["transforms.json frames[0]"]


def test_two_cameras_for_one_view() -> None:
    _, problems = parse(frames=[FRAME, FRAME])
    assert ["second camera" in problem.what for problem in problems] == [True]
