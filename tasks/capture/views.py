"""Views as arrays, for the engines, the exporter and the checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.fisheye import positions, straightened
from tasks.capture.given_cameras import Frame, GivenCameras, Intrinsics
from tasks.capture.images import UPRIGHT, DecodedDepth, DecodeError, Picture, decode_depth, decode_mask, decode_picture
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts import read_layout
from tasks.capture.layouts.layout_reader import Layout
from tasks.capture.orientation import Meant, meant
from tasks.capture.subject import Box, Subject
from tasks.errors import Problem
from tasks.settings import settings

# Decoders release the interpreter lock.
_THREADS = 2
_AT_ONCE = 8
_TRUST = (0.0, 0.5, 1.0)  # in a reading of low, medium and high confidence
T = TypeVar("T")
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
    confidence: NDArray[np.float32] | None = None
    """(dh, dw) 0..1, how far each depth reading is to be trusted; None if the sensor does not say it"""

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
    shown: Meant = "stored"
    """Which picture was taken, of one that EXIF's orientation turns"""


def load_views(paths: Iterable[str], read: Reader, names: Iterable[str] | None = None) -> list[View]:
    """All of `decoded_views` at once."""
    return list(decoded_views(paths, read, names))


def decoded_views(paths: Iterable[str], read: Reader, names: Iterable[str] | None = None) -> Iterator[View]:
    """Decode the views of a capture with these files, as `views_of` does."""
    return views_of(read_layout(list(paths), read), read, names)


def views_of(
    layout: Layout,
    read: Reader,
    names: Iterable[str] | None = None,
    placed: Mapping[str, Camera] | None = None,
) -> Iterator[View]:
    """Decode the views of a capture (all, or those named) one by one, sorted by name; few are in memory at once.

    placed: the cameras by view name, instead of the capture's own; a view that is not among them has none.
    If nothing tells the object from its background, the mask is True everywhere. Depth is zero outside of the mask and
    of the `bounds`. Raises DecodeError; a capture that was examined has no such file.
    """
    wanted = None if names is None else set(names)
    chosen = [view for view in layout.views if wanted is None or view.name in wanted]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(chosen), _AT_ONCE):
            batch = chosen[start : start + _AT_ONCE]
            for decoded in pool.map(lambda files: decode_view(files, layout.cameras, read, placed), batch):
                yield decoded.view


def decode_view(
    files: ViewFiles, cameras: GivenCameras, read: Reader, placed: Mapping[str, Camera] | None = None
) -> Decoded:
    """Decode one view with its mask and depth, as `views_of` does. Raises DecodeError with all broken files."""
    limit = settings().max_pixels
    frame = cameras.frames.get(files.name)
    lens = cameras.lenses.get(files.name) if frame is None else frame.intrinsics
    broken: list[Problem] = []

    def decoded(path: str | None, decode: Callable[[str, bytes], T]) -> T | None:
        if path is None:
            return None
        try:
            return decode(path, read(path))
        except DecodeError as error:
            broken.extend(error.problems)
            return None

    def flags(path: str, data: bytes) -> NDArray[np.uint8]:
        return decode_mask(path, data, limit)

    picture = decoded(files.image, lambda path, data: decode_picture(path, data, limit))
    depth_map = decoded(
        files.depth, lambda path, data: decode_depth(path, data, cameras.depth_unit, cameras.depth_range, limit)
    )
    mask, visible, confidence = (decoded(path, flags) for path in (files.mask, files.visible, files.confidence))
    if picture is None or broken:
        raise DecodeError(*broken)
    shown: Meant = "stored"
    if picture.orientation != UPRIGHT:
        size = (None, None) if lens is None else (lens.w, lens.h)
        depth = None if depth_map is None else depth_map.metres if depth_map.metres is not None else depth_map.read
        shown = meant(picture.rgb, picture.orientation, size, None if depth is None else depth.astype(np.float32))
        if shown == "turned":
            picture = picture.turned()
    if mask is not None:
        picture = replace(picture, alpha=masks.resample(mask, picture.rgb.shape[1], picture.rgb.shape[0]))
    if depth_map is not None:
        rows, columns = depth_map.read.shape
        if visible is not None:
            depth_map = depth_map.where(masks.from_alpha(masks.resample(visible, columns, rows)))
        if confidence is not None:
            trust = np.interp(masks.resample(confidence, columns, rows), files.confidence_levels, _TRUST)
            depth_map = replace(depth_map.where(trust > 0), confidence=trust.astype(np.float32))
    height, width = picture.rgb.shape[:2]
    if lens is not None and lens.fisheye:
        picture, depth_map = _straightened(picture, depth_map, Frame(lens, np.eye(4)).camera(width, height), lens)
    if placed is None:
        camera = None if frame is None else frame.camera(width, height)
    else:
        camera = placed[files.name].resized(width, height) if files.name in placed else None
    foreground, depth, mask_from = _foreground(picture, depth_map, camera, cameras.bounds)
    trusted = None if depth_map is None or depth is None else depth_map.confidence
    view = View(files.name, picture.rgb, foreground, depth, camera, trusted)
    return Decoded(view, picture, depth_map, mask_from, shown)


def _straightened(
    picture: Picture, depth_map: DecodedDepth | None, camera: Camera, lens: Intrinsics
) -> tuple[Picture, DecodedDepth | None]:
    """What a pinhole would have seen instead of a fisheye lens; beyond the lens' picture nothing is known."""
    where = positions(camera, lens)
    rgb = straightened(picture.rgb, where, smooth=True)
    alpha = None if picture.alpha is None else straightened(picture.alpha, where, smooth=False)
    picture = replace(
        picture, rgb=np.asarray(rgb, np.uint8), alpha=None if alpha is None else np.asarray(alpha, np.uint8)
    )
    if depth_map is None:
        return picture, None
    at = positions(camera.resized(*depth_map.read.shape[::-1]), lens)
    read = np.asarray(straightened(depth_map.read.astype(np.uint8), at, smooth=False), bool)
    metres = depth_map.metres
    if metres is not None:
        metres = np.asarray(straightened(metres, at, smooth=False), np.float32)
    confidence = depth_map.confidence
    if confidence is not None:
        confidence = np.asarray(straightened(confidence, at, smooth=False), np.float32)
    return picture, DecodedDepth(read, metres, confidence)


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
