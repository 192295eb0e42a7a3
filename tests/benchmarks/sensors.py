"""Our route on captures of simulated sensors, beside Open3D's VoxelBlockGrid: `python tests/benchmarks/sensors.py`.

Five objects on a table, RGB without alpha, default settings; then the sample with its depth in whole millimetres, of
128 pixels, and enlarged again. Needs nothing but the project; `--open3d PYTHON` names an interpreter that has Open3D
and adds its rows, of the same frames and voxel (a side of 1/128 of the object, which is what our default comes to).
Ours is measured as it is published, at 20,000 faces; Open3D's is its dense mesh, cut to the object's box, with the
table's own surface taken off. "seen" is the same without the lowest 5 mm, where the object meets the table: no camera
sees its underside, and Open3D leaves it out. The row "limit" is what averaging can reach: points of the true surface,
moved by the mean error of the readings that saw them. Peak memory is that of the process that fuses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.capture.camera import Camera
from tasks.capture.views import View
from tasks.errors import Capture2MeshError
from tasks.geometry.render import RayScene, depth_map
from tests.benchmarks.routes import SAMPLE, load, our_route
from tests.data.make_sample import mug_cameras, mug_scene
from tests.synthetic import chamfer, colour_error, f_score
from tests.synthetic.sensors import SENSORS
from tests.synthetic.tabletop import MARGIN, OBJECTS, dome_cameras, make_sensor_capture

VOXELS = 128  # along the object's longest side
NATIVE = 128  # pixels of the sample's small depth maps
FLATTEST, ASTRAY = 0.25, 0.03  # cosine, and metres
HELD_OUT = 6  # cameras of their own that the colours are compared from
LINE = "{:22} {:12} {:7} {:>6} {:>6} {:>7} {:>9} {:>7} {:>9} {:>6} {:>7} {:>7} {:>8}"


@dataclass(frozen=True)
class Case:
    """A capture on disk and its truth. scene: true colours of the mesh and perhaps a table. table: its height, None
    without one."""

    sensor: str
    shape: str
    folder: Path
    mesh: trimesh.Trimesh
    scene: RayScene
    cameras: Sequence[Camera]
    table: float | None


@dataclass(frozen=True)
class Made:
    """A mesh with colours in the capture's frame, seconds of the route, and the peak memory of its process, MB."""

    mesh: trimesh.Trimesh
    seconds: float
    peak_mb: float


def simulated(folder: Path, sensor: str, shape: str, views: int, bounds: bool) -> Case:
    """An object on the table, by one of `SENSORS`."""
    truth = make_sensor_capture(folder, shape, SENSORS[sensor], views, bounds=bounds)
    cameras = dome_cameras(truth.mesh, SENSORS[sensor].shrunk(2), HELD_OUT, np.random.default_rng(1))
    return Case(sensor, shape, folder, truth.mesh, truth.scene, cameras, float(truth.plane[3]))


def samples(folder: Path) -> Iterator[Case]:
    """The bundled sample: as it is, in whole millimetres, with small depth maps, and with those enlarged."""
    mesh, scene = mug_scene()
    cameras = mug_cameras(mesh)
    unit = json.loads((SAMPLE / "transforms.json").read_text())["depth_unit_scale_factor"]
    for name in ("as it is", "1 mm", f"{NATIVE} px", f"{NATIVE} px x4"):
        target = folder / name
        shutil.copytree(SAMPLE, target)
        for camera, path in zip(cameras, sorted((target / "depth").iterdir()), strict=True):
            depth = np.asarray(Image.open(path))
            if name == "1 mm":
                depth = np.rint(np.rint(depth * unit / 0.001) * 0.001 / unit)
            elif name != "as it is":
                depth = np.rint(depth_map(scene, camera.resized(NATIVE, NATIVE)) / unit)
                depth = np.kron(depth, np.ones((4, 4))) if name.endswith("x4") else depth
            Image.fromarray(depth.astype(np.uint16)).save(path)
        held_out = [camera.resized(256, 256) for camera in cameras[:: len(cameras) // HELD_OUT]]
        yield Case("sample", name, target, mesh, scene, held_out, None)


def ours(folder: Path) -> Made:
    """The product's route on a capture."""
    views = load(folder)
    mesh, steps = our_route(views)
    return Made(mesh, sum(steps.values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def open3d(case: Case, python: str) -> Made:
    """Open3D's mesh of the same frames, in the object's box and above the table."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "views.npz", Path(name) / "mesh.npz"
        np.savez(source, voxel=case.mesh.extents.max() / VOXELS, **_arrays(load(case.folder)))
        worker = Path(__file__).with_name("open3d_voxels.py")
        subprocess.run([python, worker, source, target], check=True)
        made = dict(np.load(target))
    low, high = case.mesh.bounds + np.array([[-MARGIN], [MARGIN]])
    if case.table is not None:
        low[2] = case.table + case.mesh.extents.max() / VOXELS  # a voxel above the table: its own surface is not ours
    inside = ((made["vertices"] >= low) & (made["vertices"] <= high)).all(axis=1)
    mesh = trimesh.Trimesh(made["vertices"], made["faces"], vertex_colors=made["colours"], process=False)
    mesh.update_faces(inside[made["faces"]].all(axis=1))
    mesh.remove_unreferenced_vertices()
    return Made(mesh, float(made["seconds"]), float(made["peak_mb"]))


def limit(case: Case) -> str:
    """F-score and Chamfer of true points that stray by the weighted mean error of their readings, above the table.

    Readings flatter than `FLATTEST`, or wrong by more than `ASTRAY`, do not count: an outlier test finds those.
    """
    points, face = trimesh.sample.sample_surface(case.mesh, 20_000, seed=0)
    normals = case.mesh.face_normals[face]
    total, weights = np.zeros(len(points)), np.zeros(len(points))
    for view in load(case.folder):
        assert view.depth is not None and view.camera is not None
        camera = view.camera.resized(*view.depth.shape[::-1])
        pixels, z = camera.project(points)
        column, row = np.floor(pixels).astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
        true, read = (
            m[row.clip(0, camera.height - 1), column.clip(0, camera.width - 1)]
            for m in (depth_map(case.scene, camera), view.depth)
        )
        rays = points - camera.centre
        cosine = -np.einsum("md,md->m", rays, normals) / np.linalg.norm(rays, axis=1)
        good = inside & (np.abs(true - z) < MARGIN) & (cosine > FLATTEST) & (read > 0) & (np.abs(read - true) < ASTRAY)
        total += np.where(good, (read - true) * cosine**2, 0)  # along the normal, by the weight of a cosine
        weights += np.where(good, cosine, 0)
    above = points[:, 2] > (-np.inf if case.table is None else case.table + MARGIN)
    counted = above & (weights > 0)
    error = np.abs(total[counted] / weights[counted]) / float(np.linalg.norm(case.mesh.extents))
    return LINE.format(
        case.sensor,
        case.shape,
        "limit",
        "",
        "",
        "",
        "",
        f"{(error < 0.01).mean():.4f}",
        f"{100 * error.mean():.4f}",
        *[""] * 4,
    )


def _arrays(views: Sequence[View]) -> dict[str, np.ndarray]:
    """The views as Open3D takes them: intrinsic matrices, world-to-camera in OpenCV's axes."""

    def matrix(camera: Camera) -> list[list[float]]:
        return [[camera.fl_x, 0, camera.cx], [0, camera.fl_y, camera.cy], [0, 0, 1]]

    cameras = [view.camera for view in views if view.camera is not None]
    depths = [view.depth for view in views if view.depth is not None]
    poses = [camera.camera_to_world @ np.diag([1.0, -1.0, -1.0, 1.0]) for camera in cameras]
    return {
        "image": np.stack([view.image for view in views]),
        "depth": np.stack(depths),
        "intrinsic": np.array([matrix(camera) for camera in cameras]),
        "depth_intrinsic": np.array(
            [matrix(camera.resized(*depth.shape[::-1])) for camera, depth in zip(cameras, depths, strict=True)]
        ),
        "extrinsic": np.linalg.inv(poses),
    }


def report(case: Case, route: str, made: Made) -> None:
    """One line: pieces, closed, F-score at 1 %, Chamfer in % of the diagonal, both where cameras see, CIEDE2000, ..."""
    welded = trimesh.Trimesh(made.mesh.vertices, made.mesh.faces, process=False)
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    diagonal = float(np.linalg.norm(case.mesh.extents))
    above = -np.inf if case.table is None else case.table + MARGIN
    figures = (
        welded.body_count,
        "yes" if welded.is_watertight else "no",
        f"{f_score(welded, case.mesh, 0.01 * diagonal):.4f}",
        f"{100 * chamfer(welded, case.mesh) / diagonal:.4f}",
        f"{f_score(welded, case.mesh, 0.01 * diagonal, above=above):.4f}",
        f"{100 * chamfer(welded, case.mesh, above=above) / diagonal:.4f}",
        f"{colour_error(made.mesh, case.mesh, case.scene, case.cameras):.2f}",
        f"{made.seconds:.1f}",
        f"{made.peak_mb:.0f}",
        len(welded.faces),
    )
    print(LINE.format(case.sensor, case.shape, route, *figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sensors", nargs="*", default=list(SENSORS), choices=SENSORS)
    parser.add_argument("--objects", nargs="*", default=list(OBJECTS), choices=OBJECTS)
    parser.add_argument("--views", type=int, default=24)
    parser.add_argument("--bounds", action="store_true", help="transforms.json has the object's box")
    parser.add_argument("--no-samples", action="store_true", help="without the sample's rows")
    parser.add_argument("--open3d", metavar="PYTHON", help="an interpreter that has Open3D")
    asked = parser.parse_args()

    def cases(folder: Path) -> Iterator[Case]:
        for sensor in asked.sensors:
            for shape in asked.objects:
                yield simulated(folder / sensor / shape, sensor, shape, asked.views, asked.bounds)
        if not asked.no_samples:
            yield from samples(folder / "sample")

    numbers = ("F 1 %", "Chamfer %", "F seen", "Ch. seen", "dE", "s", "MB", "faces")
    print(LINE.format("sensor", "object", "route", "pieces", "closed", *numbers))
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool,
    ):
        for case in cases(Path(name)):
            try:
                report(case, "ours", pool.submit(ours, case.folder).result())
            except Capture2MeshError as error:
                print(f"{case.sensor:22} {case.shape:12} ours    failed: {error}", flush=True)
            print(limit(case), flush=True)
            if asked.open3d:
                report(case, "open3d", open3d(case, asked.open3d))
            shutil.rmtree(case.folder)


if __name__ == "__main__":
    main()
