"""Every fault of a capture is found, names its file and says what to do; what is only remarkable is a warning."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from tasks.capture.capture_checks import Needs, check_manifest, examine
from tasks.errors import CaptureRefused, Problem
from tests.support.tiny import (
    FUSION,
    SIZE,
    TRELLIS,
    Content,
    ball_depth,
    edited,
    encoded,
    entries,
    report,
    ring,
    steps,
    tiny_capture,
)

GOOD, SMALL = tiny_capture(), tiny_capture(3)
VIEW, DEPTH, CAMERAS = "views/view_001.png", "depth/view_001.png", "transforms.json"


def problems_of(content: Content, needs: Needs = FUSION, **more: Any) -> tuple[Problem, ...]:
    with pytest.raises(CaptureRefused) as caught:
        report(content, needs, **more)
    for problem in caught.value.problems:
        assert problem.where
        assert problem.todo
    return caught.value.problems


def without(content: Content, *paths: str) -> Content:
    return {path: data for path, data in content.items() if path not in paths}


def opaque(content: Content) -> Content:
    """The capture without alpha."""
    return content | {path: data for path, data in tiny_capture(alpha=False).items() if path.startswith("views/")}


def moved(content: Content, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Content:
    transforms = json.loads(content[CAMERAS])
    frame = transforms["frames"][index]
    frame["transform_matrix"] = change(np.array(frame["transform_matrix"])).tolist()
    return content | {CAMERAS: json.dumps(transforms).encode()}


def named(content: Content, **values: str) -> Content:
    """The capture with other names in its second frame."""
    transforms = json.loads(content[CAMERAS])
    transforms["frames"][1] |= values
    return content | {CAMERAS: json.dumps(transforms).encode()}


def random_picture(height: int = SIZE, width: int = SIZE, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def transparent(alpha: int) -> bytes:
    return encoded(np.dstack([random_picture(), np.full((SIZE, SIZE), alpha, np.uint8)]))


def test_a_good_capture_is_reported() -> None:
    found = report(GOOD)
    assert [view.name for view in found.views] == ["view_000", "view_001", "view_002", "view_003"]
    assert found.warnings == ()
    assert found.has_cameras
    view = found.views[0]
    assert (view.width, view.height, view.channels, view.verdict) == (SIZE, SIZE, 4, "ok")
    assert view.depth_m == pytest.approx((0.7, 0.92), abs=0.03)
    assert view.coverage == pytest.approx(float((ball_depth(ring(4)[0]) > 0).mean()), abs=1e-3)
    assert view.sharpness > 1000


def test_every_file_is_read_once_and_every_view_has_a_thumbnail() -> None:
    read: list[str] = []

    def reader(path: str) -> bytes:
        read.append(path)
        return GOOD[path]

    found, thumbnails = examine("tiny", entries(GOOD), reader, FUSION)
    assert sorted(read) == sorted(GOOD)
    assert [small.name for small in thumbnails] == [view.name for view in found.views]
    assert thumbnails[0].picture.size == (64, 64)


def test_a_capture_of_views_alone_is_enough_for_trellis() -> None:
    found = report({VIEW: GOOD[VIEW]}, TRELLIS)
    assert (found.has_cameras, found.views[0].depth_m, found.warnings) == (False, None, ())


def test_relative_depth_is_no_fault_for_trellis() -> None:
    mask = encoded((ball_depth(ring(4)[1]) > 0) * np.uint8(200))
    found = report({VIEW: opaque(GOOD)[VIEW], DEPTH: mask}, TRELLIS)
    assert found.warnings == ()
    assert 0.2 < found.views[0].coverage < 0.6


def _cases() -> list[Any]:
    grey = encoded((ball_depth(ring(4)[1]) > 0) * np.uint8(200))
    half = {f"views/view_00{i}.png": encoded(random_picture(seed=i)[:, : SIZE // 2]) for i in range(4)}
    cases = {
        "view without depth": (without(GOOD, DEPTH), VIEW, "no depth map"),
        "depth without view": (GOOD | {"depth/extra.png": GOOD[DEPTH]}, "depth/extra.png", "without a view"),
        "truncated view": (GOOD | {VIEW: GOOD[VIEW][:-30]}, VIEW, "broken"),
        "truncated depth": (GOOD | {DEPTH: GOOD[DEPTH][:-30]}, DEPTH, "broken"),
        "empty view": (GOOD | {VIEW: b""}, VIEW, "0 bytes"),
        "empty depth": (GOOD | {DEPTH: b""}, DEPTH, "0 bytes"),
        "empty transforms": (GOOD | {CAMERAS: b""}, CAMERAS, "not valid JSON"),
        "no image": (GOOD | {VIEW: b"these are notes"}, VIEW, "not a readable PNG or JPEG"),
        "other size": (
            GOOD | {VIEW: encoded(random_picture(32, 32))},
            VIEW,
            "its camera in transforms.json is for 64 x 64",
        ),
        "other proportions": (edited(GOOD | half, w=SIZE // 2), DEPTH, "other proportions"),
        "constant depth": (GOOD | {DEPTH: encoded(np.full((SIZE, SIZE), 9000, np.uint16))}, DEPTH, "constant"),
        "millimetres as metres": (edited(GOOD, depth_unit_scale_factor=1.0), DEPTH, "implausible"),
        "kilometres as metres": (edited(GOOD, depth_unit_scale_factor=1e-7), DEPTH, "implausible"),
        "grey depth": (GOOD | {DEPTH: grey}, DEPTH, "8-bit grey"),
        "two views": (tiny_capture(2), "views/", "2 view(s), the engine needs 3"),
        "no views": ({CAMERAS: GOOD[CAMERAS]}, "views/", "0 view(s)"),
        "copied view": (GOOD | {VIEW: GOOD["views/view_000.png"]}, VIEW, "same pixels as views/view_000.png"),
        "one name twice": (GOOD | {"views/view_001.jpg": GOOD[VIEW]}, "views/view_001.jpg", "shares its name"),
        "bomb": (GOOD | {VIEW: _bomb()}, VIEW, "more than the"),
        "principal point": (edited(GOOD, cx=1000.0), VIEW, "principal point"),
        "focal length": (edited(GOOD, fl_x=1e9), VIEW, "focal length"),
        "unmatched name in the listing": (
            GOOD | {"views/../../x.png": b"x"},
            "views/../../x.png",
            "leaves the capture",
        ),
        "file_path outside": (named(GOOD, file_path="../other/views/a.png"), "transforms.json frames[1]", "leaves"),
        "depth_file_path outside": (
            named(GOOD, depth_file_path="C:\\depth.png"),
            "transforms.json frames[1]",
            "leaves",
        ),
        "singular matrix": (
            moved(GOOD, 1, lambda m: m * [[0], [1], [1], [1]]),
            "transforms.json frames[1]",
            "singular",
        ),
        "scaled matrix": (moved(GOOD, 1, lambda m: m * [2, 2, 2, 1]), "transforms.json frames[1]", "not rigid"),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


def _bomb() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels."""
    honest = encoded(random_picture())
    header = honest[12:16] + (100_000).to_bytes(4, "big") * 2 + honest[24:29]
    return honest[:12] + header + zlib.crc32(header).to_bytes(4, "big") + honest[33:]


@pytest.mark.parametrize(("content", "where", "what"), _cases())
def test_a_fault_is_refused_and_located(content: Content, where: str, what: str) -> None:
    problems = problems_of(content)
    assert any(problem.where == where and what in problem.what for problem in problems), [*map(str, problems)]


def test_one_fault_is_told_once() -> None:
    for content in (
        GOOD | {VIEW: b""},
        without(GOOD, DEPTH),
        GOOD | {DEPTH: GOOD[DEPTH][:-30]},
    ):
        assert len(problems_of(content)) == 1


def test_cameras_that_are_not_given_are_no_fault() -> None:
    """The stage find_cameras finds them."""
    assert not report(without(GOOD, CAMERAS)).has_cameras


def test_all_faults_are_told_together() -> None:
    content = without(GOOD, "depth/view_003.png") | {VIEW: b"", "views/view_002.png": b"x"}
    assert {problem.where for problem in problems_of(content)} == {VIEW, "views/view_002.png", "views/view_003.png"}


def test_grey_depth_with_its_range_is_metric() -> None:
    content = edited(opaque(GOOD), depth_near=0.5, depth_far=1.5)
    for index, camera in enumerate(ring(4)):
        depth = ball_depth(camera)
        grey = np.where(depth > 0, np.rint(255 - (depth - 0.5) * 254), 0).astype(np.uint8)
        content[f"depth/view_00{index}.png"] = encoded(grey)
    found = report(content)
    assert found.views[0].depth_m == pytest.approx((0.7, 0.92), abs=0.03)


def test_a_scene_is_cut_out_by_bounds() -> None:
    content = edited(opaque(GOOD), bounds=[[-0.35] * 3, [0.35] * 3])
    for index, camera in enumerate(ring(4)):
        ball = ball_depth(camera)
        content[f"depth/view_00{index}.png"] = encoded(steps(np.where(ball > 0, ball, np.float32(2.5))))
    found = report(content)
    assert found.warnings == ()
    ball = float((ball_depth(ring(4)[0]) > 0).mean())
    assert ball < found.views[0].coverage < ball + 0.12


def _warned(content: Content, needs: Needs = FUSION) -> dict[str, str]:
    return {warning.where: warning.what for warning in report(content, needs).warnings}


NO_DEPTH = encoded(np.zeros((SIZE, SIZE), np.uint16))
LARGEST = encoded(np.full((SIZE, SIZE), 65535, np.uint16))


@pytest.mark.parametrize(
    ("files", "what"),
    [
        pytest.param({VIEW: transparent(0)}, "its mask is empty", id="empty mask"),
        pytest.param({DEPTH: NO_DEPTH}, "a depth map without a reading", id="no reading"),
        pytest.param({DEPTH: LARGEST}, "a depth map without a reading", id="the largest number only"),
        pytest.param(
            {DEPTH: encoded(steps(np.where(ball_depth(ring(4)[1]) > 0, np.float32(0), np.float32(2))))},
            "no depth reading on the object",
            id="readings beside the object only",
        ),
    ],
)
def test_a_view_without_the_object_is_left_out_with_a_warning(files: Content, what: str) -> None:
    found = report(GOOD | files)
    assert [warning.where for warning in found.warnings if "leaves it out" in warning.todo] == [VIEW]
    assert what in found.views[1].verdict
    assert [view.verdict for view in found.views if view.name != "view_001"] == ["ok"] * 3


def test_too_few_views_that_show_the_object_are_refused() -> None:
    content = GOOD | {f"depth/view_00{index}.png": NO_DEPTH for index in (1, 3)}
    problems = problems_of(content)
    assert [problem.where for problem in problems] == ["views/"]
    assert problems[0].what == "holds 2 view(s) that show the object, of 4; the engine needs 3"
    assert "without a reading" in _warned(content, TRELLIS)[VIEW]


def test_a_capture_of_surroundings_is_accepted() -> None:
    """Readings everywhere and nothing that tells the object from them: fusion finds the object."""
    content = opaque(GOOD)
    for index, camera in enumerate(ring(4)):
        ball = ball_depth(camera)
        wall = np.float32(2) + np.linspace(0, 0.5, SIZE, dtype=np.float32)
        content[f"depth/view_00{index}.png"] = encoded(steps(np.where(ball > 0, ball, wall)))
    found = report(content)
    assert found.warnings == ()
    assert [view.coverage for view in found.views] == [1, 1, 1, 1]


def test_an_engine_that_needs_masks_says_which_views_lack_one() -> None:
    content = {path: data for path, data in opaque(GOOD).items() if not path.startswith("depth/")}
    with pytest.raises(CaptureRefused, match=r"4 view\(s\) without a background .*view_000.*view_001.*alpha channel"):
        report(content, TRELLIS)


def test_a_blurred_view_is_a_warning() -> None:
    rgba = np.array(Image.open(io.BytesIO(GOOD[VIEW])))
    rgba[..., :3] = gaussian_filter(rgba[..., :3].astype(float), (2, 2, 0))
    found = report(GOOD | {VIEW: encoded(rgba)})
    assert [warning.where for warning in found.warnings] == [VIEW]
    assert "blurred" in found.views[1].verdict
    assert found.views[0].verdict == "ok"


def test_a_view_without_the_object_is_one_warning() -> None:
    for missed in ({VIEW: transparent(0)}, {DEPTH: encoded(np.zeros((SIZE, SIZE), np.uint16))}):
        (warning,) = report(GOOD | missed).warnings
        assert (warning.where, warning.todo) == (VIEW, "engine fusion leaves it out")


def test_plain_views_may_be_alike() -> None:
    plain = {f"views/view_00{i}.png": encoded(np.full((SIZE, SIZE, 3), 90, np.uint8)) for i in range(4)}
    assert "same pixels" in " ".join(view.verdict for view in report(GOOD | plain).views)


def test_one_camera_for_two_pictures_is_a_warning() -> None:
    first = json.loads(GOOD[CAMERAS])["frames"][0]["transform_matrix"]
    assert "same camera as views/view_000.png" in _warned(moved(GOOD, 1, lambda _: np.array(first)))[VIEW]


def test_exif_orientation_and_strange_files_are_warnings() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    views = {"views/view_001.jpg": encoded(random_picture(), "JPEG", exif=exif), "views/notes.txt": b"notes"}
    content = named(without(GOOD, VIEW) | views, file_path="views/view_001.jpg")
    warned = _warned(content)
    assert "orientation 6" in warned["views/view_001.jpg"]
    assert "ignored" in warned["views/notes.txt"]


def test_what_the_engine_does_not_need_is_a_warning() -> None:
    broken = moved(without(GOOD, DEPTH), 2, lambda matrix: matrix * 2)
    warned = _warned(broken, TRELLIS)
    assert "no depth map" in warned[VIEW]
    assert "transforms.json frames[2]" in warned


MANIFEST_FILES = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in entries(GOOD)]


def manifest(*more: dict[str, Any]) -> str:
    return json.dumps({"schema": 1, "files": [*MANIFEST_FILES, *more]})


def test_a_right_manifest_is_no_problem() -> None:
    assert check_manifest(manifest({"path": "notes.txt", "size": 3}), entries(GOOD)) == []
    report(GOOD, manifest=manifest())


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (manifest({"path": "views/view_009.png", "bytes": 3, "sha256": ""}), "views/view_009.png", "is missing"),
        (manifest({"path": VIEW, "size": 3}), VIEW, "manifest.json says 3"),
        (manifest({"path": VIEW, "bytes": len(GOOD[VIEW]), "sha256": "00"}), VIEW, "sha256"),
        (manifest({"path": "../x", "bytes": 3, "sha256": ""}), "../x", "leaves the capture folder"),
        ("{", "manifest.json", "not a valid manifest"),
        ('{"files": 3}', "manifest.json", "not a valid manifest"),
        ("[" * 100_000, "manifest.json", "not a valid manifest"),
    ],
)
def test_a_manifest_that_contradicts_is_a_problem(text: str, where: str, what: str) -> None:
    problems = problems_of(GOOD, manifest=text)
    assert any(problem.where == where and what in problem.what for problem in problems), [*map(str, problems)]


def test_known_problems_are_told_with_the_others() -> None:
    known = Problem(where="views/link.png", what="is a link that leaves the capture folder", todo="put the file there")
    assert problems_of(without(GOOD, DEPTH), found=[known])[0] == known


def test_a_refusal_survives_pickling() -> None:
    with pytest.raises(CaptureRefused) as caught:
        report({})
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_bytes_give_a_traceback(data: st.DataObject) -> None:
    """Any bytes in any file: a report or CaptureRefused, nothing else."""
    path = data.draw(st.sampled_from(sorted(SMALL)))
    damaged = bytearray(SMALL[path])
    places = st.integers(0, len(damaged) - 1)
    for place, value in data.draw(st.dictionaries(places, st.integers(0, 255), max_size=6)).items():
        damaged[place] = value
    cut = damaged[: data.draw(places)]
    content = SMALL | {path: data.draw(st.sampled_from([bytes(damaged), bytes(cut)]) | st.binary(max_size=64))}
    with suppress(CaptureRefused):
        report(content, data.draw(st.sampled_from([FUSION, TRELLIS])))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=4), max_size=4) | st.dictionaries(st.text(), SCALARS)
KEYS = [*json.loads(SMALL[CAMERAS]), "bounds", "depth_near", "depth_far", "camera_angle_x", "k1", "k3", "camera_model"]
FRAME_KEYS = [None, "file_path", "depth_file_path", "transform_matrix", "w"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(KEYS), value=JSON, in_frame=st.sampled_from(FRAME_KEYS))
def test_no_values_in_transforms_give_a_traceback(key: str, value: Any, in_frame: str | None) -> None:
    transforms = json.loads(SMALL[CAMERAS])
    if in_frame is None:
        transforms[key] = value
    else:
        transforms["frames"][1][in_frame] = value
    with suppress(CaptureRefused):
        report(SMALL | {CAMERAS: json.dumps(transforms).encode()})
