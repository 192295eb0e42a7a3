"""The `fusion` engine: posed RGB-D views to one closed surface, by a truncated signed distance volume with carving.

Curless and Levoy, A volumetric method for building complex models from range images (SIGGRAPH 1996), with the distance
to the tangent plane of a reading instead of the distance along its ray, and voxels only near the surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes

from tasks.capture.cameras import Camera
from tasks.capture.views import View
from tasks.errors import InferenceFailed
from tasks.inference.depth import DepthMap, Planes, cut_out, noise_level, tangent_planes, window_for
from tasks.settings import FusionParameters
from tasks.surface import connected_pieces

FUSION_VERSION = "1"
MIN_VIEWS = 3  # fewer leave most of the object to guesswork

THREADS = 2
VOXEL_FOOTPRINTS = 1.6  # voxel size in pixel footprints at the object
CELL = 4  # voxels along a side of a cell, the unit in which space is near the surface or not
CHUNK_CELLS = 2048  # cells that are worked on at once: bounds memory
TRUNCATION_VOXELS = 3.0
TRUNCATION_SIGMAS = 3.0  # of the noise that is left after smoothing
ANGLE_POWER = 2  # weight of a reading: the cosine of its viewing angle to this power
BOUNDS_SAMPLES = 100_000  # surface points that the bounds are taken from
BOUNDS_MARGIN_VOXELS = 2
ZERO_GAP = 1e-3  # distances (voxels) are kept this far from 0: marching cubes then makes no degenerate triangles


@dataclass(frozen=True)
class Evidence:
    """What one view says about space: its depth map and the tangent planes of its readings, in a local frame."""

    depth_map: DepthMap
    planes: Planes


@dataclass(frozen=True)
class Grid:
    """A regular grid of voxel centres, `CELL` of them along a side of a cell.

    origin: (3,) float64, centre of voxel (0, 0, 0), metres. cells: number of cells along x, y, z.
    """

    origin: NDArray[np.float64]
    voxel: float
    cells: tuple[int, int, int]

    def voxel_centres(self, cells: NDArray[np.intp]) -> NDArray[np.float32]:
        """Centres of all voxels of some cells (k, 3), cell after cell, (k * CELL**3, 3)."""
        inside = np.stack(np.meshgrid(*[np.arange(CELL)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        indices = (cells[:, None] * CELL + inside).reshape(-1, 3)
        return (self.origin + indices * self.voxel).astype(np.float32)

    def cell_centres(self) -> NDArray[np.float32]:
        """Centres of all cells, (n, 3)."""
        indices = np.stack(np.meshgrid(*map(np.arange, self.cells), indexing="ij"), axis=-1).reshape(-1, 3)
        return (self.origin + (indices * CELL + (CELL - 1) / 2) * self.voxel).astype(np.float32)

    def cell_of(self, points: NDArray[np.float32]) -> NDArray[np.intp]:
        """Flat index of the cells that hold points; those outside the grid are left out."""
        indices = np.floor(((points - self.origin) / self.voxel + 0.5) / CELL).astype(np.intp)
        within = ((indices >= 0) & (indices < self.cells)).all(axis=1)
        return np.ravel_multi_index(tuple(indices[within].T), self.cells)


def fuse(
    views: Sequence[View], parameters: FusionParameters, progress: Callable[[float], None]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Posed RGB-D views -> a closed surface: vertices (n, 3) metres in the capture's frame, faces (m, 3).

    Every view needs a camera and metric depth. What a view sees as background or in front of a surface is free; what
    no view ever saw is inside, which closes the surface. Runs give identical bytes. `progress` is told 0..1.
    Raises InferenceFailed where nothing is left to make a surface of.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        maps = [depth_map for depth_map in pool.map(cut_out, views) if depth_map is not None]
        if not maps:
            raise InferenceFailed("fusion: no view has a depth reading on the object; check masks and depth maps")
        centre = _rough_centre(maps)
        maps = [replace(depth_map, camera=_moved(depth_map.camera, -centre)) for depth_map in maps]
        noise = noise_level(maps)
        progress(0.1)
        planes = list(pool.map(lambda depth_map: tangent_planes(depth_map, noise), maps))
        evidence = [Evidence(*pair) for pair in zip(maps, planes, strict=True)]
        progress(0.35)
        grid = _grid(evidence, parameters)
        truncation = _truncation(grid.voxel, noise, maps)
        signs = _coarse(evidence, grid, truncation)
        active = _active_cells(evidence, grid, signs)
        volume = np.repeat(np.repeat(np.repeat(signs, CELL, 0), CELL, 1), CELL, 2).astype(np.float32)
        volume *= truncation
        blocks = volume.reshape([size for count in grid.cells for size in (count, CELL)]).transpose(0, 2, 4, 1, 3, 5)
        chunks = [active[start : start + CHUNK_CELLS] for start in range(0, len(active), CHUNK_CELLS)]
        distances = pool.map(lambda cells: signed_distance(grid.voxel_centres(cells), evidence, truncation), chunks)
        for done, (cells, values) in enumerate(zip(chunks, distances, strict=True), start=1):
            blocks[tuple(cells.T)] = values.reshape(-1, CELL, CELL, CELL)
            progress(0.35 + 0.45 * done / len(chunks))
    vertices, faces = _surface(volume, grid)
    progress(0.95)
    vertices, faces = without_crumbs(vertices, faces, parameters.crumb_fraction)
    progress(1.0)
    return (vertices + centre).astype(np.float32), faces


def signed_distance(
    points: NDArray[np.float32], evidence: Sequence[Evidence], truncation: float
) -> NDArray[np.float32]:
    """Distance of points (n, 3) to the surface, (n,) metres within +-truncation, positive outside.

    The weighted mean over the views that see the point or the surface close before it, in the order of the views.
    """
    total = np.zeros(len(points), np.float32)
    weights = np.zeros(len(points), np.float32)
    free = np.full(len(points), -truncation, np.float32)
    for one in evidence:
        pixel, scale, in_image = _pixels(one.depth_map, points)
        # distance in the image to the object's outline: at least this far is the point from the object
        outside = one.depth_map.silhouette.reshape(-1)[pixel] * scale
        np.maximum(free, outside, out=free, where=in_image)
        plane = one.planes.plane[pixel]
        distance = np.einsum("nc,nc->n", plane[:, :3], points) + plane[:, 3]
        weight = one.planes.weight[pixel] ** ANGLE_POWER
        weight *= np.clip(1 + distance / truncation, 0, 1) * in_image  # fades behind the surface
        total += weight * np.minimum(distance, truncation)
        weights += weight
    seen = weights > 0
    np.divide(total, weights, out=total, where=seen)
    total[~seen] = -truncation
    return np.maximum(total, np.minimum(free, truncation))


def without_crumbs(
    vertices: NDArray[np.floating], faces: NDArray[np.int32], crumb_fraction: float
) -> tuple[NDArray[np.floating], NDArray[np.int32]]:
    """Drops pieces with less than `crumb_fraction` of the largest piece's area, and cavities that no view can see.

    Raises InferenceFailed if there is no piece at all.
    """
    if not len(faces):
        raise InferenceFailed("fusion: the views leave no surface; check that depth, masks and cameras agree")
    piece = connected_pieces(faces, len(vertices))
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    normals = np.cross(b - a, c - a)
    area = np.bincount(piece, np.linalg.norm(normals, axis=1))
    volume = np.bincount(piece, (a * normals).sum(axis=1))
    keep = ((area >= crumb_fraction * area[volume > 0].max(initial=0)) & (volume > 0))[piece]
    used, renumbered = np.unique(faces[keep], return_inverse=True)
    if not len(used):
        raise InferenceFailed("fusion: the views leave no solid piece; check that depth, masks and cameras agree")
    return vertices[used], renumbered.reshape(-1, 3).astype(np.int32)


def _rough_centre(maps: Sequence[DepthMap]) -> NDArray[np.float64]:
    """A point about the object: float32 is exact enough around it, wherever the world's origin may be."""
    centres = []
    for depth_map in maps:
        rows, columns = np.nonzero(depth_map.depth)
        middle = len(rows) // 2
        row, column = int(rows[middle]), int(columns[middle])
        index = (row + depth_map.corner[0]) * depth_map.camera.width + column + depth_map.corner[1]
        centres.append(depth_map.camera.centre + depth_map.camera.rays()[index] * depth_map.depth[row, column])
    return np.median(centres, axis=0)


def _moved(camera: Camera, offset: NDArray[np.float64]) -> Camera:
    pose = camera.camera_to_world.copy()
    pose[:3, 3] += offset
    return replace(camera, camera_to_world=pose)


def _pixels(
    depth_map: DepthMap, points: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.bool_]]:
    """Where points lie in a depth map: flat index of the pixel in the cut-out, metres per pixel, whether in the image.

    Points beyond the cut-out get its nearest border pixel.
    """
    camera = depth_map.camera
    position, z = camera.project(points)
    x, y = position[:, 0], position[:, 1]
    in_image = (z > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
    height, width = depth_map.silhouette.shape
    top, left = depth_map.corner
    column = np.clip(np.nan_to_num(x) - left, 0, width - 1).astype(np.intp)
    row = np.clip(np.nan_to_num(y) - top, 0, height - 1).astype(np.intp)
    return row * width + column, z / np.float32(camera.fl_x), in_image


def _grid(evidence: Sequence[Evidence], parameters: FusionParameters) -> Grid:
    """Voxels as fine as the capture's pixels, around all surface points that no view sees as background."""
    points = np.concatenate([one.planes.points for one in evidence])
    points = points[:: max(len(points) // BOUNDS_SAMPLES, 1)]
    for one in evidence:
        pixel, _, in_image = _pixels(one.depth_map, points)
        points = points[~(in_image & (one.depth_map.silhouette.reshape(-1)[pixel] > 0))]
    if not len(points):
        raise InferenceFailed("fusion: the views contradict each other everywhere; check the cameras' poses")
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    footprint = float(np.median([one.depth_map.footprint for one in evidence]))
    voxel = parameters.voxel_m or VOXEL_FOOTPRINTS * footprint
    usable = parameters.max_voxels - 2 * BOUNDS_MARGIN_VOXELS
    voxel = max(voxel, float((high - low).max()) / usable)
    margin = BOUNDS_MARGIN_VOXELS * voxel
    counts = np.ceil((high - low + 2 * margin) / (voxel * CELL)).astype(int)
    return Grid(low - margin, voxel, (int(counts[0]), int(counts[1]), int(counts[2])))


def _truncation(voxel: float, noise: float, maps: Sequence[DepthMap]) -> float:
    """How far from the surface distances are kept, metres: past the voxels around it and the noise that is left."""
    window = window_for(noise, float(np.median([depth_map.footprint for depth_map in maps])))
    remaining = noise / (2 * np.sqrt(np.pi) * window)
    return TRUNCATION_VOXELS * voxel + TRUNCATION_SIGMAS * float(remaining)


def _coarse(evidence: Sequence[Evidence], grid: Grid, truncation: float) -> NDArray[np.int8]:
    """Whether each cell's centre is free (+1) or inside (-1), with the shape of `grid.cells`."""
    values = signed_distance(grid.cell_centres(), evidence, truncation)
    return np.where(values > 0, 1, -1).astype(np.int8).reshape(grid.cells)


def _active_cells(evidence: Sequence[Evidence], grid: Grid, signs: NDArray[np.int8]) -> NDArray[np.intp]:
    """Cells (k, 3) that the surface may cross: around measured points, and between free and inside."""
    near = np.zeros(grid.cells, bool)
    for one in evidence:
        near.reshape(-1)[grid.cell_of(one.planes.points)] = True
    around = np.ones((3, 3, 3), bool)
    changes = ndimage.maximum_filter(signs, footprint=around) != ndimage.minimum_filter(signs, footprint=around)
    return np.argwhere(ndimage.binary_dilation(near, around) | changes)


def _surface(volume: NDArray[np.float32], grid: Grid) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The zero level as a closed, outward oriented mesh; space beyond the grid is free."""
    gap = np.float32(ZERO_GAP * grid.voxel)
    padded = np.pad(volume, 1, constant_values=np.float32(grid.voxel))
    padded[np.abs(padded) < gap] = gap
    if not (padded < 0).any():
        raise InferenceFailed("fusion: the views see nothing but free space; check that depth and masks agree")
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="descent")
    return ((vertices - 1) * grid.voxel + grid.origin).astype(np.float32), faces.astype(np.int32)
