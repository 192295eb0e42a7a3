"""COLMAP's sparse model, as text or binary -> cameras, poses and points (https://colmap.github.io/format.html)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tasks.capture.folder_tree import Folder
from tasks.capture.layout import Reader
from tasks.capture.layouts.parsing import BadFile

MODEL_FILES = tuple(f"{name}.{kind}" for name in ("cameras", "images", "points3D") for kind in ("bin", "txt"))

# In the order of their numbers in binary files, with their numbers of parameters
_MODELS = (
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
)
_NO_POINT = 2**64 - 1


@dataclass(frozen=True)
class ColmapCamera:
    """A camera's inner geometry."""

    model: str
    """Name of the camera model"""
    width: int
    """Pixels"""
    height: int
    """Pixels"""
    parameters: tuple[float, ...]
    """In COLMAP's order"""


@dataclass(frozen=True)
class ColmapImage:
    """A picture with its pose."""

    name: str
    """Path relative to the folder of pictures"""
    camera: int
    """Number of its camera"""
    rotation: NDArray[np.float64]
    """(3, 3) world to camera, y down"""
    translation: NDArray[np.float64]
    """(3,) of the same, in the model's unit"""
    points: tuple[tuple[int, tuple[float, float]], ...]
    """Numbers of the points that it shows, and where, pixels"""


@dataclass
class ColmapModel:
    """A sparse model."""

    cameras: dict[int, ColmapCamera] = field(default_factory=dict)
    images: list[ColmapImage] = field(default_factory=list)
    points: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """(3,) each, in the model's unit"""


def read_model(folder: Folder, read: Reader) -> ColmapModel:
    """Read a model; raises BadFile."""
    binary = {"cameras.bin", "images.bin"} <= folder.files.keys()
    kind = "bin" if binary else "txt"
    model = ColmapModel()
    for name, parse in _PARSERS[kind].items():
        path = folder.files.get(f"{name}.{kind}")
        if path is None:
            continue
        try:
            parse(read(path), model)
        except (struct.error, ValueError, IndexError, UnicodeDecodeError, OverflowError) as error:
            raise BadFile(path, f"is not a file of COLMAP's ({error})", "export the model again") from error
    unknown = {image.camera for image in model.images} - model.cameras.keys()
    if not model.images or not model.cameras or unknown:
        what = f"holds {len(model.cameras)} camera(s) and {len(model.images)} picture(s)"
        raise BadFile(folder.path, what, "run COLMAP again, or export its model again")
    return model


class _Stream:
    """Reads little-endian numbers one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, form: str) -> tuple[float, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        end = self.data.index(b"\0", self.place)
        found = self.data[self.place : end].decode()
        self.place = end + 1
        return found

    def array(self, form: str, count: int) -> NDArray[np.void]:
        kind = np.dtype(form)
        if count * kind.itemsize > len(self.data) - self.place:
            raise ValueError("it is cut off")
        found = np.frombuffer(self.data, kind, count, self.place)
        self.place += count * kind.itemsize
        return found


def _binary_cameras(data: bytes, model: ColmapModel) -> None:
    stream = _Stream(data)
    for _ in range(int(stream.take("Q")[0])):
        number, kind, width, height = (int(value) for value in stream.take("IiQQ"))
        name, count = _MODELS[kind]
        model.cameras[number] = ColmapCamera(name, width, height, stream.take(f"{count}d"))


def _binary_images(data: bytes, model: ColmapModel) -> None:
    stream = _Stream(data)
    for _ in range(int(stream.take("Q")[0])):
        stream.take("I")
        *pose, camera = stream.take("7dI")
        name = stream.text()
        points = stream.array("<f8,<f8,<u8", int(stream.take("Q")[0]))
        shown = tuple((int(n), (float(x), float(y))) for x, y, n in points.tolist() if n != _NO_POINT)
        model.images.append(_image(name, int(camera), pose, shown))


def _binary_points(data: bytes, model: ColmapModel) -> None:
    stream = _Stream(data)
    for _ in range(int(stream.take("Q")[0])):
        number, *place = stream.take("Q3d")
        stream.take("3Bd")
        stream.array("<i4,<i4", int(stream.take("Q")[0]))
        model.points[int(number)] = np.array(place)


def _rows(data: bytes) -> list[list[str]]:
    return [line.split() for line in data.decode("utf-8-sig").splitlines() if not line.startswith("#")]


def _text_cameras(data: bytes, model: ColmapModel) -> None:
    for row in filter(None, _rows(data)):
        parameters = tuple(float(value) for value in row[4:])
        model.cameras[int(row[0])] = ColmapCamera(row[1], int(row[2]), int(row[3]), parameters)


def _text_images(data: bytes, model: ColmapModel) -> None:
    """Two lines a picture; the second one, of its points, may be empty."""
    rows = _rows(data)
    while rows and not rows[0]:
        rows.pop(0)
    for first, second in zip(rows[::2], [*rows[1::2], []], strict=False):
        if not first:
            continue
        values = [float(value) for value in second]
        shown = tuple(
            (int(n), (x, y)) for x, y, n in zip(values[::3], values[1::3], values[2::3], strict=True) if n >= 0
        )
        pose = [float(value) for value in first[1:8]]
        model.images.append(_image(" ".join(first[9:]), int(first[8]), pose, shown))


def _text_points(data: bytes, model: ColmapModel) -> None:
    for row in filter(None, _rows(data)):
        x, y, z = (float(value) for value in row[1:4])
        model.points[int(row[0])] = np.array([x, y, z])


def _image(
    name: str, camera: int, pose: list[float], points: tuple[tuple[int, tuple[float, float]], ...]
) -> ColmapImage:
    """pose: a quaternion with its real part first, and a translation."""
    real, *imaginary = pose[:4]
    return ColmapImage(name, camera, Rotation.from_quat([*imaginary, real]).as_matrix(), np.array(pose[4:7]), points)


_PARSERS = {
    "bin": {"cameras": _binary_cameras, "images": _binary_images, "points3D": _binary_points},
    "txt": {"cameras": _text_cameras, "images": _text_images, "points3D": _text_points},
}
