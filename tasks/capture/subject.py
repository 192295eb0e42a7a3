"""The subject of a capture: the part of the scene that is reconstructed. Fusion finds it, later stages use it."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Row = tuple[float, float, float]
Floats = NDArray[np.float64]


class Box(BaseModel):
    """A box in the world, turned or not."""

    model_config = ConfigDict(frozen=True)

    centre: Row
    """World metres"""
    half: Row
    """Half the length of its sides, metres"""
    axes: tuple[Row, Row, Row]
    """Unit vectors along its sides, in the world"""

    @staticmethod
    def of(centre: Floats, half: Floats, axes: Floats) -> Box:
        """A box of arrays: centre (3,), half (3,) and axes (3, 3), a row each."""
        first, second, third = axes.tolist()
        return Box(centre=tuple(centre.tolist()), half=tuple(half.tolist()), axes=(first, second, third))

    @staticmethod
    def between(bounds: Floats) -> Box:
        """The box of two corners (2, 3), low and high, along the world's axes."""
        low, high = bounds
        return Box.of((low + high) / 2, (high - low) / 2, np.eye(3))

    def holds(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """True, (n,), for the world points (n, 3) that lie in the box."""
        return np.asarray((np.abs(self._local(points)) <= self.half).all(axis=1))

    def crossed(self, origin: Floats, rays: Floats) -> tuple[Floats, Floats]:
        """Multiples, (n,) each, of rays (n, 3) from `origin` (3,) at which they enter and leave the box.

        A ray that misses the box enters after it leaves. Kay and Kajiya, Ray tracing complex scenes (SIGGRAPH 1986).
        """
        start, way = self._local(origin[None])[0], rays @ np.array(self.axes).T
        half = np.array(self.half)
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = (-half - start) / way, (half - start) / way
        return np.fmin(first, second).max(axis=1), np.fmax(first, second).min(axis=1)

    def _local(self, points: NDArray[np.floating]) -> Floats:
        return np.asarray((points - self.centre) @ np.array(self.axes).T)


class Subject(BaseModel):
    """The part of the scene that a reconstruction is of."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["object", "surface"]
    """object: closed; surface: open, without what no view saw"""
    box: Box | None = None
    """The box that was found around it; None if masks or bounds say what it is, or everything is meant"""
    plane: tuple[float, float, float, float] | None = None
    """(a, b, c, d): a x + b y + c z + d is the height in metres above the plane that it stands on, which is left out"""
    reason: str = ""
    """Why this is the subject, for the report"""
