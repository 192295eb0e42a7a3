"""Joint refinement of all cameras of a capture, by its depth, colours and silhouettes. Finding and refining call it.

Gauss-Newton over the poses and, on request, one factor of the focal length. A reading of one view, moved into another,
has to lie on the surface, have the colour, and stay within the silhouette that are seen there: projective
point-to-plane (Chen and Medioni, Object modelling by registration of multiple range images, 1992) with a colour term
(Park, Zhou and Koltun, Colored point cloud registration revisited, ICCV 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import compare, inverse
from tasks.cameras.surface_views import SurfaceView, lifted, object_size, zoomed_normals

Floats = NDArray[np.float64]
Pair = tuple[int, int]

# Distance between a reading and a surface that is taken for its own: share of the object at first and at last
FIRST_GATE = 0.03
LAST_GATE = 0.006
GATE_SIGMAS, GATE_FOOTPRINTS = 4.0, 3.0  # and never less than this
COARSE_GATES = 1.5  # in last gates: beyond, blurred colours are compared
SAME_SIDE = 0.6  # cosine between the normals of one surface in two views
# A plane's standard deviation: its window averages noise, and a surface bends within a pixel
PLANE_SIGMAS, PLANE_FOOTPRINTS = 0.5, 0.25
FLATTEST = 0.05  # least weight by the cosine of the viewing angle
COLOUR_SIGMA = 8.0  # sRGB levels that a point differs between views: light, exposure, resampling
OUTLINE_SIGMA_PX, OUTLINE_SCALE_PX = 1.8, 4.0
OUTLINE_FROM_PX, OUTLINE_TO_PX = 0.7, 12.0  # outside the silhouette
ROBUST, ROBUST_LEAST = 1.5, 2.5  # scale of the weights: in spreads of the residuals, at least in sigmas
SPREAD = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
LARGEST_TURN = np.radians(6.0)  # of a step: beyond, the surfaces are others
LARGEST_ZOOM = 0.08
SETTLED = 2e-5  # radians
DAMPING = 1e-6
FIXED = 1e14
LEAST_OVERLAP = 0.08  # share of a view's readings that a neighbour confirms
NEIGHBOURS = 24  # by their directions; overlap is measured with these alone
KEPT_NEIGHBOURS = 12  # of them, in the equations


@dataclass(frozen=True, eq=False)
class Refined:
    """Cameras after a refinement."""

    poses: Floats
    """(n, 4, 4) camera-to-world in pinhole axes, metres"""
    zoom: float
    """Factor of the focal length"""
    information: Floats
    """(6 n + 1, 6 n + 1) normal equations at the result, in inverse variances: turn and shift of each camera in its own
    axes (radians, metres), and the logarithm of the zoom; nothing is held fixed in them"""
    residual_m: float
    """Median distance of a reading from another view's surface, metres"""
    pairs: tuple[Pair, ...]
    """Ordered pairs of views whose readings were compared"""


def refine(
    surfaces: Sequence[SurfaceView],
    poses: Floats,
    zoom: float = 1.0,
    *,
    free_focal: bool = False,
    fixed: Sequence[int] = (),
    pairs: Sequence[Pair] | None = None,
    iterations: int = 14,
    readings: int = 1000,
    gates: tuple[float, float] = (FIRST_GATE, LAST_GATE),
) -> Refined:
    """Move cameras until views agree.

    poses: (n, 4, 4) camera-to-world in pinhole axes, near the truth. fixed: views that stay; the first one without
    any. pairs: ordered pairs that are compared; those that overlap if not given. gates: first and last distance
    between a reading and its surface, in sizes of the object.
    """
    poses, count = np.array(poses, np.float64), len(poses)
    held, size = set(fixed or (0,)), object_size(surfaces, zoom)
    floor = max(
        GATE_SIGMAS * float(np.median([surface.noise for surface in surfaces])),
        GATE_FOOTPRINTS * float(np.median([surface.footprint for surface in surfaces])),
    )
    first, last = max(gates[0] * size, floor), max(gates[1] * size, floor)
    compared: Sequence[Pair] = pairs or ()
    information, residuals = np.zeros((6 * count + 1, 6 * count + 1)), np.zeros(0)
    for iteration in range(iterations):
        gate = max(last, first * (last / first) ** (iteration / max(1, 0.6 * iterations)))
        if pairs is None and iteration % 5 == 0:
            compared = overlapping(surfaces, poses, zoom)
        level = int(gate > COARSE_GATES * last)
        information, gradient, residuals = _equations(
            surfaces, poses, zoom, compared, gate, readings, level, free_focal
        )
        damped = information + np.diag(DAMPING * np.diag(information) + 1e-9)
        for view in held:
            part = np.s_[6 * view : 6 * view + 6]
            damped[part, part] += FIXED * np.eye(6)
        if not free_focal:
            damped[-1, -1] += FIXED
        step = -np.linalg.solve(damped, gradient)
        turns = step[:-1].reshape(count, 6)
        largest = np.linalg.norm(turns[:, :3], axis=1)
        turns = turns * np.minimum(1, LARGEST_TURN / np.maximum(largest, 1e-12))[:, None]
        poses = poses @ motions(turns)
        if free_focal:
            zoom *= float(np.exp(np.clip(step[-1], -LARGEST_ZOOM, LARGEST_ZOOM)))
        if largest.max() < SETTLED and gate <= 1.01 * last:
            break
    residual = float(np.median(np.abs(residuals))) if len(residuals) else float("nan")
    return Refined(poses, zoom, information, residual, tuple(compared))


def motions(steps: Floats) -> Floats:
    """Rigid motions (n, 4, 4) of turns (radians) and shifts (metres), (n, 6)."""
    moved = np.tile(np.eye(4), (len(steps), 1, 1))
    moved[:, :3, :3] = Rotation.from_rotvec(steps[:, :3]).as_matrix()
    moved[:, :3, 3] = steps[:, 3:]
    return moved


def overlapping(surfaces: Sequence[SurfaceView], poses: Floats, zoom: float = 1.0) -> list[Pair]:
    """Ordered pairs of views that see common surface, for each view with its best neighbours.

    The time grows with the number of views, not with its square.
    """
    count = len(surfaces)
    witnesses = [surface.witness.with_camera(surface.zoomed_camera(zoom)) for surface in surfaces]
    slack = LAST_GATE * object_size(surfaces, zoom)
    ahead = poses[:, :3, 2]
    focus = poses[:, :3, 3] + ahead * np.array([np.median(witness.depth) for witness in witnesses])[:, None]
    found = []
    for one in range(count):
        # views of the same place, from a similar direction, come first
        apart = np.linalg.norm(focus - focus[one], axis=1) / np.median(witnesses[one].depth) - ahead @ ahead[one]
        near = [int(other) for other in np.argsort(apart, kind="stable") if other != one][:NEIGHBOURS]
        shares = [
            compare(witnesses[one], witnesses[other], inverse(poses[other]) @ poses[one], slack).agree.mean()
            for other in near
        ]
        best = np.argsort(shares, kind="stable")[::-1][:KEPT_NEIGHBOURS]
        found += [(one, near[k]) for k in best if shares[k] > LEAST_OVERLAP]
    return sorted(found)


def _equations(
    surfaces: Sequence[SurfaceView],
    poses: Floats,
    zoom: float,
    pairs: Sequence[Pair],
    gate: float,
    readings: int,
    level: int,
    free_focal: bool,
) -> tuple[Floats, Floats, Floats]:
    """Normal matrix, gradient, and the distances from planes (metres) of all pairs."""
    size = 6 * len(poses) + 1
    matrix, gradient, distances = np.zeros((size, size)), np.zeros(size), []
    for one, other in pairs:
        motion = inverse(poses[other]) @ poses[one]
        rows, residuals, weights, apart = pair_rows(surfaces[one], surfaces[other], motion, zoom, gate, readings, level)
        if not free_focal:
            rows[:, 12] = 0
        weighted = rows * weights[:, None]
        at = np.r_[6 * one : 6 * one + 6, 6 * other : 6 * other + 6, size - 1]
        matrix[np.ix_(at, at)] += weighted.T @ rows
        gradient[at] += weighted.T @ residuals
        distances.append(apart)
    return matrix, gradient, np.concatenate(distances) if distances else np.zeros(0)


def pair_rows(
    one: SurfaceView, other: SurfaceView, motion: Floats, zoom: float, gate: float, readings: int, level: int
) -> tuple[Floats, Floats, Floats, Floats]:
    """The equations of one view's readings in another one, linear in a small motion of both cameras.

    motion: (4, 4) from the axes of `one` to those of `other`. Returns the rows (k, 13: turn and shift of one, of the
    other, logarithm of the zoom), the residuals (k,) in standard deviations, their weights (k,), and the distances
    from planes, metres.
    """
    landed = _landed(one, other, motion, zoom, readings)
    surface = lifted(other.camera, landed.column + 0.5, landed.row + 0.5, other.depth[landed.row, landed.column], zoom)
    planes = zoomed_normals(other.normals[landed.row, landed.column], zoom)
    apart = np.einsum("kc,kc->k", planes, landed.seen - surface)
    near = (np.abs(apart) < gate) & (np.linalg.norm(landed.seen - surface, axis=1) < 3 * gate)
    facing = np.einsum("kc,kc->k", planes, landed.normals) > SAME_SIDE
    same = np.flatnonzero(landed.inside & (other.depth[landed.row, landed.column] > 0) & near & facing)
    terms = [
        _plane_term(one, other, landed, same, planes[same], surface[same], apart[same]),
        _colour_term(one, other, landed, same, readings, level),
        _outline_term(other, landed),
    ]
    at, across, residuals, weights, zooming = (
        np.concatenate([getattr(term, name) for term in terms])
        for name in ("at", "across", "residual", "weight", "zooming")
    )
    back = across @ motion[:3, :3]
    rows = np.concatenate(
        [_cross(landed.points[at], back), back, _cross(across, landed.seen[at]), -across, zooming[:, None]],
        axis=1,
    )
    return rows, residuals, weights, apart[same]


@dataclass(frozen=True, eq=False)
class _Landed:
    """A view's sample, moved into another view."""

    points: Floats
    """(k, 3) in the axes of the first camera"""
    seen: Floats
    """(k, 3) in the axes of the other one"""
    normals: Floats
    """(k, 3) likewise"""
    stretched: Floats
    """(k, 3) change of `seen` with the logarithm of the zoom"""
    inside: NDArray[np.bool_]
    """(k,) True within the image"""
    row: NDArray[np.intp]
    """(k,)"""
    column: NDArray[np.intp]
    """(k,)"""
    position: Floats
    """(k, 2) in pixels"""
    centred: Floats
    """(k, 2) the same from the principal point: its change with the logarithm of the zoom"""
    shift: Floats
    """(k, 2, 3) change of the position with `seen`"""


@dataclass(frozen=True, eq=False)
class _Term:
    """Residuals of one kind, in standard deviations, with their change by a motion of the points `at`."""

    at: NDArray[np.intp]
    across: Floats
    residual: Floats
    weight: Floats
    zooming: Floats


def _landed(one: SurfaceView, other: SurfaceView, motion: Floats, zoom: float, readings: int) -> _Landed:
    points, turn, camera = one.points(zoom, readings), motion[:3, :3], other.camera
    seen = points @ turn.T + motion[:3, 3]
    fx, fy = camera.fl_x * zoom, camera.fl_y * zoom
    ahead = seen[:, 2] > 0
    z = np.where(ahead, seen[:, 2], np.inf)
    centred = np.stack([seen[:, 0] / z * fx, seen[:, 1] / z * fy], axis=1)
    position = centred + np.array([camera.cx, camera.cy])
    # a pixel within the border: slopes are rough on it
    inside = ahead & (position >= 1).all(axis=1) & (position < np.array([camera.width, camera.height]) - 1).all(axis=1)
    column, row = position.clip(0, [camera.width - 1, camera.height - 1]).astype(np.intp).T
    shift = np.zeros((len(points), 2, 3))
    shift[:, 0, 0], shift[:, 1, 1] = fx / z, fy / z
    shift[:, :, 2] = -centred / z[:, None]
    stretched = (-points * np.array([1.0, 1.0, 0.0])) @ turn.T
    normals = one.sample_normals(zoom, readings) @ turn.T
    return _Landed(points, seen, normals, stretched, inside, row, column, position, centred, shift)


def _plane_term(
    one: SurfaceView,
    other: SurfaceView,
    landed: _Landed,
    same: NDArray[np.intp],
    planes: Floats,
    surface: Floats,
    apart: Floats,
) -> _Term:
    sigma = max(PLANE_SIGMAS * float(np.hypot(one.noise, other.noise)) / np.sqrt(2), PLANE_FOOTPRINTS * other.footprint)
    seen = landed.seen[same]
    cosine = -np.einsum("kc,kc->k", landed.normals[same], seen) / np.linalg.norm(seen, axis=1)
    # both the point and the surface stretch; the normals' change counts nothing, as `apart` is about 0
    stretch = landed.stretched[same] + surface * np.array([1.0, 1.0, 0.0])
    residual = apart / sigma
    weight = _robust(residual, ROBUST_LEAST) * np.maximum(cosine, FLATTEST)
    return _Term(same, planes / sigma, residual, weight, np.einsum("kc,kc->k", planes, stretch) / sigma)


def _colour_term(
    one: SurfaceView, other: SurfaceView, landed: _Landed, same: NDArray[np.intp], readings: int, level: int
) -> _Term:
    seen, slopes = other.paint[level].at(landed.position[same])
    different = (seen - one.sample_paint[level][:readings][same]) / COLOUR_SIGMA
    weights = np.stack([_robust(different[:, channel], 1.0) for channel in range(3)], axis=1)
    at = np.repeat(same, 3)
    return _pixel_term(landed, at, slopes.reshape(-1, 2) / COLOUR_SIGMA, different.reshape(-1), weights.reshape(-1))


def _outline_term(other: SurfaceView, landed: _Landed) -> _Term:
    beyond = other.outline[landed.row, landed.column].astype(np.float64)
    at = np.flatnonzero(landed.inside & (beyond > OUTLINE_FROM_PX) & (beyond < OUTLINE_TO_PX))
    row, column = landed.row[at], landed.column[at]
    right = other.outline[row, column + 1] - other.outline[row, column - 1]
    down = other.outline[row + 1, column] - other.outline[row - 1, column]
    slope = np.stack([right, down], axis=1) / (2 * OUTLINE_SIGMA_PX)
    weight = 1 / (1 + (beyond[at] / OUTLINE_SCALE_PX) ** 2)
    return _pixel_term(landed, at, slope, beyond[at] / OUTLINE_SIGMA_PX, weight)


def _pixel_term(landed: _Landed, at: NDArray[np.intp], slope: Floats, residual: Floats, weight: Floats) -> _Term:
    """A term whose residual changes by `slope` (k, 2) a pixel."""
    across = np.einsum("kd,kdc->kc", slope, landed.shift[at])
    zooming = np.einsum("kc,kc->k", across, landed.stretched[at]) + np.einsum("kd,kd->k", slope, landed.centred[at])
    return _Term(at, across, residual, weight, zooming)


def _cross(a: Floats, b: Floats) -> Floats:
    """Cross products of (k, 3); numpy's own takes several times as long."""
    product = np.empty_like(a)
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        product[:, k] = a[:, i] * b[:, j] - a[:, j] * b[:, i]
    return product


def _robust(residuals: Floats, least: float) -> Floats:
    """Weights that fall off beyond the spread of the residuals."""
    if not len(residuals):
        return residuals
    scale = max(least, ROBUST * SPREAD * float(np.median(np.abs(residuals))))
    weights: Floats = 1 / (1 + (residuals / scale) ** 2) ** 2
    return weights
