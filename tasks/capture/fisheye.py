"""Pictures and depth maps of a fisheye lens -> those of a pinhole camera; `views` does it as it decodes them.

OpenCV's fisheye model (Kannala and Brandt, TPAMI 2006): a ray at the angle t from the axis meets the picture at
t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8) focal lengths from the principal point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.camera import Camera
from tasks.capture.given_cameras import Intrinsics


def positions(camera: Camera, lens: Intrinsics) -> NDArray[np.float64]:
    """Rows and columns, (2, h, w) pixels from the first one's centre, at which the lens shows each pixel of a pinhole.

    camera: the pinhole, with the focal length and principal point of the lens.
    """
    x = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fl_x
    y = (np.arange(camera.height) + 0.5 - camera.cy) / camera.fl_y
    x, y = np.meshgrid(x, y)
    radius = np.hypot(x, y)
    angle = np.arctan(radius)
    square = angle**2
    bent = angle * (1 + square * (lens.k1 + square * (lens.k2 + square * (lens.k3 + square * lens.k4))))
    scale = np.where(radius > 0, bent / np.maximum(radius, np.finfo(float).tiny), 1.0)
    return np.stack([y * scale * camera.fl_y + camera.cy, x * scale * camera.fl_x + camera.cx]) - 0.5


def straightened(pixels: NDArray[Any], where: NDArray[np.float64], smooth: bool) -> NDArray[Any]:
    """A picture (h, w, ...) of the lens as the pinhole sees it, 0 beyond its border; smooth: pixels are blended."""
    if pixels.ndim == 2:
        return np.asarray(ndimage.map_coordinates(pixels, where, order=1 if smooth else 0, mode="constant"))
    return np.stack([straightened(pixels[..., k], where, smooth) for k in range(pixels.shape[2])], axis=-1)
