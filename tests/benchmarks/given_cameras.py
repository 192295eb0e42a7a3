"""Given cameras that are a little wrong, refined: `python tests/benchmarks/given_cameras.py [--rows NAME ...]`.

A line says how far the rotations are off before and after (degrees, median / max, after the best motion between the two
worlds), how many cameras were moved, the Chamfer distance of the fused surface from the truth (in % of its diagonal,
with the true, the given and the refined cameras), the share of readings in conflict before and after, and processor
seconds of the refinement.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.cameras.conflict import GL_TO_PINHOLE, Witness, pinhole_poses
from tasks.cameras.joint_refinement import motions
from tasks.cameras.refinement import agreement, refined
from tasks.capture.views import View
from tasks.geometry.depth_noise import measured_noise
from tasks.inference.fusion.fuse import fuse
from tasks.settings import FusionParameters
from tests.benchmarks.cameras import walk_around
from tests.benchmarks.routes import SAMPLE, load
from tests.data.make_sample import mug_scene
from tests.synthetic import chamfer
from tests.synthetic.tabletop import table_scene

Floats = NDArray[np.float64]
Noise = Callable[[int, np.random.Generator], Floats]

LAID_POINTS, LAID_ROUNDS = 20_000, 8
SMOOTH_FRAMES = 8.0  # sigma of the steps of a drift
LINE = "{:32} {:>15} {:>15} {:>8} {:>22} {:>12} {:>6}"


def independent(degrees: float, millimetres: float, views: int, rng: np.random.Generator) -> Floats:
    """Turns (radians) and shifts (metres), (views, 6), of these root mean squares."""
    return rng.normal(size=(views, 6)) / np.sqrt(3) * np.repeat([np.radians(degrees), 1e-3 * millimetres], 3)


def drift(degrees: float, millimetres: float, views: int, rng: np.random.Generator) -> Floats:
    """The same for a smooth walk away from the truth, of this size at its largest."""
    steps = ndimage.gaussian_filter1d(rng.normal(size=(views, 6)), SMOOTH_FRAMES, axis=0)
    walked = np.cumsum(steps, axis=0) - steps[0]
    for part, most in ((np.s_[:, :3], np.radians(degrees)), (np.s_[:, 3:], 1e-3 * millimetres)):
        walked[part] *= most / np.linalg.norm(walked[part], axis=1).max()
    return walked


def rows() -> dict[str, tuple[str, Noise]]:
    """Captures and the noise of their cameras, by the name of their row."""
    disturbed = {
        f"mug, {degrees:g} degrees, {millimetres:g} mm": ("mug", partial(independent, degrees, millimetres))
        for degrees, millimetres in ((0.25, 1.0), (0.5, 2.0), (1.0, 5.0))
    }
    drifted = {f"walk-around {n}, drift": (f"walk-around {n}", partial(drift, 1.0, 10.0)) for n in (60, 200)}
    return disturbed | drifted


def capture(name: str, folder: Path) -> tuple[list[View], trimesh.Trimesh]:
    """The views of a capture with true cameras, and the true mesh."""
    if name == "mug":
        return load(SAMPLE), mug_scene()[0]
    return walk_around(int(name.split()[1]), folder), table_scene("concave")[0]


def surface_error(views: list[View], truth: trimesh.Trimesh, aligned: Floats) -> float:
    """Chamfer distance of the fused surface, moved by (4, 4), from the truth, in % of its diagonal."""
    surface = fuse(views, FusionParameters(), lambda _: None)
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False).apply_transform(aligned)
    laid_onto(mesh, truth)
    return 100 * chamfer(mesh, truth) / float(np.linalg.norm(truth.extents))


def laid_onto(mesh: trimesh.Trimesh, truth: trimesh.Trimesh) -> None:
    """Move a mesh onto the truth, point to plane: cameras alone tell where it is to some micrometres only."""
    points = trimesh.sample.sample_surface(mesh, LAID_POINTS, seed=0)[0]
    middles = truth.triangles_center
    tree = cKDTree(middles)
    for _ in range(LAID_ROUNDS):
        face = tree.query(points)[1]
        normals = truth.face_normals[face]
        apart = np.einsum("kc,kc->k", normals, middles[face] - points)
        weight = 1 / (1 + (apart / (3 * np.median(np.abs(apart)) + 1e-9)) ** 2) ** 2
        lines = np.hstack([np.cross(points, normals), normals])
        (step,) = motions(np.linalg.lstsq(lines * weight[:, None], apart * weight)[0][None])
        points = points @ step[:3, :3].T + step[:3, 3]
        mesh.apply_transform(step)


def alignment(poses: Floats, true: Floats) -> tuple[Floats, Floats]:
    """The motion (4, 4) between two worlds by their cameras, and the turns left (n,), degrees."""
    relative = Rotation.from_matrix(true[:, :3, :3] @ np.swapaxes(poses[:, :3, :3], 1, 2))
    apart = np.stack([(relative * each.inv()).magnitude() for each in relative])
    between = relative[np.argsort(np.median(apart, axis=1))[: len(poses) // 2 + 1]].mean()
    motion = np.eye(4)
    motion[:3, :3] = between.as_matrix()
    motion[:3, 3] = np.median(true[:, :3, 3] - between.apply(poses[:, :3, 3]), axis=0)
    return motion, np.degrees((relative * between.inv()).magnitude())


def measure(name: str, views: list[View], truth: trimesh.Trimesh, noise: Noise) -> None:
    """Print one line."""
    sensor = measured_noise([view.depth for view in views if view.depth is not None])
    true = pinhole_poses([Witness.of(view, sensor) for view in views])
    given = true @ motions(noise(len(views), np.random.default_rng(5)))

    def placed(poses: Floats) -> list[View]:
        return [
            replace(view, camera=replace(view.camera, camera_to_world=pose @ GL_TO_PINHOLE))
            for view, pose in zip(views, poses, strict=True)
            if view.camera is not None
        ]

    disturbed = placed(given)
    witnesses = [Witness.of(view, sensor) for view in disturbed]
    begun = time.process_time()
    result = refined(disturbed, witnesses, sensor)
    seconds = time.process_time() - begun
    poses = given if result is None else result.poses
    (before, off), (after, left) = alignment(given, true), alignment(poses, true)
    errors = [
        surface_error(placed(each), truth, motion)
        for each, motion in ((true, np.eye(4)), (given, before), (poses, after))
    ]
    conflicts = [agreement(witnesses, each).contradicted for each in (given, poses)]
    print(
        LINE.format(
            name,
            f"{np.median(off):.3f} / {off.max():.3f}",
            f"{np.median(left):.3f} / {left.max():.3f}",
            f"{0 if result is None else int(result.moved.sum())}/{len(views)}",
            " ".join(f"{error:.4f}" for error in errors),
            " ".join(f"{conflict:.3f}" for conflict in conflicts),
            f"{seconds:.0f}",
        ),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(rows()), choices=rows(), metavar="NAME")
    print(LINE.format("capture", "before", "after", "moved", "Chamfer true given ref", "conflict", "s"))
    for name in parser.parse_args().rows:
        source, noise = rows()[name]
        with tempfile.TemporaryDirectory() as folder:
            views, truth = capture(source, Path(folder))
            measure(name, views, truth, noise)


if __name__ == "__main__":
    main()
