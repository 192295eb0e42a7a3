"""Other poses that would explain a view about as well: turns about the object's axes, and slides along it.

They rescue views without matches, correct views on a shape that repeats itself, and tell what is not constrained.
`finding` calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.cameras.assembly import SETTLING_VIEWS, Assembly
from tasks.cameras.joint_refinement import refine
from tasks.cameras.pairs import assembled, turned
from tasks.cameras.surface_views import merged, object_size

Floats = NDArray[np.float64]

TURNS = 40  # about each axis
READINGS = 200  # of a view, for the axes
AXIS_ROUNDS = 10
OTHER_TURN = np.radians(3.0)  # a pose that differs by less is the same solution
OTHER_SHIFT = 0.03  # likewise, in sizes of the object
SETTLED_CANDIDATES = 4
SLIDE = 0.05  # along the weakest direction, in sizes of the object at its distance
INDIFFERENT = 0.05  # a pose that loses less than this share of a view's support is as good
ENOUGH_VIEWS = 4  # before there are as many, axes mean nothing


@dataclass(frozen=True)
class SecondSolution:
    """The best pose of a view that is not the found one."""

    margin: float
    """Share of the view's support that is lost there, 1 if everything is; negative if it would be better"""
    turn_deg: float
    """Angle from the found pose"""


def turned_poses(assembly: Assembly, pose: Floats, turns: int = TURNS) -> Floats:
    """The poses (k, 4, 4) that a pose becomes when it is turned about the axes of the object."""
    posed = list(assembly.posed)
    surfaces = [assembly.surfaces[view] for view in posed]
    points, normals = merged(surfaces, [assembly.posed[view] for view in posed], assembly.zoom, READINGS)
    middle, low, high = points.mean(axis=0), *np.percentile(points, (1, 99), axis=0)
    axes = [_axis_of_revolution(points - middle, normals)]
    centres = [axes[0][1] + middle]
    axes_of_inertia = np.linalg.eigh(np.cov((points - middle).T))[1].T
    directions = [axes[0][0], *axes_of_inertia]
    centres += [(low + high) / 2] * 3
    found = []
    for direction, centre in zip(directions, centres, strict=True):
        for angle in np.arange(1, turns) * 2 * np.pi / turns:
            turn = Rotation.from_rotvec(direction * angle).as_matrix()
            found.append(assembled(turn, centre - turn @ centre) @ pose)
    return np.stack(found)


def second_solution(assembly: Assembly, view: int) -> SecondSolution:
    """The best different pose of a posed view, all others being as they are."""
    pose = assembly.posed[view]
    here = assembly.judge(view, pose[None])
    support = max(float(here.quality(assembly.limit)[0]), 1e-6)
    candidates = turned_poses(assembly, pose)
    quality = assembly.judge(view, candidates).rough_quality(assembly.limit)
    size = object_size(assembly.surfaces, assembly.zoom)
    middle = assembly.surfaces[view].points(assembly.zoom).mean(axis=0)
    best = SecondSolution(1.0, 0.0)
    for candidate in candidates[np.argsort(-quality, kind="stable")[:SETTLED_CANDIDATES]]:
        settled = assembly.settle(view, candidate)
        if _same(settled, pose, middle, size):
            continue
        there = assembly.judge(view, settled[None]).quality(assembly.limit)
        margin = 1 - float(there[0]) / support
        if margin < best.margin:
            best = SecondSolution(margin, float(np.degrees(turned(settled[:3, :3], pose[:3, :3]))))
    return best


def slides(assembly: Assembly, view: int) -> bool:
    """True if a posed view can be moved along its least constrained direction without any loss."""
    near = assembly.nearest(view, assembly.posed[view], SETTLING_VIEWS)
    count = len(near)
    surface = assembly.surfaces[view]
    weighed = refine(
        [*(assembly.surfaces[other] for other in near), surface],
        np.stack([assembly.posed[other] for other in [*near, view]]),
        assembly.zoom,
        fixed=range(count),
        pairs=[pair for k in range(count) for pair in ((k, count), (count, k))],
        iterations=1,
    ).information[6 * count : 6 * count + 6, 6 * count : 6 * count + 6]
    # in the axes of the object's middle, in metres: a turn of the camera about itself is a shift there
    middle = surface.points(assembly.zoom).mean(axis=0)
    size = object_size(assembly.surfaces, assembly.zoom)
    change = np.eye(6)
    change[:3, :3] *= 2 / size
    change[3:, :3] = np.cross(np.eye(3), middle) * (2 / size)
    weakest = change @ np.linalg.eigh(change.T @ weighed @ change)[1][:, 0]
    pose = assembly.posed[view]
    moved = np.stack(
        [
            pose @ assembled(Rotation.from_rotvec(step[:3]).as_matrix(), step[3:])
            for step in (weakest * SLIDE * size, -weakest * SLIDE * size)
        ]
    )
    here = assembly.judge(view, pose[None]).quality(assembly.limit)[0]
    there = assembly.judge(view, moved).quality(assembly.limit)
    return bool((there > (1 - INDIFFERENT) * here).any())


def _same(one: Floats, other: Floats, middle: Floats, size: float) -> bool:
    """True if two poses differ little, and so does the place of what the view shows."""
    apart = np.linalg.norm((one - other)[:3] @ np.append(middle, 1.0))
    return turned(one[:3, :3], other[:3, :3]) < OTHER_TURN and bool(apart < OTHER_SHIFT * size)


def _axis_of_revolution(points: Floats, normals: Floats) -> tuple[Floats, Floats]:
    """Direction (3,) and a point (3,) of the line that normals meet best.

    Pottmann and Randrup, Rotational and helical surface approximation for reverse engineering (Computing 1998).
    """
    lines, weights = np.hstack([np.cross(points, normals), normals]), np.ones(len(points))
    for _ in range(AXIS_ROUNDS):
        moments = (lines * weights[:, None]).T @ lines
        to_shift = np.linalg.solve(moments[3:, 3:] + 1e-12 * np.eye(3), moments[3:, :3])
        direction = np.linalg.eigh(moments[:3, :3] - moments[:3, 3:] @ to_shift)[1][:, 0]
        shift = -to_shift @ direction
        residual = np.abs(lines @ np.concatenate([direction, shift]))
        weights = 1 / (1 + (residual / (2 * np.median(residual) + 1e-12)) ** 2) ** 2
    return direction, np.cross(direction, shift)
