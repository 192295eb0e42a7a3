"""Poses in the conventions of other software -> camera-to-world in OpenGL axes, metres, z up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.capture.given_cameras import Frame, GivenCameras, Intrinsics
from tasks.capture.transforms import check_pose
from tasks.errors import Problem

Matrix = NDArray[np.float64]

PIXEL_CENTRE = 0.5
"""To add to a principal point where the centre of the first pixel is at (0, 0): here it is at (0.5, 0.5)"""

# Of ARKit's axes, as nerfstudio turns Polycam's: x becomes y, y (up) becomes z
_Y_UP_TO_Z_UP = np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def from_opencv(camera_to_world: Matrix) -> Matrix:
    """Camera-to-world (4, 4) of a camera that looks along +z with y down -> OpenGL axes."""
    return camera_to_world @ np.diag([1.0, -1.0, -1.0, 1.0])


def from_y_up(camera_to_world: Matrix) -> Matrix:
    """Camera-to-world (4, 4) in a world with y up -> z up."""
    return _Y_UP_TO_Z_UP @ camera_to_world


def rigid(rotation: Matrix, translation: Sequence[float] | Matrix) -> Matrix:
    """A motion (4, 4) of a rotation (3, 3) and a translation (3,)."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    return matrix


def of_quaternion(xyzw: Sequence[float], translation: Sequence[float]) -> Matrix:
    """A motion (4, 4) of a quaternion with its real part last; not finite if the quaternion is no rotation."""
    if not (np.isfinite(xyzw).all() and np.linalg.norm(xyzw) > 0):
        return np.full((4, 4), np.nan)
    return rigid(Rotation.from_quat(xyzw).as_matrix(), translation)


def inverse(motion: Matrix) -> Matrix:
    """The inverse of a rigid motion (4, 4)."""
    rotation = motion[:3, :3].T
    return rigid(rotation, -rotation @ motion[:3, 3])


class CameraList:
    """Collects the cameras of a capture, view by view, and their problems."""

    def __init__(self, source: str) -> None:
        self.source = source
        """The file that gives the poses."""
        self.problems: list[Problem] = []
        self._frames: dict[str, Frame] = {}
        self._named: set[str] = set()
        self._lenses: dict[str, Intrinsics] = {}

    def add(self, name: str, lens: Intrinsics | None, pose: Matrix | None, where: str = "") -> None:
        """Add a view's camera; without a pose or a lens it is not known."""
        if lens is not None:
            self._lenses[name] = lens
        if pose is None or lens is None:
            return
        self._named.add(name)
        wrong = check_pose(where or f"{self.source} ({name})", pose)
        self.problems += wrong
        if not wrong:
            self._frames[name] = Frame(lens, pose)

    def cameras(self, depth_unit: float) -> GivenCameras:
        """All of them."""
        return GivenCameras(
            frames=self._frames,
            depth_unit=depth_unit,
            named=frozenset(self._named),
            lenses=self._lenses,
            source=self.source if self._frames or self.problems else "",
        )
