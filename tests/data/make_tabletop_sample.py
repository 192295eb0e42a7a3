"""Makes the second bundled sample, tests/data/hen: a painted wooden hen on a table, as a RealSense D435 would see it.

24 JPEG views without alpha, depth in whole millimetres with the sensor's noise and holes, no `bounds`. Shape and paint
are known exactly. From the repository root: python -m tests.data.make_tabletop_sample
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.geometry.render import Colours, Hits
from tests.data.make_sample import RGB, brush, rounded_rectangle, smooth_union
from tests.synthetic.colour_camera import ColourCamera
from tests.synthetic.sensors import RealSenseD435, Sensor
from tests.synthetic.shapes import Points, field_mesh
from tests.synthetic.tabletop import FrameWriter, TableTruth, on_table
from tests.synthetic.viewpoints import look_at

FOLDER = Path(__file__).parent / "hen"
DISTANCE = 0.33  # of the cameras from the hen's middle, metres
RINGS = ((5, 9), (34, 9), (64, 6))  # (elevation in degrees, views)
STRAY = 0.012  # of a hand: metres of aim, radians of roll
SEED = 12
EXTENT = 0.225  # of the hen from beak to tail, metres
CUBE_HALF, GRID = 0.15, 200

# The hen, in metres: z upwards, the beak towards +x, y across
BODY, BODY_AXES = (-0.005, 0.0, 0.003), (0.078, 0.055, 0.055)
NECK, HEAD, HEAD_RADIUS = (0.035, 0.0, 0.020), (0.066, 0.0, 0.078), 0.033
BEAK, BEAK_AXES = (0.103, 0.0, 0.072), (0.020, 0.011, 0.011)
TAIL, TAIL_AXES, TAIL_TURN = (-0.078, 0.0, 0.048), (0.055, 0.020, 0.030), np.radians(48)
WING, WING_AXES, WING_TURN = (-0.012, 0.048, 0.010), (0.050, 0.012, 0.028), np.radians(14)
COMB = (((0.044, 0.112), 0.012), ((0.064, 0.119), 0.014), ((0.084, 0.112), 0.011))  # ((x, z), radius)
COMB_THICKNESS = 0.75  # of its width against its height
EYE, EYE_RADIUS = (0.080, 0.084), 0.0075  # (x, z)
FOOT_RADIUS, FOOT_HALF, FOOT_HEIGHT = 0.040, 0.011, -0.060

# The paint: sRGB
CREAM, RUST, BARN_RED, YOLK = (244, 232, 206), (190, 92, 52), (196, 48, 44), (244, 180, 56)
NAVY, TEAL, SKY, MOSS, INK = (38, 56, 112), (54, 138, 138), (146, 192, 206), (92, 128, 70), (28, 26, 30)
FEATHER, FEATHER_STEP = 0.0092, 0.0105  # radius of a painted feather, distance between two rows
LIGHT_FROM_BELOW = 0.7  # of that from above: a soft sky, baked into the colours as a function of the normal


def make_tabletop_sample(folder: Path = FOLDER, sensor: Sensor = RealSenseD435(), cells: int = GRID) -> TableTruth:
    """Writes the sample capture into `folder`; a coarser sensor and hen make a quick test."""
    rng = np.random.default_rng(SEED)
    mesh, whole, scene = on_table(*painted_hen(cells), EXTENT)
    cameras = ring_cameras(mesh, sensor, rng)
    frames = FrameWriter(folder, sensor, ColourCamera(quality=86), len(cameras), rng)
    for camera in cameras:
        frames.write(scene, whole, camera)
    frames.finish()
    return TableTruth(folder, mesh, tuple(frames.cameras), scene, np.array([0.0, 0.0, 1.0, mesh.bounds[0, 2]]))


def painted_hen(cells: int = GRID) -> tuple[trimesh.Trimesh, Colours]:
    """The true mesh, and its colours at points that rays hit."""
    mesh = field_mesh(hen, CUBE_HALF, cells)
    corner_normals = mesh.vertex_normals[mesh.faces]

    def colours(hits: Hits) -> NDArray[np.float32]:
        upwards = np.einsum("mc,mc->m", hits.barycentric, corner_normals[hits.face, :, 2])
        light = (1 + LIGHT_FROM_BELOW + (1 - LIGHT_FROM_BELOW) * upwards) / 2
        return (paint(hits.points) * light[:, None]).astype(np.float32)

    return mesh, colours


def ring_cameras(mesh: trimesh.Trimesh, sensor: Sensor, rng: np.random.Generator) -> tuple[Camera, ...]:
    """Depth cameras on rings around and above a mesh, held by hand."""
    middle = mesh.bounds.mean(axis=0)
    cameras = []
    for ring, (degrees, views) in enumerate(RINGS):
        height, level = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
        for turn in 2 * np.pi * (np.arange(views) + ring / len(RINGS)) / views:
            eye = middle + DISTANCE * np.array([level * np.cos(turn), level * np.sin(turn), height])
            aim = middle + STRAY * rng.uniform(-1, 1, 3)
            cameras.append(sensor.camera(look_at(eye, aim, roll=STRAY * rng.uniform(-1, 1))))
    return tuple(cameras)


def hen(p: Points) -> NDArray[np.floating]:
    """Signed distance (n,) to the hen, nearly so away from its surface."""
    solid = smooth_union(_body(p), _neck(p), 0.030)
    solid = smooth_union(solid, _tail(p), 0.030)
    solid = smooth_union(solid, _wing(p), 0.006)
    solid = smooth_union(solid, _beak(p), 0.006)
    solid = smooth_union(solid, _comb(p), 0.005)
    return smooth_union(solid, _foot(p), 0.008)


def paint(p: Points) -> NDArray[np.floating]:
    """The hen's colours at surface points (n, 3), as (n, 3) in 0..255."""
    x, z = p[:, 0], p[:, 2]
    colour = np.tile(np.array(CREAM, float), (len(p), 1))
    back = 0.030 - z + 0.1 * np.abs(x)
    colour = _feathers(colour, x, z, (CREAM, SKY, CREAM), SKY)
    colour = brush(colour, back, RUST)
    colour = _speckles(colour, p, back)

    # the neck's collar, in scallops over the breast
    along = (p - np.array(NECK)) @ _unit(np.array(HEAD) - NECK)
    angle = np.arctan2(p[:, 1], x - NECK[0])
    collar = 0.010 + 0.004 * np.abs(np.sin(5 * angle)) - along
    front = np.maximum(collar, _neck(p) - 0.030)
    for inset, rgb in ((0.0, NAVY), (0.003, YOLK), (0.009, NAVY), (0.012, RUST)):
        colour = brush(colour, front + inset, rgb)

    # the wings: rows of feathers with a rim
    wing = np.maximum(_wing(p) - 0.0015, 0.040 - np.abs(p[:, 1]))
    colour = brush(colour, wing, NAVY)
    along, across = _turned(x - WING[0], z - WING[2], WING_TURN)
    inner = (np.hypot(along / WING_AXES[0], across / WING_AXES[2]) - 0.88) * WING_AXES[2]
    plumes = _feathers(colour, along, across, (TEAL, CREAM, YOLK), NAVY)
    colour = brush(colour, np.maximum(wing, inner), plumes)

    # the tail: bands along it
    reach, _ = _turned(x - TAIL[0], z - TAIL[2], -TAIL_TURN)
    tail = np.maximum(_tail(p) - 0.002, reach + 0.004)
    colour = brush(colour, tail, NAVY)
    for start, width, rgb in ((-0.012, 0.005, YOLK), (-0.023, 0.006, BARN_RED), (-0.036, 0.007, TEAL)):
        colour = brush(colour, np.maximum(tail, np.abs(reach - start) - width / 2), rgb)
    colour = brush(colour, np.maximum(tail, reach + 0.046), CREAM)

    colour = brush(colour, _comb(p) - 0.001, BARN_RED)
    colour = brush(colour, _beak(p) - 0.001, YOLK)
    eye = np.maximum(np.hypot(x - EYE[0], z - EYE[1]) - EYE_RADIUS, 0.015 - np.abs(p[:, 1]))
    for inset, rgb in ((0.0, CREAM), (0.0022, INK)):
        colour = brush(colour, eye + inset, rgb)

    # the foot: moss, with a string of dots
    foot = np.maximum(_foot(p) - 0.0015, z - FOOT_HEIGHT - FOOT_HALF)
    colour = brush(colour, foot, MOSS)
    step = 2 * np.pi / 20
    turn = np.arctan2(p[:, 1], x)
    dots = np.hypot(((turn + step / 2) % step - step / 2) * FOOT_RADIUS, z - FOOT_HEIGHT) - 0.0035
    return brush(colour, np.maximum(dots, foot), YOLK)


def _feathers(
    colour: NDArray[np.floating], x: Points, z: Points, colours: tuple[RGB, ...], rim: RGB
) -> NDArray[np.floating]:
    """Rows of overlapping feathers that point backwards (-x), each with a rim."""
    for row in range(-9, 10):
        middle = row * FEATHER_STEP
        offset = (z + row % 2 * FEATHER) % (2 * FEATHER) - FEATHER
        distance = np.maximum(np.hypot(x - middle, offset) - FEATHER, x - middle - FEATHER_STEP)
        colour = brush(colour, distance, rim)
        colour = brush(colour, distance + 0.0013, colours[row % len(colours)])
    return colour


def _speckles(colour: NDArray[np.floating], p: Points, back: NDArray[np.floating]) -> NDArray[np.floating]:
    """Cream dots on the back."""
    x, y = p[:, 0], p[:, 1]
    row = np.floor(x / 0.010)
    distance = np.hypot(x % 0.010 - 0.005, (y + row % 2 * 0.006) % 0.012 - 0.006) - 0.0026
    return brush(colour, np.maximum(distance, back + 0.003), CREAM)


def _body(p: Points) -> NDArray[np.floating]:
    return _ellipsoid(p - np.array(BODY), BODY_AXES)


def _neck(p: Points) -> NDArray[np.floating]:
    """A cone with round ends, from the breast to the head."""
    axis = np.array(HEAD) - NECK
    share = np.clip((p - np.array(NECK)) @ axis / (axis @ axis), 0, 1)
    distance = np.linalg.norm(p - np.array(NECK) - share[:, None] * axis, axis=1)
    return distance - (0.040 + share * (HEAD_RADIUS - 0.040))


def _tail(p: Points) -> NDArray[np.floating]:
    along, across = _turned(p[:, 0] - TAIL[0], p[:, 2] - TAIL[2], -TAIL_TURN)
    return _ellipsoid(np.column_stack([along, p[:, 1], across]), TAIL_AXES)


def _wing(p: Points) -> NDArray[np.floating]:
    """Both wings."""
    along, across = _turned(p[:, 0] - WING[0], p[:, 2] - WING[2], WING_TURN)
    return _ellipsoid(np.column_stack([along, np.abs(p[:, 1]) - WING[1], across]), WING_AXES)


def _beak(p: Points) -> NDArray[np.floating]:
    return _ellipsoid(p - np.array(BEAK), BEAK_AXES)


def _comb(p: Points) -> NDArray[np.floating]:
    """Three flattened balls on the head."""
    return np.minimum.reduce([_ellipsoid(p - np.array([x, 0, z]), (r, COMB_THICKNESS * r, r)) for (x, z), r in COMB])


def _foot(p: Points) -> NDArray[np.floating]:
    return rounded_rectangle(np.hypot(p[:, 0], p[:, 1]), p[:, 2] - FOOT_HEIGHT, FOOT_RADIUS, FOOT_HALF, 0.003)


def _ellipsoid(p: Points, axes: tuple[float, float, float]) -> NDArray[np.floating]:
    """Distance to first order (https://iquilezles.org/articles/ellipsoids)."""
    near = np.linalg.norm(p / np.array(axes), axis=1)
    return near * (near - 1) / np.maximum(np.linalg.norm(p / np.square(axes), axis=1), 1e-9)


def _turned(x: Points, z: Points, angle: float) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Coordinates along and across an axis that rises by `angle` from +x."""
    return x * np.cos(angle) + z * np.sin(angle), z * np.cos(angle) - x * np.sin(angle)


def _unit(vector: NDArray[np.floating]) -> NDArray[np.floating]:
    return vector / np.linalg.norm(vector)


if __name__ == "__main__":
    make_tabletop_sample()
