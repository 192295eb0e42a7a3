"""Usual mistakes in intrinsics: those of other pictures, a wrong focal length, depth maps beside their place.

`mistakes` tries them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from tasks.cameras.conflict import Floats, Witness
from tasks.cameras.explanations import SAME_SCALE, Explanation, Told, rounded
from tasks.capture.camera import Camera

# Sizes of pictures in those of the calibration
SIZES = (1 / 8, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 2, 2.0, 3.0, 4.0, 8.0)
FOCALS = np.geomspace(1 / 8, 8, 86)  # of the focal length, 5 % apart
FINER_FOCALS = np.linspace(-1, 1, 5)  # in halves of the step of the search before
RATIOS = (9 / 16, 3 / 4, 4 / 3, 16 / 9)  # of a picture's sides to those of a depth map that was stretched over it
SHIFTS = np.linspace(-0.08, 0.08, 5)  # of a depth map, in its widths
FINER_SHIFTS = np.array([-0.5, 0.0, 0.5])  # in steps of the search before
LEAST_SHIFT = 0.008  # below this it is a matter of calibration


def of_intrinsics(given: Explanation) -> Iterator[Explanation]:
    """Cameras of other images than those that are there."""
    for size in SIZES:
        what = f"the cameras' intrinsics are for images of {1 / size:.3g} times the size"
        todo = f"multiply fl_x, fl_y, cx and cy by {size:.3g}, or give the w and h that they are for"
        yield _seen_by(given, partial(_zoomed, size=size), (what, todo))
    yield of_another_focal_length(given)
    for ratio in RATIOS:
        for across, down in ((ratio, 1.0), (1.0, ratio)):
            what = f"the depth maps show another field of view than the views: {ratio:.3g} times as wide for its height"
            todo = "render or crop both to one field of view"
            yield _seen_by(given, partial(_stretched, x=across, y=down), (what, todo))
    yield replace(given, finer=lambda: _shifted(given, SHIFTS, (0.0, 0.0)))


def of_another_focal_length(given: Explanation) -> Explanation:
    """Cameras whose focal length is too long or too short."""
    return replace(given, finer=lambda: _lengthened(given, FOCALS, float(FOCALS[1] / FOCALS[0])))


def _seen_by(given: Explanation, change: Callable[[Camera], Camera], told: Told) -> Explanation:
    seen = tuple(_without_background(each).with_camera(change(each.camera)) for each in given.witnesses)
    return replace(given, witnesses=seen, told=lambda factor: told)


def _without_background(witness: Witness) -> Witness:
    """The mask is not the depth map's, if another camera took that."""
    return replace(witness, background=np.zeros_like(witness.background))


def _zoomed(camera: Camera, size: float) -> Camera:
    """The camera of the same picture, of another size."""
    return replace(camera, fl_x=camera.fl_x * size, fl_y=camera.fl_y * size, cx=camera.cx * size, cy=camera.cy * size)


def _lengthened(given: Explanation, lengths: Floats, step: float) -> tuple[Explanation, ...]:
    """Cameras with other focal lengths, times those that are given; step: the factor between two of them."""
    return tuple(_lengthened_by(given, float(length), step) for length in lengths)


def _lengthened_by(given: Explanation, length: float, step: float) -> Explanation:
    times, right = rounded(max(length, 1 / length)), given.witnesses[0].camera.fl_x * length
    what = f"the focal length is {times:.3g} times too {'short' if length > 1 else 'long'} for these views"
    told = None if times < 1 + SAME_SCALE else (what, f"give fl_x and fl_y in pixels of the views, about {right:.4g}")
    changed = _seen_by(given, partial(_stretched, x=length, y=length), told)
    nearer = length * np.sqrt(step) ** FINER_FOCALS
    return replace(changed, finer=lambda: _lengthened(given, nearer, float(np.sqrt(np.sqrt(step)))))


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
    todo = "correct cx and cy, or register the depth to the colour camera, or crop both alike"
    told = None if max(abs(across), abs(down)) < LEAST_SHIFT else (what, todo)
    moved = _seen_by(given, lambda camera: replace(camera, cx=camera.cx + x, cy=camera.cy + y), told)
    return replace(moved, finer=lambda: _shifted(given, (steps[1] - steps[0]) * FINER_SHIFTS, (across, down)))
