"""Comparison of two views' depth: one view's surface may not lie where the other one sees free space or background.

The parts of the stage `find_cameras` judge cameras by it, given ones and found ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tasks.capture.camera import Camera
from tasks.capture.masks import resample
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

POINTS = 500  # readings of a view that are looked up in others
MOST_PIXELS = 400_000  # of the maps that are looked up; larger ones are pooled
SIGMAS = 4.0  # two readings of one surface differ by at most so many standard deviations
# and by so many pixel footprints: the surface bends between two pixels
FOOTPRINTS = 0.5
# A silhouette is certain to this many pixels: mask and depth come from two cameras or are filtered
SILHOUETTE_PX = 3.0
# Neighbours that are further apart than this, relative to their distance, lie on both sides of a depth step
STEP = 0.03
# OpenGL camera axes to pinhole axes (x right, y down, z ahead), and back
GL_TO_PINHOLE = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Witness:
    """A view's depth, ready to be compared with that of other views. Points are in its camera's pinhole axes."""

    name: str
    """The view's name"""
    camera: Camera
    """Of the depth map's size; distortion included"""
    sensor: DepthNoise
    """The noise of its readings"""
    pixels: Floats
    """(n, 2) positions (x, y) of the sampled readings; none lies at a depth step"""
    depth: Floats
    """(n,) metres along the camera's axis, of the sampled readings"""
    points: Floats
    """(n, 3) metres, the same in the camera's axes (x right, y down, z ahead)"""
    nearest: NDArray[np.float32]
    """(h, w) metres, smallest reading of each pixel and its neighbours; infinite where there is none"""
    farthest: NDArray[np.float32]
    """(h, w) metres, the largest one; 0 where there is none"""
    background: Bools
    """(h, w), True where known background is all around"""
    pool: int = 1
    """The three maps have one value for each block of so many pixels, squared"""

    @staticmethod
    def of(view: View, sensor: DepthNoise, camera: Camera | None = None, points: int = POINTS) -> Witness:
        """The witness of a view with depth; camera: instead of the view's own. The sample is the same each time."""
        assert view.depth is not None
        camera = camera or view.camera
        assert camera is not None
        depth, background = np.asarray(view.depth, np.float32), _background(view)
        pool = int(np.ceil(np.sqrt(depth.size / MOST_PIXELS)))
        near = ndimage.minimum_filter(np.where(depth > 0, depth, np.float32(np.inf)), 3)
        far = ndimage.maximum_filter(depth, 3)
        smooth = np.flatnonzero((depth > 0) & (far - near < STEP * depth))
        chosen = np.random.default_rng(0).permutation(smooth)[:points]
        rows, columns = np.divmod(chosen, depth.shape[1])
        if pool > 1:
            near, far = _pooled(near, pool, np.minimum), _pooled(far, pool, np.maximum)
            background = _pooled(background, pool, np.logical_and)
        camera = camera.resized(depth.shape[1], depth.shape[0])
        pixels = np.column_stack([columns, rows]) + 0.5
        along = depth[rows, columns].astype(np.float64)
        lifted = _lifted(camera, pixels, along)
        return Witness(view.name, camera, sensor, pixels, along, lifted, near, far, background, pool)

    def thinned(self, points: int) -> Witness:
        """The same with fewer of the sampled readings."""
        return replace(self, pixels=self.pixels[:points], depth=self.depth[:points], points=self.points[:points])

    def with_camera(self, camera: Camera) -> Witness:
        """The same readings through another camera, of any size."""
        camera = camera.resized(self.camera.width, self.camera.height)
        return replace(self, camera=camera, points=_lifted(camera, self.pixels, self.depth))

    def scaled(self, factor: float) -> Witness:
        """The same view with all depth multiplied by a factor."""
        sensor = DepthNoise(
            (self.sensor.step[0] * factor, self.sensor.step[1] / factor),
            (self.sensor.random[0] * factor, self.sensor.random[1] / factor),
        )
        return replace(
            self,
            sensor=sensor,
            depth=self.depth * factor,
            points=self.points * factor,
            nearest=self.nearest * np.float32(factor),
            farthest=self.farthest * np.float32(factor),
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The readings of one view, (..., n) each, seen from another."""

    agree: Bools
    """True where the other view measured the same surface, within the noise of both"""
    conflict: Bools
    """True where the other view sees background, or a surface further away: free space"""
    hidden: Bools
    """True where it sees something nearer, which hides the reading"""
    behind: Floats
    """Metres by which a reading lies behind what the other view sees there, negative in front of it; 0 within the
    range of the neighbouring pixels, NaN where nothing was measured"""
    pixel: NDArray[np.intp]
    """Index in the other view's flat maps; -1 outside of the image"""


def compare(one: Witness, other: Witness, to_other: Floats, slack: Floats | float = 0.0) -> Comparison:
    """Look up the readings of a view in another one.

    to_other: (..., 4, 4) rigid motions from the axes of `one` to those of `other` (pinhole); many are tried at once.
    slack: metres that are allowed beside the sensor's noise, broadcast to (..., n).
    """
    points = one.points @ np.swapaxes(to_other[..., :3, :3], -1, -2) + to_other[..., None, :3, 3]
    camera = other.camera
    column, row, z = _projected(camera, points)
    inside = (z > 0) & (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
    pixel = np.where(inside, row // other.pool * other.nearest.shape[1] + column // other.pool, 0)
    near, far = other.nearest.take(pixel), other.farthest.take(pixel)
    measured = inside & (far > 0)
    distance = far.astype(np.float64)
    noise = SIGMAS * np.hypot(one.sensor.at(one.depth), other.sensor.at(distance))
    tolerance = noise + FOOTPRINTS * distance / camera.fl_x + slack
    agree = measured & (z >= near - tolerance) & (z <= far + tolerance)
    before = measured & (z < near - tolerance)
    behind = np.where(measured, np.minimum(z - near, 0) + np.maximum(z - far, 0), np.nan)
    return Comparison(
        agree=agree,
        conflict=before | (inside & other.background.take(pixel)),
        hidden=measured & ~agree & ~before,
        behind=behind,
        pixel=np.where(inside, pixel, -1),
    )


def pinhole_poses(witnesses: Sequence[Witness]) -> Floats:
    """Camera-to-world matrices (k, 4, 4) in pinhole axes, of the cameras of k witnesses."""
    return np.stack([witness.camera.camera_to_world for witness in witnesses]) @ GL_TO_PINHOLE


def inverse(motions: Floats) -> Floats:
    """The inverse of rigid motions (..., 4, 4)."""
    turned = np.swapaxes(motions[..., :3, :3], -1, -2)
    inverted = np.zeros_like(motions)
    inverted[..., :3, :3] = turned
    inverted[..., :3, 3] = -(turned @ motions[..., :3, 3, None])[..., 0]
    inverted[..., 3, 3] = 1
    return inverted


def _background(view: View) -> Bools:
    """True, (dh, dw), where the depth map's pixels are known background and far enough from the silhouette."""
    assert view.depth is not None
    height, width = view.depth.shape
    mask = resample(view.mask, width, height)
    if mask.all():
        return np.zeros((height, width), bool)
    return np.asarray(ndimage.distance_transform_edt(~mask) > SILHOUETTE_PX)


def _pooled(values: NDArray[Any], size: int, combine: np.ufunc) -> NDArray[Any]:
    """Blocks of size x size pixels combined into one; a last, smaller block is repeated from the border."""
    rows, columns = (-length % size for length in values.shape)
    padded = np.pad(values, ((0, rows), (0, columns)), mode="edge")
    height, width = padded.shape
    blocks = padded.reshape(height // size, size, width // size, size)
    return combine.reduce(combine.reduce(blocks, axis=3), axis=1)


def _lifted(camera: Camera, pixels: Floats, depth: Floats) -> Floats:
    """Points (n, 3) of readings in the camera's pinhole axes."""
    still = replace(camera, camera_to_world=GL_TO_PINHOLE)
    return still.directions(pixels) * depth[:, None]


def _projected(camera: Camera, points: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Pixel columns and rows, and depth, of points (..., 3) in the camera's pinhole axes."""
    still = replace(camera, camera_to_world=GL_TO_PINHOLE)
    pixels, z = still.project(points.reshape(-1, 3))
    with np.errstate(invalid="ignore"):
        column, row = np.nan_to_num(np.floor(pixels), nan=-1, posinf=-1, neginf=-1).clip(-1, 2**30).astype(np.intp).T
    shape = points.shape[:-1]
    return column.reshape(shape), row.reshape(shape), np.asarray(z, np.float64).reshape(shape)
