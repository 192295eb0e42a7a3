"""Masks of the object in a view, and the sharpness inside of them; `views` and `view_checks` call it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tasks.capture.camera import Camera

Pixel = TypeVar("Pixel", bound=np.generic)

# Alpha from here on is foreground: the pixel's larger part is the object.
_ALPHA_FOREGROUND = 128
# Depth readings are lost along silhouettes; carving with the raw mask doubled the error of the surface. Depth pixels.
_DILATE_PX = 2
# Sharpness is compared at one scale, so that views of different sizes can be told apart. Pixels, longest side.
_SHARPNESS_PX = 512
# The silhouette of a cut-out object is sharp even in a blurred picture: only pixels further inside than this count.
_SHARPNESS_MARGIN_PX = 3


def resample(image: NDArray[Pixel], width: int, height: int) -> NDArray[Pixel]:
    """A mask or picture (h, w, ...) at another size, (height, width, ...): each new pixel takes the nearest old one."""
    rows = ((np.arange(height) + 0.5) * image.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * image.shape[1] / width).astype(np.intp)
    nearest: NDArray[Pixel] = image[rows[:, None], columns]
    return nearest


def from_alpha(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Foreground (h, w) by an alpha channel (h, w) uint8."""
    return alpha >= _ALPHA_FOREGROUND


def from_readings(
    inside: NDArray[np.bool_], background: NDArray[np.bool_], width: int, height: int
) -> NDArray[np.bool_]:
    """Foreground (height, width) by a depth map's silhouette, filled and dilated.

    inside: (dh, dw), readings on the object. background: (dh, dw), readings known to lie behind or beside it. Enclosed
    pixels without any reading are unknown, so they stay foreground; seen background does not.
    """
    filled = inside | (ndimage.binary_fill_holes(inside) & ~background)
    return resample(ndimage.binary_dilation(filled, iterations=_DILATE_PX), width, height)


def within(depth: NDArray[np.float32], camera: Camera, bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """True, (h, w), for the readings of a depth map in metres that lie in `bounds` (2, 3), world metres.

    camera: of the depth map's size.
    """
    rows, columns = np.nonzero(depth)
    with np.errstate(all="ignore"):  # of cameras that are refused later
        points = camera.points(rows, columns, depth[rows, columns])
        inside = ((points >= bounds[0]) & (points <= bounds[1])).all(axis=1)
    result = np.zeros(depth.shape, bool)
    result[rows, columns] = inside
    return result


def sharpness(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Variance of the Laplacian of the grey values inside the mask, in a picture of at most 512 pixels.

    image: (h, w, 3) uint8, mask: (h, w). 0.0 if the mask leaves nothing. Pech-Pacheco et al., Diatom
    autofocusing in brightfield microscopy, ICPR 2000.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0
    scale = min(1.0, _SHARPNESS_PX / max(mask.shape))
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mask = mask[crop]
    grey = Image.fromarray(image[crop]).convert("L")
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in grey.size)
        grey, mask = grey.resize((width, height), Image.Resampling.BOX), resample(mask, width, height)
    inner = ndimage.binary_erosion(mask, iterations=_SHARPNESS_MARGIN_PX)
    if not inner.any():
        return 0.0
    return float(ndimage.laplace(np.asarray(grey, np.float32))[inner].var())
