"""Pictures as cameras write them: turned by EXIF, of a fisheye lens, of 12 bits, in formats of phones."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tasks.capture.camera import Camera
from tasks.capture.images import DecodeError, decode_depth, decode_mask, decode_picture
from tasks.capture.layouts import read_layout
from tasks.capture.orientation import turned
from tasks.capture.views import decode_view
from tasks.errors import CaptureRefused
from tests.support.tiny import FUSION, SIZE, Content, ball_depth, edited, encoded, report, ring, steps, tiny_capture

LIMIT = 1_000_000


def uneven(camera: Camera) -> NDArray[np.float32]:
    """Depth of a ball of which a corner is missing: it looks other when it is turned."""
    depth = ball_depth(camera)
    depth[: SIZE // 2, SIZE // 3 :] = 0
    return depth


def photographs(orientation: int, shown: bool) -> Content:
    """JPEG views with an orientation in EXIF; shown: cameras and depth are of the pictures as they are shown."""
    rng = np.random.default_rng(1)
    content = edited(tiny_capture(), w=None, h=None)
    transforms = json.loads(content["transforms.json"])
    for index, (frame, camera) in enumerate(zip(transforms["frames"], ring(4), strict=True)):
        del content[f"views/view_{index:03d}.png"]
        depth = uneven(camera)
        picture = np.where(depth[..., None] > 0, rng.integers(120, 200, (SIZE, SIZE, 3)), 20).astype(np.uint8)
        stored = unturned(picture, orientation) if shown else picture
        exif = Image.Exif()
        exif[0x0112] = orientation
        content[f"views/view_{index:03d}.jpg"] = encoded(stored, "JPEG", exif=exif, quality=95)
        content[f"depth/view_{index:03d}.png"] = encoded(steps(depth))
        frame["file_path"] = f"views/view_{index:03d}.jpg"
    content["transforms.json"] = json.dumps(transforms).encode()
    return content


def unturned(picture: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The pixels that a file with this orientation has to store."""
    back = {6: 8, 8: 6}.get(orientation, orientation)
    return turned(picture, back)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_is_that_of_pillow(orientation: int) -> None:
    from PIL import ImageOps

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(stream))
    np.testing.assert_array_equal(turned(pixels, orientation), np.asarray(expected))
    np.testing.assert_array_equal(turned(unturned(pixels, orientation), orientation), pixels)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shown", [False, True], ids=["as stored", "as shown"])
def test_the_picture_that_depth_means_is_taken(orientation: int, shown: bool) -> None:
    content = photographs(orientation, shown)
    layout = read_layout(list(content), content.__getitem__)
    for files, camera in zip(layout.views, ring(4), strict=True):
        decoded = decode_view(files, layout.cameras, content.__getitem__)
        assert decoded.shown == ("turned" if shown else "stored")
        bright = decoded.view.image.mean(axis=2) > 70
        assert (bright == (uneven(camera) > 0)).mean() > 0.97
    assert report(content, FUSION).warnings == ()


def test_the_size_of_the_camera_says_which_picture_is_meant() -> None:
    content = {path: data for path, data in tiny_capture().items() if not path.startswith("depth/")}
    exif = Image.Exif()
    exif[0x0112] = 6
    content["views/view_000.png"] = encoded(np.zeros((64, 48, 3), np.uint8), exif=exif)
    for size, shown in (((64, 48), "turned"), ((48, 64), "stored"), ((50, 50), "unknown")):
        content = edited(content, w=size[0], h=size[1])
        layout = read_layout(list(content), content.__getitem__)
        assert decode_view(layout.views[0], layout.cameras, content.__getitem__).shown == shown


def test_pictures_that_disagree_about_their_orientation_are_refused() -> None:
    mixed, other = photographs(6, shown=True), photographs(6, shown=False)
    mixed["views/view_002.jpg"] = other["views/view_002.jpg"]
    with pytest.raises(CaptureRefused, match="EXIF orientation 6, and it is not clear whether it applies") as caught:
        report(mixed, FUSION)
    assert [problem.where for problem in caught.value.problems] == ["views/view_002.jpg"]


def test_twelve_bits_in_sixteen_are_not_black() -> None:
    twelve = decode_picture("views/a.png", encoded(np.array([[0, 2048, 4095]], np.uint16)), LIMIT)
    np.testing.assert_array_equal(twelve.rgb[..., 0], [[0, 128, 255]])
    sixteen = decode_picture("views/a.png", encoded(np.array([[0, 2048, 65535]], np.uint16)), LIMIT)
    np.testing.assert_array_equal(sixteen.rgb[..., 0], [[0, 8, 255]])


def test_webp_is_a_view() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    found = decode_picture("views/a.webp", encoded(rgba, "WEBP", lossless=True, exact=True), LIMIT)
    np.testing.assert_array_equal(found.rgb, rgba[..., :3])
    np.testing.assert_array_equal(found.alpha, rgba[..., 3])


def test_heic_without_its_library_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    content = {path: heic if path.startswith("views/") else data for path, data in tiny_capture().items()}
    with pytest.raises(CaptureRefused) as caught:
        report(content, FUSION)
    told = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(told) == 1
    assert (
        "4 files (views/view_000.png, views/view_001.png, ...): is a HEIC picture, which needs pillow-heif" in told[0]
    )


def png_of_sixteen_bits(colour_type: int) -> bytes:
    """A PNG of 1 x 1 pixel with several channels of 16 bits; Pillow writes none."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {2: 3, 4: 2, 6: 4}[colour_type]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + b"\1\2" * channels))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("path", "data", "what"),
    [
        ("depth/a.png", png_of_sixteen_bits(2), "16-bit RGB"),
        ("depth/a.png", png_of_sixteen_bits(4), "16-bit LA"),
        ("depth/a.png", png_of_sixteen_bits(6), "16-bit RGBA"),
        ("depth/a.jpg", encoded(np.zeros((4, 4), np.uint8), "JPEG"), "is JPEG, which cannot hold depth"),
        ("depth/a.webp", b"", "is WebP, which cannot hold depth"),
        ("depth/a.png", encoded(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "8-bit colours: a picture of depth"),
        ("depth/a.tif", encoded(np.zeros((2, 2), np.int32), "TIFF"), "32-bit integers"),
    ],
)
def test_what_is_not_depth_is_said_as_what_it_is(path: str, data: bytes, what: str) -> None:
    with pytest.raises(DecodeError, match=what):
        decode_depth(path, data, 0.001, None, LIMIT)


def test_depth_of_shape_1_h_w_is_read() -> None:
    stream = io.BytesIO()
    np.save(stream, np.full((1, 2, 3), 1.5, np.float32))
    metres = decode_depth("depth/a.npy", stream.getvalue(), 0.001, None, LIMIT).metres
    assert metres is not None and metres.shape == (2, 3) and (metres == 1.5).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "I;16"])
def test_masks_of_every_mode(mode: str) -> None:
    grey = np.array([[0, 255]], np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    np.testing.assert_array_equal(decode_mask("masks/a.png", stream.getvalue(), LIMIT), grey)


def kannala_brandt(angle: NDArray[np.float64], k: tuple[float, ...]) -> NDArray[np.float64]:
    return angle * (1 + k[0] * angle**2 + k[1] * angle**4 + k[2] * angle**6 + k[3] * angle**8)


def test_a_fisheye_lens_is_straightened() -> None:
    """The ball's depth as the lens shows it comes back as a pinhole sees it, and the pattern on it as well."""
    k = (0.05, -0.02, 0.01, -0.003)
    camera = ring(4)[0]
    content = edited(
        tiny_capture(), camera_model="OPENCV_FISHEYE", **dict(zip(("k1", "k2", "k3", "k4"), k, strict=True))
    )
    # where a pinhole sees what each pixel of the lens shows
    angles = np.linspace(0, 1.2, 4000)
    y, x = (np.indices((SIZE, SIZE)) + 0.5 - SIZE / 2) / camera.fl_x
    bent = np.hypot(x, y)
    scale = np.tan(np.interp(bent, kannala_brandt(angles, k), angles)) / np.maximum(bent, 1e-12)
    pixels = np.stack([x * scale, y * scale], axis=-1).reshape(-1, 2) * camera.fl_x + SIZE / 2
    rays = camera.directions(pixels)
    shown = depth_along(rays, camera)
    pattern = (np.sin(6 * np.pi * rays @ [1.0, 0.3, 0.7]) * 100 + 120).reshape(SIZE, SIZE)
    content["views/view_000.png"] = encoded(np.repeat(pattern[..., None], 3, axis=2).astype(np.uint8))
    content["depth/view_000.png"] = encoded(steps(shown))
    layout = read_layout(list(content), content.__getitem__)
    content["confidence.png"] = encoded(np.where(shown > 0, 2, 1).astype(np.uint8))
    files = replace(layout.views[0], confidence="confidence.png")
    view = decode_view(files, layout.cameras, content.__getitem__).view
    assert view.camera is not None and view.depth is not None and not any(view.camera.distortion)
    inner = np.s_[16:48, 16:48]
    np.testing.assert_allclose(view.depth[inner], ball_depth(camera)[inner], atol=0.012)
    straight = (np.sin(6 * np.pi * camera.rays() @ [1.0, 0.3, 0.7]) * 100 + 120).reshape(SIZE, SIZE)
    assert np.abs(view.image[..., 0][inner] - straight[inner]).mean() < 4
    assert view.confidence is not None
    np.testing.assert_array_equal(view.confidence == 1, view.depth > 0)


def depth_along(rays: NDArray[np.float64], camera: Camera) -> NDArray[np.float32]:
    """Depth of the ball along some rays, (h, w)."""
    from tests.support.tiny import RADIUS

    a, b, c = (rays**2).sum(axis=1), rays @ camera.centre, camera.centre @ camera.centre - RADIUS**2
    discriminant = b**2 - a * c
    depth = np.where(discriminant > 0, (-b - np.sqrt(discriminant.clip(0))) / a, 0)
    return depth.reshape(SIZE, SIZE).astype(np.float32)


def test_a_camera_with_higher_terms_inverts_its_projection() -> None:
    pose = ring(4)[0].camera_to_world
    camera = Camera(640, 480, 500, 500, 320, 240, pose, (0.3, -0.2, 0.001, -0.002, 0.1, 0.25, -0.15, 0.05))
    pixels = np.random.default_rng(0).uniform([0, 0], [640, 480], (100, 2))
    there, _ = camera.project(camera.centre + 2 * camera.directions(pixels))
    np.testing.assert_allclose(there, pixels, atol=0.01)
    assert camera.distortion_inverts()


@pytest.mark.parametrize(
    "distortion", [(-44.85, 1017.4, 0.62, 0.94), (-1.5, 0.0, 0.0, 0.0), (0.0, 0.0, 0.9, 0.9)], ids=str
)
def test_a_distortion_that_folds_the_picture_is_refused(distortion: tuple[float, ...]) -> None:
    k1, k2, p1, p2 = distortion
    with pytest.raises(CaptureRefused, match="folds the picture onto itself"):
        report(edited(tiny_capture(), k1=k1, k2=k2, p1=p1, p2=p2), FUSION)


def test_reduced_pictures_without_their_size_are_refused() -> None:
    content: dict[str, Any] = edited(tiny_capture(), w=None, h=None, cx=float(SIZE), cy=float(SIZE))
    with pytest.raises(CaptureRefused, match=r"the principal point \(64, 64\) is of a larger picture"):
        report(content, FUSION)


def test_ignored_files_are_told_with_what_is_missing() -> None:
    content = tiny_capture()
    for index in range(4):
        content[f"views/view_{index:03d}.dng"] = content.pop(f"views/view_{index:03d}.png")
    with pytest.raises(CaptureRefused) as caught:
        report(content, FUSION)
    assert any(
        "4 files (views/view_000.dng, views/view_001.dng, ...): is ignored" in line
        for line in str(caught.value).splitlines()
    )


def test_cameras_that_do_not_move_are_refused_for_pictures_that_do() -> None:
    content = tiny_capture()
    transforms = json.loads(content["transforms.json"])
    for frame in transforms["frames"]:
        frame["transform_matrix"] = np.eye(4).tolist()
    content["transforms.json"] = json.dumps(transforms).encode()
    with pytest.raises(CaptureRefused, match=r"has the same camera as views/view_000\.png and another picture"):
        report(content, FUSION)
