"""Decoding: every accepted format gives the same numbers, and nothing large or broken gets through."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import OpenEXR
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from tasks.capture.images import DecodeError, decode_depth, decode_picture
from tests.support.tiny import encoded
from tests.synthetic.colour_camera import linear

LIMIT = 1_000_000
METRES = np.array([[0.0, 0.5, 1.0], [1.5, 2.0, 0.25]], np.float32)


def depth(path: str, data: bytes, depth_range: tuple[float, float] | None = None) -> NDArray[np.float32] | None:
    return decode_depth(path, data, 0.001, depth_range, LIMIT).metres


def exr(pixels: NDArray[np.floating], channel: str = "Z") -> bytes:
    stream = io.BytesIO()
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File(header, {channel: pixels}).write(stream)
    return stream.getvalue()


def npy(pixels: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("depth/a.png", encoded(np.rint(METRES * 1000).astype(np.uint16))),
        ("depth/a.tif", encoded(np.rint(METRES * 1000).astype(np.uint16), "TIFF")),
        ("depth/a.tiff", encoded(METRES, "TIFF")),
        ("depth/a.npy", npy(METRES)),
        ("depth/a.npy", npy(METRES.astype(np.float64)[..., None])),
        ("depth/a.npy", npy(np.rint(METRES * 1000).astype(np.uint16))),
        ("depth/a.exr", exr(METRES)),
        ("depth/a.exr", exr(METRES.astype(np.float16), "ViewLayer.Depth.Z")),
    ],
)
def test_depth_formats_give_metres(path: str, data: bytes) -> None:
    found = depth(path, data)
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, METRES, atol=1e-6)


def test_what_is_no_reading_becomes_zero() -> None:
    found = depth("depth/a.npy", npy(np.array([[np.nan, np.inf, -1.0, 1e10, 65504.0, 2.0]], np.float32)))
    np.testing.assert_array_equal(found, [[0, 0, 0, 0, 0, 2]])


@pytest.mark.parametrize(("path", "kind"), [("depth/a.png", "PNG"), ("depth/a.tif", "TIFF"), ("depth/a.npy", None)])
def test_the_largest_16_bit_number_is_not_a_reading(path: str, kind: str | None) -> None:
    """7-Scenes and others write 65535 where there is none."""
    pixels = np.array([[0, 1000, 65534, 65535]], np.uint16)
    decoded = decode_depth(path, npy(pixels) if kind is None else encoded(pixels, kind), 0.001, None, LIMIT)
    np.testing.assert_array_equal(decoded.read, [[False, True, True, False]])
    assert decoded.metres is not None
    np.testing.assert_allclose(decoded.metres, [[0, 1, 65.534, 0]], atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grey_depth_is_relative(mode: str) -> None:
    data = encoded(np.array(Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8)).convert(mode)))
    relative = decode_depth("depth/a.png", data, 0.001, None, LIMIT)
    assert relative.metres is None
    np.testing.assert_array_equal(relative.read, [[False, True, True, True]])
    np.testing.assert_allclose(depth("depth/a.png", data, (1.0, 3.0)), [[0, 3, 2, 1]], atol=1e-6)


def test_grey_below_alpha_zero_is_background() -> None:
    data = encoded(np.array([[[9, 0], [9, 255]]], np.uint8))
    np.testing.assert_array_equal(decode_depth("depth/a.png", data, 0.001, None, LIMIT).read, [[False, True]])


@pytest.mark.parametrize(
    ("path", "data", "why"),
    [
        ("depth/a.png", encoded(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "colours"),
        ("depth/a.npy", npy(np.zeros((2, 2, 3), np.float32)), "shape"),
        ("depth/a.npy", npy(np.zeros((2, 2), np.int32)), "int32"),
        ("depth/a.npy", npy(np.array([[None]])), "object"),
        ("depth/a.npy", npy(METRES)[:-3], "broken"),
        ("depth/a.exr", exr(METRES, "A"), "channels"),
        ("depth/a.exr", exr(METRES)[:-5], "broken"),
        ("depth/a.tif", b"II*\0", "not a readable"),
        ("depth/a.png", b"", "not a readable"),
    ],
)
def test_depth_that_is_none_is_refused(path: str, data: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why) as caught:
        depth(path, data)
    assert caught.value.problems[0].where == path


def test_openexr_leaves_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DecodeError):
        depth("depth/a.exr", exr(METRES)[:-5])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("P", 1), ("RGB", 3), ("RGBA", 4), ("I;16", 1)]
)
def test_views_of_every_mode_become_rgb(mode: str, channels: int) -> None:
    white = np.full((4, 4), 65535, np.uint16) if mode == "I;16" else np.array(Image.new("L", (4, 4), 255).convert(mode))
    image = Image.new("L", (4, 4), 255).convert(mode) if mode != "I;16" else Image.fromarray(white)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    picture = decode_picture("views/a.png", stream.getvalue(), LIMIT)
    assert picture.rgb.shape == (4, 4, 3)
    assert picture.rgb.dtype == np.uint8
    assert (picture.rgb == 255).all()
    assert picture.alpha is None
    assert picture.channels == channels


def test_alpha_and_transparent_palette_colours_are_kept() -> None:
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[0, 0, 3] = 0
    for data in (encoded(rgba), _palette_png(rgba)):
        alpha = decode_picture("views/a.png", data, LIMIT).alpha
        assert alpha is not None
        np.testing.assert_array_equal(alpha, rgba[..., 3])


def _palette_png(rgba: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray((rgba[..., 3] > 0).astype(np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=0)
    return stream.getvalue()


def test_cmyk_is_refused() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(stream, "JPEG")
    with pytest.raises(DecodeError, match="save it as RGB"):
        decode_picture("views/a.jpg", stream.getvalue(), LIMIT)


COLOURS = np.array(
    [[[128, 128, 128], [200, 120, 90], [60, 130, 70], [90, 100, 190], [255, 255, 255], [0, 0, 0]]], np.uint8
)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_display_p3_becomes_srgb(kind: str) -> None:
    colours = np.repeat(np.repeat(COLOURS, 16, axis=0), 16, axis=1)  # whole blocks of a JPEG
    data = encoded(colours, kind, icc_profile=display_p3(), **({"quality": 100} if kind == "JPEG" else {}))
    found = decode_picture("views/a.png", data, LIMIT).rgb[8, 8::16]
    # linear Display P3 -> linear sRGB (CSS Color 4, both of white D65)
    matrix = np.array([[1.22494, -0.22494, 0.0], [-0.04206, 1.04206, 0.0], [-0.01964, -0.07864, 1.09828]])
    light = linear(COLOURS[0] / 255) @ matrix.T
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(found, 255 * expected, atol=3 if kind == "JPEG" else 1.5)
    assert np.abs(found.astype(int) - COLOURS[0]).max() > 8


def test_alpha_is_kept_beside_a_profile() -> None:
    rgba = np.dstack([COLOURS, np.array([[0, 255, 255, 7, 255, 255]], np.uint8)])
    picture = decode_picture("views/a.png", encoded(rgba, icc_profile=display_p3()), LIMIT)
    np.testing.assert_array_equal(picture.alpha, rgba[..., 3])
    assert (picture.rgb != COLOURS).any()


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
        b"not a profile",
        b"",
    ],
    ids=["sRGB", "LAB", "broken", "empty"],
)
def test_a_profile_of_srgb_or_of_no_use_changes_nothing(profile: bytes) -> None:
    picture = decode_picture("views/a.png", encoded(COLOURS, icc_profile=profile), LIMIT)
    np.testing.assert_array_equal(picture.rgb, COLOURS)


def display_p3() -> bytes:
    """A profile of Display P3 as small as can be (ICC.1:2022): primaries adapted to D50, and sRGB's curve."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(65536 * number) for number in numbers))

    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(0.51512, 0.24120, -0.00105),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.29198, 0.69225, 0.04189),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.15710, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x04300000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def test_orientation_is_told_and_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode_picture("views/a.jpg", encoded(np.zeros((8, 16, 3), np.uint8), "JPEG", exif=exif), LIMIT)
    assert picture.orientation == 6
    assert picture.rgb.shape == (8, 16, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("cut", [3, 20, 200])
def test_truncated_images_are_refused(kind: str, cut: int) -> None:
    data = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), kind)
    with pytest.raises(DecodeError, match="broken"):
        decode_picture("views/a.png", data[:-cut], LIMIT)


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    data = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    data[len(data) // 2] ^= 1
    with pytest.raises(DecodeError):
        decode_picture("views/a.png", bytes(data), LIMIT)


def test_another_files_bytes_are_no_image() -> None:
    for data in (b"hello", encoded(np.zeros((4, 4), np.uint8), "GIF")):
        with pytest.raises(DecodeError, match="not a readable PNG or JPEG"):
            decode_picture("views/a.png", data, LIMIT)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [1100, 10_000, 100_000])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    npy_header = npy(np.zeros((1, 1), np.float32)).replace(
        b"(1, 1), }    ".ljust(13), f"({side}, {side}), }}".encode().ljust(13)
    )
    tiff = io.BytesIO()
    Image.new("1", (side if side < 50_000 else 1100,) * 2).save(tiff, "TIFF", compression="group4")
    tracemalloc.start()
    for path, data in (
        ("depth/a.png", png_header(side, side)),
        ("depth/a.npy", npy_header),
        ("depth/a.tif", tiff.getvalue()),
    ):
        with pytest.raises(DecodeError, match="pixels"):
            depth(path, data)
    with pytest.raises(DecodeError, match="pixels"):
        decode_picture("views/a.png", png_header(side, side), LIMIT)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_an_exr_bomb_is_refused_by_its_header() -> None:
    honest = exr(np.zeros((3, 5), np.float32))
    window = struct.pack("<iiii", 0, 0, 4, 2)
    assert window in honest
    with pytest.raises(DecodeError, match="pixels"):
        depth("depth/a.exr", honest.replace(window, struct.pack("<iiii", 0, 0, 99_999, 99_999)))
