"""Posed RGB-D views fused into one closed surface: a truncated signed distance volume with carving.

Curless and Levoy, A volumetric method for building complex models from range images (SIGGRAPH 1996), with the distance
to the tangent plane of a reading instead of the distance along its ray, and voxels only near the surface.
`fusion_engine` calls `fuse`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.errors import InferenceFailed
from tasks.geometry.depth import DepthMap, cut_out, noise_level, tangent_planes, window_for
from tasks.geometry.hole_filling import continued
from tasks.geometry.mesh_repair import without_crumbs
from tasks.inference.fusion.grid import CELL, VoxelGrid, grid_around, typical_footprint
from tasks.inference.fusion.seen_space import SeenSpace, signed_distance
from tasks.settings import FusionParameters

FUSION_VERSION = "2"
MIN_VIEWS = 3  # with fewer, most of the object would be a guess

THREADS = 2
# Points worked on at once: fits the caches, and is too few for OpenBLAS to start threads of its own in each of ours
CHUNK_POINTS = 25_600
TRUNCATION_VOXELS = 3.0
TRUNCATION_SIGMAS = 3.0  # of the noise that is left after smoothing
ZERO_GAP = 1e-3  # distances (voxels) are kept this far from 0: marching cubes then makes no degenerate triangles


def fuse(
    views: Sequence[View], parameters: FusionParameters, progress: Callable[[float], None]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Posed RGB-D views -> a closed surface: vertices (n, 3) metres in the capture's frame, faces (m, 3).

    Every view needs a camera and metric depth. Space that a view sees as background or in front of a surface is free.
    Space that no view saw is inside, except if it hides the smooth continuation of a hollow's walls. Runs give
    identical bytes. `progress` is called with the share that is done, 0..1.
    Raises InferenceFailed if the views leave nothing to make a surface of.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        maps = [depth_map for depth_map in pool.map(cut_out, views) if depth_map is not None]
        if not any(depth_map.depth.any() for depth_map in maps):
            raise InferenceFailed("fusion: no view has a depth reading on the object; check masks and depth maps")
        centre = _rough_centre(maps)
        maps = [replace(depth_map, camera=_moved(depth_map.camera, -centre)) for depth_map in maps]
        noise = noise_level(maps)
        progress(0.1)
        planes = list(pool.map(lambda depth_map: tangent_planes(depth_map, noise), maps))
        grid = grid_around(maps, planes, parameters)
        truncation = _truncation(grid.voxel, noise, maps)
        seen = [SeenSpace.of(*pair, grid.cell_radius, truncation) for pair in zip(maps, planes, strict=True)]
        progress(0.4)
        volume = _volume(seen, grid, truncation, pool)
    progress(0.8)
    vertices, faces = _surface(volume, grid)
    progress(0.95)
    try:
        vertices, faces = without_crumbs(vertices, faces, parameters.crumb_fraction)
    except ValueError as error:
        raise InferenceFailed("fusion: the views leave no solid; check that depth, masks and cameras agree") from error
    progress(1.0)
    return (vertices + centre).astype(np.float32), faces


def _rough_centre(maps: Sequence[DepthMap]) -> NDArray[np.float64]:
    """A point (3,) near the object: around it float32 is exact enough, however far away the world's origin is."""
    centres = []
    for depth_map in (depth_map for depth_map in maps if depth_map.depth.any()):
        readings = np.argwhere(depth_map.depth)
        row, column = readings[len(readings) // 2][:, None]
        top, left = depth_map.corner
        centres.append(depth_map.camera.points(row + top, column + left, depth_map.depth[row, column])[0])
    return np.asarray(np.median(centres, axis=0))


def _moved(camera: Camera, offset: NDArray[np.float64]) -> Camera:
    pose = camera.camera_to_world.copy()
    pose[:3, 3] += offset
    return replace(camera, camera_to_world=pose)


def _truncation(voxel: float, noise: float, maps: Sequence[DepthMap]) -> float:
    """Largest distance from the surface that is kept, metres: more than a voxel and the remaining noise."""
    window = window_for(noise, typical_footprint(maps))
    remaining = noise / (2 * np.sqrt(np.pi) * window)
    return TRUNCATION_VOXELS * voxel + TRUNCATION_SIGMAS * float(remaining)


def _volume(
    seen: Sequence[SeenSpace], grid: VoxelGrid, truncation: float, pool: ThreadPoolExecutor
) -> NDArray[np.float32]:
    """Signed distances of all voxels of the grid: exact in the cells that the surface crosses, else of one sign.

    Starts with the cells at measured points and grows to wherever neighbouring voxels of two cells disagree.
    """

    def distances(points: NDArray[np.float32]) -> NDArray[np.float32]:
        return signed_distance(points, grid.cell_radius, seen, truncation)

    coarse = np.concatenate(list(pool.map(distances, _chunks(grid.cell_centres(), CHUNK_POINTS))))
    signs = np.where(coarse.reshape(grid.cells) > 0, np.float32(truncation), np.float32(-truncation))
    volume = np.repeat(np.repeat(np.repeat(signs, CELL, 0), CELL, 1), CELL, 2)
    blocks = volume.reshape([size for count in grid.cells for size in (count, CELL)]).transpose(0, 2, 4, 1, 3, 5)
    exact = np.zeros(grid.cells, bool)
    wanted = _measured_cells(seen, grid)
    while wanted.any():
        chunks = _chunks(np.argwhere(wanted), CHUNK_POINTS // CELL**3)
        exact_values = pool.map(lambda cells: distances(grid.voxel_centres(cells)), chunks)
        for cells, values in zip(chunks, exact_values, strict=True):
            blocks[tuple(cells.T)] = values.reshape(-1, CELL, CELL, CELL)
        exact |= wanted
        wanted = _crossed(blocks) & ~exact
    return volume


def _chunks(array: NDArray[Any], size: int) -> list[NDArray[Any]]:
    return [array[start : start + size] for start in range(0, len(array), size)]


def _measured_cells(seen: Sequence[SeenSpace], grid: VoxelGrid) -> NDArray[np.bool_]:
    """True for the cells that hold a measured surface point."""
    measured = np.zeros(grid.cells, bool)
    for one in seen:
        measured.reshape(-1)[grid.cell_of(one.planes.points)] = True
    return measured


def _crossed(blocks: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True for the cells that have a voxel whose neighbour in the next cell lies on the other side of the surface."""
    crossed = np.zeros(blocks.shape[:3], bool)
    for axis in range(3):
        cells, along = np.moveaxis(blocks, (axis, 3 + axis), (0, 3)), np.moveaxis(crossed, axis, 0)
        differ = ((cells[:-1, :, :, -1] > 0) != (cells[1:, :, :, 0] > 0)).any(axis=(-1, -2))
        along[:-1] |= differ
        along[1:] |= differ
    return crossed


def _surface(volume: NDArray[np.float32], grid: VoxelGrid) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The zero level as a closed, outward oriented mesh; space beyond the grid is free."""
    gap = np.float32(ZERO_GAP * grid.voxel)
    padded = np.pad(volume, 1, constant_values=np.float32(grid.voxel))
    padded[np.abs(padded) < gap] = gap
    if not (padded < 0).any():
        raise InferenceFailed("fusion: the views see nothing but free space; check that depth and masks agree")
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="descent")
    vertices = continued(vertices - 1, faces, volume, grid.voxel)
    return (vertices * grid.voxel + grid.origin).astype(np.float32), faces.astype(np.int32)
