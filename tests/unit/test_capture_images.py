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
from PIL import Image

from tasks.capture.images import DecodeError, decode_depth, decode_picture
from tests.support.tiny import encoded

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
