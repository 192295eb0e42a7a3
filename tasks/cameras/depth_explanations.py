"""Usual mistakes in depth maps: numbers that mean something else than metres along the axis, and flipped maps.

`mistakes` tries them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tasks.cameras.conflict import GL_TO_PINHOLE, Witness
from tasks.cameras.explanations import DepthFormat, Explanation, always, as_given, with_factors
from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

MOST_STEPS = 65535  # of a 16-bit depth map


def along_the_ray(given: Explanation) -> Explanation:
    """Depth that is the distance along the ray: views with a narrow field of view contradict each other but little."""
    what = "the depth is the distance along the ray, not along the camera's axis"
    todo = "divide each reading by the length of its ray, (x / fl_x, y / fl_y, 1) from the principal point"
    along_axis = tuple(_along_the_axis(witness) for witness in given.witnesses)
    return replace(given, witnesses=along_axis, told=always(what, todo))


def of_depth(views: Sequence[View], given: Explanation, stored: DepthFormat) -> Iterator[Explanation]:
    """Depth maps whose numbers mean something else."""

    def of(witnesses: Iterable[Witness], what: str, todo: str) -> Explanation:
        return with_factors(replace(given, witnesses=tuple(witnesses)), what, todo, stored)

    yield along_the_ray(given)
    for axes, way in (((0,), "upside down"), ((1,), "mirrored"), ((0, 1), "turned by 180 degrees")):
        flipped = [_flipped(view, axes) for view in views]
        told = always(
            f"the depth maps are {way} against the cameras", "write views and depth maps as the camera saw it"
        )
        yield replace(given, witnesses=as_given(flipped).witnesses, told=told)
    if stored.integer:
        swapped = as_given([_swapped(view, stored) for view in views]).witnesses
        what = "the two bytes of the depth's 16-bit numbers are swapped"
        if _smoother(swapped, given.witnesses):
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


def _flipped(view: View, axes: tuple[int, ...]) -> View:
    """The view with its depth map flipped; its mask may be, or not."""
    assert view.depth is not None
    return replace(view, depth=np.ascontiguousarray(np.flip(view.depth, axes)), mask=np.ones_like(view.mask))


def _smoother(witnesses: Sequence[Witness], before: Sequence[Witness]) -> bool:
    """True if the depth has less noise for its distance; noise that is large enough agrees with everything."""
    if not all(len(each.depth) for each in witnesses):
        return False
    rough, was = (
        np.median([np.median(each.sensor.at(each.depth) / each.depth) for each in some]) for some in (witnesses, before)
    )
    return bool(rough < was)


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
