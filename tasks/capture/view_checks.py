"""Checks of one view: it is decoded once, measured, and forgotten; capture_checks calls `inspect` for every view."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from tasks.capture import masks
from tasks.capture.camera import Camera
from tasks.capture.contact_sheet import Thumbnail, thumbnail
from tasks.capture.images import DecodeError
from tasks.capture.layout import TRANSFORMS, Reader, ViewFiles
from tasks.capture.transforms import Cameras, Intrinsics
from tasks.capture.views import Decoded, View, decode_view, depth_file
from tasks.errors import Problem

# A handheld or table-top capture: outside of these, depth is in another unit. Metres.
_DEPTH_RANGE_M = (0.01, 100.0)
# Depth that varies less than this, relative to its distance, is one plane facing the camera.
_FLAT_DEPTH = 1e-4
# How far the proportions of a depth map may be from its view's; one pixel is always allowed for rounding.
_ASPECT_TOLERANCE = 0.01
# Focal lengths beyond these, in image widths, are fields of view of more than 169 degrees or less than half a degree.
_FOCAL_WIDTHS = (0.05, 100.0)
# A silhouette of depth that takes up more of the image's border than this is most likely not that of an object.
_BORDER_SHARE = 0.5


class ViewReport(BaseModel, frozen=True):
    """One view as the report shows it."""

    name: str
    """Stem of its file"""
    width: int
    """Pixels"""
    height: int
    """Pixels"""
    channels: int
    """Of the image file: 3 or 4, or 1 or 2 if it is grey"""
    depth_m: tuple[float, float] | None
    """(min, max) of the readings on the object, metres; None without any"""
    coverage: float
    """The object's share of the image, 0..1; 1 if nothing tells the object from its background"""
    sharpness: float
    """Variance of the Laplacian inside the mask, grey levels squared, in a picture of at most 512 pixels"""
    verdict: str = "ok"
    """The view's warnings, else `ok`"""


@dataclass(frozen=True)
class Facts:
    """The facts about a view that are kept when its pixels are gone."""

    path: str
    """Of the image, relative to the capture"""
    depth_path: str | None
    """Of its depth map"""
    report: ViewReport
    camera: Camera | None
    """Of the image's size"""
    fingerprint: str
    """Equal for views with the same image and mask"""
    relative_depth: bool
    """True if the depth map gives no distances"""
    shows_object: bool
    """False if it has no depth reading on the object, or an empty mask"""
    thumbnail: Thumbnail


@dataclass
class Inspection:
    """The findings in one view."""

    facts: Facts | None = None
    """None if the view could not be decoded"""
    problems: list[Problem] = field(default_factory=list)
    """Problems for every engine"""
    camera_problems: list[Problem] = field(default_factory=list)
    """Problems for an engine that needs cameras, warnings for others"""
    depth_problems: list[Problem] = field(default_factory=list)
    """Problems for an engine that needs metric depth, warnings for others"""
    warnings: list[Problem] = field(default_factory=list)


def inspect(files: ViewFiles, cameras: Cameras, read: Reader) -> Inspection:
    """Decode one view and check all that needs no other view."""
    try:
        decoded = decode_view(files, cameras, read)
    except DecodeError as error:
        return Inspection(problems=list(error.problems))
    view, depth_path = decoded.view, depth_file(files, cameras)
    height, width = view.mask.shape
    readings = None if view.depth is None else view.depth[view.depth > 0]
    report = ViewReport(
        name=view.name,
        width=width,
        height=height,
        channels=decoded.picture.channels,
        depth_m=None if readings is None or not len(readings) else (float(readings.min()), float(readings.max())),
        coverage=round(float(view.mask.mean()), 4),
        sharpness=round(masks.sharpness(view.image, view.mask), 2),
    )
    wrong_camera = (
        [] if view.camera is None else _check_camera(files.image, cameras.frames[files.name].intrinsics, view.camera)
    )
    facts = Facts(
        path=files.image,
        depth_path=depth_path,
        report=report,
        camera=view.camera,
        fingerprint=_fingerprint(view),
        relative_depth=decoded.depth_map is not None and decoded.depth_map.metres is None,
        shows_object=_misses(decoded) is None,
        thumbnail=thumbnail(view),
    )
    inspection = Inspection(facts, camera_problems=wrong_camera)
    if decoded.picture.orientation != 1:
        what = f"has EXIF orientation {decoded.picture.orientation}, which is not applied"
        inspection.warnings.append(Problem(where=files.image, what=what, todo="check that it was calibrated as stored"))
    if (missed := _misses(decoded)) is not None:
        inspection.warnings.append(Problem(where=files.image, what=missed, todo="it is left out"))
    if depth_path is not None:
        inspection.depth_problems += _check_depth(depth_path, decoded)
        inspection.warnings += _suspect_depth(depth_path, decoded)
    return inspection


def _misses(decoded: Decoded) -> str | None:
    """Say why a view does not show the object, None if it does."""
    view, depth_map = decoded.view, decoded.depth_map
    if not view.mask.any():
        return "shows nothing of the object: its mask is empty"
    if depth_map is None or depth_map.metres is None or view.depth is None:
        return None
    if not depth_map.read.any():
        return "has a depth map without a reading (all 0 or the largest number)"
    return None if view.depth.any() else "has no depth reading on the object"


def _check_camera(path: str, given: Intrinsics, camera: Camera) -> list[Problem]:
    width, height = camera.width, camera.height
    if (given.w or width, given.h or height) != (width, height):
        what = f"is {width} x {height} pixels; its camera in {TRANSFORMS} is for {given.w} x {given.h}"
        return [
            Problem(where=path, what=what, todo="correct w and h with the intrinsics, or use the image of that size")
        ]
    low, high = _FOCAL_WIDTHS
    if not (low * width <= camera.fl_x <= high * width and low * width <= camera.fl_y <= high * width):
        what = f"has a camera with focal lengths of {camera.fl_x:g}, {camera.fl_y:g} pixels, {width} pixels wide"
        return [Problem(where=path, what=what, todo=f"correct fl_x and fl_y in {TRANSFORMS}; they are in pixels")]
    if abs(camera.cx - width / 2) > width or abs(camera.cy - height / 2) > height:
        what = f"has a camera whose principal point ({camera.cx:g}, {camera.cy:g}) lies far outside of the image"
        return [Problem(where=path, what=what, todo=f"correct cx and cy in {TRANSFORMS}; they are in pixels")]
    return []


def _check_depth(path: str, decoded: Decoded) -> list[Problem]:
    """Faults that keep a depth map from being used for geometry."""

    def problem(what: str, todo: str) -> list[Problem]:
        return [Problem(where=path, what=what, todo=todo)]

    view, depth_map = decoded.view, decoded.depth_map
    if depth_map is None:
        return []
    (rows, columns), (height, width) = depth_map.read.shape, view.mask.shape
    if abs(columns - width * rows / height) > max(1.0, _ASPECT_TOLERANCE * columns):
        what = f"is {columns} x {rows} pixels, its view {width} x {height}: other proportions"
        return problem(what, "render or crop both to one field of view")
    if not depth_map.read.any() or depth_map.metres is None or view.depth is None:
        return []
    readings = depth_map.metres[depth_map.read]
    if depth_map.read.all() and np.ptp(readings) <= _FLAT_DEPTH * readings.max():
        return problem(f"is constant ({readings.max():g} m everywhere)", "export the depth again")
    low, high = _DEPTH_RANGE_M
    typical = float(np.median(view.depth[view.depth > 0])) if view.depth.any() else low
    if not low <= typical <= high:
        what = f"is implausible: {typical:g} m to the object"
        return problem(
            what, f"correct depth_unit_scale_factor in {TRANSFORMS} (metres per step; float depth is in metres)"
        )
    return []


def _suspect_depth(path: str, decoded: Decoded) -> list[Problem]:
    view = decoded.view
    warnings = []
    readings = np.empty(0) if view.depth is None else view.depth[view.depth > 0]
    if len(readings) and np.ptp(readings) <= _FLAT_DEPTH * readings.max():
        what = f"is {readings.max():g} m all over the object: a flat face seen head-on, or no depth"
        warnings.append(Problem(where=path, what=what, todo="check the depth map"))
    if decoded.mask_from == "depth" and _border_share(view.mask) > _BORDER_SHARE:
        what = "has readings along most of its border: the object is cut off, or the readings are of its surroundings"
        warnings.append(Problem(where=path, what=what, todo=f"give bounds in {TRANSFORMS}, or alpha in the view"))
    return warnings


def _border_share(mask: NDArray[np.bool_]) -> float:
    return float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean())


def _fingerprint(view: View) -> str:
    content = hashlib.blake2b(repr(view.image.shape).encode(), digest_size=16)
    content.update(view.image.tobytes())
    content.update(np.packbits(view.mask).tobytes())
    return content.hexdigest()
