"""Cameras found from views and depth alone, against the truth: `python tests/benchmarks/cameras.py [--rows NAME ...]`.

A line says how many views were posed, the error of their rotations (degrees) and positions (mm) after the best motion
between the two worlds, how many are wrong by more than 3 degrees, processor seconds, and what was told.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.cameras.finding import FoundCameras, find
from tasks.capture.views import View
from tasks.geometry.render import RayScene, render
from tests.benchmarks.routes import SAMPLE, load
from tests.synthetic import SHAPES, make_capture, orbit_cameras, shape_mesh, solid_colours
from tests.synthetic.rooms import make_room_capture
from tests.synthetic.sensors import SENSORS
from tests.synthetic.tabletop import BACKDROP, DISTANCE, OBJECTS, make_sensor_capture, table_scene
from tests.synthetic.viewpoints import cameras_around

HEN = SAMPLE.parent / "hen"
WRONG = 3.0  # degrees
ELEVATION, SWING, FILL = np.radians(35.0), np.radians(8.0), 0.5  # of a walk around a table
NEAR = np.radians(5.0)  # of the most typical view: those that the two worlds are aligned by
LINE = "{:32} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>7}  {}"


def rows() -> dict[str, Callable[[Path], list[View]]]:
    """Makers of captures in a folder, by the name of their row."""
    made: dict[str, Callable[[Path], list[View]]] = {"mug": lambda _: load(SAMPLE), "hen": lambda _: load(HEN)}
    made |= {f"exact {shape}": partial(_exact, shape) for shape in SHAPES}
    made |= {f"{sensor} {shape}": partial(_sensed, sensor, shape) for sensor in SENSORS for shape in OBJECTS}
    made |= {"walk 60": partial(_walk, 60), "walk 200": partial(_walk, 200)}
    made |= {f"walk-around {frames}": partial(walk_around, frames) for frames in (12, 60, 200)}
    made |= {f"plain {shape}": partial(_plain, shape, 24) for shape in SHAPES}
    made |= {"plain sphere, 5 views": partial(_plain, "sphere", 5), "two objects": _two_objects}
    return made


def _exact(shape: str, folder: Path) -> list[View]:
    make_capture(folder, shape)
    return load(folder)


def _sensed(sensor: str, shape: str, folder: Path) -> list[View]:
    make_sensor_capture(folder, shape, SENSORS[sensor])
    return load(folder)


def _walk(frames: int, folder: Path) -> list[View]:
    make_room_capture(folder, frames, SENSORS["realsense_d435"])
    return load(folder)


def walk_around(frames: int, _: Path) -> list[View]:
    """Frames once around a bowl on a table, 512 pixels, without alpha: exact depth of both."""
    mesh, _, scene = table_scene("concave")
    turn = 2 * np.pi * np.arange(frames) / frames
    height = ELEVATION + SWING * np.sin(3 * turn)
    offsets = DISTANCE * np.column_stack([np.cos(turn) * np.cos(height), np.sin(turn) * np.cos(height), np.sin(height)])
    views = []
    for index, camera in enumerate(cameras_around(mesh, offsets, 512, rolls=np.zeros(frames), fill=FILL)):
        seen = render(scene, camera)
        picture = np.where(seen.mask[..., None], seen.image, np.array(BACKDROP, np.uint8))
        views.append(View(f"frame_{index:04d}", picture, np.ones_like(seen.mask), seen.depth, camera))
    return views


def _plain(shape: str, count: int, folder: Path) -> list[View]:
    """An object of one colour."""
    mesh = shape_mesh(shape)
    scene = RayScene(mesh, solid_colours(lambda points: np.full((len(points), 3), 150.0)))
    views = []
    for index, camera in enumerate(orbit_cameras(mesh, count, 256, rng=np.random.default_rng(0))):
        seen = render(scene, camera)
        views.append(View(f"view_{index:03d}", seen.image, seen.mask, seen.depth, camera))
    return views


def _two_objects(folder: Path) -> list[View]:
    """Every other view shows another object."""
    one, other = _exact("torus", folder / "one"), load(SAMPLE)
    return [replace(view, name=f"view_{k:03d}") for k, view in enumerate([*one[::2], *other[::2]])]


def report(name: str, views: Sequence[View], found: FoundCameras, seconds: float) -> None:
    """Print one line."""
    posed = [view for view in views if view.name in found.cameras]
    told = found.refusal or found.ambiguous or ""
    if not posed:
        print(LINE.format(name, f"0/{len(views)}", "", "", "", "", "", f"{seconds:.0f}", told), flush=True)
        return
    true = np.stack([view.camera.camera_to_world for view in posed if view.camera is not None])
    got = np.stack([found.cameras[view.name].camera_to_world for view in posed])
    relative = Rotation.from_matrix(true[:, :3, :3] @ np.swapaxes(got[:, :3, :3], 1, 2))
    apart = np.stack([(relative * each.inv()).magnitude() for each in relative])
    near = apart[np.median(apart, axis=1).argmin()] < NEAR
    between = relative[near].mean()
    turned = np.degrees((relative * between.inv()).magnitude())
    shifts = true[:, :3, 3] - between.apply(got[:, :3, 3])
    shifted = 1e3 * np.linalg.norm(shifts - np.median(shifts[near], axis=0), axis=1)
    figures = (
        f"{len(posed)}/{len(views)}",
        f"{np.median(turned):.3f}",
        f"{turned.max():.3f}",
        f"{np.median(shifted):.2f}",
        int((turned > WRONG).sum()),
        f"{found.focal_px:.1f}",
        f"{seconds:.0f}",
    )
    print(LINE.format(name, *figures, told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(rows()), choices=rows(), metavar="NAME")
    parser.add_argument("--unknown-focal", action="store_true", help="the focal length is solved for as well")
    asked = parser.parse_args()
    print(LINE.format("capture", "posed", "median", "max", "mm", "wrong", "focal", "s", "told"))
    for name in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            views = rows()[name](Path(folder))
            given = [replace(view, camera=None) for view in views] if asked.unknown_focal else views
            begun = time.process_time()
            report(name, views, find(given), time.process_time() - begun)


if __name__ == "__main__":
    main()
