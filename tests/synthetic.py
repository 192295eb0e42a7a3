"""Captures with known ground truth: solids of known shape and colour, rendered to views and depth; and the metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import point_cloud_utils as pcu
import trimesh
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import marching_cubes

from tasks.capture.camera import Camera
from tasks.geometry.render import Hits, RayScene, Rendering, render

Points = NDArray[np.floating]
Field = Callable[[Points], NDArray[np.floating]]
"""A function of position: (n, 3) metres -> (n,) signed distance, or (n, 3) colours in 0..255 sRGB."""

# Off the origin, so that nothing may assume a centred object; metres, in the capture's z-up world
OBJECT_CENTRE = np.array([0.05, -0.03, 0.10])
OBJECT_HALF = 0.17  # half the side of a cube that holds every shape
GRID = 150  # marching-cubes cells along that cube: facets stray some 10 um from the true surface

CAMERA_DISTANCE = 1.0
FRAME_FILL = 0.75  # of the image's width by the bounding sphere
PRINCIPAL_POINT = (0.51, 0.495)  # of width and height: off the middle, so that swapping or ignoring it shows
POSE_JITTER = 0.05  # of directions, distance and roll
SUPERSAMPLE = 2
OUTLIER_RANGE = 0.1  # metres a depth outlier strays to either side


@dataclass(frozen=True)
class Truth:
    """What a synthetic capture was made from: mesh (watertight) and cameras in the capture frame, z-up metres."""

    folder: Path
    mesh: trimesh.Trimesh
    cameras: tuple[Camera, ...]
    scene: RayScene

    def view(self, camera: Camera) -> Rendering:
        """The truth as another camera sees it, e.g. a held-out one."""
        return render(self.scene, camera, supersample=SUPERSAMPLE)


def make_capture(
    folder: Path,
    shape: str = "sphere",
    views: int = 24,
    size: int = 512,
    *,
    depth_noise: float = 0.0,
    depth_holes: float = 0.0,
    depth_outliers: float = 0.0,
    alpha: bool = True,
    seed: int = 0,
    depth_scale: float = 0.0001,
) -> Truth:
    """Writes a capture of one of `SHAPES` (views, depth, transforms.json) into `folder`.

    depth_noise: sigma of Gaussian noise as a fraction of the distance. depth_holes, depth_outliers: share of the
    object's pixels without a reading, or with one up to 0.1 m off. alpha: the foreground mask is stored in the views.
    depth_scale: metres per unit of the 16-bit depth maps.
    """
    rng = np.random.default_rng(seed)
    mesh = shape_mesh(shape)
    scene = RayScene(mesh, solid_colours(pattern))
    cameras = orbit_cameras(mesh, views, size, rng=rng)
    renderings = [render(scene, camera, supersample=SUPERSAMPLE) for camera in cameras]
    depths = [_disturbed(view.depth, depth_noise, depth_holes, depth_outliers, rng) for view in renderings]
    write_capture(folder, cameras, renderings, depths, alpha=alpha, depth_scale=depth_scale)
    return Truth(folder, mesh, cameras, scene)


def write_capture(
    folder: Path,
    cameras: Sequence[Camera],
    renderings: Sequence[Rendering],
    depths: Sequence[NDArray[np.float32]],
    *,
    alpha: bool,
    depth_scale: float,
) -> None:
    """Writes views, 16-bit depth maps and a transforms.json in the nerfstudio convention."""
    for name in ("views", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    frames = []
    for index, (camera, view, depth) in enumerate(zip(cameras, renderings, depths, strict=True)):
        name = f"view_{index:03d}.png"
        coverage = (view.mask * 255).astype(np.uint8)
        Image.fromarray(np.dstack([view.image, coverage]) if alpha else view.image).save(folder / "views" / name)
        Image.fromarray(np.rint(depth / depth_scale).clip(0, 65535).astype(np.uint16)).save(folder / "depth" / name)
        frames.append(
            {
                "file_path": f"views/{name}",
                "depth_file_path": f"depth/{name}",
                "transform_matrix": camera.camera_to_world.tolist(),
            }
        )
    first = cameras[0]
    intrinsics = {"w": first.width, "h": first.height} | {k: getattr(first, k) for k in ("fl_x", "fl_y", "cx", "cy")}
    transforms = intrinsics | {"depth_unit_scale_factor": depth_scale, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=1) + "\n")


def orbit_cameras(mesh: trimesh.Trimesh, views: int, size: int, *, rng: np.random.Generator) -> tuple[Camera, ...]:
    """Cameras all around a mesh, on a jittered Fibonacci sphere, some 1 m away."""
    directions = fibonacci_sphere(views) + rng.normal(scale=POSE_JITTER / 2, size=(views, 3))
    distances = CAMERA_DISTANCE * (1 + rng.uniform(-POSE_JITTER, POSE_JITTER, views))
    offsets = directions * (distances / np.linalg.norm(directions, axis=1))[:, None]
    return cameras_around(mesh, offsets, size, rolls=rng.uniform(-POSE_JITTER, POSE_JITTER, views))


def cameras_around(
    mesh: trimesh.Trimesh,
    offsets: NDArray[np.float64],
    size: int,
    *,
    rolls: NDArray[np.float64],
    fill: float = FRAME_FILL,
) -> tuple[Camera, ...]:
    """Cameras at offsets (n, 3) metres from a mesh's middle that look at it, all of one focal length."""
    middle = mesh.bounds.mean(axis=0)
    radius = np.linalg.norm(mesh.vertices - middle, axis=1).max()
    distance = np.linalg.norm(offsets, axis=1).mean()
    focal = float(fill * size / 2 * np.sqrt(distance**2 - radius**2) / radius)
    cx, cy = (share * size for share in PRINCIPAL_POINT)
    return tuple(
        Camera(size, size, focal, focal, cx, cy, look_at(middle + offset, middle, roll=roll))
        for offset, roll in zip(offsets, rolls, strict=True)
    )


def look_at(eye: NDArray[np.float64], target: NDArray[np.float64], *, roll: float = 0.0) -> NDArray[np.float64]:
    """Camera-to-world (4, 4) in OpenGL axes of a camera at `eye`, world z upwards in its image, rolled by radians."""
    back = (eye - target) / np.linalg.norm(eye - target)
    level = np.cross([0.0, 0.0, 1.0], back)
    level /= np.linalg.norm(level)
    right = np.cos(roll) * level + np.sin(roll) * np.cross(back, level)
    pose = np.eye(4)
    pose[:3, :3] = np.column_stack([right, np.cross(back, right), back])
    pose[:3, 3] = eye
    return pose


def fibonacci_sphere(count: int) -> NDArray[np.float64]:
    """Evenly spread unit vectors (count, 3), from top to bottom."""
    index = np.arange(count)
    z = 1 - 2 * (index + 0.5) / count
    angle = index * np.pi * (3 - np.sqrt(5))
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z])


def solid_colours(field: Field) -> Callable[[Hits], NDArray[np.float32]]:
    """Colours for a `RayScene` that are a function of position alone, so every view agrees on them."""
    return lambda hits: field(hits.points).astype(np.float32)


def pattern(points: Points) -> NDArray[np.floating]:
    """The colours of every shape: a slow change of hue with 2 cm markings of soft edge on it, (n, 3) in 0..255."""
    p = points - OBJECT_CENTRE
    slow = 150 + 70 * np.cos(2 * np.pi * p / 0.35 + np.array([0.0, 2.1, 4.2]))
    waves = np.sin(p[:, 0] * 150) * np.cos(p[:, 1] * 150)
    waves += np.sin(p[:, 1] * 150) * np.cos(p[:, 2] * 150) + np.sin(p[:, 2] * 150) * np.cos(p[:, 0] * 150)
    return slow * (0.8 + 0.2 * np.tanh(4 * waves))[:, None]


def sphere(p: Points) -> NDArray[np.floating]:
    return np.linalg.norm(p, axis=1) - 0.15


def rounded_box(p: Points) -> NDArray[np.floating]:
    q = np.abs(p) - (np.array([0.15, 0.11, 0.07], p.dtype) - 0.02)
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(axis=1), 0) - 0.02


def torus(p: Points) -> NDArray[np.floating]:
    return np.hypot(np.hypot(p[:, 0], p[:, 1]) - 0.10, p[:, 2]) - 0.05


def bowl(p: Points) -> NDArray[np.floating]:
    """A hollow ball cut open above, 24 mm thick, with a round rim (https://iquilezles.org/articles/distfunctions)."""
    radius, height, half_wall = 0.138, 0.05, 0.012
    rim = np.sqrt(radius**2 - height**2)
    r, z = np.hypot(p[:, 0], p[:, 1]), p[:, 2]
    above = height * r < rim * z
    return np.where(above, np.hypot(r - rim, z - height), np.abs(np.hypot(r, z) - radius)) - half_wall


SHAPES: dict[str, Field] = {"sphere": sphere, "rounded_box": rounded_box, "torus": torus, "concave": bowl}


@lru_cache
def shape_mesh(shape: str) -> trimesh.Trimesh:
    """One of `SHAPES` as a watertight mesh in the capture frame."""
    mesh = field_mesh(SHAPES[shape], OBJECT_HALF, GRID)
    mesh.apply_translation(OBJECT_CENTRE)
    return mesh


def field_mesh(field: Field, half: float, cells: int) -> trimesh.Trimesh:
    """The zero level of a signed distance within a cube of side 2 * half about the origin, vertices exactly on it."""
    axis = np.linspace(-half, half, cells + 1, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    values = field(grid.reshape(-1, 3)).reshape(grid.shape[:3])
    spacing = 2 * half / cells
    vertices, faces, _, _ = marching_cubes(values, 0.0, spacing=(spacing,) * 3, gradient_direction="descent")
    vertices = vertices.astype(np.float64) - half
    for _ in range(2):  # Newton steps along the gradient take out what the cells' linear interpolation missed
        gradient = _gradient(field, vertices)
        vertices -= field(vertices)[:, None] * gradient / np.square(gradient).sum(axis=1, keepdims=True)
    return trimesh.Trimesh(vertices, faces, process=False)


def chamfer(published: trimesh.Trimesh, truth: trimesh.Trimesh, samples: int = 100_000) -> float:
    """Mean of the two directed mean point-to-surface distances, in the meshes' unit."""
    return float(np.mean([distances.mean() for distances in _surface_distances(published, truth, samples)]))


def f_score(published: trimesh.Trimesh, truth: trimesh.Trimesh, threshold: float, samples: int = 100_000) -> float:
    """Harmonic mean of precision and recall: shares of either surface within `threshold` of the other."""
    precision, recall = (float((d <= threshold).mean()) for d in _surface_distances(published, truth, samples))
    return 2 * precision * recall / max(precision + recall, np.finfo(float).tiny)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], mask: NDArray[np.bool_]) -> float:
    """Peak signal-to-noise ratio of two 8-bit images (h, w, 3) over the masked pixels, decibels."""
    error = np.square(a[mask].astype(float) - b[mask].astype(float)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def glb_to_capture_frame(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A copy of a y-up glTF mesh in the z-up capture frame: (x, y, z) -> (x, -z, y)."""
    turned = mesh.copy()
    turned.apply_transform(np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float))
    return turned


def _surface_distances(
    a: trimesh.Trimesh, b: trimesh.Trimesh, samples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of points sampled on `a` to the surface of `b`, and the reverse, (samples,) each."""

    def directed(source: trimesh.Trimesh, target: trimesh.Trimesh) -> NDArray[np.float64]:
        points, _ = trimesh.sample.sample_surface(source, samples, seed=0)
        faces = np.ascontiguousarray(target.faces, np.int64)
        distances, _, _ = pcu.closest_points_on_mesh(np.ascontiguousarray(points), np.array(target.vertices), faces)
        return np.asarray(distances, np.float64)

    return directed(a, b), directed(b, a)


def _gradient(field: Field, points: NDArray[np.float64], step: float = 1e-5) -> NDArray[np.float64]:
    offsets = np.eye(3) * step
    return np.column_stack([field(points + offset) - field(points - offset) for offset in offsets]) / (2 * step)


def _disturbed(
    depth: NDArray[np.float32], noise: float, holes: float, outliers: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A depth map with the faults of a sensor."""
    measured = depth * (1 + noise * rng.standard_normal(depth.shape))
    astray = rng.random(depth.shape) < outliers
    measured += astray * rng.uniform(-OUTLIER_RANGE, OUTLIER_RANGE, depth.shape)
    measured[rng.random(depth.shape) < holes] = 0
    return np.where(depth > 0, measured, 0).astype(np.float32)
