"""Normal equations of the joint refinement: what readings, moved from some views into another one, say about cameras.

`joint_refinement` calls it. A reading has to lie on the surface that the other view sees, have its colour, and stay
within its silhouette. All three change with the point's place in the other camera's axes, and this changes with the
motions of both cameras: the equations of a pair are built for a motion in the other camera's axes, 6 unknowns and the
zoom, and carried over to both cameras at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.conflict import inverse
from tasks.cameras.surface_views import SurfaceView, lifted, zoomed_normals

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Map = NDArray[np.floating]
Pair = tuple[int, int]

SAME_SIDE = 0.6  # cosine between the normals of one surface in two views
# A plane's standard deviation: its window averages noise, and a surface bends within a pixel
PLANE_SIGMAS, PLANE_FOOTPRINTS = 0.5, 0.25
FLATTEST = 0.05  # least weight by the cosine of the viewing angle
COLOUR_SIGMA = 8.0  # sRGB levels that a point differs between views: light, exposure, resampling
OUTLINE_SIGMA_PX, OUTLINE_SCALE_PX = 1.8, 4.0
OUTLINE_FROM_PX, OUTLINE_TO_PX = 0.7, 12.0  # outside the silhouette
ROBUST, ROBUST_LEAST = 1.5, 2.5  # scale of the weights: in spreads of the residuals, at least in sigmas
COLOUR_LEAST = 1.0
SPREAD = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
UNKNOWNS = 7  # of a pair: a small turn and shift in the other camera's axes, and the logarithm of the zoom


def normal_equations(
    surfaces: Sequence[SurfaceView],
    poses: Floats,
    zoom: float,
    pairs: Sequence[Pair],
    *,
    gate: float,
    readings: int,
    level: int,
    free_focal: bool,
) -> tuple[Floats, Floats, Floats]:
    """Normal matrix (6 n + 1, 6 n + 1), gradient (6 n + 1,) and the readings' distances from planes (k,), metres.

    poses: (n, 4, 4) camera-to-world. pairs: ordered; readings of the first view are moved into the second. gate:
    metres between a reading and a surface that is taken for its own. level: of the paint. The unknowns are each
    camera's turn and shift in its own axes, and the logarithm of the zoom.
    """
    size = 6 * len(poses) + 1
    matrix, gradient, distances = np.zeros((size, size)), np.zeros(size), [np.zeros(0)]
    points = [surface.points(zoom, readings) for surface in surfaces]
    normals = [surface.sample_normals(zoom, readings) for surface in surfaces]
    paint = [surface.sample_paint[level][:readings] for surface in surfaces]
    into: dict[int, list[int]] = {}
    for one, other in pairs:
        into.setdefault(other, []).append(one)
    for other, ones in into.items():
        motions = inverse(poses[other]) @ poses[ones]
        landed = _landed(surfaces[other], motions, [points[k] for k in ones], [normals[k] for k in ones], zoom)
        noise = np.array([surfaces[k].noise for k in ones])
        planes, apart = _planes(surfaces[other], landed, noise, gate, zoom)
        colours = np.concatenate([paint[k] for k in ones])
        paints = _colours(surfaces[other], landed, planes.at, colours, level)
        terms = [planes, paints, _outlines(surfaces[other], landed)]
        distances.append(apart)
        blocks = np.sum([_blocks(term, landed) for term in terms], axis=0)
        if not free_focal:
            blocks[:, -1, :] = blocks[:, :, UNKNOWNS - 1] = 0
        both = _of_both_cameras(motions)
        squares = np.swapaxes(both, 1, 2) @ blocks[:, :, :UNKNOWNS] @ both
        slopes = (np.swapaxes(both, 1, 2) @ blocks[:, :, UNKNOWNS:])[..., 0]
        for one, square, slope in zip(ones, squares, slopes, strict=True):
            at = np.r_[6 * one : 6 * one + 6, 6 * other : 6 * other + 6, size - 1]
            matrix[np.ix_(at, at)] += square
            gradient[at] += slope
    return matrix, gradient, np.concatenate(distances)


@dataclass(frozen=True, eq=False)
class _Landed:
    """The readings of some views that fall into the image of another one, sorted by view."""

    pair: Indices
    """(k,) which of the views each comes from"""
    count: int
    """Views"""
    reading: Indices
    """(k,) index of each in all readings of all views"""
    seen: Floats
    """(k, 3) in the axes of the other camera"""
    normals: Floats
    """(k, 3) likewise"""
    stretched: Floats
    """(k, 3) change of `seen` with the logarithm of the zoom"""
    position: Floats
    """(k, 2) in pixels"""
    pixel: Indices
    """(k,) index in the flat maps"""
    moved: Floats
    """(k, 2, 7) change of the position with the unknowns"""


@dataclass(frozen=True, eq=False)
class _Term:
    """Residuals of one kind, m for each of k readings."""

    at: Indices
    """(k,) indices of the readings"""
    rows: Floats
    """(k, m, 7) change with the unknowns"""
    weighed: Floats
    """(k, m, 8) the same and the residuals, by the inverse of their covariance"""


def _landed(
    other: SurfaceView, motions: Floats, points: Sequence[Floats], normals: Sequence[Floats], zoom: float
) -> _Landed:
    camera, turns = other.camera, motions[:, :3, :3]
    fx, fy = camera.fl_x * zoom, camera.fl_y * zoom
    pair = np.repeat(np.arange(len(points)), [len(each) for each in points])
    turned = np.concatenate([each @ turn.T for each, turn in zip(points, turns, strict=True)])
    seen = turned + motions[pair, :3, 3]
    z = np.where(seen[:, 2] > 0, seen[:, 2], np.nan)
    position = seen[:, :2] / z[:, None] * [fx, fy] + [camera.cx, camera.cy]
    # a pixel within the border: slopes are rough on it
    inside = (position >= 1).all(axis=1) & (position < [camera.width - 1, camera.height - 1]).all(axis=1)
    at = np.flatnonzero(inside)
    pair, seen, position, z = pair[at], seen[at], position[at], z[at]
    # under another zoom, x and y of a point change, z does not
    along = np.concatenate([each[:, 2:] * turn[:, 2] for each, turn in zip(points, turns, strict=True)])
    stretched = (along - turned)[at]
    turned_normals = np.concatenate([each @ turn.T for each, turn in zip(normals, turns, strict=True)])[at]
    across = np.zeros((len(at), 2, 3))
    centred = position - [camera.cx, camera.cy]
    across[:, 0, 0], across[:, 1, 1] = fx / z, fy / z
    across[:, :, 2] = -centred / z[:, None]
    moved = np.stack([_by_motion(across[:, k], seen, stretched) for k in range(2)], axis=1)
    moved[:, :, -1] += centred
    column, row = position.astype(np.intp).T
    return _Landed(pair, len(points), at, seen, turned_normals, stretched, position, row * camera.width + column, moved)


def _by_motion(across: Floats, seen: Floats, stretched: Floats) -> Floats:
    """Change (k, 7) with the unknowns of what changes by `across` (k, 3) with the points."""
    zooming = np.einsum("kc,kc->k", across, stretched)
    return np.concatenate([_cross(seen, across), across, zooming[:, None]], axis=1)


def _planes(other: SurfaceView, landed: _Landed, noise: Floats, gate: float, zoom: float) -> tuple[_Term, Floats]:
    """Distances from the planes of the surface that each reading lies on, and the same in metres."""
    depth = other.depth.reshape(-1).take(landed.pixel)
    at = np.flatnonzero(depth)
    at = at[np.abs(depth[at] - landed.seen[at, 2]) < 3 * gate]
    row, column = np.divmod(landed.pixel[at], other.camera.width)
    surface = lifted(other.camera, column + 0.5, row + 0.5, depth[at], zoom)
    planes = zoomed_normals(other.normals.reshape(-1, 3).take(landed.pixel[at], axis=0), zoom)
    seen, normals = landed.seen[at], landed.normals[at]
    apart = np.einsum("kc,kc->k", planes, seen - surface)
    same = np.abs(apart) < gate
    same &= np.einsum("kc,kc->k", seen - surface, seen - surface) < (3 * gate) ** 2
    same &= np.einsum("kc,kc->k", planes, normals) > SAME_SIDE
    at, surface, planes, seen, normals, apart = (x[same] for x in (at, surface, planes, seen, normals, apart))
    pair = landed.pair[at]
    sigma = np.maximum(PLANE_SIGMAS * np.hypot(noise, other.noise) / np.sqrt(2), PLANE_FOOTPRINTS * other.footprint)
    cosine = -np.einsum("kc,kc->k", normals, seen) / np.linalg.norm(seen, axis=1)
    residual = apart / sigma[pair]
    weight = _robust(residual, pair, landed.count, ROBUST_LEAST) * np.maximum(cosine, FLATTEST)
    # both the point and the surface stretch; the normals' change counts nothing, as `apart` is about 0
    stretch = landed.stretched[at] + surface * [1.0, 1.0, 0.0]
    rows = _by_motion(planes / sigma[pair, None], seen, stretch)
    weighed = np.concatenate([rows, residual[:, None]], axis=1) * weight[:, None]
    return _Term(at, rows[:, None], weighed[:, None]), apart


def _colours(other: SurfaceView, landed: _Landed, at: Indices, colours: Floats, level: int) -> _Term:
    """Differences of three colours, as one of the position: they change by their slopes with it."""
    seen, along_x, along_y = other.paint[level].at(landed.position[at])
    different = (seen - colours[landed.reading[at]]) / COLOUR_SIGMA
    weight = _robust(different, landed.pair[at], landed.count, COLOUR_LEAST)
    slopes = np.stack([along_x, along_y], axis=1) / COLOUR_SIGMA
    return _of_position(landed, at, slopes, different, weight)


def _outlines(other: SurfaceView, landed: _Landed) -> _Term:
    """Distances from the silhouette, of readings that lie outside of it."""
    outline = other.outline.reshape(-1)
    beyond = outline.take(landed.pixel)
    at = np.flatnonzero((beyond > OUTLINE_FROM_PX) & (beyond < OUTLINE_TO_PX))
    pixel, beyond = landed.pixel[at], beyond[at].astype(np.float64)
    right = outline.take(pixel + 1) - outline.take(pixel - 1)
    down = outline.take(pixel + other.camera.width) - outline.take(pixel - other.camera.width)
    slopes = np.stack([right, down], axis=1)[..., None] / (2 * OUTLINE_SIGMA_PX)
    weight = 1 / (1 + (beyond / OUTLINE_SCALE_PX) ** 2)
    return _of_position(landed, at, slopes, beyond[:, None] / OUTLINE_SIGMA_PX, weight[:, None])


def _of_position(landed: _Landed, at: Indices, slopes: Map, residuals: Map, weights: Floats) -> _Term:
    """A term of residuals (k, c) that change by slopes (k, 2, c) along x and y; their information is that of 2 rows."""
    rows = landed.moved[at]
    weighed = slopes * weights[:, None]
    xx, xy, yy = (np.einsum("kc,kc->k", weighed[:, i], slopes[:, j])[:, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    combined = np.empty((len(at), 2, UNKNOWNS + 1))
    combined[:, 0, :-1] = xx * rows[:, 0] + xy * rows[:, 1]
    combined[:, 1, :-1] = xy * rows[:, 0] + yy * rows[:, 1]
    combined[:, :, -1] = np.einsum("kdc,kc->kd", weighed, residuals)
    return _Term(at, rows, combined)


def _blocks(term: _Term, landed: _Landed) -> Floats:
    """(views, 7, 8) normal matrices and gradients of a term, by the view that readings come from."""
    ends = np.searchsorted(landed.pair[term.at], np.arange(landed.count + 1))
    blocks = np.empty((landed.count, UNKNOWNS, UNKNOWNS + 1))
    for k in range(landed.count):
        part = slice(ends[k], ends[k + 1])
        blocks[k] = term.rows[part].reshape(-1, UNKNOWNS).T @ term.weighed[part].reshape(-1, UNKNOWNS + 1)
    return blocks


def _of_both_cameras(motions: Floats) -> Floats:
    """(k, 7, 13) a pair's unknowns by those of its cameras: turn and shift of one, of the other, and the zoom."""
    turns, shifts = motions[:, :3, :3], motions[:, :3, 3]
    both = np.zeros((len(motions), UNKNOWNS, 13))
    both[:, :3, :3] = both[:, 3:6, 3:6] = turns
    both[:, 3:6, :3] = np.cross(shifts[:, :, None], turns, axis=1)
    both[:, range(6), range(6, 12)] = -1
    both[:, -1, -1] = 1
    return both


def _cross(a: Floats, b: Floats) -> Floats:
    """Cross products of (k, 3); numpy's own takes several times as long."""
    product = np.empty_like(a)
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        product[:, k] = a[:, i] * b[:, j] - a[:, j] * b[:, i]
    return product


def _robust(residuals: Map, pair: Indices, count: int, least: float) -> Floats:
    """Weights of residuals (k,) or (k, c) that fall off beyond the spread of those of the same view and column."""
    ends = np.searchsorted(pair, np.arange(count + 1))
    scales = np.full((count, *residuals.shape[1:]), least)
    size = np.abs(residuals)
    for k in np.flatnonzero(np.diff(ends)):
        part = size[ends[k] : ends[k + 1]]
        middle = len(part) // 2
        scales[k] = np.maximum(least, ROBUST * SPREAD * np.partition(part, middle, axis=0)[middle])
    weights: Floats = 1 / (1 + (residuals / scales[pair]) ** 2) ** 2
    return weights
