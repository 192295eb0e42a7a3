"""Evidence of the views of a capture about the place of its object; `search` compares a mesh with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth import DepthMap, cut_out, without_outliers

Floats = NDArray[np.float64]

MAX_VIEWS = 32
MAP_PX = 192  # depth maps are thinned to this size: for matching, not for fusing
OUTLIER_DISTANCE = 0.03  # readings this far (in sizes of the object) from the median of their neighbours are left out
FRONT_QUANTILE = 0.02  # this share of a view's readings lies before what counts as the object's front
OUTLINE_DIRECTIONS = 16  # tangents of a mask's outline
MAX_READINGS = 4000
FRONT_WEIGHT = 0.3  # of a front plane, compared with a tangent plane
OUTLINE_SLACK = 2.0  # pixels of the depth maps, by which masks that were made of depth are dilated


@dataclass(frozen=True)
class Readings:
    """Depth readings of the object, k of all views, in the capture's frame."""

    points: Floats
    """(k, 3) metres"""
    colours: Floats
    """(k, 3) sRGB in 0..1"""
    towards: Floats
    """(k, 3) unit vectors to the camera that made the reading"""

    def thinned(self, limit: int) -> Readings:
        """At most `limit` readings, evenly chosen."""
        kept = _evenly(len(self.points), limit)
        return Readings(self.points[kept], self.colours[kept], self.towards[kept])


@dataclass(frozen=True)
class Tangents:
    """Planes normal . x = offset in the capture's frame that the object touches from inside, k of them."""

    normals: Floats
    """(k, 3), of unit length, away from the object"""
    offsets: Floats
    """(k,) metres"""
    weights: Floats
    """(k,)"""


@dataclass(frozen=True)
class Evidence:
    """All that the views say about the place and size of the object."""

    maps: list[DepthMap]
    """The object in each view's depth map: where space is free"""
    readings: Readings
    outlines: Tangents
    """Planes through the cameras along the masks' outlines"""
    fronts: Tangents
    """Planes across the cameras' axes at which the object begins"""
    slack: float
    """All outlines may be too wide or too narrow by this, metres"""
    unit: float = 1.0
    """Diagonal of the object, metres, to within some percent"""

    @property
    def tangents(self) -> Tangents:
        """The outlines and the fronts."""
        return _stacked([self.outlines, self.fronts])


def gathered(views: Sequence[View]) -> Evidence:
    """The evidence of at most `MAX_VIEWS` views; those without a camera or a mask give none."""
    views = [view for view in views if view.camera is not None and view.mask.any()]
    views = [views[index] for index in _evenly(len(views), MAX_VIEWS)]
    maps, images = _thinned_maps(views)
    outlines = _stacked(_outline(view) for view in views)
    fronts = _stacked(_front(depth_map) for depth_map in maps if depth_map.depth.any())
    return Evidence(maps, _readings(maps, images).thinned(MAX_READINGS), outlines, fronts, _slack(views))


def _slack(views: Sequence[View]) -> float:
    """`OUTLINE_SLACK` in metres at the object."""
    footprints = [0.0]
    for view in views:
        if view.camera is not None and view.depth is not None and view.depth.any():
            height, width = view.depth.shape
            footprints.append(float(np.median(view.depth[view.depth > 0])) / view.camera.resized(width, height).fl_x)
    return OUTLINE_SLACK * float(np.median(footprints[1:] or footprints))


def _thinned_maps(views: Sequence[View]) -> tuple[list[DepthMap], list[NDArray[np.uint8]]]:
    """The object in each view's depth map, of `MAP_PX` at most, without outliers; and its colours, of the same size."""
    maps, images = [], []
    for view in views:
        if view.camera is None or not (thin := _thinned(view)).mask.any():
            continue
        depth_map = cut_out(thin)
        assert depth_map is not None
        rows, columns = np.nonzero(thin.mask)
        extent = max(np.ptp(rows), np.ptp(columns)) * depth_map.footprint
        depth = without_outliers(depth_map.depth, OUTLIER_DISTANCE * extent) if extent else depth_map.depth
        maps.append(replace(depth_map, depth=depth))
        (top, left), (height, width) = depth_map.corner, depth.shape
        images.append(thin.image[top : top + height, left : left + width])
    return maps, images


def _thinned(view: View) -> View:
    """The view with every k-th pixel of its depth map (of its mask if it has none); mask, image and camera match."""
    assert view.camera is not None
    height, width = (view.mask if view.depth is None else view.depth).shape
    step = -(-max(height, width) // MAP_PX)
    first = min((step - 1) // 2, height - 1, width - 1)
    kept = np.s_[first::step, first::step]
    image, mask = resample(view.image, width, height)[kept], resample(view.mask, width, height)[kept]
    camera = view.camera.resized(width, height)
    camera = replace(
        camera,
        width=mask.shape[1],
        height=mask.shape[0],
        fl_x=camera.fl_x / step,
        fl_y=camera.fl_y / step,
        cx=(camera.cx - first - 0.5) / step + 0.5,
        cy=(camera.cy - first - 0.5) / step + 0.5,
    )
    depth = np.zeros(mask.shape, np.float32) if view.depth is None else view.depth[kept]
    return View(view.name, image, mask, depth, camera)


def _readings(maps: Sequence[DepthMap], images: Sequence[NDArray[np.uint8]]) -> Readings:
    """All readings of the depth maps, each view's evenly thinned to `MAX_READINGS`."""
    parts = [np.empty((0, 9))]
    for depth_map, image in zip(maps, images, strict=True):
        rows, columns = np.nonzero(depth_map.depth)
        kept = _evenly(len(rows), MAX_READINGS)
        rows, columns = rows[kept], columns[kept]
        top, left = depth_map.corner
        points = depth_map.camera.points(rows + top, columns + left, depth_map.depth[rows, columns])
        towards = depth_map.camera.centre - points
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        parts.append(np.column_stack([points, image[rows, columns] / 255, towards]))
    table = np.concatenate(parts)
    return Readings(table[:, :3], table[:, 3:6], table[:, 6:])


def _outline(view: View) -> Tangents:
    """Planes through the camera along the mask's outline; none where the image's border cuts it off."""
    camera, mask = view.camera, view.mask
    assert camera is not None
    rows = np.flatnonzero(mask.any(axis=1))
    ends = np.concatenate([mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)])
    pixels = np.column_stack([ends, np.tile(rows, 2)])
    last = np.array(mask.shape[::-1]) - 1
    cut_off = ((pixels == 0) | (pixels == last)).any(axis=1)

    right, up, back = camera.camera_to_world[:3, :3].T
    rays = camera.directions(pixels + 0.5)
    angles = np.arange(OUTLINE_DIRECTIONS) * (2 * np.pi / OUTLINE_DIRECTIONS)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    heights = directions @ np.stack([rays @ right, rays @ up])
    furthest = heights.argmax(axis=1)
    # the object ends half a pixel beyond the centre of its last pixel
    height = heights.max(axis=1) + 0.5 / camera.fl_x
    normals = directions @ np.stack([right, up]) + height[:, None] * back
    normals = (normals / np.linalg.norm(normals, axis=1, keepdims=True))[~cut_off[furthest]]
    return Tangents(normals, normals @ camera.centre, np.ones(len(normals)))


def _front(depth_map: DepthMap) -> Tangents:
    """The plane across the camera's axis at which the object begins."""
    back, camera = depth_map.camera.camera_to_world[:3, 2], depth_map.camera
    nearest = np.quantile(depth_map.depth[depth_map.depth > 0], FRONT_QUANTILE)
    return Tangents(back[None], np.array([back @ camera.centre - nearest]), np.array([FRONT_WEIGHT]))


def _stacked(tangents: Iterable[Tangents]) -> Tangents:
    parts = [Tangents(np.empty((0, 3)), np.empty(0), np.empty(0)), *tangents]
    return Tangents(
        np.concatenate([part.normals for part in parts]),
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )


def _evenly(count: int, limit: int) -> NDArray[np.intp]:
    """Indices of at most `limit` of `count` things, evenly spread."""
    return np.linspace(0, count, min(count, limit), endpoint=False).astype(np.intp)
