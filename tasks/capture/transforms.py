"""transforms.json: cameras in the nerfstudio convention -> typed frames, and every problem of the file.

https://docs.nerf.studio/quickstart/data_conventions.html, with instant-ngp's keys for depth
(https://github.com/NVlabs/instant-ngp, docs/nerf_dataset_tips.md); the README documents the keys that this project adds
(`bounds`, `depth_near`, `depth_far`). The readers of `layouts` that have such a file call it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, ValidationError

from tasks.capture.folder_tree import FileIndex
from tasks.capture.given_cameras import MILLIMETRE, Frame, GivenCameras, Intrinsics, Positive
from tasks.capture.layout import TRANSFORMS, leaves_folder
from tasks.errors import Problem

# Matrices printed with three digits pass; a scaled or sheared one does not.
_RIGID_TOLERANCE = 5e-3
# Further away than this, a matrix is not in metres.
_MAX_DISTANCE_M = 1e4
# 1 is written beside depth in metres; a larger step is that of no sensor.
_LARGEST_STEP_M = 1.0
_PERSPECTIVE = frozenset(
    {"perspective", "pinhole", "simple_pinhole", "simple_radial", "radial", "opencv", "full_opencv"}
)
_FISHEYE = frozenset({"fisheye", "opencv_fisheye", "simple_radial_fisheye", "radial_fisheye"})


class _FrameEntry(Intrinsics, frozen=True):
    file_path: str
    depth_file_path: str | None = None
    depth_path: str | None = None
    mask_path: str | None = None
    transform_matrix: list[list[float]] | None = None


class _Transforms(Intrinsics, frozen=True):
    frames: tuple[Any, ...] = ()
    depth_unit_scale_factor: Positive | None = None
    integer_depth_scale: Positive | None = None
    depth_near: Positive | None = None
    depth_far: Positive | None = None
    applied_scale: Positive = 1.0
    rig: str | None = None
    bounds: tuple[tuple[FiniteFloat, FiniteFloat, FiniteFloat], tuple[FiniteFloat, FiniteFloat, FiniteFloat]] | None = (
        None
    )


@dataclass(frozen=True)
class WrittenFrame:
    """A frame of transforms.json, with the files of the capture that it names."""

    image: str
    """Path of the view, relative to the capture"""
    wrong: bool
    """True if it has a problem"""
    depth: str | None = None
    """Path of the depth map that it names"""
    mask: str | None = None
    """Path of the mask that it names"""
    lens: Intrinsics | None = None
    """None if it is wrong"""
    frame: Frame | None = None
    """None if it has a problem, or no matrix"""


@dataclass
class TransformsFile:
    """The content of a transforms.json."""

    frames: list[WrittenFrame] = field(default_factory=list)
    """One for each view that is named, right or wrong"""
    lens: Intrinsics | None = None
    """The intrinsics of all views, if the file gives them at its top level"""
    depth_unit: float = MILLIMETRE
    depth_range: tuple[float, float] | None = None
    bounds: NDArray[np.float64] | None = None
    rig: str | None = None
    problems: list[Problem] = field(default_factory=list)


def parse_transforms(
    data: bytes,
    pictures: Collection[str],
    depth_maps: Collection[str],
    masks: Iterable[str] = (),
    name: str = TRANSFORMS,
) -> TransformsFile:
    """Parse a transforms.json for a capture with these files; `name` is the file's path for messages."""
    try:
        content = json.loads(data)  # finds out UTF-8, -16 or -32 itself
        top = _Transforms.model_validate(content)
    except json.JSONDecodeError as error:
        what = f"is not valid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
        return TransformsFile(problems=[Problem(where=name, what=what, todo="correct it, or write it again")])
    except ValidationError as error:
        return TransformsFile(problems=_invalid(name, error))
    except (ValueError, RecursionError) as error:
        return TransformsFile(problems=[Problem(where=name, what=f"cannot be read ({error})", todo="write it again")])
    if "frames" not in top.model_fields_set and not _has_focal_length(top):
        what = "has neither frames nor a focal length"
        return TransformsFile(problems=[Problem(where=name, what=what, todo=_CONVENTION)])
    unit = top.depth_unit_scale_factor or top.integer_depth_scale or MILLIMETRE
    found = TransformsFile(depth_unit=unit, rig=top.rig)
    if _has_focal_length(top):
        found.lens = Intrinsics.model_validate({key: getattr(top, key) for key in Intrinsics.model_fields})
    found.depth_range, found.problems = _depth_range(name, top)
    if unit > _LARGEST_STEP_M:
        what = f"is {unit:g} metres for each step of a depth map"
        todo = f"give metres for each step, not steps for each metre: {1 / unit:g}"
        found.problems.append(Problem(where=f"{name} depth_unit_scale_factor", what=what, todo=todo))
    if top.bounds is not None:
        bounds = np.array(top.bounds)
        if (bounds[0] < bounds[1]).all():
            found.bounds = bounds / top.applied_scale
        else:
            what = "have a corner that is not below the other"
            found.problems.append(Problem(where=f"{name} bounds", what=what, todo="give (min, max) in metres"))
    files = _Files(FileIndex(pictures), FileIndex(depth_maps), FileIndex(list(masks) or pictures))
    named: set[str] = set()
    for index, entry in enumerate(top.frames):
        written, wrong = _parse_frame(f"{name} frames[{index}]", entry, top, files)
        if written is not None and written.image in named:
            what = f"is a second camera for view {written.image}"
            wrong.append(Problem(where=f"{name} frames[{index}]", what=what, todo="keep one of them"))
        elif written is not None:
            named.add(written.image)
            found.frames.append(written)
        found.problems += wrong
    return found


_CONVENTION = "correct it by nerfstudio's convention for transforms.json"


@dataclass(frozen=True)
class _Files:
    pictures: FileIndex
    depth_maps: FileIndex
    masks: FileIndex


def _has_focal_length(intrinsics: Intrinsics) -> bool:
    return intrinsics.fl_x is not None or intrinsics.camera_angle_x is not None


def _parse_frame(
    where: str, entry: object, top: _Transforms, files: _Files
) -> tuple[WrittenFrame | None, list[Problem]]:
    """One frame, None if it names no view, and the problems."""
    try:
        frame = _FrameEntry.model_validate(entry)
    except ValidationError as error:
        named = entry.get("file_path") if isinstance(entry, dict) else None
        image = files.pictures.find(named) if isinstance(named, str) and not _outside(named) else None
        return None if image is None else WrittenFrame(image, wrong=True), _invalid(where, error)
    image, problems = _found(where, "file_path", frame.file_path, files.pictures, "a view", _ADD_VIEW)
    written_depth = frame.depth_file_path or frame.depth_path
    depth, wrong = _found(where, "depth_file_path", written_depth, files.depth_maps, "a depth map", _ADD_DEPTH)
    mask, wrong_mask = _found(where, "mask_path", frame.mask_path, files.masks, "a mask", _ADD_MASK)
    lens = Intrinsics.model_validate(
        {key: getattr(top, key) for key in Intrinsics.model_fields}
        | {key: getattr(frame, key) for key in Intrinsics.model_fields if key in frame.model_fields_set}
    )
    wrong_lens = check_intrinsics(where, lens)
    problems += wrong + wrong_mask + wrong_lens
    matrix, wrong_matrix = (None, []) if frame.transform_matrix is None else _matrix(where, frame.transform_matrix)
    problems += wrong_matrix
    if image is None:
        return None, problems
    if matrix is None or problems:
        return WrittenFrame(image, bool(problems), depth, mask, None if wrong_lens else lens), problems
    matrix[:3, 3] /= top.applied_scale  # nerfstudio has multiplied positions by it, not depth
    return WrittenFrame(image, False, depth, mask, lens, Frame(lens, matrix)), []


_ADD_VIEW = "add the image, or remove the frame"
_ADD_DEPTH = "add the file to depth/, or remove the depth_file_path"
_ADD_MASK = "add the file, or remove the mask_path"


def _found(
    where: str, key: str, written: str | None, files: FileIndex, kind: str, todo: str
) -> tuple[str | None, list[Problem]]:
    """The file of the capture that a path in a frame means."""
    if written is None:
        return None, []
    if _outside(written):
        what = f"{key} {written!r} leaves the capture folder"
        todo = "give a path relative to the capture, such as views/view_000.png"
        return None, [Problem(where=where, what=what, todo=todo)]
    path = files.find(written)
    if path is None:
        return None, [Problem(where=where, what=f"names {written!r}, which is not {kind} of the capture", todo=todo)]
    return path, []


def _outside(written: str) -> bool:
    return leaves_folder(written.replace("\\", "/"))


def check_intrinsics(where: str, intrinsics: Intrinsics) -> list[Problem]:
    """Problems of a camera's inner geometry."""
    problems = []
    if not _has_focal_length(intrinsics):
        what = "has no focal length"
        problems.append(Problem(where=where, what=what, todo="give fl_x (and fl_y), or camera_angle_x"))
    model = intrinsics.camera_model.lower()
    if model not in _PERSPECTIVE | _FISHEYE:
        what = f"has the camera model {intrinsics.camera_model!r}, which is not supported"
        problems.append(Problem(where=where, what=what, todo="undistort the images"))
    elif intrinsics.k4 and not (intrinsics.k5 or intrinsics.k6 or intrinsics.fisheye or model == "full_opencv"):
        what = "has a fourth radial term k4, which is not supported"
        problems.append(Problem(where=where, what=what, todo="undistort the images, or give k1 k2 p1 p2 k3 only"))
    return problems


def _matrix(where: str, rows: list[list[float]]) -> tuple[NDArray[np.float64] | None, list[Problem]]:
    """Camera-to-world (4, 4) of 4 x 4 or 3 x 4 numbers; a problem if it is not a rigid motion."""
    if [len(row) for row in rows] not in ([4, 4, 4, 4], [4, 4, 4]):
        what = "transform_matrix is not 4 x 4"
        return None, [Problem(where=where, what=what, todo="give camera-to-world as four rows of four numbers")]
    matrix = np.array([*rows, [0.0, 0.0, 0.0, 1.0]][:4])
    return matrix, check_pose(where, matrix, "transform_matrix")


def check_pose(where: str, matrix: NDArray[np.float64], name: str = "pose") -> list[Problem]:
    """A problem if a camera-to-world (4, 4) is not a rigid motion: orthonormal, right-handed, last row 0 0 0 1."""

    def wrong(what: str, todo: str) -> list[Problem]:
        return [Problem(where=where, what=f"{name} {what}", todo=todo)]

    if not np.isfinite(matrix).all():
        return wrong("has a number that is not finite (tracking was lost)", "remove the frame and its view")
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


def _depth_range(name: str, top: _Transforms) -> tuple[tuple[float, float] | None, list[Problem]]:
    def wrong(key: str, what: str, todo: str) -> tuple[None, list[Problem]]:
        return None, [Problem(where=f"{name} {key}", what=what, todo=todo)]

    near, far = top.depth_near, top.depth_far
    if near is None and far is None:
        return None, []
    if near is None or far is None:
        return wrong("depth_near, depth_far", "are not both given", "give both, in metres")
    if near >= far:
        return wrong("depth_near", f"= {near:g} is not below depth_far = {far:g}", "give them in metres")
    return (near, far), []


def given_cameras(found: TransformsFile, names: dict[str, str], source: str = TRANSFORMS) -> GivenCameras:
    """The cameras by view name; names: of each view, by the path of its image."""
    named = {names[each.image]: each for each in found.frames if each.image in names}
    lenses = {} if found.lens is None else dict.fromkeys(names.values(), found.lens)
    return GivenCameras(
        frames={name: each.frame for name, each in named.items() if each.frame is not None},
        depth_unit=found.depth_unit,
        depth_range=found.depth_range,
        bounds=found.bounds,
        rig=found.rig,
        named=frozenset(name for name, each in named.items() if each.frame is not None or each.wrong),
        lenses=lenses | {name: each.lens for name, each in named.items() if each.lens is not None},
        source=source,
    )


def _invalid(where: str, error: ValidationError) -> list[Problem]:
    """A problem for each value that is wrong; of a matrix, one."""
    details: dict[tuple[int | str, ...], str] = {}
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        place = tuple(detail["loc"])
        details.setdefault(place[:1] if place[:1] == ("transform_matrix",) else place, detail["msg"])
    return [
        Problem(where=" ".join([where, *map(str, place)]), what=f"is wrong ({message})", todo=_CONVENTION)
        for place, message in details.items()
    ]
