"""Exposure and white balance of the views, made to agree; the texture uses it.

Each view has one gain per channel, in linear light. All gains are solved at once from surface points that several views
see, with a pull towards no change (Goldman and Chen, Vignette and exposure calibration and compensation, ICCV 2005).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROUNDS = 8  # of reweighting: highlights and moving shadows must not count
OUTLIER = 0.1  # natural logarithm of a ratio of colours; pairs that differ by more count less
PULL = 0.001  # of a view's own weight: gains that nothing determines stay 1, those that change slowly are still found
DARKEST, BRIGHTEST = 8.0, 247.0  # sRGB values beyond these are clipped by the camera, or mostly noise


def to_linear(srgb: NDArray[np.floating]) -> NDArray[np.floating]:
    """sRGB values 0..255 -> linear light 0..1 (IEC 61966-2-1)."""
    values = srgb / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: NDArray[np.floating]) -> NDArray[np.floating]:
    """Linear light 0..1 -> sRGB values 0..255, clipped."""
    values = np.clip(linear, 0, 1)
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def solved_gains(colours: Floats, weights: Floats) -> Floats:
    """Gains (v, 3) of v views, to be multiplied with their linear colours; their geometric mean is 1.

    colours: (n, v, 3) sRGB 0..255 that each view gives to n surface points. weights: (n, v), 0 = it does not see it.
    """
    usable = weights[..., None] * ((colours > DARKEST) & (colours < BRIGHTEST))
    logs = np.log(to_linear(np.clip(colours, DARKEST, BRIGHTEST)))
    return np.exp(np.column_stack([_solved(logs[..., channel], usable[..., channel]) for channel in range(3)]))


def _solved(logs: Floats, weights: Floats) -> Floats:
    """Offsets (v,) that make the logarithms (n, v) of one channel agree at each point."""
    views = logs.shape[1]
    offsets = np.zeros(views)
    robust = weights
    for _ in range(ROUNDS):
        shifted = logs + offsets
        total = robust.sum(axis=1)
        mean = (robust * shifted).sum(axis=1) / np.maximum(total, np.finfo(float).tiny)
        robust = weights / (1 + np.square((shifted - mean[:, None]) / OUTLIER))
        # sum over points of w (log + offset - mean)^2, where the mean is over the views with the same weights
        total = np.maximum(robust.sum(axis=1), np.finfo(float).tiny)
        shares = robust / total[:, None]
        matrix = np.diag(robust.sum(axis=0)) - robust.T @ shares
        right = -(robust * (logs - (shares * logs).sum(axis=1, keepdims=True))).sum(axis=0)
        pull = PULL * np.maximum(robust.sum(axis=0), np.finfo(float).eps)
        offsets = np.linalg.solve(matrix + np.diag(pull), right)
        offsets -= offsets.mean()
    return offsets
