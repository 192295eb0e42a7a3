"""The `fusion` engine: posed RGB-D views to one closed surface, by a truncated signed distance volume with carving.

Curless and Levoy, A volumetric method for building complex models from range images (SIGGRAPH 1996), with the distance
to the tangent plane of a reading instead of the distance along its ray, and voxels only near the surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.errors import InferenceFailed
from tasks.geometry.depth import DepthMap, Planes, cut_out, noise_level, tangent_planes, window_for
from tasks.geometry.hole_filling import continued
from tasks.geometry.mesh_repair import without_crumbs
from tasks.settings import FusionParameters

FUSION_VERSION = "2"
MIN_VIEWS = 3  # fewer leave most of the object to guesswork

THREADS = 2
VOXEL_FOOTPRINTS = 2.5  # voxel size in pixel footprints at the object
MIN_VOXELS = 128  # along the longest side, however coarse the pixels: curved surfaces need them
CELL = 4  # voxels along a side of a cell, the unit in which space is near the surface or not
# Points worked on at once: fits the caches, and is too few for OpenBLAS to start threads of its own in each of ours
CHUNK_POINTS = 25_600
TRUNCATION_VOXELS = 3.0
TRUNCATION_SIGMAS = 3.0  # of the noise that is left after smoothing
BOUNDS_SAMPLES = 100_000  # surface points that the bounds are taken from
BOUNDS_MARGIN_VOXELS = 2
ZERO_GAP = 1e-3  # distances (voxels) are kept this far from 0: marching cubes then makes no degenerate triangles


@dataclass(frozen=True)
class Evidence:
    """What one view says about space: its depth map and the tangent planes of its readings, in a local frame.

    hidden_from: (h * w,) float32, a cell whose centre lies in a pixel and wholly beyond this depth is hidden.
    """

    depth_map: DepthMap
    planes: Planes
    hidden_from: NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxel centres, `CELL` of them along a side of a cell.

    origin: (3,) float64, centre of voxel (0, 0, 0), metres. cells: number of cells along x, y, z.
    """

    origin: NDArray[np.float64]
    voxel: float
    cells: tuple[int, int, int]

    @property
    def cell_radius(self) -> float:
        """Of the sphere around a cell's voxel centres, metres."""
        return float(np.sqrt(3) / 2 * CELL * self.voxel)

    def voxel_centres(self, cells: NDArray[np.intp]) -> NDArray[np.float32]:
        """Centres of all voxels of some cells (k, 3), (k, CELL**3, 3)."""
        inside = np.stack(np.meshgrid(*[np.arange(CELL)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        return (self.origin + (cells[:, None] * CELL + inside) * self.voxel).astype(np.float32)

    def cell_centres(self) -> NDArray[np.float32]:
        """Centres of all cells, (n, 1, 3)."""
        indices = np.stack(np.meshgrid(*map(np.arange, self.cells), indexing="ij"), axis=-1).reshape(-1, 1, 3)
        return (self.origin + (indices * CELL + (CELL - 1) / 2) * self.voxel).astype(np.float32)

    def cell_of(self, points: NDArray[np.float32]) -> NDArray[np.intp]:
        """Flat index of the cells that hold points; those outside the grid are left out."""
        indices = np.floor(((points - self.origin) / self.voxel + 0.5) / CELL).astype(np.intp)
        within = ((indices >= 0) & (indices < self.cells)).all(axis=1)
        return np.asarray(np.ravel_multi_index(tuple(indices[within].T), self.cells))


def fuse(
    views: Sequence[View], parameters: FusionParameters, progress: Callable[[float], None]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Posed RGB-D views -> a closed surface: vertices (n, 3) metres in the capture's frame, faces (m, 3).

    Every view needs a camera and metric depth. What a view sees as background or in front of a surface is free; what
    no view ever saw is inside, except where it hides the smooth continuation of a hollow's walls. Runs give identical
    bytes. `progress` is told 0..1.
    Raises InferenceFailed where nothing is left to make a surface of.
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
        grid = _grid(maps, planes, parameters)
        truncation = _truncation(grid.voxel, noise, maps)
        evidence = [Evidence(*pair, _hidden_from(*pair, grid, truncation)) for pair in zip(maps, planes, strict=True)]
        progress(0.4)
        volume = _volume(evidence, grid, truncation, pool)
    progress(0.8)
    vertices, faces = _surface(volume, grid)
    progress(0.95)
    try:
        vertices, faces = without_crumbs(vertices, faces, parameters.crumb_fraction)
    except ValueError as error:
        raise InferenceFailed("fusion: the views leave no solid; check that depth, masks and cameras agree") from error
    progress(1.0)
    return (vertices + centre).astype(np.float32), faces


def signed_distance(
    points: NDArray[np.float32], radius: float, evidence: Sequence[Evidence], truncation: float
) -> NDArray[np.float32]:
    """Distance to the surface of cells of points (k, m, 3), each of `radius`: (k, m) metres within +-truncation.

    Positive outside. The weighted mean over the views that see a point or the surface close before it, in the order of
    the views; points that no view sees are inside.
    """
    total = np.zeros(points.shape[:2], np.float32)
    weights = np.zeros_like(total)
    free = np.full_like(total, -truncation)
    middles = points.mean(axis=1)
    for one in evidence:
        pixel, z, _ = _pixels(one.depth_map, middles)
        open_cells = np.flatnonzero(z - radius < one.hidden_from.take(pixel, mode="clip"))
        outside, distance, weight = _seen_from(one, points[open_cells].reshape(-1, 3))
        weight *= np.clip(1 + distance / truncation, 0, 1)  # fades behind the surface
        distance = weight * np.minimum(distance, truncation)
        total[open_cells] += distance.reshape(-1, points.shape[1])
        weights[open_cells] += weight.reshape(-1, points.shape[1])
        free[open_cells] = np.maximum(free[open_cells], outside.reshape(-1, points.shape[1]))
    measured = np.divide(total, weights, out=np.full_like(total, -truncation), where=weights > 0)
    return np.maximum(measured, np.minimum(free, truncation))


def _rough_centre(maps: Sequence[DepthMap]) -> NDArray[np.float64]:
    """A point about the object: float32 is exact enough around it, wherever the world's origin may be."""
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


def _pixels(
    depth_map: DepthMap, points: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.bool_]]:
    """Where points lie in a depth map: flat index of the pixel in the cut-out, depth, whether in the image.

    Points beyond the cut-out get its nearest border pixel; the index means nothing for those at the camera's own depth.
    """
    camera = depth_map.camera
    position, z = camera.project(points)
    x, y = position[:, 0], position[:, 1]
    in_image = (z > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
    height, width = depth_map.silhouette.shape
    top, left = depth_map.corner
    with np.errstate(invalid="ignore"):
        column = np.clip(x - left, 0, width - 1).astype(np.intp)
        row = np.clip(y - top, 0, height - 1).astype(np.intp)
    return row * width + column, z, in_image


def _seen_from(
    one: Evidence, points: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """What a view says about points (n, 3): how far outside of its silhouette they are at least (metres), the distance
    to the surface that is seen there, and that measurement's weight, 0 where there is none; (n,) each."""
    pixel, z, in_image = _pixels(one.depth_map, points)
    outside = one.depth_map.silhouette.take(pixel, mode="clip") * (z / np.float32(one.depth_map.camera.fl_x))
    outside[~in_image] = -np.inf
    plane = one.planes.plane.take(pixel, axis=0, mode="clip")
    distance = plane[:, 3] + plane[:, 0] * points[:, 0] + plane[:, 1] * points[:, 1] + plane[:, 2] * points[:, 2]
    return outside, distance, one.planes.weight.take(pixel, mode="clip") * in_image


def _hidden_from(depth_map: DepthMap, planes: Planes, grid: Grid, truncation: float) -> NDArray[np.float32]:
    """Depth from which on a cell is hidden behind the surface in all pixels that it may touch, (h * w,)."""
    shape = depth_map.silhouette.shape
    depth, cosine = planes.depth.reshape(shape), planes.cosine.reshape(shape)
    beyond = depth + truncation / np.where(cosine > 0, cosine, np.float32(np.finfo(np.float32).tiny))
    nearest = float(depth[depth > 0].min()) if (depth > 0).any() else 1.0
    reach = int(np.ceil(grid.cell_radius * depth_map.camera.fl_x / nearest)) + 1
    return ndimage.maximum_filter(beyond.astype(np.float32), 2 * reach + 1, mode="nearest").reshape(-1)


def _grid(maps: Sequence[DepthMap], planes: Sequence[Planes], parameters: FusionParameters) -> Grid:
    """Voxels as fine as the capture's pixels, around all surface points that no view sees as background."""
    points = np.concatenate([one.points for one in planes])
    points = points[:: max(len(points) // BOUNDS_SAMPLES, 1)]
    for depth_map in maps:
        pixel, _, in_image = _pixels(depth_map, points)
        points = points[~(in_image & (depth_map.silhouette.take(pixel, mode="clip") > 0))]
    if not len(points):
        raise InferenceFailed("fusion: the views contradict each other everywhere; check the cameras' poses")
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    footprint = _footprint(maps)
    longest = float((high - low).max())
    voxel = parameters.voxel_m or min(VOXEL_FOOTPRINTS * footprint, longest / MIN_VOXELS)
    voxel = max(voxel, longest / (parameters.max_voxels - 2 * BOUNDS_MARGIN_VOXELS))
    margin = BOUNDS_MARGIN_VOXELS * voxel
    counts = np.ceil((high - low + 2 * margin) / (voxel * CELL)).astype(int)
    return Grid(low - margin, voxel, (int(counts[0]), int(counts[1]), int(counts[2])))


def _footprint(maps: Sequence[DepthMap]) -> float:
    """Size of a pixel at the object, metres, in a typical view."""
    return float(np.median([depth_map.footprint for depth_map in maps if depth_map.depth.any()]))


def _truncation(voxel: float, noise: float, maps: Sequence[DepthMap]) -> float:
    """How far from the surface distances are kept, metres: past the voxels around it and the noise that is left."""
    window = window_for(noise, _footprint(maps))
    remaining = noise / (2 * np.sqrt(np.pi) * window)
    return TRUNCATION_VOXELS * voxel + TRUNCATION_SIGMAS * float(remaining)


def _volume(
    evidence: Sequence[Evidence], grid: Grid, truncation: float, pool: ThreadPoolExecutor
) -> NDArray[np.float32]:
    """Signed distances of all voxels of the grid: exact in the cells that the surface crosses, else of one sign.

    Starts with the cells at measured points and grows to wherever neighbouring voxels of two cells disagree.
    """

    def distances(points: NDArray[np.float32]) -> NDArray[np.float32]:
        return signed_distance(points, grid.cell_radius, evidence, truncation)

    coarse = np.concatenate(list(pool.map(distances, _chunks(grid.cell_centres(), CHUNK_POINTS))))
    signs = np.where(coarse.reshape(grid.cells) > 0, np.float32(truncation), np.float32(-truncation))
    volume = np.repeat(np.repeat(np.repeat(signs, CELL, 0), CELL, 1), CELL, 2)
    blocks = volume.reshape([size for count in grid.cells for size in (count, CELL)]).transpose(0, 2, 4, 1, 3, 5)
    exact = np.zeros(grid.cells, bool)
    wanted = _measured_cells(evidence, grid)
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


def _measured_cells(evidence: Sequence[Evidence], grid: Grid) -> NDArray[np.bool_]:
    """Which cells hold a measured surface point."""
    measured = np.zeros(grid.cells, bool)
    for one in evidence:
        measured.reshape(-1)[grid.cell_of(one.planes.points)] = True
    return measured


def _crossed(blocks: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which cells have a voxel whose neighbour in the next cell lies on the other side of the surface."""
    crossed = np.zeros(blocks.shape[:3], bool)
    for axis in range(3):
        cells, along = np.moveaxis(blocks, (axis, 3 + axis), (0, 3)), np.moveaxis(crossed, axis, 0)
        differ = ((cells[:-1, :, :, -1] > 0) != (cells[1:, :, :, 0] > 0)).any(axis=(-1, -2))
        along[:-1] |= differ
        along[1:] |= differ
    return crossed


def _surface(volume: NDArray[np.float32], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The zero level as a closed, outward oriented mesh; space beyond the grid is free."""
    gap = np.float32(ZERO_GAP * grid.voxel)
    padded = np.pad(volume, 1, constant_values=np.float32(grid.voxel))
    padded[np.abs(padded) < gap] = gap
    if not (padded < 0).any():
        raise InferenceFailed("fusion: the views see nothing but free space; check that depth and masks agree")
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="descent")
    vertices = continued(vertices - 1, faces, volume, grid.voxel)
    return (vertices * grid.voxel + grid.origin).astype(np.float32), faces.astype(np.int32)
