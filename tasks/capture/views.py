"""Views as arrays, for the engines, the exporter and the checks."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.images import DecodedDepth, DecodeError, Picture, decode_depth, decode_picture
from tasks.capture.layout import Reader, ViewFiles, pair
from tasks.capture.transforms import Cameras, load_cameras
from tasks.errors import Problem
from tasks.settings import settings

# Decoders release the interpreter lock.
_THREADS = 2
# A silhouette of depth that covers this share of the view does not separate the object from its surroundings.
FILLED = 0.98

MaskSource = Literal["alpha", "depth", "bounds", "none"]


@dataclass(frozen=True)
class View:
    """One decoded view of a capture."""

    name: str
    """Stem of its file"""
    image: NDArray[np.uint8]
    """(h, w, 3) sRGB"""
    mask: NDArray[np.bool_]
    """(h, w), True for pixels of the object"""
    depth: NDArray[np.float32] | None
    """(dh, dw) metres along the camera's axis, 0 = no reading"""
    camera: Camera | None
    """Of the image's size; `camera.resized(dw, dh)` is the depth map's"""


@dataclass(frozen=True)
class Decoded:
    """A view with its decoded files."""

    view: View
    picture: Picture
    depth_map: DecodedDepth | None
    mask_from: MaskSource
    """The source of the mask; "none": nothing tells the object from its background"""


def load_views(paths: Iterable[str], read: Reader, names: Iterable[str] | None = None) -> list[View]:
    """Decode the views of a capture (all, or those named), sorted by name.

    If nothing tells the object from its background, the mask is True everywhere. Depth is zero outside of the mask and
    of the `bounds`. Raises DecodeError; a capture that was examined has no such file.
    """
    layout = pair(paths)
    cameras, _ = load_cameras(layout, read)
    wanted = None if names is None else set(names)
    chosen = [view for view in layout.views if wanted is None or view.name in wanted]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [decoded.view for decoded in pool.map(lambda files: decode_view(files, cameras, read), chosen)]


def depth_file(files: ViewFiles, cameras: Cameras) -> str | None:
    """Path of the view's depth map: the one that transforms.json names, else the one with the view's name."""
    frame = cameras.frames.get(files.name)
    return frame.depth if frame is not None and frame.depth is not None else files.depth


def decode_view(files: ViewFiles, cameras: Cameras, read: Reader) -> Decoded:
    """Decode one view with its mask and depth (see `load_views`). Raises DecodeError with all of its broken files."""
    limit = settings().max_pixels
    frame = cameras.frames.get(files.name)
    depth_path = depth_file(files, cameras)
    broken: list[Problem] = []
    picture = depth_map = None
    try:
        picture = decode_picture(files.image, read(files.image), limit)
    except DecodeError as error:
        broken += error.problems
    try:
        if depth_path is not None:
            depth_map = decode_depth(depth_path, read(depth_path), cameras.depth_unit, cameras.depth_range, limit)
    except DecodeError as error:
        broken += error.problems
    if picture is None or broken:
        raise DecodeError(*broken)
    height, width = picture.rgb.shape[:2]
    camera = None if frame is None else frame.camera(width, height)
    mask, depth, mask_from = _foreground(picture, depth_map, camera, cameras.bounds)
    return Decoded(View(files.name, picture.rgb, mask, depth, camera), picture, depth_map, mask_from)


def _foreground(
    picture: Picture, depth_map: DecodedDepth | None, camera: Camera | None, bounds: NDArray[np.float64] | None
) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None, MaskSource]:
    """The mask (h, w), the depth inside of it, and the source of the mask."""
    height, width = picture.rgb.shape[:2]
    mask = None if picture.alpha is None else masks.from_alpha(picture.alpha)
    if depth_map is None:
        return (np.ones((height, width), bool), None, "none") if mask is None else (mask, None, "alpha")
    inside, depth = depth_map.read, depth_map.metres
    source: MaskSource = "depth"
    if depth is not None and camera is not None and bounds is not None:
        inside, source = masks.within(depth, camera.resized(depth.shape[1], depth.shape[0]), bounds), "bounds"
    if mask is None:
        mask = masks.from_readings(inside, depth_map.read & ~inside, width, height)
        if source == "depth" and mask.mean() >= FILLED:
            mask, source = np.ones_like(mask), "none"
    else:
        source = "alpha"
    if depth is not None:
        kept = inside & masks.resample(mask, depth.shape[1], depth.shape[0])
        depth = np.where(kept, depth, np.float32(0))
    return mask, depth, source
