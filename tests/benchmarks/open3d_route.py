"""Our route beside Open3D's own on the same captures at the same face count: `python tests/benchmarks/open3d_route.py`.

Open3D is installed into an environment of its own in the user's cache folder; it needs system libraries (Debian:
libgl1 libegl1 libx11-6 libusb-1.0-0 libudev1 libgomp1). Every 6th view is held out; both meshes are rendered by the
same renderer. Seconds are those of the steps, without start-up and decoding.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from platformdirs import user_cache_path
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

sys.path.insert(0, str(Path(__file__).parents[2]))

from tasks.capture.views import View
from tests.benchmarks.routes import (
    FACES,
    SAMPLE,
    TEXTURE_PX,
    Figures,
    figures,
    load,
    our_route,
    split,
)
from tests.data.make_sample import mug_scene
from tests.synthetic import make_capture, shape_mesh

OPEN3D = "open3d==0.20.0"
ENVIRONMENT = user_cache_path("capture2mesh") / "benchmark-open3d"
SYNTHETIC = "concave"
FACE_TOLERANCE = 0.02  # of the budget; beyond it the two meshes are not compared
LINE = "{:16} {:8} {:>8} {:>10} {:>9} {:>12} {:>11} {:>10} {:>7}  {}"

Result = tuple[trimesh.Trimesh, dict[str, float]]


def open3d_python() -> Path:
    """The interpreter of Open3D's environment, made on first use."""
    python = ENVIRONMENT / "bin" / "python"
    if subprocess.run([python, "-c", "import open3d"], capture_output=True).returncode if python.exists() else True:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", OPEN3D], check=True)
    return python


def open3d_route(views: Sequence[View], extent: float) -> Result:
    """Views -> Open3D's textured mesh in the capture's frame, and the seconds of each step."""
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "views.npz", Path(name) / "mesh.npz"
        settings: dict[str, Any] = {"faces": FACES, "texture_px": TEXTURE_PX, "extent": extent}
        np.savez(source, **settings, **_arrays(views))
        worker = Path(__file__).with_name("open3d_worker.py")
        subprocess.run([open3d_python(), worker, source, target], check=True)
        made = dict(np.load(target))
    steps = dict(zip(made["steps"].tolist(), made["seconds"].tolist(), strict=True))
    material = PBRMaterial(baseColorTexture=Image.fromarray(made["texture"][..., :3]))
    corners = np.arange(made["faces"].size).reshape(-1, 3)  # uv belong to corners: no vertex is shared
    visual = TextureVisuals(uv=made["corner_uv"].reshape(-1, 2), material=material)
    return trimesh.Trimesh(made["vertices"][made["faces"]].reshape(-1, 3), corners, visual=visual, process=False), steps


def _arrays(views: Sequence[View]) -> dict[str, Any]:
    """The views as Open3D takes them: intrinsic matrices, world-to-camera in OpenCV's axes."""
    intrinsic, extrinsic = [], []
    for view in views:
        camera = view.camera
        assert camera is not None and view.depth is not None and view.depth.shape == view.mask.shape
        intrinsic.append([[camera.fl_x, 0, camera.cx], [0, camera.fl_y, camera.cy], [0, 0, 1]])
        extrinsic.append(np.linalg.inv(camera.camera_to_world @ np.diag([1.0, -1.0, -1.0, 1.0])))
    return {
        "image": np.stack([view.image for view in views]),
        "depth": np.stack([view.depth for view in views if view.depth is not None]),
        "intrinsic": np.array(intrinsic),
        "extrinsic": np.array(extrinsic),
    }


def report(capture: str, route: str, got: Figures, steps: dict[str, float]) -> None:
    decibels = f"{got.psnr:.2f}/{got.psnr_covered:.2f}"
    numbers = (f"{got.seconds:.1f}", f"{got.chamfer:.4f}", f"{got.f_score:.4f}", decibels, str(got.watertight))
    spent = "  ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
    print(LINE.format(capture, route, *numbers, got.components, got.faces, spent), flush=True)


def compare(name: str, views: Sequence[View], truth: trimesh.Trimesh) -> None:
    used, held_out = split(views)
    results: list[Figures] = []
    for route, (mesh, steps) in (
        ("ours", our_route(used)),
        ("open3d", open3d_route(used, float(truth.extents.max()))),
    ):
        results.append(figures(mesh, truth, held_out, sum(steps.values())))
        report(name, route, results[-1], steps)
    ours, theirs = results
    if abs(ours.faces - theirs.faces) > FACE_TOLERANCE * FACES:
        raise RuntimeError(f"{name}: {ours.faces} and {theirs.faces} faces cannot be compared")
    ratios = f"seconds x{ours.seconds / theirs.seconds:.2f}, Chamfer x{ours.chamfer / theirs.chamfer:.2f}"
    # where Open3D leaves holes it has no colour: compared where either has a surface of its own
    print(f"{name}: ours / open3d: {ratios}, PSNR {ours.psnr_covered - theirs.psnr_covered:+.2f} dB", flush=True)


def main() -> None:
    open3d_python()
    print(
        LINE.format(
            "capture", "route", "seconds", "chamfer %", "F 1 %", "PSNR/covered", "watertight", "components", "faces", ""
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        make_capture(Path(folder), SYNTHETIC)
        compare(SYNTHETIC, load(Path(folder)), shape_mesh(SYNTHETIC))
    compare("mug (sample)", load(SAMPLE), mug_scene()[0])


if __name__ == "__main__":
    main()
