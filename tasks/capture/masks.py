"""Masks of the object in a view, and the sharpness inside of them; `views` and `view_checks` call it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from tasks.capture.camera import Camera
from tasks.capture.subject import Box

Pixel = TypeVar("Pixel", bound=np.generic)

# Alpha from here on is foreground: the pixel's larger part is the object.
ALPHA_FOREGROUND = 128
# Depth readings are lost along silhouettes; carving with the raw mask doubled the error of the surface. Depth pixels.
_RIM_PX = 2
# A depth map with less than this share around its readings was not cut out along an object.
_CUT_OUT_SHARE = 0.2
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
    return alpha >= ALPHA_FOREGROUND


def behind_or_beside(depth: NDArray[np.float32], camera: Camera, box: Box) -> NDArray[np.bool_]:
    """Known background (h, w) of a depth map in metres: rays that miss the box, and readings beyond it.

    A pixel without a reading says nothing; one with a reading before the box hides it. camera: of the map's size.
    """
    with np.errstate(all="ignore"):  # of cameras that are refused later
        enter, leave = (multiple.reshape(depth.shape) for multiple in box.crossed(camera.centre, camera.rays()))
        return _without_rim((enter > leave) | (leave <= 0) | ((depth > 0) & (depth > leave)))


def around_cut_out(read: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Known background (h, w) of a depth map that was cut out along an object: what has no reading around it.

    read: (h, w), pixels with a reading. Nothing is known if a reading lies on the image's border, or if little is
    missing: then these are the gaps that every sensor leaves.
    """
    missing = ~read
    border = np.concatenate([missing[0], missing[-1], missing[:, 0], missing[:, -1]])
    pieces, _ = ndimage.label(missing)
    around = pieces == pieces[0, 0]
    if not border.all() or around.mean() < _CUT_OUT_SHARE:
        return np.zeros(read.shape, bool)
    return _without_rim(around)


def _without_rim(background: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the pixels next to others: readings are wrong or missing along silhouettes."""
    return np.asarray(ndimage.binary_erosion(background, iterations=_RIM_PX, border_value=1))


def within(depth: NDArray[np.float32], camera: Camera, box: Box) -> NDArray[np.bool_]:
    """True, (h, w), for the readings of a depth map in metres that lie in the box. camera: of the depth map's size."""
    rows, columns = np.nonzero(depth)
    result = np.zeros(depth.shape, bool)
    with np.errstate(all="ignore"):  # of cameras that are refused later
        result[rows, columns] = box.holds(camera.points(rows, columns, depth[rows, columns]))
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
