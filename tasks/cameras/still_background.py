"""Turntables: the object turns before a background that stays where it is in every view. `finding` calls it.

The whole frames of such a capture agree perfectly on cameras that do not move; only the object tells how they moved
around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

Map = NDArray[np.float64]

COMPARED_PX = 160  # sides of the maps in which the background is sought
SPREAD = (0.0, 90.0)  # percentiles over views: an object may hide a pixel in one of them; readings may be too far
SIGMAS = 6.0  # of depth that stays
LEAST_STILL = 0.3  # share of the frame that stays
# The grey values of what stays change less over the views than from place to place, or it is a plain table that
# looks the same from everywhere
STILL_GREY = 0.3
BEHIND = 0.02  # of its distance: the background lies further behind the object
LEAST_MOVING = 0.003  # share of the frame
CLOSED_PX = 2


def without_still_background(views: Sequence[View], sensor: DepthNoise, *, sure: bool = False) -> list[View] | None:
    """The views with what moves alone, if the background stays where it is; None if it does not, or is cut out.

    sure: it is known that the background stays, however little of it is seen.
    """
    shapes = {view.depth.shape for view in views if view.depth is not None}
    if len(shapes) != 1 or any(view.has_mask or view.depth is None for view in views):
        return None
    ((height, width),) = shapes
    scale = min(1.0, COMPARED_PX / max(height, width))
    columns, rows = round(width * scale), round(height * scale)
    depth = np.stack([resample(view.depth, columns, rows) for view in views if view.depth is not None])
    grey = np.stack([_grey(view, columns, rows) for view in views])
    known = (depth > 0).mean(axis=0) > 0.5
    measured = np.where(depth > 0, depth, np.nan)
    near, far = (_percentile(measured, known, share) for share in SPREAD)
    still = known & (far - near < np.maximum(BEHIND * far, SIGMAS * sensor.at(far) + sensor.step_at(far)))
    if not still.any() or not (sure or _stays(still, grey)):
        return None
    moving = ndimage.binary_closing(known & ~still, iterations=CLOSED_PX)
    moving = ndimage.binary_fill_holes(ndimage.binary_opening(moving))
    pieces, count = ndimage.label(moving)
    if not count:
        return None
    largest = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    if largest.mean() < LEAST_MOVING:
        return None
    # the object may hide it in all views but one; where in all, the farthest reading is far before what is around
    farthest = depth.max(axis=0).astype(np.float64)
    around = far[tuple(ndimage.distance_transform_edt(~still, return_distances=False, return_indices=True))]
    background = np.where(farthest > (1 - BEHIND) * around, farthest, np.inf)
    return [_cut_out(view, largest, background) for view in views]


def _stays(still: NDArray[np.bool_], grey: Map) -> bool:
    """True if so much of the frame has the same depth and grey values (n, h, w) in all views that the cameras stand."""
    change, contrast = grey[:, still].std(axis=0).mean(), grey.mean(axis=0)[still].std()
    return bool(still.mean() >= LEAST_STILL and change <= STILL_GREY * contrast)


def _percentile(values: Map, known: NDArray[np.bool_], share: float) -> Map:
    """The percentile over views (n, h, w), without NaN, of the pixels where most views have a value; else 0."""
    ordered = np.sort(values[:, known], axis=0)  # NaN comes last; np.nanpercentile takes a hundred times as long
    place = share / 100 * (np.isfinite(ordered).sum(axis=0) - 1)
    below, column = np.floor(place).astype(np.intp), np.arange(len(place))
    low, high = ordered[below, column], ordered[np.ceil(place).astype(np.intp), column]
    result = np.zeros(known.shape)
    result[known] = low + (place - below) * (high - low)
    return result


def _grey(view: View, columns: int, rows: int) -> Map:
    picture = Image.fromarray(view.image).convert("L").resize((columns, rows), Image.Resampling.BOX)
    return np.asarray(picture, np.float64)


def _cut_out(view: View, region: NDArray[np.bool_], background: Map) -> View:
    """The view of what moves: within the region, and before the background where that is ever seen."""
    assert view.depth is not None
    height, width = view.depth.shape
    behind = view.depth > (1 - BEHIND / 2) * resample(background, width, height)
    mask = resample(region, width, height) & ~behind
    sized = resample(mask, view.mask.shape[1], view.mask.shape[0])
    return replace(view, mask=sized, depth=np.where(mask, view.depth, np.float32(0)))
