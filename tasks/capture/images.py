"""Bytes of image and depth files -> arrays, for `views`. Files that are too large by their header are refused."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from tasks.capture.colour_profile import to_srgb
from tasks.capture.enlarged_depth import native_pixels
from tasks.capture.orientation import turned
from tasks.errors import InputError, Problem

_OPAQUE = 255
_EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
"""EXIF's orientation of a picture that is shown as it is stored"""
# Cameras of 12 bits are saved in 16 bits without scaling: then no pixel reaches this.
_TWELVE_BITS = 2**12
# How a file begins, whatever its name says (https://www.w3.org/TR/png, ISO/IEC 23008-12)
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}
_PNG_END = b"IEND\xaeB`\x82"
# Renderers write the largest half-precision number or 1e10 for a ray that hit nothing: from here on, metres, a number
# is no reading.
_NOTHING_HIT = 65_504.0
_EXR_DEPTH_NAMES = ("z", "depth", "y", "v", "r")
# OpenEXR decodes all channels of a file at once: together they may have this many times the pixels of the largest
# picture that is decoded.
_EXR_CHANNELS = 4
# OpenEXR prints its complaints to stdout, which belongs to --json; only one thread at a time can redirect it.
_EXR_LOCK = Lock()
_TIFF_BITS = 258  # the tag BitsPerSample: a number for each channel
_PNG_SEVERAL_CHANNELS = {2: "RGB", 4: "LA (grey with alpha)", 6: "RGBA"}
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
_SAVE_DEPTH = "save depth as 16-bit grey PNG, or as 32-bit float TIFF, EXR or NPY in metres"
_SAVE_AGAIN = "replace it with a file that opens, or remove it"

# We have a limit of our own, which is an error; Pillow's warning would only be noise beside it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DecodeError(InputError):
    """Files that could not be decoded; `problems` names them and the reasons."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    rgb: NDArray[np.uint8]
    """(h, w, 3) sRGB"""
    alpha: NDArray[np.uint8] | None
    """(h, w); None if no pixel is below 255"""
    channels: int
    """Of the file"""
    orientation: int
    """EXIF's, 1 = as stored; whoever knows the camera applies it"""

    def turned(self) -> Picture:
        """The picture as EXIF's orientation shows it."""
        alpha = None if self.alpha is None else turned(self.alpha, self.orientation)
        return replace(self, rgb=turned(self.rgb, self.orientation), alpha=alpha)


@dataclass(frozen=True)
class DecodedDepth:
    """A decoded depth file."""

    read: NDArray[np.bool_]
    """(h, w), True if the pixel has a reading"""
    metres: NDArray[np.float32] | None
    """(h, w), 0 = no reading; None for a relative map (8-bit grey) without a known range"""
    confidence: NDArray[np.float32] | None = None
    """(h, w) 0..1, how far each reading is to be trusted; None if nothing says it"""

    def where(self, kept: NDArray[np.bool_]) -> DecodedDepth:
        """The same map with readings only where `kept` (h, w) is True."""
        metres = None if self.metres is None else np.where(kept, self.metres, np.float32(0))
        return replace(self, read=self.read & kept, metres=metres)


def decode_picture(path: str, data: bytes, max_pixels: int) -> Picture:
    """Decode a PNG, JPEG, WebP or HEIC view.

    16-bit channels keep their upper 8 bits (of 12-bit grey, the upper 8 of the 12), grey and palette images become RGB,
    colours with an embedded profile sRGB. Raises DecodeError, also for CMYK (there is no conversion without its
    profile) and for more than `max_pixels`.
    """
    formats: tuple[str, ...] = _PICTURE_FORMATS
    if data[4:12].startswith(_HEIF_BRANDS):
        _register_heif(path)
        formats = ("HEIF",)
    with _refusing(path, "PNG or JPEG image"), _open(path, data, formats, max_pixels) as image:
        if image.mode == "CMYK":
            raise DecodeError(Problem(where=path, what="is a CMYK image", todo="save it as RGB"))
        channels = len(image.getbands())
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        if image.mode.startswith("I"):
            values = np.asarray(image).astype(np.int64)
            grey = (values >> (4 if values.max() < _TWELVE_BITS else 8)).clip(0, _OPAQUE).astype(np.uint8)
            return Picture(np.repeat(grey[..., None], 3, axis=2), None, channels, orientation)
        colours = image.convert("RGBA" if image.has_transparency_data else "RGB")
        pixels = np.asarray(to_srgb(colours, image.info.get("icc_profile")))
    alpha = pixels[..., 3] if pixels.shape[2] == 4 and pixels[..., 3].min() < _OPAQUE else None
    return Picture(np.ascontiguousarray(pixels[..., :3]), alpha, channels, orientation)


def decode_mask(path: str, data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a picture (h, w) uint8 that says something of each pixel; of several channels the brightest counts."""
    with _refusing(path, "mask"), _open(path, data, _PICTURE_FORMATS, max_pixels) as image:
        if image.mode.startswith(("I", "F")):
            return np.asarray(np.asarray(image) > 0, np.uint8) * np.uint8(_OPAQUE)
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))
        if image.mode in ("LA", "RGBA") and np.asarray(image.getchannel("A")).min() < _OPAQUE:
            return np.asarray(image.getchannel("A"))
        return np.asarray(image.convert("RGB")).max(axis=2)


def decode_depth(
    path: str, data: bytes, unit: float, depth_range: tuple[float, float] | None, max_pixels: int
) -> DecodedDepth:
    """Decode a depth map.

    16-bit integers times `unit` are metres; floats are metres. Values that are not finite and positive, the largest
    16-bit number and a renderer's infinity are no readings. 8-bit grey is relative: 0 = background, else linear between
    `depth_range` = (near, far) metres with 255 = near and 1 = far; without the range it only tells where readings are.
    A map that was enlarged by nearest neighbour is returned at its native size. Raises DecodeError.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if (lossy := _LOSSY.get(suffix)) is not None:
        raise DecodeError(Problem(where=path, what=f"is {lossy}, which cannot hold depth", todo=_SAVE_DEPTH))
    with _refusing(path, "depth map"):
        match suffix:
            case ".npy":
                raw: NDArray[Any] = _decode_npy(path, data, max_pixels)
            case ".exr":
                raw = _decode_exr(path, data, max_pixels)
            case _:
                raw = _decode_grey(path, data, ("PNG",) if suffix == ".png" else ("TIFF",), max_pixels)
    if raw.dtype == np.uint8:
        read = raw > 0
        if depth_range is None:
            return DecodedDepth(read, None)
        near, far = depth_range
        steps = (raw.astype(np.float32) - 1) / (_OPAQUE - 1)
        return DecodedDepth(read, np.where(read, far - steps * (far - near), 0).astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        metres = raw.astype(np.float32) * np.float32(unit if raw.dtype == np.uint16 else 1.0)
        read = np.isfinite(metres) & (metres > 0) & (metres < _NOTHING_HIT)
        if raw.dtype == np.uint16:  # 7-Scenes and others write the largest number where there is no reading
            read &= raw < np.iinfo(np.uint16).max
    metres = np.where(read, metres, np.float32(0))
    native = np.ix_(*native_pixels(metres))
    return DecodedDepth(read[native], metres[native])


def _register_heif(path: str) -> None:
    """Make Pillow read HEIC, if pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener  # here, because few captures have one
    except ImportError as error:
        todo = "install pillow-heif, or save it as JPEG or PNG"
        raise DecodeError(Problem(where=path, what="is a HEIC picture, which needs pillow-heif", todo=todo)) from error
    register_heif_opener()


@contextmanager
def _refusing(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except DecodeError:
        raise
    except (UnidentifiedImageError, SyntaxError) as error:
        raise DecodeError(Problem(where=path, what=f"is not a readable {kind}", todo=_SAVE_AGAIN)) from error
    except Exception as error:  # decoders raise nearly any type on broken bytes, and none of them is our fault
        what = f"is a broken {kind} ({str(error) or type(error).__name__})"
        raise DecodeError(Problem(where=path, what=what, todo=_SAVE_AGAIN)) from error


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError(Problem(where=path, what=f"has no pixels ({width} x {height})", todo=_SAVE_AGAIN))
    if width * height > max_pixels:
        raise DecodeError(_too_large(path, f"{width} x {height} pixels", max_pixels))


def _too_large(path: str, size: str, max_pixels: int) -> Problem:
    what = f"has {size}, more than the {max_pixels:,} that are decoded"
    return Problem(where=path, what=what, todo="scale it down, or raise CAPTURE2MESH_MAX_PIXELS")


def _open(path: str, data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """Open an image after a check of its header; a PNG's checksums are verified, which Pillow's decoder does not."""
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise DecodeError(_too_large(path, "far too many pixels", max_pixels)) from error
    _check_size(path, image.width, image.height, max_pixels)
    if image.format != "PNG":
        return image
    image.verify()
    if _PNG_END not in data:
        raise OSError("truncated PNG file")
    return Image.open(io.BytesIO(data), formats=formats)


def _decode_grey(path: str, data: bytes, formats: tuple[str, ...], max_pixels: int) -> NDArray[Any]:
    """(h, w) uint8, uint16 or float32 of a PNG or TIFF with one channel (or with equal channels)."""
    if data.startswith(_PNG_START) and len(data) > 25 and data[24] == 16 and data[25] in _PNG_SEVERAL_CHANNELS:
        # Pillow would give its upper 8 bits
        raise DecodeError(_no_depth(path, f"16-bit {_PNG_SEVERAL_CHANNELS[data[25]]} pixels, several channels"))
    with _open(path, data, formats, max_pixels) as image:
        bits = image.tag_v2.get(_TIFF_BITS, ()) if isinstance(image, TiffImageFile) else ()
        if len(bits) > 1 and max(bits) > 8:  # of these too Pillow would give the upper 8 bits
            raise DecodeError(_no_depth(path, f"{max(bits)}-bit {image.mode} pixels, several channels"))
        if image.mode in ("F", "L"):
            return np.asarray(image)
        if image.mode.startswith("I;16"):
            return np.asarray(image).astype(np.uint16)
        if image.mode == "I":
            raise DecodeError(_no_depth(path, "32-bit integers"))
        if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
            raise DecodeError(_no_depth(path, f"{image.mode} pixels"))
        red, green, blue, alpha = np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    grey = np.where(alpha > 0, red, 0).astype(np.uint8)
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise DecodeError(_no_depth(path, "8-bit colours: a picture of depth, not depth"))
    return grey


def _decode_npy(path: str, data: bytes, max_pixels: int) -> NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if len(shape) == 3 and 1 in (shape[0], shape[2]):
        shape = shape[:2] if shape[2] == 1 else shape[1:]
    if len(shape) != 2 or not (dtype.kind == "f" or dtype == np.uint16):
        raise DecodeError(_no_depth(path, f"an array of shape {shape} and type {dtype}"))
    _check_size(path, shape[1], shape[0], max_pixels)
    stream.seek(0)
    return np.asarray(np.load(stream, allow_pickle=False)).reshape(shape)


def _decode_exr(path: str, data: bytes, max_pixels: int) -> NDArray[Any]:
    """(h, w) float16 or float32 of the depth channel of an EXR with one part."""
    import OpenEXR  # here, because few captures have one

    with _EXR_LOCK, redirect_stdout(sys.stderr):
        with OpenEXR.File(io.BytesIO(data), header_only=True) as file:
            if len(file.parts) != 1:
                raise DecodeError(_no_depth(path, f"{len(file.parts)} parts"))
            _check_exr_size(path, file.header(), max_pixels)
        with OpenEXR.File(io.BytesIO(data), separate_channels=True) as file:
            channels = {name.lower().rsplit(".", 1)[-1]: channel.pixels for name, channel in file.channels().items()}
    name = next((name for name in _EXR_DEPTH_NAMES if name in channels), None)
    if name is None or channels[name] is None or channels[name].ndim != 2 or channels[name].dtype.kind != "f":
        raise DecodeError(_no_depth(path, f"channels {sorted(channels)}"))
    return np.array(channels[name])


def _check_exr_size(path: str, header: dict[str, Any], max_pixels: int) -> None:
    """Check all that OpenEXR allocates by the header: the picture, each of its channels, a tile."""
    low, high = (np.asarray(corner, np.int64) for corner in header["dataWindow"])
    width, height = (int(side) for side in high - low + 1)
    _check_size(path, width, height, max_pixels)
    if len(header["channels"]) * width * height > _EXR_CHANNELS * max_pixels:
        raise DecodeError(
            _too_large(path, f"{len(header['channels'])} channels of {width} x {height} pixels", max_pixels)
        )
    if "tiles" in header:
        _check_size(path, header["tiles"].xSize, header["tiles"].ySize, max_pixels)


def _no_depth(path: str, found: str) -> Problem:
    return Problem(
        where=path,
        what=f"is not a depth map: it has {found}",
        todo=_SAVE_DEPTH,
    )
