"""Depth maps made ready for fusion and registration: without outliers, smoothed, with a tangent plane per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.camera import Camera
from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

# A silhouette in a mask may be wrong by this much (pixels): nothing nearer to it is taken for background
SILHOUETTE_MARGIN = 1.5
# How far around the object's pixels (pixels) the distance to the silhouette is known
SILHOUETTE_REACH = 24
# Readings further than this from the median of their neighbours are outliers: in pixel footprints and noise sigmas
OUTLIER_FOOTPRINTS = 3.0
OUTLIER_SIGMAS = 5.0
# Windows whose readings scatter around their plane by more than this hold a depth step: they give no plane
STEP_FOOTPRINTS = 0.6
STEP_SIGMAS = 2.0
# The Gaussian window of a plane (sigma, pixels) grows with the noise until its plane is this certain (pixel footprints)
MIN_WINDOW = 0.8
MAX_WINDOW = 4.0
PLANE_ERROR_FOOTPRINTS = 0.4
# Share of a full window that has to hold readings: fills single missing ones, does not reach beyond an edge
MIN_SUPPORT = 0.3
# Surfaces seen at a flatter angle than this (cosine) are not measured
MIN_COSINE = 0.15
# Readings are worse near depth edges: sensors widen, blur and shift those. A window that reaches so far (pixels) is
# half full at a straight edge
EDGE_REACH = 4
LEAST_INNER = 0.2  # what only such readings show is kept


@dataclass(frozen=True)
class DepthMap:
    """The object's part of a depth map."""

    depth: NDArray[np.float64]
    """(h, w) metres along the camera's axis, 0 = no reading"""
    silhouette: NDArray[np.float32]
    """(h, w) distance to the object's outline, pixels, positive outside"""
    corner: tuple[int, int]
    """(row, column) of the whole map at which the part begins"""
    camera: Camera
    """Of the whole map"""
    confidence: NDArray[np.float32] | None = None
    """(h, w) 0..1, trust in each reading; None = the same in all of them"""

    @property
    def distance(self) -> float:
        """Of the object along the camera's axis, metres; 0 without a reading."""
        return float(np.median(self.depth[self.depth > 0])) if self.depth.any() else 0.0

    @property
    def footprint(self) -> float:
        """Size of a pixel at the object, metres; 0 without a reading."""
        return self.distance / self.camera.fl_x


@dataclass(frozen=True)
class Planes:
    """The tangent plane of every pixel of a `DepthMap`, in the world."""

    plane: NDArray[np.float32]
    """(h * w, 4), unit normal n towards the camera and offset o, metres: x lies n . x + o in front of the surface"""
    weight: NDArray[np.float32]
    """(h * w,), trust in the readings behind the plane, at most 1, 0 = there is none; says nothing of the angle"""
    inner: NDArray[np.float32]
    """(h * w,), share of a reading's precision (1 / variance) that is left so near to a depth edge, 0..1, 0 = none"""
    depth: NDArray[np.float32]
    """(h * w,) metres along the camera's axis, 0 = none"""
    cosine: NDArray[np.float32]
    """(h * w,), of the viewing angle, 0 = none"""
    points: NDArray[np.float32]
    """(k, 3) metres, the surface points of the pixels with a plane"""


def cut_out(view: View) -> DepthMap | None:
    """The object's part of a view's depth map; None if its mask is empty.

    Only the mask decides about background: missing readings within it are unknown.
    """
    assert view.depth is not None and view.camera is not None
    height, width = view.depth.shape
    mask = resample(view.mask, width, height)
    depth = np.where(mask & np.isfinite(view.depth) & (view.depth > 0), view.depth, 0).astype(np.float64)
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = max(rows[0] - SILHOUETTE_REACH, 0), max(columns[0] - SILHOUETTE_REACH, 0)
    cut = np.s_[top : rows[-1] + 1 + SILHOUETTE_REACH, left : columns[-1] + 1 + SILHOUETTE_REACH]
    # pixel centres are half a pixel away from the outline between object and background
    outside = ndimage.distance_transform_edt(~mask[cut]) - 0.5
    return DepthMap(
        depth[cut],
        (outside - SILHOUETTE_MARGIN).astype(np.float32),
        (int(top), int(left)),
        view.camera.resized(width, height),
        None if view.confidence is None else view.confidence[cut],
    )


def window_for(noise: float, footprint: float) -> float:
    """Sigma (pixels) of the Gaussian window whose mean is certain to `PLANE_ERROR_FOOTPRINTS`."""
    averaging = noise / max(2 * np.sqrt(np.pi) * PLANE_ERROR_FOOTPRINTS * footprint, np.finfo(float).tiny)
    return float(np.clip(averaging, MIN_WINDOW, MAX_WINDOW))


def tangent_planes(depth_map: DepthMap, sensor: DepthNoise) -> Planes:
    """Fits a plane around every pixel, least squares under a Gaussian window, in inverse depth.

    A plane in space is exactly linear in inverse depth over the image, so slanted surfaces are smoothed without bias.
    Windows across a depth step give no plane.
    """
    camera, footprint = depth_map.camera, depth_map.footprint
    noise = sensor.at(depth_map.depth)
    depth = without_outliers(depth_map.depth, OUTLIER_FOOTPRINTS * footprint + OUTLIER_SIGMAS * noise)
    inverse = np.divide(1.0, depth, out=np.zeros_like(depth), where=depth > 0)
    inverse, slope_x, slope_y, scatter, support = _linear_fit(
        inverse, window_for(float(sensor.at(depth_map.distance)), footprint)
    )

    rays = camera.rays().reshape(camera.height, camera.width, 3)
    top, left = depth_map.corner
    rays = rays[top : top + depth.shape[0], left : left + depth.shape[1]]
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = 1 / inverse
        scatter_m = scatter * fitted**2
        along_x = np.gradient(rays, axis=1) - rays * (slope_x * fitted)[..., None]
        along_y = np.gradient(rays, axis=0) - rays * (slope_y * fitted)[..., None]
        normals = np.cross(along_y, along_x)
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        cosine = -(normals * rays).sum(axis=2) / np.linalg.norm(rays, axis=2)
        good = (depth_map.silhouette < 0) & (inverse > 0) & (support > MIN_SUPPORT) & (cosine > MIN_COSINE)
        good &= scatter_m < STEP_FOOTPRINTS * footprint + STEP_SIGMAS * noise
    trust = np.ones(depth.shape) if depth_map.confidence is None else depth_map.confidence.astype(np.float64)
    good &= trust > 0
    rows, columns = np.nonzero(good)
    points = camera.points(rows + top, columns + left, fitted[good])
    plane = np.zeros((*depth.shape, 4), np.float32)
    plane[good, :3] = normals[good]
    plane[good, 3] = -(normals[good] * points).sum(axis=1)

    def kept(values: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.where(good, values, 0).astype(np.float32).reshape(-1)

    around = ndimage.uniform_filter(good.astype(np.float64), 2 * EDGE_REACH + 1, mode="constant")
    inner = np.clip(2 * around - 1, LEAST_INNER, 1) ** 2
    weight = kept(np.minimum(support, 1) * trust)
    return Planes(plane.reshape(-1, 4), weight, kept(inner), kept(fitted), kept(cosine), points.astype(np.float32))


def without_outliers(depth: NDArray[np.float64], tolerance: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """The depth map without readings that stray from the median of their 3x3 neighbours by more than `tolerance`."""
    padded = np.pad(np.where(depth > 0, depth, np.nan), 1, constant_values=np.nan)
    height, width = depth.shape
    neighbours = np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
    neighbours.sort(axis=0)  # NaN sorts last
    count = np.isfinite(neighbours).sum(axis=0)
    median = np.take_along_axis(neighbours, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    return np.where((depth > 0) & (np.abs(depth - median) <= tolerance), depth, 0)


def _linear_fit(values: NDArray[np.float64], sigma: float) -> tuple[NDArray[np.float64], ...]:
    """Weighted least squares of value = a + b x + c y around every pixel (Gaussian window; 0 = missing).

    Returns a, b, c, the weighted scatter around the plane, and the share of the window that holds values.
    """
    reach = np.arange(-int(np.ceil(2.5 * sigma)), int(np.ceil(2.5 * sigma)) + 1)
    window = np.exp(-0.5 * (reach / sigma) ** 2)
    window /= window.sum()
    moments = [window, window * reach, window * reach**2]

    def correlate(image: NDArray[np.float64], orders: Sequence[tuple[int, int]]) -> list[NDArray[np.float64]]:
        rows = {x: ndimage.correlate1d(image, moments[x], axis=1, mode="constant") for x in {x for x, _ in orders}}
        return [ndimage.correlate1d(rows[x], moments[y], axis=0, mode="constant") for x, y in orders]

    present = (values > 0).astype(np.float64)
    level = values.sum() / max(present.sum(), 1)  # taken out for numerical accuracy
    centred = (values - level) * present
    s, sx, sy, sxx, sxy, syy = correlate(present, [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)])
    sv, sxv, syv = correlate(centred, [(0, 0), (1, 0), (0, 1)])
    (svv,) = correlate(centred**2, [(0, 0)])
    with np.errstate(divide="ignore", invalid="ignore"):
        mx, my, mv = sx / s, sy / s, sv / s
        cxx, cxy, cyy = sxx / s - mx**2, sxy / s - mx * my, syy / s - my**2
        cxv, cyv, cvv = sxv / s - mx * mv, syv / s - my * mv, svv / s - mv**2
        determinant = cxx * cyy - cxy**2
        b = (cyy * cxv - cxy * cyv) / determinant
        c = (cxx * cyv - cxy * cxv) / determinant
        scatter = np.sqrt(np.maximum(cvv - b * cxv - c * cyv, 0))
        a = mv - b * mx - c * my + level
    usable = determinant > 1e-3 * sigma**4  # otherwise the readings lie on one line
    return np.where(usable, a, 0), b, c, scatter, s
