"""Points of interest of a view, lifted into space by its depth, and their matches in other views. `pairs` uses them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tasks.cameras.interest_points import interest_points
from tasks.cameras.surface_views import SurfaceView, lifted
from tasks.capture.masks import resample
from tasks.capture.views import View

Floats = NDArray[np.float64]

LONGEST_PX = 640  # sides of the picture in which they are sought
MOST = 1500  # of a view: those of most contrast
RIM_PX = 3  # so far inside the silhouette: on it, depth is wrong
DARKEST_RANGE = 12.0  # sRGB levels that a dark object's contrast is stretched from at least
STRETCH = (1.0, 99.0)  # percentiles
RATIO = 0.9  # of the distance of the best match to that of the second; later steps reject wrong ones


@dataclass(frozen=True, eq=False)
class Features:
    """Points of interest of one view with depth."""

    position: Floats
    """(k, 2) in the pixels of its `SurfaceView`"""
    depth: Floats
    """(k,) metres"""
    descriptors: NDArray[np.float32]
    """(k, 128) of unit length"""

    def points(self, surface: SurfaceView, zoom: float) -> Floats:
        """(k, 3) in the camera's pinhole axes, metres."""
        return lifted(surface.camera, self.position[:, 0], self.position[:, 1], self.depth, zoom)


def features(view: View, surface: SurfaceView) -> Features:
    """The points of interest of a view inside its mask, where its surface is known."""
    grey, mask = _stretched(view)
    height, width = grey.shape
    inner = ndimage.binary_erosion(mask, iterations=RIM_PX, border_value=1)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = max(rows[0] - RIM_PX, 0), max(columns[0] - RIM_PX, 0)
    part = np.s_[top : rows[-1] + 1 + RIM_PX, left : columns[-1] + 1 + RIM_PX]
    inner &= resample(surface.depth > 0, width, height)
    found = interest_points(grey[part], inner[part], MOST)
    camera = surface.camera
    position = (found.position + np.array([left, top])) * [camera.width / width, camera.height / height]
    at = position.astype(np.intp)
    depth = surface.depth[at[:, 1].clip(0, camera.height - 1), at[:, 0].clip(0, camera.width - 1)]
    good = np.flatnonzero(depth)
    return Features(position[good], depth[good].astype(np.float64), found.descriptors[good])


def matches(one: Features, other: Features) -> NDArray[np.intp]:
    """(k, 2) indices of features that are each other's best match, and clearly better than the second one."""
    if min(len(one.depth), len(other.depth)) < 2:
        return np.zeros((0, 2), np.intp)
    alike = one.descriptors @ other.descriptors.T
    best = alike.argmax(axis=1)
    mine = np.arange(len(best))
    first = alike[mine, best]
    alike[mine, best] = -1
    second = alike.max(axis=1)
    alike[mine, best] = first
    mutual = alike.argmax(axis=0)[best] == mine
    # of unit vectors: |a - b|^2 = 2 - 2 a b
    distinct = 1 - first < RATIO**2 * (1 - second)
    kept = np.flatnonzero(mutual & distinct)
    return np.column_stack([kept, best[kept]])


def _stretched(view: View) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The object's grey values in 0..1, its background even, and its mask, `LONGEST_PX` at most."""
    height, width = view.mask.shape
    scale = min(1.0, LONGEST_PX / max(height, width))
    size = round(width * scale), round(height * scale)
    picture = Image.fromarray(view.image).convert("L")
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.BOX)
    grey, mask = np.asarray(picture, np.float32), resample(view.mask, *size)
    low, high = np.percentile(grey[mask], STRETCH)
    grey = np.clip((grey - low) / max(high - low, DARKEST_RANGE), 0, 1).astype(np.float32)
    return np.where(mask, grey, np.median(grey[mask])), mask
