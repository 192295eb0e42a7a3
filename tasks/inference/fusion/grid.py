"""The voxels of a fusion: a regular grid around the object, as fine as the capture's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import InferenceFailed
from tasks.geometry.depth import DepthMap, Planes
from tasks.inference.fusion.seen_space import pixels_of
from tasks.settings import FusionParameters

VOXEL_FOOTPRINTS = 2.5  # voxel size in pixel footprints at the object
MIN_VOXELS = 128  # along the longest side, however coarse the pixels: curved surfaces need them
CELL = 4  # voxels along a side of a cell, the unit in which space is near the surface or not
BOUNDS_SAMPLES = 100_000  # surface points that the bounds are taken from
BOUNDS_MARGIN_VOXELS = 2


@dataclass(frozen=True)
class VoxelGrid:
    """A regular grid of voxel centres, `CELL` of them along a side of a cell."""

    origin: NDArray[np.float64]
    """(3,) metres, centre of voxel (0, 0, 0)"""
    voxel: float
    """Side of a voxel, metres"""
    cells: tuple[int, int, int]
    """Number of cells along x, y, z"""

    @property
    def cell_radius(self) -> float:
        """Radius of the sphere around a cell's voxel centres, metres."""
        return float(np.sqrt(3) / 2 * CELL * self.voxel)

    def voxel_centres(self, cells: NDArray[np.intp]) -> NDArray[np.float32]:
        """Centres of all voxels of some cells (k, 3), (k, CELL**3, 3)."""
        inside = np.stack(np.meshgrid(*[np.arange(CELL)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        return (self.origin + (cells[:, None] * CELL + inside) * self.voxel).astype(np.float32)

    def cell_centres(self) -> NDArray[np.float32]:
        """Centres of all cells, (n, 1, 3)."""
        indices = np.stack(np.meshgrid(*map(np.arange, self.cells), indexing="ij"), axis=-1).reshape(-1, 1, 3)
        return (self.origin + (indices * CELL + (CELL - 1) / 2) * self.voxel).astype(np.float32)

    def blocks(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """A view of all voxels by cell: (x, y, z) of the cells, then (CELL, CELL, CELL) inside of each."""
        return voxels.reshape([size for count in self.cells for size in (count, CELL)]).transpose(0, 2, 4, 1, 3, 5)

    def cell_of(self, points: NDArray[np.float32]) -> NDArray[np.intp]:
        """Flat index of the cells that hold points (n, 3); points outside the grid are left out."""
        indices = np.floor(((points - self.origin) / self.voxel + 0.5) / CELL).astype(np.intp)
        within = ((indices >= 0) & (indices < self.cells)).all(axis=1)
        return np.asarray(np.ravel_multi_index(tuple(indices[within].T), self.cells))


def grid_around(
    maps: Sequence[DepthMap],
    planes: Sequence[Planes],
    parameters: FusionParameters,
    spread: float,
    floor: NDArray[np.float64] | None,
    contact: float,
) -> VoxelGrid:
    """Voxels as fine as the capture's pixels, around all surface points that no view sees as background.

    spread: metres by which the views contradict each other; no voxel is finer. floor: (4,), the plane that the object
    stands on and reaches down to. contact: height in metres above it up to which points may be its own.

    Raises InferenceFailed if there is no such point.
    """
    every = max(sum(len(one.points) for one in planes) // BOUNDS_SAMPLES, 1)
    points = np.concatenate([one.points[::every] for one in planes])
    if floor is not None:
        points = points[points @ floor[:3] + floor[3] > contact]
    for depth_map in maps:
        pixel, _, in_image = pixels_of(depth_map, points)
        points = points[~(in_image & (depth_map.silhouette.take(pixel, mode="clip") > 0))]
    if not len(points):
        raise InferenceFailed("fusion: the views contradict each other everywhere; check the cameras' poses")
    if floor is not None:
        points = np.concatenate([points, points - (points @ floor[:3] + floor[3])[:, None] * floor[:3]])
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    footprint = typical_footprint(maps)
    longest = float((high - low).max())
    voxel = parameters.voxel_m or max(min(VOXEL_FOOTPRINTS * footprint, longest / MIN_VOXELS), spread)
    voxel = max(voxel, longest / (parameters.max_voxels - 2 * BOUNDS_MARGIN_VOXELS))
    margin = BOUNDS_MARGIN_VOXELS * voxel
    counts = np.ceil((high - low + 2 * margin) / (voxel * CELL)).astype(int)
    return VoxelGrid(low - margin, voxel, (int(counts[0]), int(counts[1]), int(counts[2])))


def typical_footprint(maps: Sequence[DepthMap]) -> float:
    """Size of a pixel at the object, metres, in a typical view."""
    return float(np.median([depth_map.footprint for depth_map in maps if depth_map.depth.any()]))
