"""Posed RGB-D views fused into one closed surface: a truncated signed distance volume with carving.

Curless and Levoy, A volumetric method for building complex models from range images (SIGGRAPH 1996), with the distance
to the tangent plane of a reading instead of the distance along its ray, and voxels only near the surface.
`fusion_engine` calls `fuse`.
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
from tasks.capture.subject import Box, Subject
from tasks.capture.views import View
from tasks.errors import InferenceFailed
from tasks.geometry.depth import DepthMap, cut_out, tangent_planes, window_for
from tasks.geometry.depth_noise import DepthNoise, measured_noise
from tasks.geometry.fairing import without_noise
from tasks.geometry.hole_filling import continued, on_jumps, rested
from tasks.geometry.mesh_repair import compact, connected_pieces, face_normals, without_crumbs
from tasks.geometry.subject_search import find_subject
from tasks.inference.fusion.agreement import spread_between
from tasks.inference.fusion.grid import CELL, VoxelGrid, grid_around, typical_footprint
from tasks.inference.fusion.seen_space import SeenSpace, signed_distance
from tasks.inference.fusion.solid_morphology import without_pockets, without_thin_parts
from tasks.settings import FusionParameters

FUSION_VERSION = "7"
MIN_VIEWS = 3  # with fewer, most of the object would be a guess
MOST_VIEWS = 100  # a view costs some 20 MB at 640 x 480; more of them would add little

THREADS = 2
# Points worked on at once: fits the caches, and is too few for OpenBLAS to start threads of its own in each of ours
CHUNK_POINTS = 25_600
TRUNCATION_VOXELS = 3.0
TRUNCATION_SIGMAS = 3.0  # of what the views contradict each other by
THIN_SPREADS = 2.0  # solid parts of half this thickness lie between readings that contradict each other
NOISY_VOXELS = 0.01  # contradictions of less than this are not worth smoothing
OPEN_SHARE = 0.5  # of a closed surface that would be invented: then it stays open
ZERO_GAP = 1e-3  # distances (voxels) are kept this far from 0: marching cubes then makes no degenerate triangles

NOTHING = "fusion: the views see nothing but free space; check that depth and masks agree"


@dataclass(frozen=True)
class FusedSurface:
    """A surface in the capture's frame, with what is known about it."""

    vertices: NDArray[np.float32]
    """(n, 3) metres"""
    faces: NDArray[np.int32]
    """(m, 3), counter-clockwise seen from outside"""
    subject: Subject
    """The part of the scene that it is of"""
    sensor: DepthNoise
    """The noise of the depth maps"""
    spread_m: float
    """Metres by which two views contradict each other after smoothing: sensor and cameras together"""
    voxel_m: float
    """Size of the voxels, metres"""
    distance_m: float
    """Typical distance of the surface from the cameras, metres"""
    views: tuple[str, ...]
    """Names of the views that see it, in their order"""
    invented_share: float
    """Share of the closed surface's area that no view saw, 0..1; 0 for an open surface, which has no such part"""


def fuse(views: Sequence[View], parameters: FusionParameters, progress: Callable[[float], None]) -> FusedSurface:
    """Posed RGB-D views -> a surface in the capture's frame.

    Every view needs a camera and metric depth. Space that a view sees as background or in front of a surface is free.
    Of an object, space that no view saw is inside, except if it hides the smooth continuation of a hollow's walls, or
    of an underside down to the plane that it stands on. Of other subjects, only what was seen is part of the surface.
    Runs give identical bytes. `progress` is called with the share that is done, 0..1. Raises InferenceFailed if the
    views leave nothing to make a surface of.
    """
    sensor = measured_noise([view.depth for view in views if view.depth is not None])
    subject = _subject(views, sensor, parameters)
    with ThreadPoolExecutor(THREADS) as pool:
        contact = _contact(subject)
        cut = list(pool.map(lambda view: _cut_out(view, subject, contact), views))
        maps = [depth_map for depth_map in cut if depth_map is not None]
        names = tuple(
            view.name
            for view, depth_map in zip(views, cut, strict=True)
            if depth_map is not None and depth_map.depth.any()
        )
        if len(names) < MIN_VIEWS:
            raise InferenceFailed(
                f"fusion: {len(names)} of {len(views)} views have a depth reading on the object, not {MIN_VIEWS};"
                f" check masks, bounds and depth maps (subject: {subject.reason})"
            )
        centre = _rough_centre(maps)
        maps = [replace(depth_map, camera=_moved(depth_map.camera, -centre)) for depth_map in maps]
        floor = (
            None
            if subject.plane is None
            else np.append(subject.plane[:3], subject.plane[3] + subject.plane[:3] @ centre)
        )
        progress(0.1)
        planes = list(pool.map(lambda depth_map: tangent_planes(depth_map, sensor), maps))
        spread = spread_between(maps, planes)
        grid = grid_around(maps, planes, parameters, spread, floor, contact)
        truncation = _truncation(grid.voxel, sensor, spread, maps)
        seen = [SeenSpace.of(*pair, grid.cell_radius, truncation, spread) for pair in zip(maps, planes, strict=True)]
        progress(0.4)
        volume, measured = _volume(seen, grid, truncation, floor, contact + grid.voxel, pool)
    progress(0.8)
    if subject.kind == "object":
        thin = int(THIN_SPREADS * spread / grid.voxel)
        vertices, faces, invented = _surface(volume, measured, grid, thin, floor, contact)
        if parameters.subject == "auto" and invented > OPEN_SHARE:
            reason = f"{invented:.0%} of the closed surface would be invented, so it stays open; {subject.reason}"
            subject = subject.model_copy(update={"kind": "surface", "reason": reason.removesuffix("; ")})
    if subject.kind == "surface":
        vertices, faces, invented = *_open_surface(volume, measured, grid), 0.0
    progress(0.95)
    try:
        vertices, faces = without_crumbs(vertices, faces, parameters.crumb_fraction, subject.kind == "object")
    except ValueError as error:
        raise InferenceFailed("fusion: the views leave no solid; check that depth, masks and cameras agree") from error
    if spread > NOISY_VOXELS * grid.voxel:
        vertices = without_noise(vertices, faces, spread)
    progress(1.0)
    vertices = (vertices + centre).astype(np.float32)
    return FusedSurface(vertices, faces, subject, sensor, spread, grid.voxel, _distance(maps), names, invented)


def _subject(views: Sequence[View], sensor: DepthNoise, parameters: FusionParameters) -> Subject:
    """The subject: what the masks or bounds leave, else the object that is found, else everything."""
    if parameters.subject == "surface":
        return Subject(kind="surface", reason="asked for")
    if np.mean([view.has_mask for view in views]) > 0.5:
        return Subject(kind="object", reason="what the views' masks or the bounds leave")
    found = find_subject(views, sensor)
    if found is None and parameters.subject == "object":
        raise InferenceFailed(
            "fusion: no object was found: the views have no masks and show no plane with something on it;"
            " give bounds in transforms.json or alpha in the views, or set infer.fusion.subject=surface"
        )
    return found or Subject(kind="surface", reason="no masks, and no object on a plane was found: all that was seen")


def _contact(subject: Subject) -> float:
    """Height above the supporting plane, metres, below which its readings cannot be told from the object's."""
    if subject.plane is None or subject.box is None:
        return 0.0
    height = np.dot(subject.plane[:3], subject.box.centre) + subject.plane[3]
    return float(height - subject.box.half[2])


def _cut_out(view: View, subject: Subject, contact: float) -> DepthMap | None:
    """The subject's part of a depth map, with the plane's readings next to it: they show free space around its foot."""
    shown = view.of(subject)
    if subject.box is not None and shown is not view:
        half, axes = np.array(subject.box.half), np.array(subject.box.axes)
        lowered = Box.of(subject.box.centre - axes[2] * contact, half + np.array([0, 0, contact]), axes)
        shown = replace(shown, depth=view.within(lowered).depth)
    return cut_out(shown)


def _rough_centre(maps: Sequence[DepthMap]) -> NDArray[np.float64]:
    """A point (3,) near the object: around it float32 is exact enough, however far away the world's origin is."""
    centres = []
    for depth_map in (depth_map for depth_map in maps if depth_map.depth.any()):
        readings = np.argwhere(depth_map.depth)
        row, column = readings[len(readings) // 2][:, None]
        top, left = depth_map.corner
        centres.append(depth_map.camera.points(row + top, column + left, depth_map.depth[row, column])[0])
    return np.asarray(np.median(centres, axis=0))


def _distance(maps: Sequence[DepthMap]) -> float:
    """Of the object from a typical camera, metres."""
    return float(np.median([depth_map.distance for depth_map in maps if depth_map.depth.any()]))


def _moved(camera: Camera, offset: NDArray[np.float64]) -> Camera:
    pose = camera.camera_to_world.copy()
    pose[:3, 3] += offset
    return replace(camera, camera_to_world=pose)


def _truncation(voxel: float, sensor: DepthNoise, spread: float, maps: Sequence[DepthMap]) -> float:
    """Largest distance from the surface that is kept, metres: more than a voxel and what the views contradict by."""
    noise = float(sensor.at(_distance(maps)))
    remaining = noise / (2 * np.sqrt(np.pi) * window_for(noise, typical_footprint(maps)))
    return TRUNCATION_VOXELS * voxel + TRUNCATION_SIGMAS * max(remaining, spread)


def _volume(
    seen: Sequence[SeenSpace],
    grid: VoxelGrid,
    truncation: float,
    floor: NDArray[np.float64] | None,
    contact: float,
    pool: ThreadPoolExecutor,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Signed distances of all voxels of the grid: exact in the cells that the surface crosses, else of one sign.

    Also gives the voxels that have been measured. Starts with the cells at measured points and grows to wherever
    neighbouring voxels of two cells disagree. Space below the floor is free, and up to the height `contact` (metres)
    above it the object has the cross-section that it has there: what is unseen around its foot is not part of it.
    """

    fade = TRUNCATION_VOXELS * grid.voxel

    def distances(points: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if floor is None:
            return signed_distance(points, grid.cell_radius, seen, truncation, fade)
        up = floor[:3].astype(np.float32)
        below = -(points @ up + np.float32(floor[3]))
        lifted = points + np.maximum(below + np.float32(contact), 0)[..., None] * up
        distance, measured = signed_distance(lifted, grid.cell_radius, seen, truncation, fade)
        return np.maximum(distance, np.minimum(below, np.float32(truncation))), measured | (np.abs(below) < grid.voxel)

    coarse = np.concatenate([found for found, _ in pool.map(distances, _chunks(grid.cell_centres(), CHUNK_POINTS))])
    signs = np.where(coarse.reshape(grid.cells) > 0, np.float32(truncation), np.float32(-truncation))
    volume = np.repeat(np.repeat(np.repeat(signs, CELL, 0), CELL, 1), CELL, 2)
    measured = np.zeros(volume.shape, bool)
    blocks, measured_blocks = grid.blocks(volume), grid.blocks(measured)
    exact = np.zeros(grid.cells, bool)
    wanted = _measured_cells(seen, grid)
    while wanted.any():
        chunks = _chunks(np.argwhere(wanted), CHUNK_POINTS // CELL**3)
        exact_values = pool.map(lambda cells: distances(grid.voxel_centres(cells)), chunks)
        for cells, (values, known) in zip(chunks, exact_values, strict=True):
            blocks[tuple(cells.T)] = values.reshape(-1, CELL, CELL, CELL)
            measured_blocks[tuple(cells.T)] = known.reshape(-1, CELL, CELL, CELL)
        exact |= wanted
        wanted = _crossed(blocks) & ~exact
    return volume, measured


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


def _surface(
    volume: NDArray[np.float32],
    measured: NDArray[np.bool_],
    grid: VoxelGrid,
    thin: int,
    floor: NDArray[np.float64] | None,
    contact: float,
) -> tuple[NDArray[np.float32], NDArray[np.int32], float]:
    """The zero level as a closed, outward oriented mesh, and the share of its area that no view saw.

    Space beyond the grid is free. Solid parts that are thinner than 2 * thin + 1 voxels are left out: they lie between
    readings that contradict each other. floor, contact: the plane that the object stands on, and the height (metres)
    above it up to which its readings count as the plane's.
    """
    gap = np.float32(ZERO_GAP * grid.voxel)
    volume = without_thin_parts(volume, thin, grid.voxel)
    if floor is not None:
        plane = np.append(floor[:3], (floor[3] + floor[:3] @ grid.origin) / grid.voxel)
        volume = without_pockets(volume, measured, grid.voxel, plane, contact / grid.voxel + 1)
    padded = np.pad(volume, 1, constant_values=np.float32(grid.voxel))
    padded[np.abs(padded) < gap] = gap
    if not (padded < 0).any():
        raise InferenceFailed(NOTHING)
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="descent")
    vertices -= 1
    faces = faces[_seen_pieces(faces, _known(vertices, measured, np.logical_or))]
    if not len(faces):
        raise InferenceFailed(NOTHING)
    seen = _known(vertices, measured, np.logical_and) & ~on_jumps(vertices, volume, grid.voxel)
    vertices = continued(vertices, faces, volume, grid.voxel)
    if floor is not None:
        vertices = rested(vertices, faces, volume, ~seen, plane, contact / grid.voxel + 1)
    invented = _invented_share(vertices, faces, seen)
    return (vertices * grid.voxel + grid.origin).astype(np.float32), faces.astype(np.int32), invented


def _open_surface(
    volume: NDArray[np.float32], measured: NDArray[np.bool_], grid: VoxelGrid
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The zero level where all corners of a cube have been measured, as an open mesh."""
    if not (volume < 0).any() or not (volume > 0).any():
        raise InferenceFailed(NOTHING)
    vertices, faces, _, _ = marching_cubes(volume, 0.0, gradient_direction="descent")
    # beside what was measured, free space borders on unknown space: that is not a surface
    cubes = ndimage.minimum_filter(measured, size=2, origin=-1)
    inside = np.floor(vertices[faces].mean(axis=1)).astype(np.intp)
    vertices, faces = compact(vertices, faces[cubes[tuple(inside.T)]])
    if not len(faces):
        raise InferenceFailed(NOTHING)
    return (vertices * grid.voxel + grid.origin).astype(np.float32), faces.astype(np.int32)


def _known(
    vertices: NDArray[np.floating], measured: NDArray[np.bool_], either: Callable[..., NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    """True, (n,), for vertices (voxels) between two voxels that have both been measured, or one of them."""
    ends = [np.clip(end(vertices), 0, np.array(measured.shape) - 1).astype(np.intp) for end in (np.floor, np.ceil)]
    return np.asarray(either(*(measured[tuple(end.T)] for end in ends)))


def _seen_pieces(faces: NDArray[np.integer], known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True, (m,), for the faces of pieces that a view saw a part of: others are space that is in no picture."""
    piece = connected_pieces(faces, len(known))
    return np.asarray(np.bincount(piece, known[faces].any(axis=1))[piece] > 0)


def _invented_share(vertices: NDArray[np.floating], faces: NDArray[np.integer], seen: NDArray[np.bool_]) -> float:
    """Share of the area none of whose vertices (n, 3) is seen, (n,)."""
    area = np.linalg.norm(face_normals(vertices, faces), axis=1)
    return float(area[~seen[faces].any(axis=1)].sum() / area.sum())
