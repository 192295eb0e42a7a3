"""EXIF orientation: whether a view's camera and depth map mean the stored picture, or the turned one that is shown.

Some software calibrates pictures as they are stored (COLMAP), some as they are shown (OpenCV, Metashape). `views` asks
for every picture that has an orientation.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.masks import resample

Pixels = TypeVar("Pixels", bound=NDArray[Any])
Meant = Literal["stored", "turned", "unknown"]

# Edges of picture and depth are compared at this size, pixels of the longest side
_SIDE = 96
# The edges of one fit this much better, as correlation coefficients: else it is not known
_MARGIN = 0.1
_SAME_SHAPE = 0.02


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """A picture (h, w, ...) as EXIF's orientation (1 to 8) shows it."""
    match orientation:
        case 2:
            shown = pixels[:, ::-1]
        case 3:
            shown = pixels[::-1, ::-1]
        case 4:
            shown = pixels[::-1]
        case 5:
            shown = pixels.swapaxes(0, 1)
        case 6:
            shown = np.rot90(pixels, -1)
        case 7:
            shown = pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            shown = np.rot90(pixels)
        case _:
            shown = pixels
    return np.ascontiguousarray(shown)  # type: ignore[return-value]


def meant(
    rgb: NDArray[np.uint8],
    orientation: int,
    camera_size: tuple[int | None, int | None],
    depth: NDArray[np.floating] | None,
) -> Meant:
    """Which picture the camera of this size (width, height) and the depth map (h, w) belong to, by their proportions.

    Where these are the same for both, the edges of depth tell: they lie on edges of the picture.
    """
    (height, width), shown = rgb.shape[:2], turned(rgb, orientation)
    if (width, height) != shown.shape[1::-1]:
        if None not in camera_size:
            if camera_size == (width, height):
                return "stored"
            if camera_size == shown.shape[1::-1]:
                return "turned"
        if depth is not None:
            proportions = depth.shape[1] / depth.shape[0]
            fits_stored, fits_shown = (
                abs(proportions * side[0] / side[1] - 1) < _SAME_SHAPE for side in (rgb.shape, shown.shape)
            )
            if fits_stored != fits_shown:
                return "stored" if fits_stored else "turned"
    if depth is None:
        return "unknown"
    as_stored, as_shown = _likeness(rgb, depth), _likeness(shown, depth)
    if abs(as_stored - as_shown) < _MARGIN:
        return "unknown"
    return "stored" if as_stored > as_shown else "turned"


def _likeness(rgb: NDArray[np.uint8], depth: NDArray[np.floating]) -> float:
    """Correlation of the edges of a picture with those of a depth map, -1 to 1."""
    rows, columns = depth.shape
    scale = min(1.0, _SIDE / max(rows, columns))
    size = (max(2, round(columns * scale)), max(2, round(rows * scale)))
    grey = resample(ndimage.uniform_filter(rgb.mean(axis=2), max(1, round(max(rgb.shape) / _SIDE))), *size)
    edges = [ndimage.gaussian_gradient_magnitude(each.astype(float), 1.0) for each in (grey, resample(depth, *size))]
    limited = [np.minimum(each, np.percentile(each, 95)).ravel() for each in edges]
    if min(each.std() for each in limited) == 0:
        return 0.0
    return float(np.corrcoef(*limited)[0, 1])
