"""Usual mistakes in cameras and depth, each as the views would be without it; `mistakes` tries them all.

The mistakes are those of public reports: depth in another unit, axes of another library, matrices the other way round,
depth that is not the distance along the camera's axis, and depth maps that are not of the view's own camera.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, product
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import GL_TO_PINHOLE, Floats, Witness, inverse, pinhole_poses
from tasks.capture.camera import Camera
from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise, measured_noise

FACTORS = np.geomspace(1e-3, 1e3, 467)  # of the depth, 3 % apart
LEAST_PARALLAX = 0.05  # of the way between two cameras, in distances of what they see
ONE = np.ones(1)
# Cameras and depth of calibrated devices differ in scale by less than this: no mistake, but a matter of refinement
SAME_SCALE = 0.03
# A factor that is so close to a round one is that one
ROUND = 0.01
ROUND_FACTORS = (*np.arange(11, 31) / 10, 4, 5, 6, 8, 10, 20, 25.4, 50, 100, 200, 254, 256, 500, 1000)
# Sizes of pictures in those of the calibration
SIZES = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 2, 2.0, 3.0, 4.0, 8.0)
RATIOS = (9 / 16, 3 / 4, 4 / 3, 16 / 9)  # of a picture's sides to those of a depth map that was stretched over it
SHIFTS = np.linspace(-0.08, 0.08, 5)  # of a depth map, in its widths
FINER_SHIFTS = np.array([-0.5, 0.0, 0.5])  # in steps of the search before
LEAST_SHIFT = 0.008  # below this it is a matter of calibration
MOST_STEPS = 65535  # of a 16-bit depth map
# The directions of OpenGL's camera axes and of their opposites, and the conventions that have names
DIRECTIONS = (("right", "left"), ("up", "down"), ("backwards", "ahead"))
OPENGL = ("right", "up", "backwards")
LIBRARIES: dict[tuple[str, ...], str] = {("left", "up", "ahead"): " (PyTorch3D)", ("ahead", "left", "up"): " (ROS)"}
WITH_EVERY_FACTOR = (OPENGL, ("right", "down", "ahead"))  # these and quarter turns are tried with a scale too
MIRRORS = tuple(signs for signs in product((1, -1), repeat=3) if min(signs) < 0)
QUARTER_TURN = np.array([[0.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
Told = tuple[str, str] | None


@dataclass(frozen=True)
class DepthFormat:
    """How a capture's depth maps are stored."""

    unit: float
    """Metres per step of 16-bit maps"""
    integer: bool
    """True for integers, False for floats in metres"""
    limits: tuple[float, float] | None
    """(near, far) of 8-bit maps, metres; None for others"""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The views as they would be without a mistake."""

    poses: Floats
    """(k, 4, 4) camera-to-world in pinhole axes"""
    witnesses: tuple[Witness, ...]
    """(k,) the views' depth"""
    factors: Floats
    """(f,) factors of all depth that may come with it"""
    told: Callable[[float], Told]
    """Gives the mistake and its remedy, by the factor of the depth; None: nothing worth telling"""
    finer: Callable[[], tuple[Explanation, ...]] = tuple
    """Explanations close to this one"""


def as_given(views: Sequence[View]) -> Explanation:
    """No mistake. Every view has a camera and depth."""
    sensor = measured_noise([view.depth for view in views if view.depth is not None])
    witnesses = tuple(Witness.of(view, sensor) for view in views)
    return Explanation(pinhole_poses(witnesses), witnesses, ONE, lambda factor: None)


def explanations(views: Sequence[View], given: Explanation, stored: DepthFormat) -> Iterator[Explanation]:
    """Every mistake that is tried, the simplest first. given: `as_given` of the views."""
    yield replace(given, factors=_with_parallax(given), told=lambda factor: scaled(factor, stored))
    yield from _of_matrices(given, stored)
    yield from _of_depth(views, given, stored)
    yield from _of_intrinsics(given)
    yield replace(given, finer=lambda: _shifted(given, SHIFTS, (0.0, 0.0)))


def _with_parallax(given: Explanation) -> Floats:
    """The factors with which the cameras are not all in one place, where any scale would do."""
    way = np.linalg.norm(np.diff(given.poses[:, :3, 3], axis=0), axis=1)
    depth = np.median(np.concatenate([witness.depth for witness in given.witnesses]))
    return FACTORS[np.median(way) / depth / FACTORS > LEAST_PARALLAX]


def scaled(factor: float, stored: DepthFormat) -> Told:
    """The depth has to be multiplied by this factor to fit the cameras."""
    times = rounded(max(factor, 1 / factor))
    if times < 1 + SAME_SCALE:
        return None
    size = "large" if factor < 1 else "small"
    right = stored.unit * (times if factor > 1 else 1 / times)
    unit = f"depth_unit_scale_factor {right:.6g} instead of {stored.unit:g}"
    metres = f"depth in metres ({'multiply' if factor > 1 else 'divide'} it by {times:.3g})"
    way = f"{'divide' if factor > 1 else 'multiply'} the cameras' positions by {times:.3g}"
    return (
        f"the depth is {times:.3g} times too {size} for these cameras",
        f"{unit if stored.integer else metres}? Or the positions in transform_matrix are not in metres: {way}",
    )


def rounded(factor: float) -> float:
    """The factor, or the round number that it is close to."""
    nearest = min(ROUND_FACTORS, key=lambda each: abs(np.log(factor / each)))
    return float(nearest if abs(factor / nearest - 1) < ROUND else factor)


def _of_matrices(given: Explanation, stored: DepthFormat) -> Iterator[Explanation]:
    matrices = given.poses @ GL_TO_PINHOLE
    transposed = matrices.copy()
    transposed[:, :3, :3] = np.swapaxes(matrices[:, :3, :3], 1, 2)
    axes = "have OpenCV's axes (y down, looking along +z), not OpenGL's (y up, looking along -z)"
    flip = "negate the second and third column of each transform_matrix"
    backwards = "are world-to-camera, not camera-to-world"
    for poses, what, todo in (
        (matrices, axes, flip),
        (inverse(matrices) @ GL_TO_PINHOLE, backwards, "invert each transform_matrix"),
        (inverse(matrices), f"{backwards}, and {axes}", f"invert each transform_matrix, then {flip}"),
        (transposed @ GL_TO_PINHOLE, "have transposed rotations", "transpose the rotation in each transform_matrix"),
        (transposed, f"have transposed rotations, and {axes}", f"transpose each rotation, then {flip}"),
    ):
        yield _with_factors(replace(given, poses=poses), f"the matrices {what}", todo, stored)
    for turns in (1, 2, 3):
        turned = replace(given, poses=given.poses @ np.linalg.matrix_power(QUARTER_TURN, turns))
        what = f"the cameras are turned by {90 * turns} degrees against the images"
        yield _with_factors(turned, what, "give images, depth maps and cameras of one orientation (EXIF?)", stored)

    yield from _of_axes(given, matrices, backwards)
    yield from _of_positions(given, matrices)


def _of_axes(given: Explanation, matrices: Floats, backwards: str) -> Iterator[Explanation]:
    """Matrices with the camera axes of yet another convention."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.eye(4)
        axes[:3, :3] = np.eye(3)[:, order] * signs
        names = tuple(DIRECTIONS[axis][sign < 0] for axis, sign in zip(order, signs, strict=True))
        if np.linalg.det(axes) < 0 or names in WITH_EVERY_FACTOR:
            continue
        what = f"camera axes x {names[0]}, y {names[1]}, z {names[2]}{LIBRARIES.get(names, '')}"
        what += f", not OpenGL's x {OPENGL[0]}, y {OPENGL[1]}, z {OPENGL[2]}"
        todo = "write the columns of each camera-to-world matrix in OpenGL's axes"
        to_opengl = axes.T @ GL_TO_PINHOLE
        if names[2] != OPENGL[2]:  # else it is a quarter turn
            yield replace(given, poses=matrices @ to_opengl, told=_always(f"the matrices have {what}", todo))
        told = _always(f"the matrices {backwards}, and have {what}", f"invert each transform_matrix, then {todo}")
        yield replace(given, poses=inverse(matrices) @ to_opengl, told=told)


def _of_positions(given: Explanation, matrices: Floats) -> Iterator[Explanation]:
    """Rotations and positions that do not belong together, and views in the opposite order."""

    def of(rotations: Floats, positions: Floats, what: str, todo: str) -> Explanation:
        changed = matrices.copy()
        changed[:, :3, :3], changed[:, :3, 3] = rotations, positions
        return replace(given, poses=changed @ GL_TO_PINHOLE, told=_always(what, todo))

    rotations, positions = matrices[:, :3, :3], matrices[:, :3, 3]
    centres = -(rotations @ positions[..., None])[..., 0]
    what = "the rotations are camera-to-world, but the positions are those of world-to-camera matrices"
    yield of(rotations, centres, what, "invert whole matrices: the position is -R t")
    for axes, (shift, order) in product((np.eye(3), GL_TO_PINHOLE[:3, :3]), ((-1, "x y z w"), (1, "w x y z"))):
        quaternions = np.roll(Rotation.from_matrix(rotations @ axes).as_quat(), shift, axis=1)
        what = f"the rotations were made of quaternions that were taken for {order}, but have another order"
        todo = "read the quaternions in their own order, x y z w or w x y z"
        yield of(Rotation.from_quat(quaternions).as_matrix() @ axes, positions, what, todo)
    for mirror in MIRRORS:
        flipped = "".join(name for name, sign in zip("xyz", mirror, strict=True) if sign < 0)
        what = f"the cameras' positions are mirrored against their rotations: {flipped} has the wrong sign"
        yield of(rotations, positions * mirror, what, "take rotations and positions from one world (left-handed?)")
    turned = given.poses[0] @ inverse(given.poses) @ given.poses[0]
    what = "the views turn the other way than their cameras"
    todo = "name the views in the opposite order, or write the rig with the other direction (--clockwise)"
    yield replace(given, poses=turned, told=_always(what, todo))


def _always(what: str, todo: str) -> Callable[[float], Told]:
    """Tells a mistake that comes without another scale."""
    return lambda factor: (what, todo)


def _with_factors(changed: Explanation, what: str, todo: str, stored: DepthFormat) -> Explanation:
    """The explanation with every factor of the depth."""
    return replace(changed, factors=_with_parallax(changed), told=_with_scale(what, todo, stored))


def _with_scale(what: str, todo: str, stored: DepthFormat) -> Callable[[float], Told]:
    def told(factor: float) -> Told:
        scale = scaled(factor, stored)
        return (what, todo) if scale is None else (f"{what}, and {scale[0]}", f"{todo}; {scale[1]}")

    return told


def _of_depth(views: Sequence[View], given: Explanation, stored: DepthFormat) -> Iterator[Explanation]:
    """Depth maps whose numbers mean something else."""

    def of(witnesses: Iterable[Witness], what: str, todo: str) -> Explanation:
        return _with_factors(replace(given, witnesses=tuple(witnesses)), what, todo, stored)

    along_the_ray = (
        "the depth is the distance along the ray, not along the camera's axis",
        "divide each reading by the length of its ray, (x / fl_x, y / fl_y, 1) from the principal point",
    )
    ray = tuple(_along_the_axis(witness) for witness in given.witnesses)
    yield replace(given, witnesses=ray, told=lambda factor: along_the_ray)
    if stored.integer:
        swapped = as_given([_swapped(view, stored) for view in views]).witnesses
        what = "the two bytes of the depth's 16-bit numbers are swapped"
        if all(len(each.depth) for each in swapped):  # else they are even rougher than before
            yield of(swapped, what, "write the depth maps again: PNG is big-endian")
    todo = "write depth in metres that grows with the distance"
    readings = np.concatenate([witness.depth for witness in given.witnesses])

    def inverted(total: float) -> Explanation:
        reversed_ = [_reversed(each, partial(np.subtract, total)) for each in given.witnesses]
        return of(reversed_, "the depth is inverted: what is near has the larger number", todo)

    if stored.limits or stored.integer:
        yield inverted(sum(stored.limits) if stored.limits else MOST_STEPS * stored.unit)
    square = float(np.median(readings)) ** 2
    disparity = [_reversed(each, partial(np.divide, square)) for each in given.witnesses]
    yield of(disparity, "the depth is a disparity: inversely proportional to the distance", todo)
    yield inverted(float(readings.max() + readings.min()))  # last: about any value, a disparity is almost inverted


def _swapped(view: View, stored: DepthFormat) -> View:
    """The view with the two bytes of each reading swapped."""
    assert view.depth is not None
    steps = np.rint(view.depth / stored.unit).clip(0, MOST_STEPS).astype(np.uint16)
    return replace(view, depth=(steps.byteswap() * stored.unit).astype(np.float32))


def _reversed(witness: Witness, change: Callable[[Any], Any]) -> Witness:
    """The witness with all depth changed by a function that falls: what was near becomes far."""
    with np.errstate(divide="ignore", invalid="ignore"):
        known = np.isfinite(witness.nearest)
        depth = np.maximum(change(witness.depth), np.finfo(np.float32).tiny)
        nearest = np.where(known, change(witness.farthest), np.inf).astype(np.float32)
        farthest = np.where(known, change(witness.nearest), 0).astype(np.float32)
    noise = witness.sensor.at(witness.depth) * np.median(depth / witness.depth)
    sensor = DepthNoise((0.0, 0.0), (float(np.median(noise)), 0.0))
    reversed_ = replace(witness, sensor=sensor, depth=depth, nearest=nearest, farthest=farthest)
    return reversed_.with_camera(witness.camera)


def _along_the_axis(witness: Witness) -> Witness:
    """The witness whose readings are the distances along the rays."""
    camera = replace(witness.camera, camera_to_world=GL_TO_PINHOLE)
    lengths = np.linalg.norm(camera.rays(), axis=1).reshape(camera.height, camera.width).astype(np.float32)
    height, width = witness.nearest.shape
    each = resample(lengths, width, height)
    depth = witness.depth / np.linalg.norm(camera.directions(witness.pixels), axis=1)
    nearer = replace(witness, depth=depth, nearest=witness.nearest / each, farthest=witness.farthest / each)
    return nearer.with_camera(witness.camera)


def _of_intrinsics(given: Explanation) -> Iterator[Explanation]:
    """Cameras of other images than those that are there."""
    for size in SIZES:
        what = f"the cameras' intrinsics are for images of {1 / size:.3g} times the size"
        todo = f"multiply fl_x, fl_y, cx and cy by {size:.3g}, or give the w and h that they are for"
        yield _seen_by(given, partial(_zoomed, size=size), (what, todo))
    for ratio in RATIOS:
        for across, down in ((ratio, 1.0), (1.0, ratio)):
            what = f"the depth maps show another field of view than the views: {ratio:.3g} times as wide for its height"
            todo = "render or crop both to one field of view"
            yield _seen_by(given, partial(_stretched, x=across, y=down), (what, todo))


def _seen_by(given: Explanation, change: Callable[[Camera], Camera], told: Told) -> Explanation:
    seen = tuple(_without_background(each).with_camera(change(each.camera)) for each in given.witnesses)
    return replace(given, witnesses=seen, told=lambda factor: told)


def _without_background(witness: Witness) -> Witness:
    """The mask is not the depth map's, if another camera took that."""
    return replace(witness, background=np.zeros_like(witness.background))


def _zoomed(camera: Camera, size: float) -> Camera:
    """The camera of the same picture, of another size."""
    return replace(camera, fl_x=camera.fl_x * size, fl_y=camera.fl_y * size, cx=camera.cx * size, cy=camera.cy * size)


def _stretched(camera: Camera, x: float, y: float) -> Camera:
    """The camera of a picture that was stretched about its middle."""
    return replace(camera, fl_x=camera.fl_x * x, fl_y=camera.fl_y * y)


def _shifted(given: Explanation, steps: Floats, about: tuple[float, float]) -> tuple[Explanation, ...]:
    """Depth maps beside their place, by steps to either side of a shift (x, y). All in widths of the map."""
    return tuple(_shifted_by(given, about[0] + x, about[1] + y, steps) for x in steps for y in steps)


def _shifted_by(given: Explanation, across: float, down: float, steps: Floats) -> Explanation:
    width = given.witnesses[0].camera.width
    x, y = across * width, down * width
    what = f"the depth maps are shifted against the views, by about {x:.0f}, {y:.0f} pixels (right, down)"
    todo = "register the depth to the colour camera, or crop both alike"
    told = None if max(abs(across), abs(down)) < LEAST_SHIFT else (what, todo)
    moved = _seen_by(given, lambda camera: replace(camera, cx=camera.cx + x, cy=camera.cy + y), told)
    return replace(moved, finer=lambda: _shifted(given, (steps[1] - steps[0]) * FINER_SHIFTS, (across, down)))
