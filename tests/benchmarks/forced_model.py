"""The `trellis` engine on random weights and forced geometry, and captures of the object that it then makes.

What the benchmarks of a GPU machine share: dataset_gpu.py and gpu_machine.py. The real weights are on a hub that
benchmarks do not reach.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.forced_geometry.sitecustomize import FREQUENCY, RADIUS, WAVE

ROOT = Path(__file__).resolve().parents[2]
VIEWS, SIZE = 8, 1080
TINY_VIEWS, TINY_SIZE = 3, 128
METRES = 0.34  # of the forced object's unit cube
NOISE = 2.0  # of a sensor, 8-bit steps: views have a photograph's file size
PICTURED = 8  # captures that are rendered; of the same pictures others are made, which are not the same capture


def environment(weights: Path, tiny: bool = False) -> dict[str, str]:
    """Variables of a process that runs the engine on random weights; they are written to a folder if it has none.

    tiny: for a machine without a GPU, slow and without detail.
    """
    python = os.environ.get("CAPTURE2MESH_TRELLIS_PYTHON", sys.executable)
    if not (weights / "weights.json").exists():
        command = [python, "-m", "tests.benchmarks.random_weights", str(weights), *(["--tiny"] if tiny else [])]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    forced = str(Path(__file__).resolve().parent / "forced_geometry")
    return {
        "CAPTURE2MESH_WEIGHTS": str(weights / "weights"),
        "CAPTURE2MESH_WEIGHTS_LIST": str(weights / "weights.json"),
        "CAPTURE2MESH_TRELLIS_PYTHON": python,
        "CAPTURE2MESH_TRELLIS_DEVICE": "cpu" if tiny else "cuda",
        "PYTHONPATH": os.pathsep.join(filter(None, [forced, os.environ.get("PYTHONPATH", "")])),
    }


def make_captures(folder: Path, count: int, tiny: bool = False) -> list[Path]:
    """So many captures of the forced object, those that are there already apart; gives their folders."""
    pictures = [folder / f"{index:03}" for index in range(min(count, PICTURED))]
    missing = [capture for capture in pictures if not (capture / "transforms.json").exists()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_make_capture, missing, [tiny] * len(missing)))
    return [_like(pictures[index % len(pictures)], folder / f"{index:03}") for index in range(count)]


def blob(points: NDArray[np.floating]) -> NDArray[np.floating]:
    """About the signed distance of points (n, 3) from the forced object, in the engine's frame."""
    return np.asarray(np.linalg.norm(points, axis=1) - RADIUS - WAVE * np.sin(FREQUENCY * points).prod(axis=1))


def _make_capture(folder: Path, tiny: bool) -> None:
    """The forced object, some 0.25 m across, in colours and from cameras of its own."""
    from tasks.geometry.render import RayScene, render
    from tests.synthetic import OBJECT_CENTRE, field_mesh, orbit_cameras, pattern, solid_colours, write_capture

    views, size = (TINY_VIEWS, TINY_SIZE) if tiny else (VIEWS, SIZE)
    rng = np.random.default_rng(int(folder.name))
    mesh = field_mesh(blob, half=0.5, cells=120)
    mesh.apply_scale(METRES)
    mesh.apply_translation(OBJECT_CENTRE)
    tint = rng.uniform(0.6, 1.0, 3)
    scene = RayScene(mesh, solid_colours(lambda points: tint * pattern(points)))
    cameras = orbit_cameras(mesh, views, size, rng=rng)
    renderings = [render(scene, camera) for camera in cameras]
    for view in renderings:
        view.image[:] = (view.image + rng.normal(scale=NOISE, size=view.image.shape)).clip(0, 255)
    write_capture(folder, cameras, renderings, [view.depth for view in renderings], alpha=True, depth_scale=0.0001)


def _like(pictured: Path, folder: Path) -> Path:
    """Another capture of the same pictures: its transforms.json has another name in it, so nothing of it is cached."""
    if not folder.exists():
        shutil.copytree(pictured, folder, copy_function=os.link)
        transforms = json.loads((pictured / "transforms.json").read_text())
        (folder / "transforms.json").unlink()
        (folder / "transforms.json").write_text(json.dumps(transforms | {"name": folder.name}))
    return folder
