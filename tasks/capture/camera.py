"""Pinhole cameras in the nerfstudio convention (transforms.json); every room that works with views uses them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# OpenGL camera axes (x right, y up, looks along -z) to the axes of a pinhole projection (y down, looks along +z)
_GL_TO_PINHOLE = np.array([1.0, -1.0, -1.0])
_NO_HIGHER_TERMS = (0.0, 0.0, 0.0, 0.0)
# Places along each side at which a distortion is checked, and what its inverse may miss by, pixels
_CHECKED, _HALF_A_PIXEL = 17, 0.5


@dataclass(frozen=True)
class Camera:
    """Pinhole camera; pixel centres lie at half-integers, so cx = width / 2 is the middle.

    Convention: https://docs.nerf.studio/quickstart/data_conventions.html
    """

    width: int
    """Pixels"""
    height: int
    """Pixels"""
    fl_x: float
    """Focal length, pixels"""
    fl_y: float
    """Focal length, pixels"""
    cx: float
    """Principal point, pixels from the left border"""
    cy: float
    """Principal point, pixels from the upper border"""
    camera_to_world: NDArray[np.float64]
    """(4, 4) in OpenGL axes (x right, y up, looks along -z), metres, world z-up"""
    distortion: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """In OpenCV's order: k1 k2 p1 p2, and optional k3, and k4 k5 k6 of its rational model"""

    @property
    def centre(self) -> NDArray[np.float64]:
        """Position in the world, (3,) metres."""
        return self.camera_to_world[:3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """The same camera for an image (or depth map) of another size."""
        sx, sy = width / self.width, height / self.height
        return replace(
            self,
            width=width,
            height=height,
            fl_x=self.fl_x * sx,
            fl_y=self.fl_y * sy,
            cx=self.cx * sx,
            cy=self.cy * sy,
        )

    def project(self, points: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """World points (n, 3) -> pixel positions (n, 2) and depth along the camera's axis (n,), metres.

        Distortion is applied. Depth is not positive behind the camera; pixels there mean nothing.
        """
        dtype = points.dtype
        rotation = (self.camera_to_world[:3, :3] * _GL_TO_PINHOLE).astype(dtype)
        local = (points - self.centre.astype(dtype)) @ rotation
        depth = local[:, 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            xy = local[:, :2] / depth[:, None]
        if any(self.distortion):
            xy = self._distort(xy)
        pixels = xy * np.array([self.fl_x, self.fl_y], dtype) + np.array([self.cx, self.cy], dtype)
        return pixels, depth

    def rays(self) -> NDArray[np.float64]:
        """Directions in the world through every pixel centre, (height * width, 3), with unit depth (not unit length).

        Distortion is removed. `points` gives the world points of depth readings.
        """
        x, y = np.arange(self.width) + 0.5, np.arange(self.height) + 0.5
        if any(self.distortion):
            return self.directions(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2))
        right, down, ahead = self._axes()
        across = ((x - self.cx) / self.fl_x)[:, None] * right
        along = ((y - self.cy) / self.fl_y)[:, None] * down + ahead
        return (across + along[:, None]).reshape(-1, 3)

    def directions(self, pixels: NDArray[np.floating]) -> NDArray[np.float64]:
        """Directions as those of `rays`, with the same bits, through some positions: (n, 2) pixels -> (n, 3)."""
        xy = (pixels - np.array([self.cx, self.cy])) / np.array([self.fl_x, self.fl_y])
        if any(self.distortion):
            xy = self._undistort(xy)
        right, down, ahead = self._axes()
        return xy[:, :1] * right + (xy[:, 1:] * down + ahead)

    def points(
        self, rows: NDArray[np.number], columns: NDArray[np.number], depth: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """World points (n, 3), metres, of the depth readings `depth` (n,), metres, of the pixels (row, column)."""
        rays = self.directions(np.column_stack([columns, rows]) + 0.5)
        return self.centre + depth[:, None] * rays

    def distortion_inverts(self) -> bool:
        """True if a direction can be found for every place in the picture: checked on a grid, to half a pixel."""
        x, y = (np.linspace(0.5, side - 0.5, _CHECKED) for side in (self.width, self.height))
        pixels = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        focal, centre = np.array([self.fl_x, self.fl_y]), np.array([self.cx, self.cy])
        with np.errstate(all="ignore"):
            there = (pixels - centre) / focal
            xy = self._undistort(there)
            missed = (np.abs(self._distort(xy) - there) * focal).max()
            # where the picture folds, neighbours change places
            right, down = np.eye(2) / focal.max()
            across = self._distort(xy + right)[:, 0] > self._distort(xy)[:, 0]
            along = self._distort(xy + down)[:, 1] > self._distort(xy)[:, 1]
        return bool(missed < _HALF_A_PIXEL and across.all() and along.all())

    def _axes(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """The pinhole axes in the world: x to the right, y down, z ahead."""
        right, down, ahead = (self.camera_to_world[:3, :3] * _GL_TO_PINHOLE).T
        return right, down, ahead

    def _distort(self, xy: NDArray[np.floating]) -> NDArray[np.floating]:
        k1, k2, p1, p2, k3, k4, k5, k6 = (*self.distortion, *_NO_HIGHER_TERMS)[:8]
        x, y = xy[:, 0], xy[:, 1]
        r2 = x * x + y * y
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        return np.column_stack(
            [
                x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
                y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
            ]
        )

    def _undistort(self, distorted: NDArray[np.float64]) -> NDArray[np.float64]:
        xy = distorted
        for _ in range(20):  # fixed-point iteration, as OpenCV's undistortPoints
            xy = xy + (distorted - self._distort(xy))
        return xy
