"""Search for the subject of a capture: it stands on a supporting plane where the cameras look. `fuse` calls it.

The plane is found by random sampling: Fischler and Bolles, Random sample consensus (CACM 1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.subject import Box, Subject
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

Floats = NDArray[np.float64]

READINGS_PER_VIEW = 4000
CENTRE_SHARE = 0.2  # of an image's sides: its middle, where the camera looks
TRIES = 400  # random planes
LOCAL = 64  # a try's second and third reading are among so many neighbours in the same view
SIGMAS = 4.0  # of noise around a plane
SPREAD = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
COARSE = 0.01  # of the distance: views may contradict each other by more than their noise
FOOTPRINTS = 2.0  # pixel sizes at its distance, that a plane is thick at least
MIN_PLANE_SHARE = 0.1  # of the readings around the focus lie on a supporting plane at least
MAX_BELOW_SHARE = 0.1  # of them lie below it at most
MIN_ABOVE_SHARE = 0.01  # of them stand on it at least
CELLS = 96  # along the sides of a cube around the focus, in which what stands on the plane falls into pieces
MARGIN_CELLS = 1.5
MIN_LOOKING_SHARE = 0.5  # of the views have the object's middle in their image at least
NEARNESS = 8.0  # how much the distance from the focus counts, in shares of what is searched, against size


@dataclass(frozen=True)
class _Readings:
    """Some readings of all views."""

    points: Floats
    """(n, 3) world metres"""
    thickness: Floats
    """(n,) metres that a reading of a plane may lie off it"""


def find_subject(views: Sequence[View], sensor: DepthNoise) -> Subject | None:
    """The box of the object that stands on a plane where the cameras look; None if there is no such object.

    views: with cameras, depth in metres and all of their readings, those of the surroundings as well.
    """
    views = [view for view in views if view.depth is not None and view.depth.any() and view.camera is not None]
    if not views:
        return None
    readings = _readings(views, sensor)
    focus, reach = _focus(views)
    near = np.linalg.norm(readings.points - focus, axis=1) < reach
    readings = _Readings(readings.points[near], readings.thickness[near])
    centres = np.array([view.camera.centre for view in views if view.camera is not None])
    plane = _supporting_plane(readings, centres)
    if plane is None:
        return None
    height = readings.points @ plane[:3] + plane[3]
    on = np.abs(height) < readings.thickness
    floor = SIGMAS * SPREAD * float(np.median(np.abs(height[on])))
    found = _standing(readings.points[height > floor], focus, reach, plane, floor)
    # around a camera stands a room, on one of its walls; furniture in a room is seen in passing
    if found is None or found.box is None or found.box.holds(centres).any():
        return None
    return found if _looking_share(views, found.box) >= MIN_LOOKING_SHARE else None


def _readings(views: Sequence[View], sensor: DepthNoise) -> _Readings:
    points, thickness = [], []
    for view in views:
        assert view.depth is not None and view.camera is not None
        rows, columns = np.nonzero(view.depth)
        every = max(1, len(rows) // READINGS_PER_VIEW)
        rows, columns = rows[::every], columns[::every]
        camera = view.camera.resized(view.depth.shape[1], view.depth.shape[0])
        z = view.depth[rows, columns].astype(np.float64)
        points.append(camera.points(rows, columns, z))
        thickness.append(np.maximum.reduce([SIGMAS * sensor.at(z), FOOTPRINTS * z / camera.fl_x, COARSE * z]))
    return _Readings(np.concatenate(points), np.concatenate(thickness))


def _focus(views: Sequence[View]) -> tuple[Floats, float]:
    """The point (3,) that the cameras look at, and the distance around it in which the subject is searched, metres."""
    seen, distances = [], []
    for view in views:
        assert view.depth is not None and view.camera is not None
        (height, width), edge = view.depth.shape, (1 - CENTRE_SHARE) / 2
        middle = view.depth[int(height * edge) : int(height * (1 - edge)), int(width * edge) : int(width * (1 - edge))]
        if middle.any():
            z = np.median(middle[middle > 0], keepdims=True)
            camera = view.camera.resized(width, height)
            seen.append(camera.points(np.array([(height - 1) / 2]), np.array([(width - 1) / 2]), z)[0])
            distances.append(z)
    if not seen:
        return np.zeros(3), 0.0
    return np.median(seen, axis=0), float(np.median(distances))


def _looking_share(views: Sequence[View], box: Box) -> float:
    """Share of the views that have the box's middle in their image."""
    cameras = [view.camera for view in views if view.camera is not None]
    middle = np.array([box.centre], np.float32)
    projected = [(camera, *camera.project(middle)) for camera in cameras]
    inside = [z[0] > 0 and 0 <= x < camera.width and 0 <= y < camera.height for camera, ((x, y),), z in projected]
    return float(np.mean(inside))


def _supporting_plane(readings: _Readings, centres: Floats) -> Floats | None:
    """(4,), unit normal towards the cameras and offset, of the plane that most readings lie on and few lie below."""
    points, rng = readings.points, np.random.default_rng(0)
    if len(points) < LOCAL:
        return None
    first = rng.integers(0, len(points) - LOCAL, TRIES)
    corners = points[first[:, None] + np.column_stack([np.zeros(TRIES, int), rng.integers(1, LOCAL, (TRIES, 2))])]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    normals, corners = normals[lengths > 0] / lengths[lengths > 0, None], corners[lengths > 0]
    best, most = None, MIN_PLANE_SHARE * len(points)
    every = max(1, len(points) // 20_000)
    some, thick = points[::every], readings.thickness[::every]
    for normal, corner in zip(normals, corners[:, 0], strict=True):
        plane = _towards(np.append(normal, -normal @ corner), centres)
        if plane is None:
            continue
        count = int((np.abs(some @ plane[:3] + plane[3]) < thick).sum()) * every
        if count > most:
            best, most = plane, count
    if best is None:
        return None
    for _ in range(3):
        on = np.abs(points @ best[:3] + best[3]) < readings.thickness
        middle = points[on].mean(axis=0)
        normal = np.linalg.eigh(np.cov((points[on] - middle).T))[1][:, 0]
        refined = _towards(np.append(normal, -normal @ middle), centres)
        if refined is None:
            return None
        best = refined
    height = points @ best[:3] + best[3]
    if (height < -readings.thickness).mean() > MAX_BELOW_SHARE or (
        height > readings.thickness
    ).mean() < MIN_ABOVE_SHARE:
        return None
    return best


def _towards(plane: Floats, centres: Floats) -> Floats | None:
    """The plane with its normal towards the cameras; None if they are on both sides of it."""
    heights = centres @ plane[:3] + plane[3]
    if (heights > 0).all():
        return plane
    return -plane if (heights < 0).all() else None


def _standing(points: Floats, focus: Floats, reach: float, plane: Floats, floor: float) -> Subject | None:
    """The connected piece of points (n, 3) above the plane that is large and near to the focus.

    floor: height in metres, below which the points may be those of the plane.
    """
    cell = 2 * reach / CELLS
    index = np.floor((points - focus + reach) / cell).astype(np.intp).clip(0, CELLS - 1)
    taken = np.zeros((CELLS,) * 3, bool)
    taken[tuple(index.T)] = True
    pieces, count = ndimage.label(ndimage.binary_dilation(taken), np.ones((3, 3, 3)))
    label = pieces[tuple(index.T)]
    distance = np.full(count + 1, np.inf)
    np.minimum.at(distance, label, np.linalg.norm(points - focus, axis=1))
    score = np.bincount(label, minlength=count + 1) * np.exp(-np.square(distance * NEARNESS / reach))
    chosen = points[label == int(np.argmax(score))]
    if not len(chosen):
        return None
    up = plane[:3]
    across = np.cross(up, np.eye(3)[int(np.argmin(np.abs(up)))])
    across /= np.linalg.norm(across)
    axes = np.stack([across, np.cross(up, across), up])
    local = chosen @ axes.T
    low, high = local.min(axis=0) - MARGIN_CELLS * cell, local.max(axis=0) + MARGIN_CELLS * cell
    low[2] = floor - plane[3]
    box = Box.of((low + high) / 2 @ axes, (high - low) / 2, axes)
    a, b, c, d = plane.tolist()
    sides = " x ".join(f"{2 * side:.2f}" for side in box.half)
    at = ", ".join(f"{value:.2f}" for value in box.centre)
    reason = f"box of {sides} m at ({at}), the plane below it removed; set bounds to change it"
    return Subject(kind="object", box=box, plane=(a, b, c, d), reason=reason)
