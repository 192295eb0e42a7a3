"""transforms.json: cameras in the nerfstudio convention -> typed frames, and every problem of the file.

https://docs.nerf.studio/quickstart/data_conventions.html; the README documents the keys that this project adds
(`bounds`, `depth_near`, `depth_far`). `views` and `capture_checks` call it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Lt
from numpy.typing import NDArray
from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError

from tasks.capture.camera import Camera
from tasks.capture.layout import IMAGE_SUFFIXES, TRANSFORMS, VIEWS, Layout, Reader, leaves_folder
from tasks.errors import Problem

# Matrices printed with three digits pass; a scaled or sheared one does not.
_RIGID_TOLERANCE = 5e-3
# Further away than this, a matrix is not in metres.
_MAX_DISTANCE_M = 1e4
_PERSPECTIVE = frozenset({"perspective", "pinhole", "simple_pinhole", "simple_radial", "radial", "opencv"})
_UNSUPPORTED_DISTORTION = ("k3", "k4", "k5", "k6")

Positive = Annotated[FiniteFloat, Gt(0)]


class Intrinsics(BaseModel, frozen=True):
    """A camera's inner geometry; each value may stand at the top level or in a frame.

    w, h, fl_*, c*: pixels. camera_angle_*: fields of view, radians. k*, p*: OpenCV's distortion.
    """

    w: PositiveInt | None = None
    h: PositiveInt | None = None
    fl_x: Positive | None = None
    fl_y: Positive | None = None
    cx: FiniteFloat | None = None
    cy: FiniteFloat | None = None
    camera_angle_x: Annotated[FiniteFloat, Gt(0), Lt(math.pi)] | None = None
    camera_angle_y: Annotated[FiniteFloat, Gt(0), Lt(math.pi)] | None = None
    k1: FiniteFloat = 0.0
    k2: FiniteFloat = 0.0
    k3: FiniteFloat = 0.0
    k4: FiniteFloat = 0.0
    k5: FiniteFloat = 0.0
    k6: FiniteFloat = 0.0
    p1: FiniteFloat = 0.0
    p2: FiniteFloat = 0.0
    camera_model: str = "OPENCV"
    is_fisheye: bool = False


class _FrameEntry(Intrinsics, frozen=True):
    file_path: str
    depth_file_path: str | None = None
    transform_matrix: list[list[FiniteFloat]]


class _Transforms(Intrinsics, frozen=True):
    frames: list[Any]
    depth_unit_scale_factor: Positive = 0.001
    depth_near: Positive | None = None
    depth_far: Positive | None = None
    rig: str | None = None
    bounds: tuple[tuple[FiniteFloat, FiniteFloat, FiniteFloat], tuple[FiniteFloat, FiniteFloat, FiniteFloat]] | None = (
        None
    )


@dataclass(frozen=True)
class Frame:
    """One view's camera as transforms.json gives it; `camera` completes it with the image's size."""

    intrinsics: Intrinsics
    camera_to_world: NDArray[np.float64]
    """(4, 4), OpenGL axes, metres"""
    depth: str | None = None
    """Path of the depth map that the frame names, relative to the capture"""

    def camera(self, width: int, height: int) -> Camera:
        """The camera of an image of this size."""
        known = self.intrinsics
        fl_x = known.fl_x or width / 2 / math.tan((known.camera_angle_x or math.pi / 2) / 2)
        fl_y = known.fl_y or (height / 2 / math.tan(known.camera_angle_y / 2) if known.camera_angle_y else fl_x)
        return Camera(
            width=width,
            height=height,
            fl_x=fl_x,
            fl_y=fl_y,
            cx=width / 2 if known.cx is None else known.cx,
            cy=height / 2 if known.cy is None else known.cy,
            camera_to_world=self.camera_to_world,
            distortion=(known.k1, known.k2, known.p1, known.p2),
        )


@dataclass(frozen=True)
class Cameras:
    """The cameras of a capture, with the other values of its transforms.json."""

    frames: Mapping[str, Frame] = field(default_factory=lambda: MappingProxyType({}))
    """By view name, only frames without a problem"""
    depth_unit: float = 0.001
    """Metres per step of a 16-bit depth map"""
    depth_range: tuple[float, float] | None = None
    """(near, far) of 8-bit depth maps, metres"""
    bounds: NDArray[np.float64] | None = None
    """(2, 3) corners of the object's box, world metres"""
    named: frozenset[str] = frozenset()
    """Views that have a frame, right or wrong"""
    rig: str | None = None
    """The kind of a declared rig, as `capture2mesh rig` writes it"""


def load_cameras(layout: Layout, read: Reader) -> tuple[Cameras, list[Problem]]:
    """A capture's cameras and every problem of them; no cameras and no problems without a transforms.json."""
    if not layout.has_transforms:
        return Cameras(), []
    return parse_transforms(read(TRANSFORMS), layout)


def parse_transforms(data: bytes, layout: Layout) -> tuple[Cameras, list[Problem]]:
    """Parse transforms.json for the views of a capture. Frames with a problem are left out of the cameras."""
    try:
        content = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
        top = _Transforms.model_validate(content)
    except json.JSONDecodeError as error:
        what = f"is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        return Cameras(), [Problem(where=TRANSFORMS, what=what, todo="correct it, or write it again")]
    except ValidationError as error:
        return Cameras(), _invalid(TRANSFORMS, error)
    except (ValueError, RecursionError) as error:
        return Cameras(), [Problem(where=TRANSFORMS, what=f"cannot be read ({error})", todo="write it again")]
    depth_range, problems = _depth_range(top)
    bounds = None if top.bounds is None else np.array(top.bounds)
    if bounds is not None and not (bounds[0] < bounds[1]).all():
        problems.append(_problem("bounds", "have a corner that is not below the other", "give (min, max) in metres"))
        bounds = None
    frames: dict[str, Frame] = {}
    named: set[str] = set()
    for index, entry in enumerate(top.frames):
        name, frame, wrong = _parse_frame(f"{TRANSFORMS} frames[{index}]", entry, top, layout)
        if name is not None and name in named:
            wrong.append(_problem(f"frames[{index}]", f"is a second camera for view {name}", "keep one of them"))
        elif name is not None and frame is not None:
            frames[name] = frame
        if name is not None:
            named.add(name)
        problems += wrong
    cameras = Cameras(
        MappingProxyType(frames), top.depth_unit_scale_factor, depth_range, bounds, frozenset(named), top.rig
    )
    return cameras, problems


def _parse_frame(
    where: str, entry: object, top: _Transforms, layout: Layout
) -> tuple[str | None, Frame | None, list[Problem]]:
    """One frame's view name and camera, each None if it is wrong, and the problems."""
    try:
        frame = _FrameEntry.model_validate(entry)
    except ValidationError as error:
        return None, None, _invalid(where, error)
    name, problems = _view_name(where, frame.file_path, layout)
    depth, wrong = _depth_file(where, frame.depth_file_path, layout)
    inherited = Intrinsics.model_validate(
        {key: getattr(top, key) for key in Intrinsics.model_fields}
        | {key: getattr(frame, key) for key in Intrinsics.model_fields if key in frame.model_fields_set}
    )
    problems += wrong + _check_intrinsics(where, inherited) + _check_matrix(where, frame.transform_matrix)
    if problems:
        return name, None, problems
    return name, Frame(inherited, np.array(frame.transform_matrix), depth), []


def _view_name(where: str, file_path: str, layout: Layout) -> tuple[str | None, list[Problem]]:
    if leaves_folder(file_path):
        return None, [_outside(where, "file_path", file_path)]
    path = PurePosixPath(file_path)
    name = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
    if path.parent == PurePosixPath(VIEWS) and any(view.name == name for view in layout.views):
        return name, []
    what = f"names {file_path!r}, which is not a view of the capture"
    return None, [Problem(where=where, what=what, todo=f"add the image to {VIEWS}/, or remove the frame")]


def _depth_file(where: str, file_path: str | None, layout: Layout) -> tuple[str | None, list[Problem]]:
    if file_path is None:
        return None, []
    if leaves_folder(file_path):
        return None, [_outside(where, "depth_file_path", file_path)]
    path = str(PurePosixPath(file_path))
    if path in layout.unmatched_depth or any(path == view.depth for view in layout.views):
        return path, []
    what = f"names {file_path!r}, which is not a depth map of the capture"
    return None, [Problem(where=where, what=what, todo="add the file to depth/, or remove the depth_file_path")]


def _check_intrinsics(where: str, intrinsics: Intrinsics) -> list[Problem]:
    problems = []
    if intrinsics.fl_x is None and intrinsics.camera_angle_x is None:
        what = "has no focal length"
        problems.append(Problem(where=where, what=what, todo="give fl_x (and fl_y), or camera_angle_x"))
    if intrinsics.is_fisheye or intrinsics.camera_model.lower() not in _PERSPECTIVE:
        what = f"has the camera model {'fisheye' if intrinsics.is_fisheye else intrinsics.camera_model!r}"
        problems.append(Problem(where=where, what=f"{what}, which is not supported", todo="undistort the images"))
    high_order = [name for name in _UNSUPPORTED_DISTORTION if getattr(intrinsics, name)]
    if high_order:
        what = f"has the distortion terms {', '.join(high_order)}, which are not supported"
        problems.append(Problem(where=where, what=what, todo="undistort the images, or give k1 k2 p1 p2 only"))
    return problems


def _check_matrix(where: str, rows: list[list[float]]) -> list[Problem]:
    """A problem if the matrix is not a rigid motion: 4x4, orthonormal, right-handed, last row 0 0 0 1."""

    def wrong(what: str, todo: str) -> list[Problem]:
        return [Problem(where=where, what=f"transform_matrix {what}", todo=todo)]

    if [len(row) for row in rows] != [4, 4, 4, 4]:
        return wrong("is not 4 x 4", "give camera-to-world as four rows of four numbers")
    matrix = np.array(rows)
    if np.abs(matrix).max() > _MAX_DISTANCE_M:
        return wrong(f"has numbers beyond {_MAX_DISTANCE_M:g}", "give the position in metres")
    rotation = matrix[:3, :3]
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > _RIGID_TOLERANCE:
        return wrong("has a last row that is not 0 0 0 1", "give camera-to-world in row-major order")
    if np.linalg.matrix_rank(rotation, tol=_RIGID_TOLERANCE) < 3:
        return wrong("is singular", "give a rotation and a position")
    if np.abs(rotation.T @ rotation - np.eye(3)).max() > _RIGID_TOLERANCE:
        return wrong("is not rigid: its axes are not orthonormal", "remove the scale or shear")
    if np.linalg.det(rotation) < 0:
        return wrong("mirrors: its axes are left-handed", "flip one axis (OpenGL: x right, y up, z backwards)")
    return []


def _depth_range(top: _Transforms) -> tuple[tuple[float, float] | None, list[Problem]]:
    near, far = top.depth_near, top.depth_far
    if near is None and far is None:
        return None, []
    if near is None or far is None:
        return None, [_problem("depth_near, depth_far", "are not both given", "give both, in metres")]
    if near >= far:
        return None, [_problem("depth_near", f"= {near:g} is not below depth_far = {far:g}", "give them in metres")]
    return (near, far), []


def _problem(key: str, what: str, todo: str) -> Problem:
    return Problem(where=f"{TRANSFORMS} {key}", what=what, todo=todo)


def _outside(where: str, key: str, path: str) -> Problem:
    what = f"{key} {path!r} leaves the capture folder"
    return Problem(where=where, what=what, todo="give a path relative to the capture, such as views/view_000.png")


def _invalid(where: str, error: ValidationError) -> list[Problem]:
    return [
        Problem(
            where=" ".join([where, *map(str, detail["loc"])]),
            what=f"is wrong ({detail['msg']})",
            todo="correct it by nerfstudio's convention for transforms.json",
        )
        for detail in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")
