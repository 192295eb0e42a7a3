"""Depth maps that were enlarged by nearest neighbour, found and read at their native size; `images` calls it.

Repeated pixels look like steps, and smoothing would keep them: nerfstudio's files of Polycam captures have them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_FACTOR = 16
# Changes from one pixel to the next along each side, at least: fewer may be the edges of a flat box
FEWEST_CHANGES = 8
# Factors that are not whole are many, and one of them fits a few changes by chance. Below 2, most places fit
FEWEST_CHANGES_FRACTION, SMALLEST_FRACTION = 32, 2.0
# A pixel i repeats the native pixel i / factor (OpenCV) or (i + 0.5) / factor (Pillow), rounded down
OFFSETS = (0.0, 0.5)
ROUNDING = 1e-4  # native pixels; libraries compute this in 32-bit floats

Indices = NDArray[np.intp]


def native_pixels(metres: NDArray[np.float32]) -> tuple[Indices, Indices]:
    """Rows and columns of a depth map (h, w), one of each run of repeated ones; all if it was not enlarged."""
    height, width = metres.shape
    changes = [np.flatnonzero((np.diff(metres, axis=axis) != 0).any(axis=1 - axis)) + 1 for axis in (0, 1)]
    rows, columns = _whole(metres.shape, changes) or _fraction(metres.shape, changes) or metres.shape
    return _middles(height, rows), _middles(width, columns)


def _whole(shape: tuple[int, ...], changes: list[Indices]) -> tuple[int, int] | None:
    """The native size, if each pixel is a block of the same size."""
    block = int(np.gcd.reduce(np.concatenate([*changes, shape])))
    found = 1 < block <= LARGEST_FACTOR and min(map(len, changes)) >= FEWEST_CHANGES
    return (shape[0] // block, shape[1] // block) if found else None


def _fraction(shape: tuple[int, ...], changes: list[Indices]) -> tuple[int, int] | None:
    """The native size, if the factor is about the same along both sides, and is not whole."""
    height, width = shape
    most = max(len(found) / size for found, size in zip(changes, shape, strict=True))
    if min(map(len, changes)) < FEWEST_CHANGES_FRACTION or most > 1 / SMALLEST_FRACTION:
        return None
    rows = np.arange(-(-height // LARGEST_FACTOR), int(height / SMALLEST_FRACTION) + 1)
    columns = np.rint(rows * width / height).astype(int)
    for offset in OFFSETS:
        fits = _between_runs(changes[0], height / rows, offset) & _between_runs(changes[1], width / columns, offset)
        fits &= (height % rows > 0) | (width % columns > 0)
        if fits.any():
            first = int(np.argmax(fits))
            return int(rows[first]), int(columns[first])
    return None


def _between_runs(changes: Indices, factors: NDArray[np.float64], offset: float) -> NDArray[np.bool_]:
    """For each factor (k,): True if all changes (n,) are where one run of repeated pixels ends and the next begins.

    Where such an end falls on a pixel, rounding decides on which side of it the change is.
    """
    before, after = ((changes + side + offset) / factors[:, None] for side in (-1, 0))
    return np.asarray((np.floor(after + ROUNDING) >= np.ceil(before - ROUNDING)).all(axis=1))


def _middles(size: int, native: int) -> Indices:
    """Index of the pixel in the middle of each of `native` runs."""
    return ((np.arange(native) + 0.5) * size / native).astype(np.intp)
