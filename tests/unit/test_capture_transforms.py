"""transforms.json: what is read from it, and every way in which it can be wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tasks.capture.given_cameras import GivenCameras
from tasks.capture.layouts import read_layout
from tasks.errors import Problem

FILES = ("views/a.png", "views/b.png", "depth/a.png", "depth/other.png", "transforms.json")
POSE = np.eye(4).tolist()
FRAME = {"file_path": "views/a.png", "transform_matrix": POSE}


def parse(frame: dict[str, Any] | None = None, **top: Any) -> tuple[GivenCameras, list[Problem]]:
    content = {"fl_x": 50.0, "frames": [FRAME | (frame or {})]} | top
    return parse_file(json.dumps(content).encode())


def parse_file(data: bytes) -> tuple[GivenCameras, list[Problem]]:
    layout = read_layout(FILES, {"transforms.json": data}.__getitem__)
    return layout.cameras, list(layout.camera_problems)


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


@pytest.mark.parametrize(
    "path",
    ["views/a.png", "./views/a.png", "views/a", "views/a.jpg", "views\\a.png", "VIEWS/A.PNG", "images/a.png", "a"],
)
def test_frames_are_matched_by_stem(path: str) -> None:
    assert "a" in parse({"file_path": path})[0].frames


def test_depth_file_path_is_respected() -> None:
    content = {"fl_x": 50.0, "frames": [FRAME | {"depth_file_path": "./depth/other.png"}]}
    layout = read_layout(FILES, lambda path: json.dumps(content).encode())
    assert not layout.camera_problems
    assert layout.views[0].depth == "depth/other.png"
    assert layout.unmatched_depth == ("depth/a.png",)


def test_depth_keys_and_bounds() -> None:
    cameras, problems = parse(depth_unit_scale_factor=0.01, depth_near=1, depth_far=3, bounds=[[0, 0, 0], [1, 2, 3]])
    assert not problems
    assert (cameras.depth_unit, cameras.depth_range) == (0.01, (1, 3))
    np.testing.assert_array_equal(cameras.bounds, [[0, 0, 0], [1, 2, 3]])


def test_no_transforms() -> None:
    layout = read_layout(["views/a.png"], {}.__getitem__)
    assert not layout.cameras.frames
    assert not layout.camera_problems
    assert layout.cameras.depth_unit == 0.001


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'{\n "frames": [1,,]\n}', "line 2, column 15"),
        (b'{"frames": [], "fl_x": NaN}', "finite number"),
        (b'{"frames": [], "fl_x": -Infinity}', "finite number"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"fl_x": ' + b"1" * 5000 + b', "frames": []}', "cannot be read"),
        (b"[]", "is wrong"),
        (b"{}", "neither frames nor a focal length"),
        (b'{"frames": 3}', "is wrong"),
    ],
)
def test_what_is_no_transforms_json(data: bytes, what: str) -> None:
    cameras, problems = parse_file(data)
    assert not cameras.frames
    assert [what in str(problem) for problem in problems] == [True]


ROTATED = np.array([[0.6, 0.8, 0, 0], [-0.8, 0.6, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("frame", "top", "what"),
    [
        ({"transform_matrix": POSE[:2]}, {}, "not 4 x 4"),
        ({"transform_matrix": [[1, 2], [3]]}, {}, "not 4 x 4"),
        ({"transform_matrix": (ROTATED * 0).tolist()}, {}, "last row"),
        ({"transform_matrix": (ROTATED * [1, 1, 0, 1]).tolist()}, {}, "singular"),
        ({"transform_matrix": (ROTATED * [1.1, 1, 1, 1]).tolist()}, {}, "not rigid"),
        ({"transform_matrix": (ROTATED * [-1, 1, 1, 1]).tolist()}, {}, "mirrors"),
        ({"transform_matrix": ROTATED.T.tolist()}, {}, "last row"),
        ({"transform_matrix": (ROTATED * [[1], [1], [1], [1e5]]).tolist()}, {}, "beyond"),
        ({"transform_matrix": [[1e999] * 4] * 4}, {}, "not finite"),
        ({"transform_matrix": "x"}, {}, "transform_matrix"),
        ({"file_path": "views/c.png"}, {}, "not a view of the capture"),
        ({"file_path": "/views/a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "views/../../a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "https://host/views/a.png"}, {}, "leaves the capture folder"),
        ({"file_path": "views\\..\\a.png"}, {}, "leaves the capture folder"),
        ({"depth_file_path": "../a.png"}, {}, "leaves the capture folder"),
        ({"depth_file_path": "depth/none.png"}, {}, "not a depth map of the capture"),
        ({"fl_x": 0}, {}, "greater than 0"),
        ({"w": 0}, {}, "greater than 0"),
        ({}, {"fl_x": None}, "no focal length"),
        ({}, {"camera_model": "EQUIRECTANGULAR"}, "not supported"),
        ({}, {"camera_model": "THIN_PRISM_FISHEYE"}, "not supported"),
        ({}, {"k4": 0.1}, "k4"),
        ({}, {"depth_near": 1}, "not both"),
        ({}, {"depth_near": 2, "depth_far": 1}, "not below"),
        ({}, {"bounds": [[0, 0, 0], [1, 1, 0]]}, "corner"),
        ({}, {"bounds": [0, 1]}, "bounds"),
        ({}, {"depth_unit_scale_factor": 0}, "depth_unit_scale_factor"),
        ({}, {"depth_unit_scale_factor": 5000}, "not steps for each metre: 0.0002"),
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


def test_a_matrix_without_its_last_row() -> None:
    cameras, problems = parse({"transform_matrix": ROTATED[:3].tolist()})
    assert not problems
    np.testing.assert_array_equal(cameras.frames["a"].camera_to_world, ROTATED)


def test_positions_that_nerfstudio_scaled_are_metres_again() -> None:
    cameras, _ = parse({"transform_matrix": ROTATED.tolist()}, applied_scale=0.5)
    np.testing.assert_array_equal(cameras.frames["a"].camera_to_world[:3, 3], [0, 0, 2])


def test_keys_of_instant_ngp_for_depth() -> None:
    cameras, problems = parse({"depth_path": "./depth/other"}, integer_depth_scale=0.0005, enable_depth_loading=True)
    assert not problems
    assert cameras.depth_unit == 0.0005


def test_intrinsics_without_poses_are_kept() -> None:
    cameras, problems = parse_file(b'{"fl_x": 70, "w": 100, "h": 80}')
    assert not problems
    assert not cameras.frames
    assert {name: lens.fl_x for name, lens in cameras.lenses.items()} == {"a": 70, "b": 70}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_windows(encoding: str) -> None:
    cameras, problems = parse_file(json.dumps({"fl_x": 50, "frames": [FRAME]}).encode(encoding))
    assert not problems
    assert "a" in cameras.frames


def test_lost_tracking_names_its_frame() -> None:
    _, problems = parse_file(
        json.dumps(
            {
                "fl_x": 50,
                "frames": [
                    FRAME,
                    FRAME | {"file_path": "views/b.png", "transform_matrix": (ROTATED * np.nan).tolist()},
                ],
            }
        ).encode()
    )
    assert [problem.where for problem in problems] == ["transforms.json frames[1]"]


def test_distortion_is_in_the_order_of_opencv() -> None:
    assert camera(k1=0.1, k2=0.2, k3=0.3, p1=0.4, p2=0.5).distortion == (0.1, 0.2, 0.4, 0.5, 0.3, 0, 0, 0)
    full = camera(k1=0.1, k2=0.2, p1=0.3, p2=0.4, k3=0.5, k4=0.6, k5=0.7, k6=0.8, camera_model="FULL_OPENCV")
    assert full.distortion == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
