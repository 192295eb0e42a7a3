"""Captures of exact depth, with faults on request. Used by tests, benchmarks and the script of the sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from tasks.capture.camera import Camera
from tasks.geometry.render import RayScene, Rendering, render
from tests.synthetic.shapes import pattern, shape_mesh, solid_colours
from tests.synthetic.viewpoints import orbit_cameras

SUPERSAMPLE = 2
OUTLIER_RANGE = 0.1  # metres a depth outlier strays to either side


@dataclass(frozen=True)
class Truth:
    """The truth behind a synthetic capture: mesh (watertight) and cameras in the capture frame, z-up metres."""

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
    names = [f"view_{index:03d}.png" for index in range(len(cameras))]
    for name, view, depth in zip(names, renderings, depths, strict=True):
        coverage = (view.mask * 255).astype(np.uint8)
        Image.fromarray(np.dstack([view.image, coverage]) if alpha else view.image).save(folder / "views" / name)
        Image.fromarray(np.rint(depth / depth_scale).clip(0, 65535).astype(np.uint16)).save(folder / "depth" / name)
    files = [(f"views/{name}", f"depth/{name}") for name in names]
    write_transforms(folder, cameras, files, depth_scale)


def write_transforms(
    folder: Path,
    cameras: Sequence[Camera],
    files: Sequence[tuple[str, str]],
    depth_scale: float,
    bounds: NDArray[np.float64] | None = None,
) -> None:
    """Writes transforms.json for views and depth maps (their paths in the capture), all of one camera's intrinsics."""
    frames = [
        {"file_path": view, "depth_file_path": depth, "transform_matrix": camera.camera_to_world.tolist()}
        for camera, (view, depth) in zip(cameras, files, strict=True)
    ]
    first = cameras[0]
    intrinsics = {"w": first.width, "h": first.height} | {k: getattr(first, k) for k in ("fl_x", "fl_y", "cx", "cy")}
    box = {} if bounds is None else {"bounds": bounds.tolist()}
    transforms = intrinsics | {"depth_unit_scale_factor": depth_scale} | box | {"frames": frames}
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=1) + "\n")


def _disturbed(
    depth: NDArray[np.float32], noise: float, holes: float, outliers: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A depth map with the faults of a sensor."""
    measured = depth * (1 + noise * rng.standard_normal(depth.shape))
    astray = rng.random(depth.shape) < outliers
    measured += astray * rng.uniform(-OUTLIER_RANGE, OUTLIER_RANGE, depth.shape)
    measured[rng.random(depth.shape) < holes] = 0
    return np.where(depth > 0, measured, 0).astype(np.float32)
