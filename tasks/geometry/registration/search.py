"""Search for the similarity from a generated mesh's canonical frame to the capture's: poses tried, refined, judged.

Three kinds of evidence count. The mesh has to touch the tangent planes of the masks' outlines; they fix scale and place
if the depth shows one side only. The depth readings have to lie on the mesh. The mesh must not fill space that a view
sees to be free. Colours only choose between poses that these cannot tell apart. tasks.inference.reconstruction calls
`register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.capture.views import View
from tasks.geometry.depth import DepthMap
from tasks.geometry.registration.evidence import Evidence, Readings, gathered
from tasks.geometry.registration.samples import MeshSamples, furthest_along, sampled, spread_directions

Floats = NDArray[np.float64]

# The search: turns about the vertical, then all rotations
AZIMUTHS = 36
ALL_UPS, ALL_AZIMUTHS = 64, 24
COARSE_POINTS = 600  # readings
COARSE_SAMPLES = 4000  # of the mesh; distances are taken to their tangent planes
PROBES = 800  # mesh samples that are looked for in free space
COARSE_STEPS, FINE_STEPS = 8, 20
FINALISTS = 4
COLOUR_TURNS = np.radians([5.0, 2.5, 1.2, 0.6])
REWEIGHTINGS = 4

# Tolerances: lengths are shares of the object's diagonal
OUTLINE_WEIGHT = 0.1  # of all tangents together, compared with all readings together
KERNEL_MEDIANS, KERNEL_FLOOR = 2.5, 0.003  # residuals of more medians than this count little
REACH = 0.06  # readings further from the mesh are not matched: to look further is slow and does not help
NEAREST_SLACK = 0.3  # a sample counts as the nearest if no other is nearer by more than this share
SETTLED, MAX_STEP = 1e-5, 0.3  # smaller steps end the iteration, larger ones are cut
# A change of the pose that the evidence determines worse than this, relative to the change that it determines best, is
# not made: for example a turn of a sphere. With colours the limit is higher, for colours then decide about such changes
RANK, COLOURED_RANK = 1e-5, 1e-3
TRUNCATION = 0.05  # larger distances count as this one
TIE, TIE_FLOOR = 1.3, 0.002  # colours decide between poses whose scores differ by less than this factor and share
# A pose is accepted if at least this share of the readings is near the mesh, and at most this share of the mesh is in
# free space
NEAR = 0.03
MIN_INLIERS, MAX_STRAY = 0.85, 0.08


@dataclass(frozen=True)
class Registration:
    """The place of a canonical mesh in the capture, and how well it fits there."""

    to_capture: Floats
    """(4, 4) similarity, canonical frame -> capture frame, metres"""
    residual_m: float
    """Root mean square of the distances between the mesh and the readings near it, metres"""
    inlier_share: float
    """Share of the depth readings that are near the mesh: within `NEAR` of its diagonal"""
    stray_share: float
    """Share of the mesh's samples, over all views, that lie deeper than that in space that the view sees to be free"""
    likeness: float | None = None
    """Correlation (-1..1) of the mesh's colours with those of the readings; None for a mesh without colours"""

    @property
    def scale(self) -> float:
        """Metres per canonical unit."""
        return float(np.cbrt(np.linalg.det(self.to_capture[:3, :3])))

    @property
    def accepted(self) -> bool:
        """True if the mesh is the captured object, in its place."""
        return self.inlier_share >= MIN_INLIERS and self.stray_share <= MAX_STRAY


@dataclass(frozen=True)
class PoseCandidate:
    """A pose of the mesh, judged."""

    pose: Floats
    """(4, 4) similarity, canonical frame -> capture frame"""
    score: float
    """Root mean square of truncated distances, metres: less is better"""
    likeness: float
    """Correlation (-1..1) of the colours; 0 for a mesh without colours"""


def register(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    views: Sequence[View],
    colours: NDArray[np.floating] | None = None,
) -> Registration | None:
    """Finds the similarity that takes a canonical z-up mesh to the capture that the views show.

    vertices (n, 3) of any unit, faces (m, 3), colours (n, 3) RGB 0..1 of the vertices. Views need a camera and a mask,
    some of them metric depth; None if there is no such view. Deterministic. Look at `accepted` before you use it.
    """
    evidence = gathered(views)
    if not len(evidence.readings.points) or not len(evidence.outlines.offsets):
        return None
    samples = sampled(vertices, faces, colours)
    turns = [_touching(rotation, samples, evidence)[0] for rotation in _azimuths(AZIMUTHS)]
    evidence = replace(evidence, unit=float(np.median([_scale(pose) for pose in turns])) * samples.diagonal)
    found = _measured(_best(turns, samples, evidence), samples, evidence)
    if found.accepted:
        return found
    anywhere = _measured(_best(_all_rotations(samples, evidence), samples, evidence), samples, evidence)
    return max(found, anywhere, key=lambda one: (one.accepted, one.inlier_share - one.stray_share))


def _azimuths(count: int) -> list[Floats]:
    return list(Rotation.from_euler("z", np.arange(count)[:, None] * (360 / count), degrees=True).as_matrix())


def _all_rotations(samples: MeshSamples, evidence: Evidence) -> list[Floats]:
    """Poses (4, 4) of those rotations, out of all, at which the mesh fits the outlines best."""
    tilts = [Rotation.align_vectors(up[None], [[0.0, 0.0, 1.0]])[0].as_matrix() for up in spread_directions(ALL_UPS)]
    poses = [_touching(tilt @ turn, samples, evidence) for tilt in tilts for turn in _azimuths(ALL_AZIMUTHS)]
    return [pose for pose, _ in sorted(poses, key=lambda one: one[1])[:AZIMUTHS]]


def _touching(rotation: Floats, samples: MeshSamples, evidence: Evidence) -> tuple[Floats, float]:
    """The pose (4, 4) of a given rotation at which the mesh touches all tangents, and the median error, metres.

    The turned mesh reaches h(n) along n; scale s and translation t solve s h(n) + n . t = offset, which is linear.
    Reweighting makes the solution robust.
    """
    tangents = evidence.tangents
    reach = furthest_along(tangents.normals @ rotation, samples.extremes)[1]
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


def _best(starts: Sequence[Floats], samples: MeshSamples, evidence: Evidence) -> Floats:
    """The best pose (4, 4) that a starting pose leads to; colours decide between poses that fit as well."""
    rank = RANK if samples.colours is None else COLOURED_RANK
    few, sketch = replace(evidence, readings=evidence.readings.thinned(COARSE_POINTS)), samples.thinned(COARSE_SAMPLES)
    rough = [_judged(_refined(pose, sketch, few, COARSE_STEPS, rank), sketch, few) for pose in starts]
    finalists = _ranked(rough, evidence.unit)[:FINALISTS]
    fine = [_refined(one.pose, samples, evidence, FINE_STEPS, rank) for one in finalists]
    best = _ranked([_judged(pose, samples, evidence) for pose in fine], evidence.unit)[0]
    if samples.colours is None:
        return best.pose
    return _refined(_turned_to_colours(best, samples, evidence), samples, evidence, FINE_STEPS, rank)


def _tied(candidates: Sequence[PoseCandidate], unit: float) -> list[PoseCandidate]:
    limit = TIE * min(one.score for one in candidates) + TIE_FLOOR * unit
    return [one for one in candidates if one.score <= limit]


def _ranked(candidates: Sequence[PoseCandidate], unit: float) -> list[PoseCandidate]:
    """Best first: by colours where the score is about the best, by the score otherwise."""
    tied = {id(one) for one in _tied(candidates, unit)}
    return sorted(candidates, key=lambda one: (id(one) not in tied, -one.likeness if id(one) in tied else 0, one.score))


def _refined(pose: Floats, samples: MeshSamples, evidence: Evidence, steps: int, rank: float) -> Floats:
    """Gauss-Newton on the readings' distances to the mesh's planes and the outlines' to its outermost points.

    Point to plane: Chen and Medioni, Object modelling by registration of multiple range images (1992).
    """
    for _ in range(steps):
        pose, moved = _step(pose, samples, evidence, rank)
        if moved < SETTLED:
            break
    return pose


def _step(pose: Floats, samples: MeshSamples, evidence: Evidence, rank: float) -> tuple[Floats, float]:
    """One step; returns the new pose and how far it moved, as a share of the object's size.

    Unknowns: rotation vector, translation and log scale about the object's middle, in units of half its diagonal.
    """
    readings, outlines, arm = evidence.readings, evidence.outlines, evidence.unit / 2
    found, gap = _match(pose, samples, readings)
    on_mesh, normals = _moved(pose, samples.points[found]), _turned(pose, samples.normals[found])
    usable = ((normals * readings.towards).sum(axis=1) > 0) & (gap < REACH * samples.diagonal * _scale(pose))
    miss = (normals * (readings.points - on_mesh)).sum(axis=1)
    weights = usable * _kernel(gap, KERNEL_FLOOR * evidence.unit) / len(gap)

    outermost = _moved(pose, samples.extremes)
    touching = outermost[furthest_along(outlines.normals, outermost)[0]]
    outline_miss = outlines.offsets - (outlines.normals * touching).sum(axis=1)
    outline_miss -= np.median(outline_miss).clip(-evidence.slack, evidence.slack)
    outline_weights = OUTLINE_WEIGHT * _kernel(np.abs(outline_miss), KERNEL_FLOOR * evidence.unit) / len(outline_miss)

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


def _match(pose: Floats, samples: MeshSamples, readings: Readings) -> tuple[NDArray[np.intp], Floats]:
    """Each reading's nearest mesh sample, and how far it is from the surface there, metres, at most `REACH`."""
    scale = _scale(pose)
    local = (readings.points - pose[:3, 3]) @ pose[:3, :3] / scale**2
    reach = REACH * samples.diagonal
    # an approximate search is enough: near points come out all but exact, and far points, which are slow, count little
    distance, found = samples.tree.query(local, eps=NEAREST_SLACK, distance_upper_bound=reach)
    # a reading without a sample in reach got the number after the last
    found = np.minimum(found, len(samples.points) - 1)
    height = np.abs(((local - samples.points[found]) * samples.normals[found]).sum(axis=1))
    # a reading that is beside its sample by no more than the spacing lies over the surface
    beside = np.sqrt(np.maximum(np.minimum(distance, reach) ** 2 - height**2, 0))
    gap = np.where(np.isfinite(distance), np.hypot(height, np.maximum(beside - samples.spacing, 0)), reach)
    return found, scale * gap


def _judged(pose: Floats, samples: MeshSamples, evidence: Evidence) -> PoseCandidate:
    found, gap = _match(pose, samples, evidence.readings)
    stray = _stray(pose, samples, evidence)
    limit = TRUNCATION * evidence.unit
    score = np.sqrt(np.square(np.minimum(gap, limit)).mean() + np.square(np.minimum(stray, limit)).mean())
    return PoseCandidate(pose, float(score), _likeness(found, samples, evidence))


def _likeness(found: NDArray[np.intp], samples: MeshSamples, evidence: Evidence) -> float:
    """Correlation of the readings' colours with those of the mesh samples that they were matched to."""
    if samples.colours is None:
        return 0.0
    seen = evidence.readings.colours - evidence.readings.colours.mean(axis=0)
    painted = samples.colours[found] - samples.colours[found].mean(axis=0)
    return float((seen * painted).sum() / max(np.linalg.norm(seen) * np.linalg.norm(painted), np.finfo(float).tiny))


def _stray(pose: Floats, samples: MeshSamples, evidence: Evidence) -> Floats:
    """How far mesh samples are inside the space that a view sees to be free, metres, for all that lie in its image."""
    points = _moved(pose, samples.points[:PROBES])
    stray = np.concatenate([_stray_in(depth_map, points) for depth_map in evidence.maps])
    return stray if len(stray) else np.array([np.inf])


def _stray_in(depth_map: DepthMap, points: Floats) -> Floats:
    """`_stray` in one view: the distance before a reading, or beside the mask; 0 in the mask without a reading."""
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


def _turned_to_colours(start: PoseCandidate, samples: MeshSamples, evidence: Evidence) -> Floats:
    """Turns the mesh about its middle until its colours agree best, as far as the geometry fits as well."""
    limit = TIE * start.score + TIE_FLOOR * evidence.unit
    best = start
    for angle in COLOUR_TURNS:
        for turn in np.concatenate([np.eye(3), -np.eye(3)]) * angle:
            while True:
                middle = _moved(best.pose, samples.extremes).mean(axis=0)
                pose = _increment(np.concatenate([turn, np.zeros(4)]), middle, 1.0) @ best.pose
                other = _judged(pose, samples, evidence)
                if other.likeness <= best.likeness or other.score > limit:
                    break
                best = other
    return best.pose


def _measured(pose: Floats, samples: MeshSamples, evidence: Evidence) -> Registration:
    found, gap = _match(pose, samples, evidence.readings)
    near = NEAR * samples.diagonal * _scale(pose)
    inliers = gap[gap <= near]
    return Registration(
        to_capture=pose,
        residual_m=float(np.sqrt(np.square(inliers).mean())) if len(inliers) else near,
        inlier_share=float((gap <= near).mean()),
        stray_share=float((_stray(pose, samples, evidence) > near).mean()),
        likeness=None if samples.colours is None else _likeness(found, samples, evidence),
    )


def _moved(pose: Floats, points: Floats) -> Floats:
    return points @ pose[:3, :3].T + pose[:3, 3]


def _turned(pose: Floats, normals: Floats) -> Floats:
    return normals @ pose[:3, :3].T / _scale(pose)


def _scale(pose: Floats) -> float:
    return float(np.cbrt(np.linalg.det(pose[:3, :3])))
