"""Small captures in memory: a ball seen from a ring of cameras, as the bytes of its files."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.capture.camera import Camera
from tasks.capture.capture_checks import CaptureReport, Needs, examine
from tasks.store.location import FileEntry

Content = dict[str, bytes]
"""A capture: the bytes of its files by relative path."""

FUSION = Needs(cameras=True, metric_depth=True, min_views=3)
TRELLIS = Needs(cameras=False, metric_depth=False, min_views=1, masks=True)
RADIUS, DISTANCE, SIZE = 0.3, 1.0, 64
DEPTH_UNIT = 0.0001


def tiny_capture(views: int = 4, alpha: bool = True) -> Content:
    """Views with a random texture, 16-bit depth maps and a transforms.json."""
    rng = np.random.default_rng(0)
    content: Content = {}
    frames = []
    for index, camera in enumerate(ring(views)):
        depth = ball_depth(camera)
        image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        rgba = np.dstack([image, (depth > 0) * np.uint8(255)])
        content[f"views/view_{index:03d}.png"] = encoded(rgba if alpha else image)
        content[f"depth/view_{index:03d}.png"] = encoded(steps(depth))
        frames.append({"file_path": f"views/view_{index:03d}.png", "transform_matrix": camera.camera_to_world.tolist()})
    first = ring(views)[0]
    intrinsics = {"w": SIZE, "h": SIZE, "fl_x": first.fl_x, "fl_y": first.fl_y, "cx": SIZE / 2, "cy": SIZE / 2}
    transforms = intrinsics | {"depth_unit_scale_factor": DEPTH_UNIT, "frames": frames}
    return content | {"transforms.json": json.dumps(transforms).encode()}


def write_tiny_capture(folder: Path) -> Path:
    """Write a tiny capture as a folder; gives the folder."""
    for path, data in tiny_capture().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def ring(views: int) -> list[Camera]:
    """Cameras around the z axis that look at the origin."""
    cameras = []
    for turn in np.arange(views) * 2 * np.pi / views:
        backwards = np.array([np.sin(turn), -np.cos(turn), 0.0])
        pose = np.eye(4)
        pose[:3] = np.column_stack([np.cross([0, 0, 1], backwards), [0, 0, 1], backwards, DISTANCE * backwards])
        cameras.append(Camera(SIZE, SIZE, 1.2 * SIZE, 1.2 * SIZE, SIZE / 2, SIZE / 2, pose))
    return cameras


def ball_depth(camera: Camera) -> NDArray[np.float32]:
    """Depth (h, w) of a ball at the origin, metres, 0 = nothing."""
    rays = camera.rays()
    a, b, c = (rays**2).sum(axis=1), rays @ camera.centre, camera.centre @ camera.centre - RADIUS**2
    discriminant = b**2 - a * c
    depth = np.where(discriminant > 0, (-b - np.sqrt(discriminant.clip(0))) / a, 0)
    return depth.reshape(camera.height, camera.width).astype(np.float32)


def steps(depth: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Metres -> 16-bit steps of DEPTH_UNIT."""
    return np.rint(depth / DEPTH_UNIT).astype(np.uint16)


def encoded(pixels: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def edited(content: Content, **changes: Any) -> Content:
    """The capture with other top-level values in its transforms.json; None removes one."""
    transforms = json.loads(content["transforms.json"]) | changes
    kept = {key: value for key, value in transforms.items() if value is not None}
    return content | {"transforms.json": json.dumps(kept).encode()}


def entries(content: Content) -> list[FileEntry]:
    return [
        FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in content.items()
    ]


def report(content: Content, needs: Needs = FUSION, **more: Any) -> CaptureReport:
    """Examine a capture."""
    return examine("tiny", entries(content), content.__getitem__, needs, **more)[0]
