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
from tasks.cameras.normal_equations import Pair, normal_equations
from tasks.cameras.surface_views import SurfaceView, object_size

Floats = NDArray[np.float64]

# Distance between a reading and a surface that is taken for its own: share of the object at first and at last
FIRST_GATE = 0.03
LAST_GATE = 0.006
GATE_SIGMAS, GATE_FOOTPRINTS = 4.0, 3.0  # and never less than this
COARSE_GATES = 1.5  # in last gates: beyond, blurred colours are compared
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
            compared = [pair for pair in overlapping(surfaces, poses, zoom) if not held.issuperset(pair)]
        level = int(gate > COARSE_GATES * last)
        information, gradient, residuals = normal_equations(
            surfaces, poses, zoom, compared, gate=gate, readings=readings, level=level, free_focal=free_focal
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
