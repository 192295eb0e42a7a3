"""Views as arrays, for the engines, the exporter and the checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.images import DecodedDepth, DecodeError, Picture, decode_depth, decode_picture
from tasks.capture.layout import Reader, ViewFiles, pair
from tasks.capture.subject import Box, Subject
from tasks.capture.transforms import Cameras, load_cameras
from tasks.errors import Problem
from tasks.settings import settings

# Decoders release the interpreter lock.
_THREADS = 2
_AT_ONCE = 8
MaskSource = Literal["alpha", "depth", "bounds", "none"]


@dataclass(frozen=True)
class View:
    """One decoded view of a capture."""

    name: str
    """Stem of its file"""
    image: NDArray[np.uint8]
    """(h, w, 3) sRGB"""
    mask: NDArray[np.bool_]
    """(h, w), False for known background: the object, or pixels that nothing is known of"""
    depth: NDArray[np.float32] | None
    """(dh, dw) metres along the camera's axis, 0 = no reading"""
    camera: Camera | None
    """Of the image's size; `camera.resized(dw, dh)` is the depth map's"""

    @property
    def has_mask(self) -> bool:
        """True if something is known to be background."""
        return not self.mask.all()

    def within(self, box: Box) -> View:
        """The same view of what lies in the box: other readings go, and pixels that see beyond it are background."""
        assert self.depth is not None and self.camera is not None
        (rows, columns), (height, width) = self.depth.shape, self.mask.shape
        camera = self.camera.resized(columns, rows)
        background = masks.behind_or_beside(self.depth, camera, box)
        kept = masks.within(self.depth, camera, box) & ~background
        mask = self.mask & ~masks.resample(background, width, height)
        return replace(self, mask=mask, depth=np.where(kept, self.depth, np.float32(0)))

    def of(self, subject: Subject | None) -> View:
        """The same view of a subject that was found in it."""
        return self if subject is None or subject.box is None or self.depth is None else self.within(subject.box)


@dataclass(frozen=True)
class Decoded:
    """A view with its decoded files."""

    view: View
    picture: Picture
    depth_map: DecodedDepth | None
    mask_from: MaskSource
    """The source of the mask; "none": nothing tells the object from its background"""


def load_views(paths: Iterable[str], read: Reader, names: Iterable[str] | None = None) -> list[View]:
    """All of `decoded_views` at once."""
    return list(decoded_views(paths, read, names))


def decoded_views(
    paths: Iterable[str],
    read: Reader,
    names: Iterable[str] | None = None,
    placed: Mapping[str, Camera] | None = None,
) -> Iterator[View]:
    """Decode the views of a capture (all, or those named) one by one, sorted by name; few are in memory at once.

    placed: the cameras by view name, instead of the capture's own; a view that is not among them has none.
    If nothing tells the object from its background, the mask is True everywhere. Depth is zero outside of the mask and
    of the `bounds`. Raises DecodeError; a capture that was examined has no such file.
    """
    layout = pair(paths)
    cameras, _ = load_cameras(layout, read)
    wanted = None if names is None else set(names)
    chosen = [view for view in layout.views if wanted is None or view.name in wanted]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(chosen), _AT_ONCE):
            batch = chosen[start : start + _AT_ONCE]
            for decoded in pool.map(lambda files: decode_view(files, cameras, read, placed), batch):
                yield decoded.view


def depth_file(files: ViewFiles, cameras: Cameras) -> str | None:
    """Path of the view's depth map: the one that transforms.json names, else the one with the view's name."""
    frame = cameras.frames.get(files.name)
    return frame.depth if frame is not None and frame.depth is not None else files.depth


def decode_view(
    files: ViewFiles, cameras: Cameras, read: Reader, placed: Mapping[str, Camera] | None = None
) -> Decoded:
    """Decode one view with its mask and depth, as `decoded_views` does. Raises DecodeError with all broken files."""
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
    if placed is None:
        camera = None if frame is None else frame.camera(width, height)
    else:
        camera = placed[files.name].resized(width, height) if files.name in placed else None
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
    depth, (rows, columns) = depth_map.metres, depth_map.read.shape
    box = None if bounds is None or depth is None or camera is None else Box.between(bounds)
    source: MaskSource = "alpha"
    if mask is None and box is not None:
        assert depth is not None and camera is not None
        background = masks.behind_or_beside(depth, camera.resized(columns, rows), box)
        mask, source = ~masks.resample(background, width, height), "bounds"
    elif mask is None:
        background = masks.around_cut_out(depth_map.read)
        mask, source = ~masks.resample(background, width, height), "depth" if background.any() else "none"
    if depth is not None:
        depth = np.where(masks.resample(mask, columns, rows), depth, np.float32(0))
        if box is not None and camera is not None:
            depth = np.where(masks.within(depth, camera.resized(columns, rows), box), depth, np.float32(0))
    return mask, depth, source
