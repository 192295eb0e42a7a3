"""A simulated walk through a furnished room, of any number of frames. Used by benchmarks and tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.geometry.render import Hits, RayScene
from tests.synthetic.captures import Truth
from tests.synthetic.colour_camera import ColourCamera
from tests.synthetic.sensors import KinectV1, Sensor
from tests.synthetic.shapes import SHAPES, field_mesh
from tests.synthetic.tabletop import FrameWriter
from tests.synthetic.viewpoints import look_at

ROOM = (5.0, 4.0, 2.6)  # metres; the floor at z = 0, the middle at x = y = 0
WALL_COLOUR = (198, 190, 176)
# (low corner, high corner, sRGB), metres: what stands in the room, by its boxes
FURNITURE = (
    ((-0.60, -0.40, 0.70), (0.60, 0.40, 0.74), (160, 112, 70)),  # a table with four legs
    ((-0.56, -0.36, 0.00), (-0.50, -0.30, 0.70), (130, 90, 56)),
    ((0.50, -0.36, 0.00), (0.56, -0.30, 0.70), (130, 90, 56)),
    ((-0.56, 0.30, 0.00), (-0.50, 0.36, 0.70), (130, 90, 56)),
    ((0.50, 0.30, 0.00), (0.56, 0.36, 0.70), (130, 90, 56)),
    ((-2.40, -1.90, 0.00), (-1.80, -0.30, 0.42), (86, 104, 136)),  # a sofa and its back
    ((-2.48, -1.90, 0.00), (-2.40, -0.30, 0.85), (76, 92, 122)),
    ((1.90, -1.20, 0.00), (2.45, 0.40, 1.90), (206, 202, 192)),  # a cupboard
    ((-1.40, 1.65, 0.00), (0.20, 1.98, 0.80), (148, 72, 60)),  # a sideboard
    ((1.00, 1.40, 0.00), (1.50, 1.90, 0.45), (94, 128, 84)),  # a stool
)
# (shape, where its middle is, metres, size of its longest side)
SOLIDS = (
    ("sphere", (-0.25, 0.10, 0.84), 0.20),
    ("torus", (0.25, -0.10, 0.78), 0.24),
    ("rounded_box", (-0.90, 1.80, 0.87), 0.30),
    ("concave", (-0.20, 1.80, 0.90), 0.26),
    ("sphere", (1.25, 1.65, 0.60), 0.30),
)
SOLID_COLOURS = ((196, 64, 52), (230, 176, 60), (64, 128, 160), (228, 222, 210), (88, 150, 92))
CELLS = 48  # of marching cubes along a solid

EYE_HEIGHT = 1.45
PATH = (1.35, 1.05)  # half axes of the walk's ellipse around the table, metres
ROUNDS = 2.0  # of a walk, whatever its frames: 1,000 of them turn by some 2 degrees each


def make_room_capture(
    folder: Path, frames: int, sensor: Sensor | None = None, *, colour: ColourCamera | None = None, seed: int = 0
) -> Truth:
    """Writes a walk of `frames` frames, one by one; the truth's mesh is the room with all that stands in it.

    sensor: Kinect v1 unless given. colour: the default colour camera. Some 0.4 s of one core a frame of 640x480.
    """
    rng = np.random.default_rng(seed)
    sensor = sensor or KinectV1()
    mesh, scene = room_scene()
    writer = FrameWriter(folder, sensor, colour or ColourCamera(), frames, rng)
    for camera in walk(sensor, frames):
        writer.write(scene, mesh, camera, supersample=1)
    writer.finish()
    return Truth(folder, mesh, tuple(writer.cameras), scene)


@lru_cache(maxsize=1)
def room_scene() -> tuple[trimesh.Trimesh, RayScene]:
    """The room's mesh (open surfaces and solids) and its painted scene, z-up metres."""
    x, y, z = ROOM
    parts, colours = [_box((-x / 2, -y / 2, 0), (x / 2, y / 2, z))], [WALL_COLOUR]
    for low, high, colour in FURNITURE:
        parts.append(_box(low, high))
        colours.append(colour)
    for (shape, middle, size), colour in zip(SOLIDS, SOLID_COLOURS, strict=True):
        solid = field_mesh(SHAPES[shape], 0.17, CELLS)
        parts.append(trimesh.Trimesh(solid.vertices * size / solid.extents.max() + middle, solid.faces, process=False))
        colours.append(colour)
    mesh = trimesh.util.concatenate(parts)
    counts = [len(part.faces) for part in parts]
    of_face = np.repeat(np.array(colours, np.float32), counts, axis=0)
    wall = np.repeat(np.arange(len(parts)) == 0, counts)

    def paint(hits: Hits) -> NDArray[np.float32]:
        p = hits.points
        marks = np.sin(40 * p[:, 0] + 3 * np.sin(9 * p[:, 2])) * np.cos(37 * p[:, 1]) * np.cos(31 * p[:, 2])
        shade = np.where(wall[hits.face], _wall_shade(p), 0.9 + 0.1 * np.tanh(4 * marks))
        return (of_face[hits.face] * shade[:, None]).astype(np.float32)

    return mesh, RayScene(mesh, paint)


def walk(sensor: Sensor, frames: int) -> tuple[Camera, ...]:
    """Depth cameras on an ellipse around the table that look across it, and to the walls by turns."""
    turn = 2 * np.pi * ROUNDS * np.arange(frames) / frames
    eyes = np.column_stack([PATH[0] * np.cos(turn), PATH[1] * np.sin(turn), EYE_HEIGHT + 0.15 * np.sin(2.3 * turn)])
    # a slow swing of the gaze: 0 = at the table, +-pi = outwards
    swing = 2.6 * np.sin(0.7 * turn)
    gaze = turn + np.pi + swing
    aims = eyes + np.column_stack([np.cos(gaze), np.sin(gaze), -0.35 + 0.25 * np.sin(3.1 * turn)])
    return tuple(sensor.camera(look_at(eye, aim)) for eye, aim in zip(eyes, aims, strict=True))


def _box(low: tuple[float, float, float], high: tuple[float, float, float]) -> trimesh.Trimesh:
    return trimesh.creation.box(bounds=np.array([low, high]))


def _wall_shade(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Floor tiles, and pictures on the walls: factors (m,) of the walls' colour."""
    tiles = np.sin(2 * np.pi * p[:, 0] / 0.4) * np.sin(2 * np.pi * p[:, 1] / 0.4)
    floor = 0.62 + 0.1 * np.tanh(12 * tiles)
    along = p[:, 0] + p[:, 1]
    framed = (np.abs(p[:, 2] - 1.5) < 0.3) & (np.abs((along + 0.4) % 0.9 - 0.45) < 0.3)
    picture = 0.6 + 0.35 * np.sin(29 * along) * np.sin(23 * p[:, 2])
    return np.where(p[:, 2] < 0.01, floor, np.where(framed, picture, 0.95 + 0.03 * np.sin(50 * p[:, 2])))
