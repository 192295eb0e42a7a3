"""Where an object of unknown pose and scale lies in a capture: canonical frame of a generated mesh -> capture frame.

Three kinds of evidence: the outlines of the masks, whose tangent planes the mesh has to touch (they hold scale and
place where the depth shows one side only); the depth readings, which have to lie on the mesh; and the space that the
views see to be free, which the mesh must not fill. Colours only choose between poses that these cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from tasks.capture.views import View
from tasks.geometry.depth import DepthMap, cut_out, without_outliers

Floats = NDArray[np.float64]

# What is looked at
MAX_VIEWS = 32
MAP_PX = 192  # depth maps are thinned to this size: for matching, not for fusing
OUTLIER_DISTANCE = 0.03  # readings this far (in sizes of the object) from the median of their neighbours are left out
FRONT_QUANTILE = 0.02  # of a view's readings lie before what counts as the object's front
OUTLINE_DIRECTIONS = 16  # tangents of a mask's outline
EXTREME_DIRECTIONS = 512  # in which the mesh's outermost vertices are known
COARSE_POINTS, FINE_POINTS = 600, 4000  # readings
COARSE_SAMPLES, FINE_SAMPLES = 4000, 30_000  # of the mesh; distances are taken to their tangent planes
SPACINGS = 2.0  # hardly a place on the mesh is further than this many mean spacings from a sample
PROBES = 800  # mesh samples that are looked for in free space

# The search: turns about the vertical, then all rotations
AZIMUTHS = 36
ALL_UPS, ALL_AZIMUTHS = 64, 24
COARSE_STEPS, FINE_STEPS = 8, 20
FINALISTS = 4
COLOUR_TURNS = np.radians([5.0, 2.5, 1.2, 0.6])
REWEIGHTINGS = 4

# Tolerances: lengths are shares of the object's diagonal
FRONT_WEIGHT = 0.3  # of a front plane against a tangent plane
OUTLINE_WEIGHT = 0.1  # of all tangents together against all readings together
OUTLINE_SLACK = 2.0  # pixels of the depth maps, by which masks that were made of depth are dilated
KERNEL_MEDIANS, KERNEL_FLOOR = 2.5, 0.003  # residuals of more than so many medians count little
REACH = 0.06  # readings further from the mesh are not matched: the search for more is slow and does not help
NEAREST_SLACK = 0.3  # the nearest sample may be by so much further than the nearest there is
SETTLED, MAX_STEP = 1e-5, 0.3  # smaller steps end the iteration, larger ones are cut
# What is so much weaker determined than the rest is left as it is: a sphere's rotation. With colours, which settle it
# better, that is more
RANK, COLOURED_RANK = 1e-5, 1e-3
TRUNCATION = 0.05  # further off is just wrong
TIE, TIE_FLOOR = 1.3, 0.002  # poses whose scores differ by less are told apart by colour
# A pose is accepted if so much of the cloud is near the mesh, and no more than so much of the mesh is in free space
NEAR = 0.03
MIN_INLIERS, MAX_STRAY = 0.85, 0.08

# Products of matrices this small start no threads in OpenBLAS, whose overhead is many times the work
CHUNK_POINTS, CHUNK_DIRECTIONS = 1024, 64


@dataclass(frozen=True)
class Registration:
    """Where a canonical mesh lies in the capture.

    to_capture: (4, 4) similarity, canonical -> capture, metres. inlier_share: of the depth readings, those near the
    mesh, within `NEAR` of its diagonal. residual_m: root mean square of their distance to the mesh. stray_share: of the
    mesh's samples, once per view, those further than that in what the view sees as free space. likeness: correlation
    (-1..1) of the mesh's colours with those of the readings; None for a mesh without.
    """

    to_capture: Floats
    residual_m: float
    inlier_share: float
    stray_share: float
    likeness: float | None = None

    @property
    def scale(self) -> float:
        """Metres per canonical unit."""
        return float(np.cbrt(np.linalg.det(self.to_capture[:3, :3])))

    @property
    def accepted(self) -> bool:
        """Whether the mesh is the captured object, in place."""
        return self.inlier_share >= MIN_INLIERS and self.stray_share <= MAX_STRAY


@dataclass(frozen=True)
class Cloud:
    """Depth readings in the capture frame: points (k, 3) metres, colours (k, 3) in 0..1, towards (k, 3) the camera."""

    points: Floats
    colours: Floats
    towards: Floats

    def thinned(self, limit: int) -> Cloud:
        """At most `limit` of them, evenly."""
        kept = _evenly(len(self.points), limit)
        return Cloud(self.points[kept], self.colours[kept], self.towards[kept])


@dataclass(frozen=True)
class Tangents:
    """Planes normals . x = offsets (k,) that the object touches from below; normals (k, 3) outward, weights (k,)."""

    normals: Floats
    offsets: Floats
    weights: Floats


@dataclass(frozen=True)
class Surface:
    """A mesh for matching, canonical frame: evenly spread samples with unit normals and colours (n, 3), their tree,
    how far apart they are at most, and the outermost vertices (e, 3)."""

    points: Floats
    normals: Floats
    colours: Floats | None
    tree: cKDTree
    spacing: float
    extremes: Floats

    @property
    def diagonal(self) -> float:
        return float(np.linalg.norm(np.ptp(self.extremes, axis=0)))

    def thinned(self, limit: int) -> Surface:
        """With the first samples only: they are in no order."""
        points = self.points[:limit]
        colours = None if self.colours is None else self.colours[:limit]
        spacing = self.spacing * float(np.sqrt(len(self.points) / len(points)))
        return Surface(points, self.normals[:limit], colours, cKDTree(points), spacing, self.extremes)


@dataclass(frozen=True)
class Scene:
    """What the views know.

    slack: by how much all outlines may be too wide or too narrow, metres. unit: the object's diagonal, metres, to
    within some percent.
    """

    maps: list[DepthMap]
    cloud: Cloud
    outlines: Tangents
    fronts: Tangents
    slack: float
    unit: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A pose (4, 4) with its score: root mean square of truncated distances, metres; and its likeness in colour."""

    pose: Floats
    score: float
    likeness: float


def register(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    views: Sequence[View],
    colours: NDArray[np.floating] | None = None,
) -> Registration | None:
    """Finds the similarity that takes a canonical z-up mesh to the capture that the views are of.

    vertices (n, 3) of any unit, faces (m, 3), colours (n, 3) RGB 0..1 of the vertices. Views need a camera and a mask,
    some of them metric depth; without any the answer is None. Deterministic. Look at `accepted` before you use it.
    """
    scene = _scene(views)
    if not len(scene.cloud.points) or not len(scene.outlines.offsets):
        return None
    surface = _surface(vertices, faces, colours)
    turns = [_touching(rotation, surface, scene)[0] for rotation in _azimuths(AZIMUTHS)]
    scene = replace(scene, unit=float(np.median([_scale(pose) for pose in turns])) * surface.diagonal)
    found = _measured(_best(turns, surface, scene), surface, scene)
    if found.accepted:
        return found
    anywhere = _measured(_best(_all_rotations(surface, scene), surface, scene), surface, scene)
    return max(found, anywhere, key=lambda one: (one.accepted, one.inlier_share - one.stray_share))


def _scene(views: Sequence[View]) -> Scene:
    views = [view for view in views if view.camera is not None and view.mask.any()]
    views = [views[index] for index in _evenly(len(views), MAX_VIEWS)]
    maps, images = _thinned_maps(views)
    outlines = _stacked(_outline(view) for view in views)
    fronts = _stacked(_front(depth_map) for depth_map in maps if depth_map.depth.any())
    return Scene(maps, _cloud(maps, images).thinned(FINE_POINTS), outlines, fronts, _slack(views))


def _slack(views: Sequence[View]) -> float:
    """`OUTLINE_SLACK` in metres at the object."""
    footprints = [0.0]
    for view in views:
        if view.camera is not None and view.depth is not None and view.depth.any():
            height, width = view.depth.shape
            footprints.append(float(np.median(view.depth[view.depth > 0])) / view.camera.resized(width, height).fl_x)
    return OUTLINE_SLACK * float(np.median(footprints[1:] or footprints))


def _thinned_maps(views: Sequence[View]) -> tuple[list[DepthMap], list[NDArray[np.uint8]]]:
    """The object in each view's depth map, of `MAP_PX` at most, without outliers; and its colours, of the same size."""
    maps, images = [], []
    for view in views:
        if view.camera is None or not (thin := _thinned(view)).mask.any():
            continue
        depth_map = cut_out(thin)
        assert depth_map is not None
        rows, columns = np.nonzero(thin.mask)
        extent = max(np.ptp(rows), np.ptp(columns)) * depth_map.footprint
        depth = without_outliers(depth_map.depth, OUTLIER_DISTANCE * extent) if extent else depth_map.depth
        maps.append(replace(depth_map, depth=depth))
        (top, left), (height, width) = depth_map.corner, depth.shape
        images.append(thin.image[top : top + height, left : left + width])
    return maps, images


def _thinned(view: View) -> View:
    """Every k-th pixel of a view's depth map (of its mask where it has none), its mask and image, and their camera."""
    assert view.camera is not None
    height, width = (view.mask if view.depth is None else view.depth).shape
    step = -(-max(height, width) // MAP_PX)
    first = min((step - 1) // 2, height - 1, width - 1)
    rows, columns = np.arange(first, height, step), np.arange(first, width, step)

    def nearest(image: NDArray[Any]) -> NDArray[Any]:
        y = ((rows + 0.5) * image.shape[0] / height).astype(int)
        x = ((columns + 0.5) * image.shape[1] / width).astype(int)
        return image[y[:, None], x]

    camera = view.camera.resized(width, height)
    camera = replace(
        camera,
        width=len(columns),
        height=len(rows),
        fl_x=camera.fl_x / step,
        fl_y=camera.fl_y / step,
        cx=(camera.cx - first - 0.5) / step + 0.5,
        cy=(camera.cy - first - 0.5) / step + 0.5,
    )
    depth = np.zeros((len(rows), len(columns)), np.float32) if view.depth is None else nearest(view.depth)
    return View(view.name, nearest(view.image), nearest(view.mask), depth, camera)


def _cloud(maps: Sequence[DepthMap], images: Sequence[NDArray[np.uint8]]) -> Cloud:
    """All readings of the depth maps, each view's evenly thinned to what `FINE_POINTS` need."""
    parts = [np.empty((0, 9))]
    for depth_map, image in zip(maps, images, strict=True):
        rows, columns = np.nonzero(depth_map.depth)
        kept = _evenly(len(rows), FINE_POINTS)
        rows, columns = rows[kept], columns[kept]
        top, left = depth_map.corner
        rays = depth_map.camera.directions(np.column_stack([columns + left, rows + top]) + 0.5)
        points = depth_map.camera.centre + depth_map.depth[rows, columns, None] * rays
        towards = -rays / np.linalg.norm(rays, axis=1, keepdims=True)
        parts.append(np.column_stack([points, image[rows, columns] / 255, towards]))
    table = np.concatenate(parts)
    return Cloud(table[:, :3], table[:, 3:6], table[:, 6:])


def _outline(view: View) -> Tangents:
    """Planes through the camera along the mask's outline; sides on which the image cuts it off give none."""
    camera, mask = view.camera, view.mask
    assert camera is not None
    rows = np.flatnonzero(mask.any(axis=1))
    ends = np.concatenate([mask[rows].argmax(axis=1), mask.shape[1] - 1 - mask[rows, ::-1].argmax(axis=1)])
    pixels = np.column_stack([ends, np.tile(rows, 2)])
    last = np.array(mask.shape[::-1]) - 1
    cut_off = ((pixels == 0) | (pixels == last)).any(axis=1)

    right, up, back = camera.camera_to_world[:3, :3].T
    rays = camera.directions(pixels + 0.5)
    angles = np.arange(OUTLINE_DIRECTIONS) * (2 * np.pi / OUTLINE_DIRECTIONS)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    heights = directions @ np.stack([rays @ right, rays @ up])
    furthest = heights.argmax(axis=1)
    # the object ends half a pixel beyond the centre of its last pixel
    height = heights.max(axis=1) + 0.5 / camera.fl_x
    normals = directions @ np.stack([right, up]) + height[:, None] * back
    normals = (normals / np.linalg.norm(normals, axis=1, keepdims=True))[~cut_off[furthest]]
    return Tangents(normals, normals @ camera.centre, np.ones(len(normals)))


def _front(depth_map: DepthMap) -> Tangents:
    """The plane across the camera's axis at which the object begins."""
    back, camera = depth_map.camera.camera_to_world[:3, 2], depth_map.camera
    nearest = np.quantile(depth_map.depth[depth_map.depth > 0], FRONT_QUANTILE)
    return Tangents(back[None], np.array([back @ camera.centre - nearest]), np.array([FRONT_WEIGHT]))


def _stacked(tangents: Iterable[Tangents]) -> Tangents:
    parts = [Tangents(np.empty((0, 3)), np.empty(0), np.empty(0)), *tangents]
    return Tangents(
        np.concatenate([part.normals for part in parts]),
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.weights for part in parts]),
    )


def _surface(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], colours: NDArray[np.floating] | None
) -> Surface:
    """Samples spread over the mesh by area (stratified, in random order), with normals that face outwards."""
    corners = vertices.astype(np.float64)[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    doubled = np.linalg.norm(normals, axis=1)
    reach = doubled.cumsum()
    rng = np.random.default_rng(0)
    at = (rng.permutation(FINE_SAMPLES) + rng.random(FINE_SAMPLES)) / FINE_SAMPLES
    face = np.searchsorted(reach, at * reach[-1]).clip(max=len(faces) - 1)
    u, v = rng.random((2, FINE_SAMPLES))
    root = np.sqrt(u)
    weights = np.column_stack([1 - root, root * (1 - v), root * v])
    points = np.einsum("nc,ncd->nd", weights, corners[face])
    painted = None
    if colours is not None:
        painted = np.einsum("nc,ncd->nd", weights, colours.astype(np.float64)[faces[face]])
    outward = 1.0 if np.einsum("nd,nd->", corners.mean(axis=1), normals) >= 0 else -1.0
    unit = outward * normals[face] / np.maximum(doubled[face], np.finfo(float).tiny)[:, None]
    spacing = SPACINGS * float(np.sqrt(reach[-1] / 2 / FINE_SAMPLES))
    return Surface(points, unit, painted, cKDTree(points), spacing, _extremes(vertices))


def _extremes(vertices: NDArray[np.floating]) -> Floats:
    """The outermost vertices, (e, 3): those furthest in one of many directions."""
    furthest = _furthest(_sphere(EXTREME_DIRECTIONS).astype(np.float32), vertices.astype(np.float32))[0]
    return np.asarray(vertices[np.unique(furthest)], np.float64)


def _furthest(
    directions: NDArray[np.floating], points: NDArray[np.floating]
) -> tuple[NDArray[np.intp], NDArray[np.floating]]:
    """Index of the point (n, 3) that is furthest along each direction (k, 3), and how far that is, (k,) each."""
    index, reach = np.zeros(len(directions), np.intp), np.full(len(directions), -np.inf, points.dtype)
    for start in range(0, len(points), CHUNK_POINTS):
        some = points[start : start + CHUNK_POINTS]
        for first in range(0, len(directions), CHUNK_DIRECTIONS):
            chunk = slice(first, first + CHUNK_DIRECTIONS)
            heights = directions[chunk] @ some.T
            best = heights.argmax(axis=1)
            highest = heights[np.arange(len(best)), best]
            index[chunk] = np.where(highest > reach[chunk], start + best, index[chunk])
            reach[chunk] = np.maximum(reach[chunk], highest)
    return index, reach


def _sphere(count: int) -> Floats:
    """Evenly spread unit vectors (count, 3): a Fibonacci lattice."""
    index = np.arange(count)
    z = 1 - (2 * index + 1) / count
    angle = index * np.pi * (3 - np.sqrt(5))
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z])


def _azimuths(count: int) -> list[Floats]:
    return list(Rotation.from_euler("z", np.arange(count)[:, None] * (360 / count), degrees=True).as_matrix())


def _all_rotations(surface: Surface, scene: Scene) -> list[Floats]:
    """Poses (4, 4) of the rotations, of all there are, under which the mesh fits the outlines best."""
    tilts = [Rotation.align_vectors(up[None], [[0.0, 0.0, 1.0]])[0].as_matrix() for up in _sphere(ALL_UPS)]
    poses = [_touching(tilt @ turn, surface, scene) for tilt in tilts for turn in _azimuths(ALL_AZIMUTHS)]
    return [pose for pose, _ in sorted(poses, key=lambda one: one[1])[:AZIMUTHS]]


def _touching(rotation: Floats, surface: Surface, scene: Scene) -> tuple[Floats, float]:
    """The pose (4, 4) of a given rotation at which the mesh touches all tangents, and how far it is off, metres.

    With h(n) how far the turned mesh reaches along n, scale s and translation t solve s h(n) + n . t = offset, which is
    linear; robust by reweighting.
    """
    tangents = _stacked([scene.outlines, scene.fronts])
    reach = _furthest(tangents.normals @ rotation, surface.extremes)[1]
    system = np.column_stack([reach, tangents.normals])
    weights = tangents.weights
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weights)
        solution = np.linalg.lstsq(system * root[:, None], tangents.offsets * root)[0]
        miss = np.abs(system @ solution - tangents.offsets)
        weights = tangents.weights * _kernel(miss, 0.0)
    pose = np.eye(4)
    pose[:3, :3] = max(solution[0], np.finfo(float).eps) * rotation
    pose[:3, 3] = solution[1:]
    return pose, float(np.median(miss))


def _best(starts: Sequence[Floats], surface: Surface, scene: Scene) -> Floats:
    """The pose (4, 4) that the starting poses lead to and that fits best; of equal ones that of the likest colours."""
    rank = RANK if surface.colours is None else COLOURED_RANK
    few, sketch = replace(scene, cloud=scene.cloud.thinned(COARSE_POINTS)), surface.thinned(COARSE_SAMPLES)
    rough = [_judged(_refined(pose, sketch, few, COARSE_STEPS, rank), sketch, few) for pose in starts]
    fine = [_refined(one.pose, surface, scene, FINE_STEPS, rank) for one in _ranked(rough, scene.unit)[:FINALISTS]]
    best = _ranked([_judged(pose, surface, scene) for pose in fine], scene.unit)[0]
    if surface.colours is None:
        return best.pose
    return _refined(_turned_to_colours(best, surface, scene), surface, scene, FINE_STEPS, rank)


def _tied(candidates: Sequence[Candidate], unit: float) -> list[Candidate]:
    limit = TIE * min(one.score for one in candidates) + TIE_FLOOR * unit
    return [one for one in candidates if one.score <= limit]


def _ranked(candidates: Sequence[Candidate], unit: float) -> list[Candidate]:
    """Best first: by colours where the score is about the best, by the score otherwise."""
    tied = {id(one) for one in _tied(candidates, unit)}
    return sorted(candidates, key=lambda one: (id(one) not in tied, -one.likeness if id(one) in tied else 0, one.score))


def _refined(pose: Floats, surface: Surface, scene: Scene, steps: int, rank: float) -> Floats:
    """Gauss-Newton on the readings' distances to the mesh's planes and the outlines' to its outermost points.

    Point to plane: Chen and Medioni, Object modelling by registration of multiple range images (1992).
    """
    for _ in range(steps):
        pose, moved = _step(pose, surface, scene, rank)
        if moved < SETTLED:
            break
    return pose


def _step(pose: Floats, surface: Surface, scene: Scene, rank: float) -> tuple[Floats, float]:
    """One step; returns the new pose and how far it moved, as a share of the object's size.

    Unknowns: rotation vector, translation and log scale about the object's middle, in units of half its diagonal.
    """
    cloud, outlines, arm = scene.cloud, scene.outlines, scene.unit / 2
    found, gap = _match(pose, surface, cloud)
    on_mesh, normals = _moved(pose, surface.points[found]), _turned(pose, surface.normals[found])
    usable = ((normals * cloud.towards).sum(axis=1) > 0) & (gap < REACH * surface.diagonal * _scale(pose))
    miss = (normals * (cloud.points - on_mesh)).sum(axis=1)
    weights = usable * _kernel(gap, KERNEL_FLOOR * scene.unit) / len(gap)

    outermost = _moved(pose, surface.extremes)
    touching = outermost[_furthest(outlines.normals, outermost)[0]]
    outline_miss = outlines.offsets - (outlines.normals * touching).sum(axis=1)
    outline_miss -= np.median(outline_miss).clip(-scene.slack, scene.slack)
    outline_weights = OUTLINE_WEIGHT * _kernel(np.abs(outline_miss), KERNEL_FLOOR * scene.unit) / len(outline_miss)

    middle = outermost.mean(axis=0)
    n = np.concatenate([normals, outlines.normals])
    lever = (np.concatenate([on_mesh, touching]) - middle) / arm
    jacobian = np.column_stack([np.cross(lever, n), n, (lever * n).sum(axis=1)])
    weighted = jacobian * np.concatenate([weights, outline_weights])[:, None]
    residual = np.concatenate([miss, outline_miss]) / arm
    change = np.linalg.lstsq(weighted.T @ jacobian, weighted.T @ residual, rcond=rank)[0].clip(-MAX_STEP, MAX_STEP)
    return _increment(change, middle, arm) @ pose, float(np.abs(change).max())


def _increment(change: Floats, middle: Floats, arm: float) -> Floats:
    """The similarity (4, 4) of a rotation vector, a translation in units of `arm`, and a log scale, about `middle`."""
    increment = np.eye(4)
    increment[:3, :3] = np.exp(change[6]) * Rotation.from_rotvec(change[:3]).as_matrix()
    increment[:3, 3] = middle + arm * change[3:6] - increment[:3, :3] @ middle
    return increment


def _kernel(miss: Floats, floor: float) -> Floats:
    """Weights (n,) of Geman and McClure for distances (n,): small beyond some medians of them."""
    width = max(KERNEL_MEDIANS * float(np.median(miss)), floor, np.finfo(float).tiny)
    return 1 / (1 + (miss / width) ** 2) ** 2


def _match(pose: Floats, surface: Surface, cloud: Cloud) -> tuple[NDArray[np.intp], Floats]:
    """Each reading's nearest mesh sample, and how far it is from the surface there, metres, at most `REACH`."""
    scale = _scale(pose)
    local = (cloud.points - pose[:3, 3]) @ pose[:3, :3] / scale**2
    reach = REACH * surface.diagonal
    # near enough: what is close by is all but exact, and far points, which are slow, count little
    distance, found = surface.tree.query(local, eps=NEAREST_SLACK, distance_upper_bound=reach)
    found = np.minimum(found, len(surface.points) - 1)  # what has none within reach is given the number after the last
    height = np.abs(((local - surface.points[found]) * surface.normals[found]).sum(axis=1))
    # what lies beside a sample by no more than their spacing lies over the surface
    beside = np.sqrt(np.maximum(np.minimum(distance, reach) ** 2 - height**2, 0))
    gap = np.where(np.isfinite(distance), np.hypot(height, np.maximum(beside - surface.spacing, 0)), reach)
    return found, scale * gap


def _judged(pose: Floats, surface: Surface, scene: Scene) -> Candidate:
    found, gap = _match(pose, surface, scene.cloud)
    stray = _stray(pose, surface, scene)
    limit = TRUNCATION * scene.unit
    score = np.sqrt(np.square(np.minimum(gap, limit)).mean() + np.square(np.minimum(stray, limit)).mean())
    return Candidate(pose, float(score), _likeness(found, surface, scene))


def _likeness(found: NDArray[np.intp], surface: Surface, scene: Scene) -> float:
    """Correlation of the readings' colours with those of the mesh samples that they were matched to."""
    if surface.colours is None:
        return 0.0
    seen = scene.cloud.colours - scene.cloud.colours.mean(axis=0)
    painted = surface.colours[found] - surface.colours[found].mean(axis=0)
    return float((seen * painted).sum() / max(np.linalg.norm(seen) * np.linalg.norm(painted), np.finfo(float).tiny))


def _stray(pose: Floats, surface: Surface, scene: Scene) -> Floats:
    """How far mesh samples are inside the space that a view sees to be free, metres, for all that lie in its image."""
    points = _moved(pose, surface.points[:PROBES])
    stray = np.concatenate([_stray_in(depth_map, points) for depth_map in scene.maps])
    return stray if len(stray) else np.array([np.inf])


def _stray_in(depth_map: DepthMap, points: Floats) -> Floats:
    """The same in one view: how far before a reading, or beside the mask; in the mask without a reading it is 0."""
    pixels, depth = depth_map.camera.project(points)
    inside = (depth > 0) & (pixels >= 0).all(axis=1)
    inside &= (pixels < [depth_map.camera.width, depth_map.camera.height]).all(axis=1)
    pixels, depth = pixels[inside], depth[inside]
    column, row = (pixels - depth_map.corner[::-1]).astype(int).T
    height, width = depth_map.depth.shape
    row, column = row.clip(0, height - 1), column.clip(0, width - 1)  # the map's margin is far outside of the object
    reading = depth_map.depth[row, column]
    beside = depth_map.silhouette[row, column] * depth / depth_map.camera.fl_x
    return np.maximum(np.where(reading > 0, reading - depth, beside), 0)


def _turned_to_colours(start: Candidate, surface: Surface, scene: Scene) -> Floats:
    """Turns the mesh about its middle to where colours agree best, as far as the geometry leaves that open."""
    limit = TIE * start.score + TIE_FLOOR * scene.unit
    best = start
    for angle in COLOUR_TURNS:
        for turn in np.concatenate([np.eye(3), -np.eye(3)]) * angle:
            while True:
                middle = _moved(best.pose, surface.extremes).mean(axis=0)
                pose = _increment(np.concatenate([turn, np.zeros(4)]), middle, 1.0) @ best.pose
                other = _judged(pose, surface, scene)
                if other.likeness <= best.likeness or other.score > limit:
                    break
                best = other
    return best.pose


def _measured(pose: Floats, surface: Surface, scene: Scene) -> Registration:
    found, gap = _match(pose, surface, scene.cloud)
    near = NEAR * surface.diagonal * _scale(pose)
    inliers = gap[gap <= near]
    return Registration(
        to_capture=pose,
        residual_m=float(np.sqrt(np.square(inliers).mean())) if len(inliers) else near,
        inlier_share=float((gap <= near).mean()),
        stray_share=float((_stray(pose, surface, scene) > near).mean()),
        likeness=None if surface.colours is None else _likeness(found, surface, scene),
    )


def _evenly(count: int, limit: int) -> NDArray[np.intp]:
    """Indices of at most `limit` of `count` things, evenly spread."""
    return np.linspace(0, count, min(count, limit), endpoint=False).astype(np.intp)


def _moved(pose: Floats, points: Floats) -> Floats:
    return points @ pose[:3, :3].T + pose[:3, 3]


def _turned(pose: Floats, normals: Floats) -> Floats:
    return normals @ pose[:3, :3].T / _scale(pose)


def _scale(pose: Floats) -> float:
    return float(np.cbrt(np.linalg.det(pose[:3, :3])))
