"""The subject of a capture: its box, known background, and the search for an object that stands on a plane."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.subject import Box, Subject
from tasks.capture.views import View
from tasks.geometry.depth_noise import measured_noise
from tasks.geometry.subject_search import find_subject
from tests.support.on_a_table import PLACE, at, block, table, views_from_above, views_of_scene
from tests.synthetic import look_at

SIZE = 40
TURNED = np.array([[0.6, 0.8, 0.0], [-0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
BOX = Box.between(np.array([[-0.2, -0.1, -1.5], [0.2, 0.3, -0.5]]))  # before a camera at the origin
CAMERA = Camera(SIZE, SIZE, float(SIZE), float(SIZE), SIZE / 2, SIZE / 2, np.eye(4))
INNER = np.s_[SIZE // 2 - 2 : SIZE // 2 + 2, SIZE // 2 - 2 : SIZE // 2 + 2]  # its middle looks through the box


def test_a_box_between_two_corners() -> None:
    assert BOX.centre == pytest.approx((0, 0.1, -1))
    assert BOX.half == pytest.approx((0.2, 0.2, 0.5))
    points = np.array([[0, 0, -1], [0.19, 0.29, -0.51], [0.21, 0, -1], [0, -0.11, -1], [0, 0, -1.6]])
    assert BOX.holds(points).tolist() == [True, True, False, False, False]


def test_a_turned_box_holds_what_lies_along_its_sides() -> None:
    box = Box.of(np.array([1.0, 2, 3]), np.array([0.5, 0.1, 0.2]), TURNED)
    along, across = TURNED[0], TURNED[1]
    points = np.array(box.centre) + np.array([0.45 * along, 0.55 * along, 0.09 * across, 0.3 * across, [0.45, 0, 0]])
    assert box.holds(points).tolist() == [True, False, True, False, False]


def test_rays_enter_and_leave_a_box() -> None:
    enter, leave = BOX.crossed(np.zeros(3), np.array([[0, 0, -1.0], [0, 0, -2], [0, 0, 1], [1, 0, -1], [1, 0, 0]]))
    assert (enter[:2].tolist(), leave[:2].tolist()) == (pytest.approx([0.5, 0.25]), pytest.approx([1.5, 0.75]))
    assert leave[2] < 0  # behind the camera
    assert (enter[3:] > leave[3:]).all()  # beside the box, one of them along its side
    inside, out = BOX.crossed(np.array([0, 0, -1.0]), np.array([[0, 0, -1.0]]))
    assert (inside[0], out[0]) == (pytest.approx(-0.5), pytest.approx(0.5))


def test_rays_cross_a_turned_box() -> None:
    box = Box.of(np.zeros(3), np.array([0.5, 0.1, 0.2]), TURNED)
    enter, leave = box.crossed(-2 * TURNED[0], TURNED[:2])
    assert (enter[0], leave[0]) == (pytest.approx(1.5), pytest.approx(2.5))
    assert enter[1] > leave[1]


@pytest.mark.parametrize(
    ("metres", "background"), [(0.3, False), (1.0, False), (1.4, False), (1.6, True), (0.0, False)]
)
def test_only_a_reading_beyond_the_box_is_known_background(metres: float, background: bool) -> None:
    """One before the box hides it, and a missing one says nothing."""
    found = masks.behind_or_beside(np.full((SIZE, SIZE), metres, np.float32), CAMERA, BOX)
    assert (found[INNER] == background).all()
    assert found[-1].all() and found[:, [0, -1]].all()  # rays that miss the box


def test_pixels_next_to_the_object_are_not_known_background() -> None:
    depth = np.full((SIZE, SIZE), 2, np.float32)
    depth[INNER] = 1
    found = masks.behind_or_beside(depth, CAMERA, BOX)
    row = ~found[SIZE // 2]
    assert np.flatnonzero(row).tolist() == [*range(SIZE // 2 - 4, SIZE // 2 + 4)]


def test_nothing_is_beside_a_box_around_the_camera_and_everything_if_it_is_behind() -> None:
    depth = np.zeros((SIZE, SIZE), np.float32)
    assert not masks.behind_or_beside(depth, CAMERA, Box.between(np.array([[-1.0, -1, -3], [1, 1, 1]])))[INNER].any()
    assert masks.behind_or_beside(depth, CAMERA, Box.between(np.array([[-1.0, -1, 1], [1, 1, 3]]))).all()


def test_what_surrounds_a_cut_out_is_known_background() -> None:
    read = np.zeros((SIZE, SIZE), bool)
    read[10:30, 10:30] = True
    read[18:22, 18:22] = False  # a gap in the object
    found = masks.around_cut_out(read)
    assert np.flatnonzero(~found[12]).tolist() == [*range(8, 32)]
    assert not found[18:22, 18:22].any()


def test_gaps_of_a_sensor_are_not_a_cut_out() -> None:
    read = np.zeros((SIZE, SIZE), bool)
    read[10:, 10:30] = True  # reaches the border: surroundings
    assert not masks.around_cut_out(read).any()
    read = np.ones((SIZE, SIZE), bool)
    read[[0, 1, -2, -1]] = read[:, [0, 1, -2, -1]] = False  # little is missing
    assert not masks.around_cut_out(read).any()
    assert not masks.around_cut_out(np.ones((SIZE, SIZE), bool)).any()


def test_a_view_within_a_box() -> None:
    depth = np.full((SIZE, SIZE), 2, np.float32)
    depth[INNER] = 1
    depth[SIZE // 2, SIZE // 2] = 0  # missing
    depth[SIZE // 2 + 1, SIZE // 2] = 0.3  # before the box
    camera = CAMERA.resized(2 * SIZE, 2 * SIZE)
    picture = np.zeros((2 * SIZE, 2 * SIZE, 3), np.uint8)
    view = View("a", picture, np.ones((2 * SIZE, 2 * SIZE), bool), depth, camera)
    assert view.of(None) is view and view.of(Subject(kind="surface")) is view
    cut = view.of(Subject(kind="object", box=BOX))
    assert cut.depth is not None and cut.has_mask and not view.has_mask
    assert set(np.unique(cut.depth)) == {0, 1} and (cut.depth > 0).sum() == 14
    assert cut.mask[SIZE - 4 : SIZE + 4, SIZE - 4 : SIZE + 4].all()  # twice the size, missing readings included
    assert not cut.mask[:10].any() and not cut.mask[SIZE, : SIZE - 9].any()


def test_a_view_within_a_box_keeps_its_own_mask() -> None:
    mask = np.ones((SIZE, SIZE), bool)
    mask[SIZE // 2] = False
    view = View("a", np.zeros((SIZE, SIZE, 3), np.uint8), mask, np.ones((SIZE, SIZE), np.float32), CAMERA)
    cut = view.within(BOX)
    assert not cut.mask[SIZE // 2].any() and cut.mask[SIZE // 2 + 1, SIZE // 2]


def found_in(views: list[View]) -> Subject | None:
    return find_subject(views, measured_noise([view.depth for view in views if view.depth is not None]))


def in_millimetres(view: View) -> View:
    assert view.depth is not None
    return replace(view, depth=(np.rint(view.depth * 1000) / 1000).astype(np.float32))


def height(points: NDArray[np.floating], subject: Subject) -> NDArray[np.float64]:
    assert subject.plane is not None
    return np.asarray(points @ np.array(subject.plane[:3]) + subject.plane[3])


@pytest.mark.parametrize("millimetres", [False, True])
def test_an_object_on_a_table_is_found(millimetres: bool) -> None:
    views = views_from_above(trimesh.util.concatenate([block(), table()]))
    subject = found_in([*map(in_millimetres, views)] if millimetres else views)
    assert subject is not None and subject.kind == "object" and subject.box is not None and subject.plane is not None
    assert subject.plane[:3] == pytest.approx((0, 0, 1), abs=1e-3)
    assert height(PLACE, subject) == pytest.approx(0, abs=3e-4)
    inside, _ = trimesh.sample.sample_surface(block(), 1000, seed=0)
    assert subject.box.holds(inside[inside[:, 2] > PLACE[2] + 0.004]).all()
    assert not subject.box.holds(table().vertices).any()
    assert not subject.box.holds(np.array([PLACE, at(0.1, 0, 0.0003)])).any()
    assert np.prod(subject.box.half) * 8 < 3 * block().bounding_box.volume  # close around it
    assert "set bounds to change it" in subject.reason


def test_the_object_where_the_cameras_look_is_found_and_not_a_larger_one_beside_it() -> None:
    larger = block((0.2, 0.2, 0.2))
    larger.apply_translation([0.36, 0, 0])
    views = views_from_above(trimesh.util.concatenate([block((0.1, 0.1, 0.1)), larger, table()]))
    subject = found_in(views)
    assert subject is not None and subject.box is not None
    assert subject.box.holds(at(0, 0, 0.09)[None]).all()
    assert not subject.box.holds(larger.vertices).any()


def test_a_plane_with_nothing_on_it_and_an_object_without_a_plane_have_no_subject() -> None:
    assert found_in(views_from_above(table(), 8)) is None
    assert found_in(views_from_above(block(), 8)) is None
    assert find_subject([], measured_noise([np.zeros((9, 9))])) is None


def test_a_wall_has_no_subject() -> None:
    wall = trimesh.creation.box((3, 0.1, 3)).apply_translation(PLACE)
    poses = [look_at(at(x, -1, z), at(x / 2, 0, z / 2)) for x in (-0.3, 0, 0.3) for z in (-0.2, 0.2)]
    assert found_in(views_of_scene(wall, poses)) is None


@pytest.mark.parametrize("outwards", [True, False])
def test_a_room_has_no_subject(outwards: bool) -> None:
    """Walls stand on the floor, and the cameras are between them."""
    room = trimesh.creation.box((4, 3, 2.5)).apply_translation(PLACE)
    room.invert()
    around = [np.array([np.cos(turn), np.sin(turn), 0.1]) for turn in np.linspace(0, 6, 12)]
    poses = [look_at(PLACE, PLACE + way) if outwards else look_at(PLACE + way, PLACE) for way in around]
    assert found_in(views_of_scene(room, poses)) is None


def test_what_is_seen_in_passing_is_no_subject() -> None:
    """As furniture on a walk through a room: most views look at other places of one plane."""
    floor = trimesh.creation.box((6, 6, 0.02)).apply_translation(at(0, 0, -0.01))
    scene = trimesh.util.concatenate([block(), floor])
    at_block = [look_at(at(x, -0.5, 0.4), at(0, 0, 0.05)) for x in (-0.2, -0.1, 0.1, 0.2)]
    turns = np.linspace(0, 2 * np.pi, 6, endpoint=False)
    beside = [look_at(at(1.5 * np.cos(t), 1.5 * np.sin(t), 0.6), at(2 * np.cos(t), 2 * np.sin(t), 0)) for t in turns]
    assert found_in(views_of_scene(scene, at_block)) is not None
    assert found_in(views_of_scene(scene, at_block + beside)) is None


def test_cameras_on_both_sides_of_a_plane_give_none() -> None:
    both = trimesh.util.concatenate([block(), table()])
    views = views_from_above(both, 8)
    assert found_in(views) is not None
    assert found_in(views + views_from_above(both, 8, elevations=(-75, -15))) is None
