"""Captures as people had them, from public reports: each is read as it is meant, or refused with its cause by name.

Every case is asked through `capture2mesh look`, which says what a run would do, of a small capture in memory.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
import OpenEXR
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from flows.__main__ import app
from tests.support.tiny import Content, edited, encoded
from tests.synthetic import make_capture

VIEWS, SIZE, UNIT = 8, 128, 0.0001
CAMERAS = "transforms.json"
Floats = NDArray[np.float64]
Change = Callable[[Content], Content]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """A painted bowl: RGBA views, 16-bit depth maps, transforms.json."""
    folder = tmp_path_factory.mktemp("bowl")
    make_capture(folder, "concave", VIEWS, SIZE, depth_scale=UNIT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def look(content: Content) -> tuple[int, str]:
    """Exit status and output of `look` for a capture in a bucket."""
    memory = fsspec.filesystem("memory")
    memory.rm("/reported", recursive=True) if memory.exists("/reported") else None
    for path, data in content.items():
        memory.pipe_file(f"/reported/bowl/{path}", data)
    result = CliRunner().invoke(app, ["look", "memory://reported/bowl", "--engine", "fusion"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


# Ways to change a capture


def depth_as(suffix: str, write: Callable[[Floats], bytes], **top: Any) -> Change:
    """Depth maps of another format, of metres; transforms.json with other top-level values."""

    def change(content: Content) -> Content:
        changed = edited(content, **top)
        for path in [path for path in content if path.startswith("depth/")]:
            metres = np.asarray(Image.open(io.BytesIO(changed.pop(path)))) * UNIT
            changed[path.removesuffix(".png") + suffix] = write(metres)
        return changed if suffix == ".png" else frames(lambda frame, index: frame.pop("depth_file_path"))(changed)

    return change


def steps_of(unit: float) -> Callable[[Floats], bytes]:
    return lambda metres: encoded(np.rint(metres / unit).astype(np.uint16))


def pictures_as(suffix: str, write: Callable[[Image.Image], bytes]) -> Change:
    """Pictures of another format; frames name them."""

    def change(content: Content) -> Content:
        changed = dict(content)
        for path in [path for path in content if path.startswith("views/")]:
            picture = Image.open(io.BytesIO(changed.pop(path)))
            changed[path.removesuffix(".png") + suffix] = write(picture)
        return frames(lambda frame, _: frame.update(file_path=frame["file_path"].removesuffix(".png") + suffix))(
            changed
        )

    return change


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def frames(edit: Callable[[dict[str, Any], int], object]) -> Change:
    """Frames that are edited, one by one."""

    def change(content: Content) -> Content:
        transforms = json.loads(content[CAMERAS])
        for index, frame in enumerate(transforms["frames"]):
            edit(frame, index)
        return content | {CAMERAS: json.dumps(transforms).encode()}

    return change


def poses(move: Callable[[Floats], Floats]) -> Change:
    return frames(lambda frame, _: frame.update(transform_matrix=move(np.array(frame["transform_matrix"])).tolist()))


def farther(factor: float) -> Change:
    return poses(lambda matrix: matrix * np.array([[1, 1, 1, factor]] * 3 + [[1, 1, 1, 1]]))


def top(**values: Any) -> Change:
    return lambda content: edited(content, **values)


def written(**names: Callable[[str], str]) -> Change:
    """Paths in frames that are written otherwise."""
    return frames(lambda frame, _: frame.update({key: write(frame[key]) for key, write in names.items()}))


def moved(rename: Callable[[str], str]) -> Change:
    """Files with other names; transforms.json stays."""
    return lambda content: {path if path == CAMERAS else rename(path): data for path, data in content.items()}


def beside(**files: bytes) -> Change:
    return lambda content: content | files


def both(*changes: Change) -> Change:
    def change(content: Content) -> Content:
        for each in changes:
            content = each(content)
        return content

    return change


# What each of them does


def npy(pixels: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def exr(metres: Floats) -> bytes:
    """As Blender writes it: what the rays missed is 1e10."""
    stream = io.BytesIO()
    pixels = np.where(metres > 0, metres, 1e10).astype(np.float32)
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"V": pixels}).write(stream)
    return stream.getvalue()


def with_largest_number(metres: Floats) -> bytes:
    pixels = np.rint(metres / UNIT).astype(np.uint16)
    return encoded(np.where(pixels == 0, np.uint16(65535), pixels))


def along_the_ray(content: Content) -> Content:
    lens = json.loads(content[CAMERAS])
    x, y = (np.arange(SIZE) + 0.5 - lens["cx"]) / lens["fl_x"], (np.arange(SIZE) + 0.5 - lens["cy"]) / lens["fl_y"]
    length = np.sqrt(1 + x[None] ** 2 + y[:, None] ** 2)
    return depth_as(".npy", lambda metres: npy((metres * length).astype(np.float32)))(content)


def rgb16(metres: Floats, colour: int = 2, channels: int = 3) -> bytes:
    """A PNG of 16 bits in several channels, which Pillow does not write."""
    rows = np.repeat(np.rint(metres / UNIT).astype(">u2")[..., None], channels, axis=2)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", metres.shape[1], metres.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def rgb16_tiff(metres: Floats) -> bytes:
    """A TIFF of 16 bits in three channels (TIFF 6.0), which Pillow does not write either."""
    height, width = metres.shape
    pixels = np.repeat(np.rint(metres / UNIT).astype("<u2")[..., None], 3, axis=2).tobytes()
    bits, start = 8, 14
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)]
    tags += [(273, 4, 1, start), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(pixels))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", start + len(pixels)) + struct.pack("<3H", 16, 16, 16)
    return head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def sideways(picture: Image.Image, *, displayed: bool) -> bytes:
    """A phone's JPEG: stored lying, if it is shown as the cameras mean it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture.convert("RGB")
    stored = upright.transpose(Image.Transpose.ROTATE_90) if displayed else upright
    return saved(stored, "JPEG", quality=97, exif=exif)


def in_folders_of_cameras(content: Content) -> Content:
    """Windows paths to the pictures of two cameras, which have the same names."""

    def place(path: str) -> str:
        folder, name = path.split("/")
        number = int(name[5:8])
        return f"{folder}/cam{number % 2}/{number // 2:06d}.png"

    named = written(file_path=place, depth_file_path=place)(content)
    return moved(place)(written(file_path=lambda path: path.replace("/", "\\"))(named))


def as_nerf_synthetic(content: Content) -> Content:
    transforms = json.loads(content[CAMERAS])
    lists = {"camera_angle_x": 2 * math.atan(SIZE / 2 / transforms["fl_x"]), "frames": []}
    found: Content = {}
    for index, frame in enumerate(transforms["frames"]):
        found[f"train/r_{index}.png"] = content[frame["file_path"]]
        lists["frames"].append({"file_path": f"./train/r_{index}", "transform_matrix": frame["transform_matrix"]})
    return found | {"transforms_train.json": json.dumps(lists).encode()}


def half_size(content: Content) -> Content:
    return pictures_as(".png", lambda picture: saved(picture.resize((SIZE // 2, SIZE // 2)), "PNG"))(content)


def without_some_frames(content: Content) -> Content:
    transforms = json.loads(content[CAMERAS])
    return edited(content, frames=transforms["frames"][:2] + transforms["frames"][4:])


def copied_by_explorer(content: Content) -> Content:
    return content | {"views/view_000 (1).png": content["views/view_000.png"]}


def truncated(content: Content) -> Content:
    return content | {"views/view_004.png": content["views/view_004.png"][:900]}


def in_japanese(path: str) -> str:
    return path.replace("view_", "\u30de\u30b0 #1 50%+ (")


def wrong_quaternions(matrix: Floats) -> Floats:
    misread = matrix.copy()
    misread[:3, :3] = Rotation.from_quat(np.roll(Rotation.from_matrix(matrix[:3, :3]).as_quat(), 1)).as_matrix()
    return misread


def cameras_of_others(first: int, step: int = 1) -> Change:
    """Cameras that begin with another one, and may go backwards."""

    def change(content: Content) -> Content:
        matrices = [frame["transform_matrix"] for frame in json.loads(content[CAMERAS])["frames"]]
        return frames(
            lambda frame, index: frame.update(transform_matrix=matrices[(first + step * index) % len(matrices)])
        )(content)

    return change


def turned_the_other_way(content: Content) -> Content:
    """Each motion from the first camera is undone instead of done."""
    first = np.array(json.loads(content[CAMERAS])["frames"][0]["transform_matrix"])
    return poses(lambda matrix: first @ np.linalg.inv(matrix) @ first)(content)


OCTREE = Image.Quantize.FASTOCTREE
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
AXES = np.diag([1.0, -1.0, -1.0, 1.0])
ROBOT = np.array([[0.0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
READ: dict[str, Change] = {
    "as it is": top(),
    "depth in millimetres": depth_as(".png", steps_of(0.001), depth_unit_scale_factor=None),
    "depth of half the size": depth_as(
        ".png", lambda metres: steps_of(0.001)(metres[::2, ::2]), depth_unit_scale_factor=None
    ),
    "depth with 65535 for no reading": depth_as(".png", with_largest_number),
    "depth of Blender, 1e10 behind": depth_as(".exr", exr),
    "depth of PyTorch, 1 x h x w": depth_as(".npy", lambda metres: npy(metres.astype(np.float32)[None])),
    "depth named r_0_depth_0001": both(
        moved(lambda path: path.replace(".png", "_depth_0001.png") if path.startswith("depth/") else path),
        frames(lambda frame, _: frame.pop("depth_file_path")),
    ),
    "depth as 16-bit TIFF": depth_as(
        ".tif", lambda metres: encoded(np.rint(metres * 1000).astype(np.uint16), "TIFF"), depth_unit_scale_factor=0.001
    ),
    "pictures stored as JPEG named .png": pictures_as(
        ".png", lambda picture: saved(picture.convert("RGB"), "JPEG", quality=97)
    ),
    "grey pictures with alpha": pictures_as(".png", lambda picture: saved(picture.convert("LA"), "PNG")),
    "pictures with a palette": pictures_as(
        ".png", lambda picture: saved(picture.quantize(256, Image.Quantize.FASTOCTREE), "PNG")
    ),
    "WebP pictures": pictures_as(".webp", lambda picture: saved(picture, "WEBP", lossless=True)),
    "EXIF, cameras of the shown pictures": pictures_as(".jpg", lambda picture: sideways(picture, displayed=True)),
    "EXIF, cameras of the stored pictures": pictures_as(".jpg", lambda picture: sideways(picture, displayed=False)),
    "litter": beside(
        **{
            "views/.ipynb_checkpoints/view_000-checkpoint.png": b"x",
            "views/@eaDir/view_000.png/SYNOFILE_THUMB_M.png": b"x",
            "views/Icon\r": b"",
            "depth/._view_000.png": b"x",
            "depth/desktop.ini": b"x",
            "Thumbs.db": b"x",
        }
    ),
    "names of timestamps": both(
        moved(lambda path: path.replace("view_00", "1305031102.17530")),
        written(file_path=lambda path: path.replace("view_00", "1305031102.17530")[:-4]),
        frames(lambda frame, _: frame.pop("depth_file_path")),
    ),
    "names of many alphabets": both(
        moved(lambda path: path.replace("view_", "マグ #1 50%+ (")),
        written(
            **dict.fromkeys(("file_path", "depth_file_path"), lambda path: path.replace("view_", "マグ #1 50%+ ("))
        ),
    ),
    "names in upper case": both(
        moved(lambda path: path.split("/")[0] + "/" + path.split("/")[1].upper()),
        frames(lambda frame, _: frame.pop("depth_file_path")),
    ),
    "paths with ./": written(file_path=lambda path: f"./{path}", depth_file_path=lambda path: f"./{path}"),
    "paths with backslashes": written(file_path=lambda path: path.replace("/", "\\")),
    "paths without a suffix": written(file_path=lambda path: f"./{path[:-4]}"),
    "pictures in folders of cameras": in_folders_of_cameras,
    "nerfstudio's folders": both(
        moved(lambda path: path.replace("views/", "images/")),
        written(file_path=lambda path: path.replace("views/", "./images/")),
    ),
    "nerfstudio's paths, folder renamed": written(file_path=lambda path: path.replace("views/", "./images/")),
    "matrices of three rows": poses(lambda matrix: matrix[:3]),
    "applied_scale of nerfstudio": both(farther(0.5), top(applied_scale=0.5)),
    "w and h as 128.0": top(w=float(SIZE), h=float(SIZE)),
    "k3 of Metashape": top(k1=-0.004, k2=0.002, k3=-0.009, k4=0, p1=-0.0001, p2=0.0001),
    "depth_path of instant-ngp": both(
        top(depth_unit_scale_factor=None, integer_depth_scale=UNIT, enable_depth_loading=True),
        frames(lambda frame, _: frame.update(depth_path="./" + frame.pop("depth_file_path"))),
    ),
    "UTF-16 of PowerShell": lambda content: content | {CAMERAS: content[CAMERAS].decode().encode("utf-16")},
    "camera models by frame": frames(
        lambda frame, index: frame.update(camera_model=("PINHOLE", "SIMPLE_RADIAL", "OPENCV")[index % 3])
    ),
}
"""Captures that are read as they are meant, without any refusal"""

REFUSED: dict[str, tuple[Change, str]] = {
    "depth in fifths of a millimetre": (
        depth_as(".png", steps_of(1 / 5000), depth_unit_scale_factor=None),
        r"depth is 5 times too large.*depth_unit_scale_factor 0.0002",
    ),
    "depth in quarters of a millimetre": (
        depth_as(".png", steps_of(1 / 4000), depth_unit_scale_factor=None),
        r"depth is 4 times too large.*depth_unit_scale_factor 0.00025",
    ),
    "float depth in inches": (
        depth_as(".npy", lambda metres: npy((metres / 0.0254).astype(np.float32))),
        r"depth is 39\.\d times too large.*divide it by 39",
    ),
    "steps for each metre": (top(depth_unit_scale_factor=1 / UNIT), r"not steps for each metre: 0.0001"),
    "depth along the ray": (along_the_ray, r"the distance along the ray"),
    "depth of other proportions": (
        depth_as(".png", lambda metres: steps_of(UNIT)(metres[::2])),
        r"is 128 x 64 pixels, its view 128 x 128: other proportions",
    ),
    "depth as JPEG": (
        depth_as(".jpg", lambda metres: encoded((metres * 99).astype(np.uint8), "JPEG")),
        r"is JPEG, which cannot hold depth",
    ),
    "depth as 32-bit integers": (
        depth_as(".npy", lambda metres: npy((metres * 1000).astype(np.int32))),
        r"type int32; save depth as 16-bit grey PNG",
    ),
    "depth as 32-bit TIFF": (
        depth_as(".tif", lambda metres: encoded((metres * 1000).astype(np.int32), "TIFF")),
        r"it has 32-bit integers",
    ),
    "depth as 16-bit RGB": (depth_as(".png", rgb16), r"it has 16-bit RGB pixels, several channels"),
    "depth as 16-bit grey with alpha": (
        depth_as(".png", lambda metres: rgb16(metres, 4, 2)),
        r"it has 16-bit LA \(grey with alpha\) pixels",
    ),
    "depth as 16-bit RGB TIFF": (depth_as(".tif", rgb16_tiff), r"it has 16-bit RGB pixels, several channels"),
    "depth as a coloured picture": (
        depth_as(".png", lambda metres: encoded(np.dstack([metres * 99, metres * 50, metres * 9]).astype(np.uint8))),
        r"a picture of depth, not depth",
    ),
    "CMYK pictures": (
        pictures_as(".jpg", lambda picture: saved(picture.convert("RGB").convert("CMYK"), "JPEG")),
        r"is a CMYK image; save it as RGB",
    ),
    "HEIC pictures": (pictures_as(".heic", lambda picture: HEIC), r"is a HEIC picture|broken PNG or JPEG"),
    "HEIC named .jpg": (pictures_as(".jpg", lambda picture: HEIC), r"is a HEIC picture|broken PNG or JPEG"),
    "TIFF pictures": (
        pictures_as(".tif", lambda picture: saved(picture, "TIFF")),
        r"\(views/view_000.tif, views/view_001.tif, ...\): is ignored: views are PNG, JPEG",
    ),
    "a truncated picture": (truncated, r"views/view_004.png: is a broken"),
    "a copy of a picture": (copied_by_explorer, r"views/view_000 \(1\).png: has the same pixels as views/view_000.png"),
    "a frame too few": (without_some_frames, r"has no camera in transforms.json; add its frame, or remove the view"),
    "lost tracking": (
        frames(lambda frame, index: frame.update(transform_matrix=[[math.nan] * 4] * 4) if index == 3 else None),
        r"frames\[3\].*tracking was lost",
    ),
    "pictures of half the size": (half_size, r"is 64 x 64 pixels; its camera in transforms.json is for 128 x 128"),
    "pictures of half the size, without w and h": (
        both(half_size, top(w=None, h=None)),
        r"the principal point .* is of a larger picture",
    ),
    "distortion of a calibration that failed": (
        top(k1=-44.85, k2=1017.4, p1=0.62, p2=0.94),
        r"distortion .* that folds the picture onto itself",
    ),
    "paths that begin above": (
        written(file_path=lambda path: f"../bowl/{path}"),
        r"'../bowl/views/view_000.png' leaves the capture folder",
    ),
    "positions of half the size": (farther(0.5), r"depth is 2 times too large.*the cameras' positions by 2"),
    "positions of 1.1 times the size": (farther(1.1), r"depth is 1.1 times too small.*the cameras' positions by 1.1"),
    "positions in millimetres": (farther(1000), r"depth is 1e\+03 times too small|depth is 1000 times too small"),
    "axes of OpenCV": (poses(lambda matrix: matrix @ AXES), r"have OpenCV's axes"),
    "axes of PyTorch3D": (
        poses(lambda matrix: matrix @ np.diag([-1.0, 1, -1, 1])),
        r"camera axes x left, y up, z ahead \(PyTorch3D\)",
    ),
    "axes of a robot": (poses(lambda matrix: matrix @ ROBOT), r"camera axes x ahead, y left, z up \(ROS\)"),
    "world-to-camera": (poses(np.linalg.inv), r"are world-to-camera"),
    "world-to-camera of PyTorch3D": (
        poses(lambda matrix: np.linalg.inv(matrix @ np.diag([-1.0, 1, -1, 1]))),
        r"are world-to-camera, .*x left, y up, z ahead \(PyTorch3D\)",
    ),
    "left-handed": (poses(lambda matrix: matrix @ np.diag([1.0, 1, -1, 1])), r"its axes are left-handed"),
    "positions of a left-handed world": (
        poses(lambda matrix: matrix * np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, -1], [1, 1, 1, 1]])),
        r"positions are mirrored against their rotations: z has the wrong sign",
    ),
    "positions of world-to-camera": (
        poses(lambda matrix: np.column_stack([matrix[:, :3], np.linalg.inv(matrix)[:, 3]])),
        r"the positions are those of world-to-camera",
    ),
    "a principal point that is not the middle, and not given": (
        top(cx=0.44 * SIZE, cy=0.5 * SIZE),
        r"shifted against the views, by about .*; correct cx and cy, or register the depth",
    ),
    "a focal length in millimetres": (top(fl_x=50, fl_y=50), r"focal length is 5\.\d+ times too short"),
    "the focal length of another camera": (top(fl_x=365, fl_y=365), r"focal length is 1\.3\d* times too long"),
    "a focal length that is a tenth too long": (top(fl_x=309, fl_y=309), r"focal length is 1\.1\d* times too long"),
    "mirrored depth": (
        depth_as(".png", lambda metres: steps_of(UNIT)(metres[:, ::-1])),
        r"the depth maps are mirrored against the cameras",
    ),
    "cameras of the next view": (cameras_of_others(1), r"each has that of the next view"),
    "cameras in the opposite order": (cameras_of_others(-1, -1), r"they are in the opposite order"),
    "a turntable that turned the other way": (
        turned_the_other_way,
        r"the views turn the other way than their cameras; .*--clockwise",
    ),
    "quaternions in another order": (poses(wrong_quaternions), r"quaternions that were taken for x y z w"),
    "nerf_synthetic, without depth": (as_nerf_synthetic, r"\(train/r_0.png, train/r_1.png, ...\): has no depth map"),
    "a zip": (lambda content: {"bowl.zip": b"x"}, r"bowl.zip is an archive: unpack it: unzip"),
    "a folder too high": (
        lambda content: {f"scan/{path}": data for path, data in content.items()},
        r"no capture there, but below: scan; name one of them",
    ),
    "a recording of Record3D": (lambda content: {"bowl.r3d": b"x"}, r"a recording of Record3D: export it"),
}
"""Captures that are refused: the reason that is told"""


@pytest.mark.parametrize("case", READ)
def test_it_is_read_as_it_is_meant(case: str, capture: Content) -> None:
    code, told = look(READ[case](capture))
    assert code == 0, told
    assert "warning" not in told


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_its_cause(case: str, capture: Content) -> None:
    change, reason = REFUSED[case]
    code, told = look(change(capture))
    assert code == 2, told
    assert re.search(reason, told), told
