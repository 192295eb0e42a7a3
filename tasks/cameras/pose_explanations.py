"""Usual mistakes in poses: axes of other libraries, inverted matrices, quaternions and positions of other conventions.

`mistakes` tries them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import numpy as np
from scipy.spatial.transform import Rotation

from tasks.cameras.conflict import GL_TO_PINHOLE, Floats, inverse
from tasks.cameras.explanations import DepthFormat, Explanation, with_factors, without_scale

# The directions of OpenGL's camera axes and of their opposites, and the conventions that have names
DIRECTIONS = (("right", "left"), ("up", "down"), ("backwards", "ahead"))
OPENGL = ("right", "up", "backwards")
LIBRARIES: dict[tuple[str, ...], str] = {("left", "up", "ahead"): " (PyTorch3D)", ("ahead", "left", "up"): " (ROS)"}
WITH_EVERY_FACTOR = (OPENGL, ("right", "down", "ahead"))  # these and quarter turns are tried with a scale too
MIRRORS = tuple(signs for signs in product((1, -1), repeat=3) if min(signs) < 0)
QUARTER_TURN = np.array([[0.0, -1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])


def of_matrices(given: Explanation, stored: DepthFormat) -> Iterator[Explanation]:
    """Matrices of other conventions, each with what it is and its remedy."""
    matrices = given.poses @ GL_TO_PINHOLE
    transposed = matrices.copy()
    transposed[:, :3, :3] = np.swapaxes(matrices[:, :3, :3], 1, 2)
    axes = "have OpenCV's axes (y down, looking along +z), not OpenGL's (y up, looking along -z)"
    flip = "negate the second and third column of each transform_matrix"
    backwards = "are world-to-camera, not camera-to-world"
    for poses, what, todo in (
        (matrices, axes, flip),
        (inverse(matrices) @ GL_TO_PINHOLE, backwards, "invert each transform_matrix"),
        (inverse(matrices), f"{backwards}, and {axes}", f"invert each transform_matrix, then {flip}"),
        (transposed @ GL_TO_PINHOLE, "have transposed rotations", "transpose the rotation in each transform_matrix"),
        (transposed, f"have transposed rotations, and {axes}", f"transpose each rotation, then {flip}"),
    ):
        yield with_factors(replace(given, poses=poses), f"the matrices {what}", todo, stored)
    for turns in (1, 2, 3):
        turned = replace(given, poses=given.poses @ np.linalg.matrix_power(QUARTER_TURN, turns))
        what = f"the cameras are turned by {90 * turns} degrees against the images"
        yield with_factors(turned, what, "give images, depth maps and cameras of one orientation (EXIF?)", stored)
    yield from _of_axes(given, matrices, backwards)
    yield from _of_positions(given, matrices)


def _of_axes(given: Explanation, matrices: Floats, backwards: str) -> Iterator[Explanation]:
    """Matrices with the camera axes of yet another convention."""
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        axes = np.eye(4)
        axes[:3, :3] = np.eye(3)[:, order] * signs
        names = tuple(DIRECTIONS[axis][sign < 0] for axis, sign in zip(order, signs, strict=True))
        if np.linalg.det(axes) < 0 or names in WITH_EVERY_FACTOR:
            continue
        what = f"camera axes x {names[0]}, y {names[1]}, z {names[2]}{LIBRARIES.get(names, '')}"
        what += f", not OpenGL's x {OPENGL[0]}, y {OPENGL[1]}, z {OPENGL[2]}"
        todo = "write the columns of each camera-to-world matrix in OpenGL's axes"
        to_opengl = axes.T @ GL_TO_PINHOLE
        if names[2] != OPENGL[2]:  # else it is a quarter turn
            yield without_scale(replace(given, poses=matrices @ to_opengl), f"the matrices have {what}", todo)
        inverted = replace(given, poses=inverse(matrices) @ to_opengl)
        both, todo = f"the matrices {backwards}, and have {what}", f"invert each transform_matrix, then {todo}"
        yield without_scale(inverted, both, todo)


def _of_positions(given: Explanation, matrices: Floats) -> Iterator[Explanation]:
    """Rotations and positions that do not belong together, and views in the opposite order."""

    def of(rotations: Floats, positions: Floats, what: str, todo: str) -> Explanation:
        changed = matrices.copy()
        changed[:, :3, :3], changed[:, :3, 3] = rotations, positions
        return without_scale(replace(given, poses=changed @ GL_TO_PINHOLE), what, todo)

    rotations, positions = matrices[:, :3, :3], matrices[:, :3, 3]
    centres = -(rotations @ positions[..., None])[..., 0]
    what = "the rotations are camera-to-world, but the positions are those of world-to-camera matrices"
    yield of(rotations, centres, what, "invert whole matrices: the position is -R t")
    for axes, (shift, order) in product((np.eye(3), GL_TO_PINHOLE[:3, :3]), ((-1, "x y z w"), (1, "w x y z"))):
        quaternions = np.roll(Rotation.from_matrix(rotations @ axes).as_quat(), shift, axis=1)
        what = f"the rotations were made of quaternions that were taken for {order}, but have another order"
        todo = "read the quaternions in their own order, x y z w or w x y z"
        yield of(Rotation.from_quat(quaternions).as_matrix() @ axes, positions, what, todo)
    for mirror in MIRRORS:
        flipped = "".join(name for name, sign in zip("xyz", mirror, strict=True) if sign < 0)
        what = f"the cameras' positions are mirrored against their rotations: {flipped} has the wrong sign"
        yield of(rotations, positions * mirror, what, "take rotations and positions from one world (left-handed?)")
    turned = given.poses[0] @ inverse(given.poses) @ given.poses[0]
    what = "the views turn the other way than their cameras"
    todo = "name the views in the opposite order, or write the rig with the other direction (--clockwise)"
    yield without_scale(replace(given, poses=turned), what, todo)
