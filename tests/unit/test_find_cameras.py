"""The stage find_cameras: given cameras are kept, refined or refused, and later stages see the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from flows.cli.conventions import parameters_of
from tasks.cameras.find_cameras import PICTURE, CaptureCameras, find_cameras
from tasks.cameras.finding import FoundCameras
from tasks.capture.listing import list_capture
from tasks.capture.stage_capture import Capture, stage_capture
from tasks.capture.subject import Box
from tasks.errors import CaptureRefused
from tasks.settings import CameraParameters
from tasks.store.results import store
from tests.support.tiny import FUSION, TRELLIS
from tests.synthetic import Truth, make_capture

pytestmark = pytest.mark.usefixtures("own_store")
AUTO = CameraParameters()
DEGREES, METRES = 0.5, 0.003


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    return make_capture(tmp_path / "box", "rounded_box", views=10, size=128)


def moved(truth: Truth, move: Callable[[int, NDArray[np.float64]], NDArray[np.float64]], **top: object) -> Capture:
    """The capture with other matrices in its transforms.json."""
    path = truth.folder / "transforms.json"
    content = json.loads(path.read_text()) | top
    for index, frame in enumerate(content["frames"]):
        frame["transform_matrix"] = move(index, np.array(frame["transform_matrix"])).tolist()
    path.write_text(json.dumps(content))
    return stage_capture(list_capture(str(truth.folder)))


def as_it_is(index: int, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix


def shaken(index: int, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The camera turned by about half a degree and shifted by 3 mm, each view otherwise."""
    rng = np.random.default_rng(index)
    shake = np.eye(4)
    shake[:3, :3] = Rotation.from_rotvec(np.radians(DEGREES) * rng.normal(size=3) / np.sqrt(3)).as_matrix()
    shake[:3, 3] = METRES * rng.normal(size=3) / np.sqrt(3)
    return matrix @ shake


def turns_between(cameras: CaptureCameras, truth: Truth) -> NDArray[np.float64]:
    """Degrees by which the turn from the first camera to each other one is wrong."""
    found = np.stack([camera.camera_to_world[:3, :3] for camera in cameras.by_view().values()])
    right = np.stack([camera.camera_to_world[:3, :3] for camera in truth.cameras])
    wrong = Rotation.from_matrix(found[0].T @ found) * Rotation.from_matrix(right[0].T @ right).inv()
    return np.degrees(wrong.magnitude())


def test_right_cameras_stay_as_they_are_given(truth: Truth) -> None:
    capture = moved(truth, as_it_is)
    found = find_cameras(capture, AUTO, FUSION)
    assert found.source == "given" and not found.warnings
    assert found.conflict is not None and found.conflict < 0.02
    for view, camera in zip(capture.views(), capture.views(placed=found.by_view()), strict=True):
        assert view.camera is not None and camera.camera is not None
        np.testing.assert_array_equal(view.camera.camera_to_world, camera.camera.camera_to_world)
        np.testing.assert_array_equal(view.mask, camera.mask)
    picture = Image.open(BytesIO(store().read(found, PICTURE)))
    assert np.asarray(picture).std() > 5


def test_shaken_cameras_are_refined(truth: Truth) -> None:
    given = find_cameras(moved(truth, shaken), CameraParameters(mode="given"), FUSION)
    assert given.conflict is not None and given.conflict > 0.1 and given.source == "given"
    refined = find_cameras(moved(truth, as_it_is), AUTO, FUSION)
    assert refined.source == "refined"
    assert refined.conflict is not None and refined.conflict < 0.02
    assert np.median(turns_between(refined, truth)) < 0.4 * np.median(turns_between(given, truth))
    assert 0.1 < refined.correction_deg < 3 * DEGREES
    assert 0 < refined.correction_m < 5 * METRES


def test_a_declared_rig_is_not_refined(truth: Truth) -> None:
    found = find_cameras(moved(truth, shaken, rig="turntable"), AUTO, FUSION)
    assert found.source == "rig" and found.correction_deg == 0
    assert found.warnings


def test_a_mistake_is_refused_with_its_name(truth: Truth) -> None:
    capture = moved(truth, lambda index, matrix: np.linalg.inv(matrix))
    with pytest.raises(CaptureRefused, match="world-to-camera"):
        find_cameras(capture, AUTO, FUSION)


def test_an_engine_without_cameras_goes_on_without_wrong_ones(truth: Truth) -> None:
    capture = moved(truth, lambda index, matrix: np.linalg.inv(matrix))
    found = find_cameras(capture, AUTO, TRELLIS)
    assert found.source == "none" and not found.views
    assert len(found.left_out) == 10 and "world-to-camera" in found.warnings[0].what
    assert all(view.camera is None for view in capture.views(placed=found.by_view()))


def test_cameras_that_are_wrong_by_no_usual_mistake_are_told(truth: Truth) -> None:
    """The poses are mixed: nothing can be made of them, and that is not passed over."""
    poses = [camera.camera_to_world for camera in truth.cameras]
    order = np.random.default_rng(3).permutation(len(poses))
    found = find_cameras(moved(truth, lambda index, matrix: poses[order[index]]), AUTO, FUSION)
    assert found.source == "given" and found.warnings


def test_without_cameras_there_is_nothing_to_check(truth: Truth) -> None:
    (truth.folder / "transforms.json").unlink()
    found = find_cameras(stage_capture(list_capture(str(truth.folder))), AUTO, TRELLIS)
    assert found.source == "none" and not found.views and not found.warnings


@pytest.mark.parametrize(("mode", "why"), [("given", "the engine needs cameras"), ("auto", "could not be found")])
def test_without_cameras_the_refusal_says_why(truth: Truth, mode: Literal["given", "auto"], why: str) -> None:
    """Two views are too few to find cameras by."""
    (truth.folder / "transforms.json").unlink()
    for index in range(2, 10):
        (truth.folder / "views" / f"view_{index:03d}.png").unlink()
        (truth.folder / "depth" / f"view_{index:03d}.png").unlink()
    with pytest.raises(CaptureRefused, match=why):
        find_cameras(stage_capture(list_capture(str(truth.folder))), CameraParameters(mode=mode), FUSION)


@pytest.mark.parametrize(("written", "means"), [("auto", None), ("true", True), ("false", False)])
def test_a_person_may_say_whether_the_object_moves(
    written: str, means: bool | None, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool | None] = []

    def refuse(views: object, progress: object, object_moves: bool | None) -> FoundCameras:
        said.append(object_moves)
        raise CaptureRefused("box", [])

    monkeypatch.setattr("tasks.cameras.find_cameras.find", refuse)
    (truth.folder / "transforms.json").unlink()
    parameters = parameters_of([f"cameras.object_moves={written}"]).cameras
    with pytest.raises(CaptureRefused):
        find_cameras(stage_capture(list_capture(str(truth.folder))), parameters, FUSION)
    assert said == [means]


def test_found_cameras_are_what_later_stages_get(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"view_{index:03d}" for index in range(9)]
    answer = FoundCameras(
        cameras=dict(zip(names, truth.cameras, strict=False)),
        left_out={"view_009": "its features match no other view"},
        refusal=None,
        ambiguous="the shape repeats itself",
        focal_px=150.0,
        focal_found=True,
        residual_m=0.0001,
        agreement=0.9,
        conflict=0.01,
        margin=0.5,
        unconstrained=(),
        object_moves=None,
    )
    monkeypatch.setattr("tasks.cameras.find_cameras.find", lambda views, progress, object_moves: answer)
    (truth.folder / "transforms.json").unlink()
    capture = stage_capture(list_capture(str(truth.folder)))
    found = find_cameras(capture, AUTO, FUSION)
    assert found.source == "found" and list(found.by_view()) == names
    assert [view.name for view in found.left_out] == ["view_009"]
    assert [warning.what for warning in found.warnings][1] == "may be wrong: the shape repeats itself"
    assert [view.camera is not None for view in capture.views(placed=found.by_view())] == [True] * 9 + [False]


def test_of_an_object_that_turned_later_stages_see_nothing_else(truth: Truth) -> None:
    """Here the box is around its upper half."""
    capture = moved(truth, as_it_is)
    low, high = truth.mesh.bounds
    upper = Box.between(np.array([[*low[:2], (low[2] + high[2]) / 2], high]))
    given = find_cameras(capture, AUTO, FUSION)
    seen = list(given.model_copy(update={"box": upper}).views_of(capture, capture.view_names[:4]))
    assert [view.name for view in seen] == list(capture.view_names[:4])
    for view, whole in zip(seen, given.views_of(capture), strict=False):
        assert view.depth is not None and view.camera is not None and whole.depth is not None
        rows, columns = np.nonzero(view.depth)
        camera = view.camera.resized(*view.depth.shape[::-1])
        assert upper.holds(camera.points(rows, columns, view.depth[rows, columns])).all()
        assert (view.depth > 0).sum() < (whole.depth > 0).sum()
