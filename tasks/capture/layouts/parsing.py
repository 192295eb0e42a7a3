"""Text and JSON files of layouts -> numbers and models; what is wrong with one is a problem that names it.

The readers of layouts call it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from tasks.capture.folder_tree import Folder, suffix
from tasks.capture.given_cameras import Intrinsics, Positive
from tasks.capture.layout import Reader
from tasks.capture.layouts.poses import PIXEL_CENTRE, Matrix
from tasks.errors import Problem

M = TypeVar("M")

_LENS_FILES = re.compile(
    r"(?:cam(?:era)?|intrinsics?|calib(?:ration)?|K|color)"
    r"(?:[_-]?(?:K|matrix|intrinsics?|primesense|color|parameters))?\.(?:txt|csv|json)",
    re.IGNORECASE,
)


class _Open3DCamera(BaseModel):
    """PinholeCameraIntrinsic of Open3D; its matrix is stored by columns."""

    width: int
    height: int
    intrinsic_matrix: tuple[float, ...]
    depth_scale: Positive | None = None


class BadFile(Exception):
    """A file of a layout that cannot be read; carries the problem."""

    def __init__(self, where: str, what: str, todo: str = "correct it, or export it again") -> None:
        super().__init__(what)
        self.problem = Problem(where=where, what=what, todo=todo)


def json_file(kind: type[M], read: Reader, path: str) -> M:
    """A JSON file by its model; raises BadFile."""
    try:
        return TypeAdapter(kind).validate_python(json.loads(read(path)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadFile(path, f"is wrong at {'.'.join(map(str, first['loc'])) or 'its top'} ({first['msg']})") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"is not valid JSON ({error})") from error


def intrinsics(where: str, **values: float | str | None) -> Intrinsics:
    """Intrinsics by the names of nerfstudio; raises BadFile for impossible ones."""
    try:
        return Intrinsics.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadFile(where, f"has an impossible camera: {first['loc'][0]} is {first['input']}") from error


def pinhole(
    where: str, matrix: Matrix, width: int | None = None, height: int | None = None, shift: float = 0.0
) -> Intrinsics:
    """Intrinsics of a camera matrix (3, 3); shift: to add to its principal point, pixels. Raises BadFile."""
    return intrinsics(
        where,
        w=width,
        h=height,
        fl_x=float(matrix[0, 0]),
        fl_y=float(matrix[1, 1]),
        cx=float(matrix[0, 2]) + shift,
        cy=float(matrix[1, 2]) + shift,
        camera_model="PINHOLE",
    )


def lines(read: Reader, path: str) -> Iterator[list[str]]:
    """The fields of a text file's lines, separated by blanks, commas or semicolons; comments and empty lines go."""
    try:
        text = read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(path, "is not a text file") from error
    for line in text.splitlines():
        fields = re.split(r"[\s,;]+", line.partition("#")[0].strip())
        if fields != [""]:
            yield fields


def numbers(read: Reader, path: str) -> NDArray[np.float64]:
    """All numbers of a text file, flat; raises BadFile."""
    try:
        return np.array([float(value) for fields in lines(read, path) for value in fields])
    except ValueError as error:
        raise BadFile(path, f"holds something that is not a number ({error})") from error


def matrix(read: Reader, path: str) -> NDArray[np.float64]:
    """A 4 x 4 matrix of a text file, which may leave out its last row; raises BadFile."""
    found = numbers(read, path)
    if found.size not in (12, 16):
        raise BadFile(path, f"holds {found.size} numbers, a pose has 16")
    return np.concatenate([found, [0.0, 0, 0, 1]])[:16].reshape(4, 4)


def lens_file(folder: Folder) -> str | None:
    """Path of a file directly in a folder whose name says that it holds a camera's intrinsics."""
    return next(iter(sorted(path for name, path in folder.files.items() if _LENS_FILES.fullmatch(name))), None)


def lens(read: Reader, path: str) -> tuple[Intrinsics, float | None]:
    """Intrinsics of a file, and metres for each step of depth if it says them.

    JSON of Open3D, or numbers: a matrix of 9 or 16, or fx fy cx cy, with or without width and height. The first pixel's
    centre is at (0, 0) in all of them. Raises BadFile.
    """
    if suffix(path) == ".json":
        given = json_file(_Open3DCamera, read, path)
        if len(given.intrinsic_matrix) != 9:
            raise BadFile(path, "has no 3 x 3 intrinsic_matrix")
        columns = np.array(given.intrinsic_matrix).reshape(3, 3)
        unit = 1 / given.depth_scale if given.depth_scale else None
        return pinhole(path, columns.T, given.width, given.height, PIXEL_CENTRE), unit
    found = numbers(read, path)
    size: tuple[int | None, int | None] = (None, None)
    match found.size:
        case 9 | 16:
            side = 3 if found.size == 9 else 4
            camera = found.reshape(side, side)[:3, :3]
        case 4 | 6:
            camera = np.array([[found[0], 0, found[2]], [0, found[1], found[3]], [0, 0, 1]])
            size = (int(found[4]), int(found[5])) if found.size == 6 else size
        case _:
            raise BadFile(path, f"holds {found.size} numbers; a camera matrix has 9, or fx fy cx cy")
    return pinhole(path, camera, *size, PIXEL_CENTRE), None
