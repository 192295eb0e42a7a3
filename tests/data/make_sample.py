"""Makes the bundled sample, tests/data/mug: a painted mug, 24 views with depth. Its shape and paint are known exactly.

From the repository root: python -m tests.data.make_sample
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from tasks.capture.camera import Camera
from tasks.geometry.render import Hits, RayScene, render
from tests.synthetic import SUPERSAMPLE, Points, Truth, cameras_around, field_mesh, write_capture

FOLDER = Path(__file__).parent / "mug"
SIZE = 512
DISTANCE = 0.45
FRAME_FILL = 0.97
DEPTH_SCALE = 0.00005
RINGS = ((8, 6), (32, 6), (56, 5), (80, 2), (-18, 3), (-52, 2))  # (elevation in degrees, views)

# The mug, in metres: z upwards, its middle at the origin, the handle towards +x
HALF_HEIGHT, RADIUS, BELLY, WALL, FLOOR = 0.050, 0.040, 0.004, 0.0055, 0.008
HANDLE_REACH, HANDLE_LOOP, HANDLE_STRAIGHT, HANDLE_THICKNESS = 0.047, 0.019, 0.011, 0.0062
CUBE_HALF, GRID = 0.078, 210

RGB = tuple[int, int, int]
# The paint: sRGB, metres
CREAM, COBALT, TERRACOTTA, LEAF = (247, 239, 222), (32, 66, 148), (212, 86, 54), (78, 146, 98)
YOLK, TURQUOISE, MINT, CLAY, BROWN = (246, 188, 62), (112, 188, 190), (178, 218, 208), (208, 166, 132), (150, 96, 68)
BRUSH = 0.0004  # softness of a painted edge
FLOWERS, FLOWER_HEIGHT, FLOWER_RADIUS = 8, 0.0120, 0.0135
LINES = ((0.0345, 0.0011), (0.0385, 0.0005), (-0.0105, 0.0011))  # (height, half width)
SCALES, SCALE_TOP, SCALE_STEP, SCALE_ROWS, SCALE_RADIUS = 20, -0.0105, 0.0066, 6, 0.0066
DOT_STEP, DOT_RADIUS = 0.0075, 0.0021
RIM, FOOT = 0.0040, 0.0025
SPIRAL_PITCH, SPIRAL_RADIUS = 0.0042, 0.021
LIGHT_FROM_BELOW = 0.78  # of that from above: a soft sky, baked into the colours as a function of the normal
CAVITY_SHADE = 0.25  # by how much the mug's floor is darker than its rim


def make_sample(folder: Path = FOLDER) -> Truth:
    """Writes the sample capture into `folder`."""
    mesh, scene = mug_scene()
    cameras = mug_cameras(mesh)
    views = [render(scene, camera, supersample=SUPERSAMPLE) for camera in cameras]
    write_capture(folder, cameras, views, [view.depth for view in views], alpha=True, depth_scale=DEPTH_SCALE)
    return Truth(folder, mesh, cameras, scene)


def mug_scene(cells: int = GRID) -> tuple[trimesh.Trimesh, RayScene]:
    """The true mesh, and its painted scene, in the capture frame."""
    mesh = field_mesh(mug, CUBE_HALF, cells)
    corner_normals = mesh.vertex_normals[mesh.faces]

    def colours(hits: Hits) -> NDArray[np.float32]:
        upwards = np.einsum("mc,mc->m", hits.barycentric, corner_normals[hits.face, :, 2])
        light = (1 + LIGHT_FROM_BELOW + (1 - LIGHT_FROM_BELOW) * upwards) / 2
        return (paint(hits.points) * light[:, None]).astype(np.float32)

    return mesh, RayScene(mesh, colours)


def mug_cameras(mesh: trimesh.Trimesh) -> tuple[Camera, ...]:
    """Rings of cameras above, beside and below the mug."""
    elevation = np.radians(np.concatenate([np.full(views, degrees) for degrees, views in RINGS]))
    turns = np.concatenate([(np.arange(views) + ring / len(RINGS)) / views for ring, (_, views) in enumerate(RINGS)])
    level, azimuth = np.cos(elevation), 2 * np.pi * turns
    offsets = DISTANCE * np.column_stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)])
    return cameras_around(mesh, offsets, SIZE, rolls=np.zeros(len(offsets)), fill=FRAME_FILL)


def mug(p: Points) -> NDArray[np.floating]:
    """Signed distance (n,) to the mug, nearly so away from its surface."""
    r, z = np.hypot(p[:, 0], p[:, 1]), p[:, 2]
    cavity = rounded_rectangle(r - _belly(z), z - FLOOR - HALF_HEIGHT, RADIUS - WALL, 2 * HALF_HEIGHT, 0.014)
    foot = rounded_rectangle(r, z + HALF_HEIGHT, 0.028, 0.002, 0.001)
    solid = smooth_union(_body(r, z), _handle(p), 0.010)
    solid = _smooth_cut(_smooth_cut(solid, cavity, 0.003), foot, 0.002)
    return _smooth_cut(solid, HALF_HEIGHT - z, 0.004)


def paint(p: Points) -> NDArray[np.floating]:
    """The mug's colours at surface points (n, 3), as (n, 3) in 0..255."""
    r, z, angle = np.hypot(p[:, 0], p[:, 1]), p[:, 2], np.arctan2(p[:, 1], p[:, 0])
    body = _body(r, z)
    colour = np.tile(np.array(CREAM, float), (len(p), 1))
    colour = _scales(colour, angle, z)
    colour = _flowers(colour, angle + np.pi / FLOWERS, z)  # leaves, not a flower, behind the handle
    for height, half_width in LINES:
        colour = brush(colour, np.abs(z - height) - half_width, COBALT)
    colour = brush(colour, _handle(p) - body, COBALT)
    dots = np.hypot(p[:, 1], (z + DOT_STEP / 2) % DOT_STEP - DOT_STEP / 2) - DOT_RADIUS
    ends = np.abs(z) - 2.5 * DOT_STEP
    colour = brush(colour, np.maximum.reduce([dots, ends, HANDLE_REACH + HANDLE_LOOP - p[:, 0]]), CREAM)

    inside = np.maximum(body + WALL / 2, FLOOR / 2 - HALF_HEIGHT - z)
    colour = brush(colour, inside, TURQUOISE)
    colour = brush(colour, np.maximum(inside, _flower(p[:, 0], p[:, 1], 0.022)), CREAM)
    colour = brush(colour, np.maximum(inside, r - 0.008), YOLK)
    depth = np.clip((HALF_HEIGHT - z) / (2 * HALF_HEIGHT), 0, 1)
    colour = colour * (1 - CAVITY_SHADE * depth * (inside < 0))[:, None]

    colour = brush(colour, HALF_HEIGHT - RIM - z, COBALT)
    below = z + HALF_HEIGHT - FOOT
    colour = brush(colour, below, CLAY)
    arm = (r / SPIRAL_PITCH - angle / (2 * np.pi)) % 1 - 0.5
    spiral = np.abs(arm) * SPIRAL_PITCH - 0.0008
    return brush(colour, np.maximum.reduce([spiral, r - SPIRAL_RADIUS, below]), BROWN)


def _scales(colour: NDArray[np.floating], angle: Points, z: Points) -> NDArray[np.floating]:
    """Rows of overlapping fish scales around the mug's lower half, the upper over the lower."""
    for row in reversed(range(SCALE_ROWS)):
        height = SCALE_TOP - row * SCALE_STEP
        distance = np.hypot(_around(angle + row % 2 * np.pi / SCALES, SCALES), z - height) - SCALE_RADIUS
        above = z - height - SCALE_STEP
        colour = brush(colour, np.maximum(distance, above), COBALT)
        colour = brush(colour, np.maximum(distance + 0.0011, above), (TURQUOISE, CREAM, MINT)[row % 3])
    return brush(colour, SCALE_TOP - z, CREAM)


def _flowers(colour: NDArray[np.floating], angle: Points, z: Points) -> NDArray[np.floating]:
    """A garland of flowers, every other one blue, with leaves and buds in between."""
    x, y = _around(angle, FLOWERS), z - FLOWER_HEIGHT
    between = _around(angle + np.pi / FLOWERS, FLOWERS)
    leaves = np.hypot(np.abs(between) + 0.0055, np.abs(y) - 0.0090) - 0.0085
    colour = brush(colour, leaves, LEAF)
    colour = brush(colour, np.hypot(between, y) - 0.0022, YOLK)
    petals = _flower(x, y, FLOWER_RADIUS)
    blue = np.abs(_around(angle, FLOWERS // 2)) * FLOWERS < np.pi * RADIUS
    colour = brush(colour, petals, TERRACOTTA)
    colour = brush(colour, np.where(blue, petals, np.inf), COBALT)
    colour = brush(colour, np.hypot(x, y) - 0.0056, CREAM)
    return brush(colour, np.hypot(x, y) - 0.0044, YOLK)


def _flower(x: Points, y: Points, radius: float) -> NDArray[np.floating]:
    """Six round petals: negative inside."""
    sector = np.pi / 3
    angle = (np.arctan2(x, y) + sector / 2) % sector - sector / 2
    distance = np.hypot(x, y)
    return np.hypot(distance * np.cos(angle) - 0.66 * radius, distance * np.sin(angle)) - 0.34 * radius


def _around(angle: Points, count: int) -> NDArray[np.floating]:
    """Metres along the mug's wall from the nearest of `count` evenly spaced places."""
    step = 2 * np.pi / count
    return ((angle + step / 2) % step - step / 2) * (RADIUS + BELLY / 2)


def brush(colour: NDArray[np.floating], distance: Points, rgb: RGB | NDArray[np.floating]) -> NDArray[np.floating]:
    """Paints where `distance` is negative; rgb: one colour, or (n, 3) 0..255."""
    weight = np.clip(0.5 - distance / BRUSH, 0, 1)[:, None]
    return colour * (1 - weight) + weight * np.array(rgb, float)


def _body(r: Points, z: Points) -> NDArray[np.floating]:
    """The mug's outer wall and bottom, open-ended upwards."""
    return rounded_rectangle(r - _belly(z), z - HALF_HEIGHT, RADIUS, 2 * HALF_HEIGHT, 0.010)


def _belly(z: Points) -> NDArray[np.floating]:
    return BELLY * np.cos(np.clip(z / HALF_HEIGHT, -1, 1) * (np.pi / 2))


def _handle(p: Points) -> NDArray[np.floating]:
    """A stadium-shaped loop in the xz plane, of slightly flattened section."""
    straight = np.maximum(np.abs(p[:, 2]) - HANDLE_STRAIGHT, 0)
    loop = np.hypot(p[:, 0] - HANDLE_REACH, straight) - HANDLE_LOOP
    return np.hypot(loop, p[:, 1] * 0.8) - HANDLE_THICKNESS


def rounded_rectangle(x: Points, y: Points, half_x: float, half_y: float, radius: float) -> NDArray[np.floating]:
    """Signed distance to a rectangle around the origin, its corners rounded by `radius`."""
    qx, qy = np.abs(x) - (half_x - radius), np.abs(y) - (half_y - radius)
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - radius


def smooth_union(a: Points, b: Points, blend: float) -> NDArray[np.floating]:
    """Polynomial smooth minimum (https://iquilezles.org/articles/smin)."""
    overlap = np.maximum(blend - np.abs(a - b), 0) / blend
    return np.minimum(a, b) - overlap**2 * blend / 4


def _smooth_cut(a: Points, b: Points, blend: float) -> NDArray[np.floating]:
    """What of `a` is outside of `b`."""
    return -smooth_union(-a, b, blend)


if __name__ == "__main__":
    make_sample()
