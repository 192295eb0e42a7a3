"""Captures by simulated sensors of an object that stands on a table.

Used by tests/benchmarks/sensors.py, tests and tests/data/make_tabletop_sample.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from tasks.capture.camera import Camera
from tasks.geometry.render import Colours, Hits, RayScene, render
from tests.data.make_sample import mug_scene
from tests.synthetic.captures import SUPERSAMPLE, Truth, write_transforms
from tests.synthetic.colour_camera import ColourCamera
from tests.synthetic.seen import Map, seen
from tests.synthetic.sensors import Sensor
from tests.synthetic.shapes import SHAPES, Points, pattern, shape_mesh, solid_colours
from tests.synthetic.viewpoints import look_at

OBJECTS = (*SHAPES, "mug")

PLACE = np.array([0.04, -0.07, 0.02])  # where the object's foot is, metres: the table is not at 0
MARGIN = 0.005  # of `bounds` around the object, metres
EXTENT = 0.25  # of an object's longest side, metres
TABLE_RADIUS, TABLE_THICKNESS = 0.6, 0.03
BACKDROP = (126, 130, 136)  # beyond the table: sRGB, and out of the depth sensor's reach

DISTANCE = 0.5  # of the cameras from the object's middle, metres
NEAREST_MARGIN = 0.03  # between a sensor's shortest distance and the object, metres
ELEVATIONS = (10.0, 80.0)  # degrees above the table
HAND = 0.03  # radians of roll, share of the distance, and metres of aim that a hand strays


@dataclass(frozen=True)
class TableTruth(Truth):
    """Truth of an object on a table: `mesh` is the object alone, `scene` has both.

    plane: (4,) unit normal and offset of the table's top, normal * p = offset.
    """

    plane: NDArray[np.float64]


def make_sensor_capture(
    folder: Path,
    shape: str,
    sensor: Sensor,
    views: int = 24,
    *,
    colour: ColourCamera | None = None,
    extent: float = EXTENT,
    bounds: bool = False,
    seed: int = 0,
) -> TableTruth:
    """Writes a capture of one of `OBJECTS` on a table: JPEG views without alpha, depth, transforms.json.

    Cameras stand on a dome, 0.5 m from the object's middle, or as far as keeps it beyond the sensor's shortest
    distance. colour: the default colour camera. extent: the object's longest side, metres. bounds: transforms.json
    has the object's box.
    """
    rng = np.random.default_rng(seed)
    mesh, whole, scene = table_scene(shape, extent)
    cameras = dome_cameras(mesh, sensor, views, rng)
    frames = FrameWriter(folder, sensor, colour or ColourCamera(), views, rng)
    for camera in cameras:
        frames.write(scene, whole, camera)
    frames.finish(mesh.bounds + np.array([[-MARGIN], [MARGIN]]) if bounds else None)
    plane = np.array([0.0, 0.0, 1.0, PLACE[2]])
    return TableTruth(folder, mesh, tuple(frames.cameras), scene, plane)


class FrameWriter:
    """Writes the frames of a simulated capture one by one, so that any number fits in memory."""

    def __init__(
        self, folder: Path, sensor: Sensor, colour: ColourCamera, views: int, rng: np.random.Generator
    ) -> None:
        self.cameras: list[Camera] = []
        self._folder, self._sensor, self._colour, self._rng = folder, sensor, colour, rng
        self._gains = colour.gains(views, rng)
        self._files: list[tuple[str, str]] = []
        for name in ("views", "depth"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def write(self, scene: RayScene, mesh: trimesh.Trimesh, camera: Camera, supersample: int = SUPERSAMPLE) -> None:
        """Measures and photographs the scene of a mesh from the depth map's camera."""
        sensor, index = self._sensor, len(self.cameras)
        depth = sensor.deliver(seen(scene, mesh, camera), self._rng)
        scale = sensor.colour_scale
        view = camera.resized(camera.width * scale, camera.height * scale)
        # a large picture of a small depth map is sharp enough without
        rendering = render(scene, view, supersample=supersample if scale == 1 else 1)
        image = np.where(rendering.mask[..., None], rendering.image, np.array(BACKDROP, np.uint8))
        files = (f"views/view_{index:04d}.jpg", f"depth/view_{index:04d}.{'png' if sensor.step else 'npy'}")
        self._colour.save(self._colour.picture(image, self._gains[index], self._rng), self._folder / files[0])
        _save_depth(depth, sensor.step, self._folder / files[1])
        self.cameras.append(view)
        self._files.append(files)

    def finish(self, bounds: NDArray[np.float64] | None = None) -> None:
        """Writes transforms.json, with the object's box (2, 3) if there is one."""
        write_transforms(self._folder, self.cameras, self._files, self._sensor.step or 0.001, bounds)


@lru_cache(maxsize=1)
def table_scene(shape: str, extent: float = EXTENT) -> tuple[trimesh.Trimesh, trimesh.Trimesh, RayScene]:
    """One of `OBJECTS` on the table, as `on_table` gives it."""
    return on_table(*_object(shape), extent)


def on_table(
    mesh: trimesh.Trimesh, paint: Colours, extent: float = EXTENT
) -> tuple[trimesh.Trimesh, trimesh.Trimesh, RayScene]:
    """A painted object on the table: its mesh, the mesh of both, and the painted scene of both, in the capture frame.

    extent: the object's longest side there, metres.
    """
    scale = extent / mesh.extents.max()
    low, high = mesh.bounds
    foot = np.array([*(low + high)[:2] / 2, low[2]])
    standing = trimesh.Trimesh((mesh.vertices - foot) * scale + PLACE, mesh.faces, process=False)
    table = trimesh.creation.cylinder(TABLE_RADIUS, TABLE_THICKNESS, sections=96)
    table.apply_translation([PLACE[0], PLACE[1], PLACE[2] - TABLE_THICKNESS / 2])
    whole = trimesh.util.concatenate([standing, table])

    def colours(hits: Hits) -> NDArray[np.float32]:
        result = table_top(hits.points).astype(np.float32)
        on = np.flatnonzero(hits.face < len(standing.faces))
        part = Hits(*(values[on] for values in (hits.ray, hits.face, hits.barycentric, hits.distance, hits.points)))
        result[on] = paint(replace(part, points=(part.points - PLACE) / scale + foot))
        return result

    return standing, whole, RayScene(whole, colours)


def dome_cameras(mesh: trimesh.Trimesh, sensor: Sensor, views: int, rng: np.random.Generator) -> tuple[Camera, ...]:
    """Depth cameras on a spiral over the upper half of a sphere about a mesh, held by hand."""
    middle = mesh.bounds.mean(axis=0)
    reach = float(np.linalg.norm(mesh.vertices - middle, axis=1).max())
    distance = max(DISTANCE, sensor.nearest + reach + NEAREST_MARGIN)
    low, high = np.sin(np.radians(ELEVATIONS))
    height = low + (high - low) * (np.arange(views) + 0.5) / views
    azimuth = np.arange(views) * np.pi * (3 - np.sqrt(5)) + rng.uniform(0, 2 * np.pi)
    level = np.sqrt(1 - height**2)
    offsets = np.column_stack([level * np.cos(azimuth), level * np.sin(azimuth), height])
    offsets *= distance * (1 + HAND * rng.uniform(0, 2, views))[:, None]
    aims = middle + HAND * rng.uniform(-1, 1, (views, 3))
    rolls = HAND * rng.uniform(-1, 1, views)
    return tuple(
        sensor.camera(look_at(middle + offset, aim, roll=roll))
        for offset, aim, roll in zip(offsets, aims, rolls, strict=True)
    )


def table_top(points: Points) -> NDArray[np.floating]:
    """The table's colours at points (n, 3), 0..255: boards with a grain."""
    x, y = points[:, 0] - PLACE[0], points[:, 1] - PLACE[1]
    board = np.floor(y / 0.11)
    grain = np.sin(260 * y + 9 * np.sin(7 * x + 2.3 * board)) + 0.6 * np.sin(95 * y - 31 * x + board)
    shade = 0.86 + 0.07 * np.sin(12.9 * board) + 0.05 * grain
    seam = np.abs(y / 0.11 - board - 0.5) > 0.488
    return np.array([188.0, 150.0, 108.0]) * (shade * np.where(seam, 0.55, 1.0))[:, None]


def _object(shape: str) -> tuple[trimesh.Trimesh, Colours]:
    if shape == "mug":
        mesh, scene = mug_scene()
        return mesh, scene.colours
    paint: Callable[[Hits], NDArray[np.float32]] = solid_colours(pattern)
    return shape_mesh(shape), paint


def _save_depth(depth: Map, step: float, path: Path) -> None:
    if not step:
        np.save(path, depth)
        return
    units = np.rint(depth / step).clip(0, 65535).astype(np.uint16)
    Image.fromarray(units).save(path, compress_level=1)
