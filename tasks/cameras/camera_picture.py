"""A picture of a capture's cameras around what they see, for the run's artifacts; `find_cameras` draws it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tasks.capture.camera import Camera
from tasks.capture.masks import resample
from tasks.capture.views import View

SIZE_PX = 480  # of each of the two sides: from above, and from the side
POINTS = 1500  # of a view
FRUSTUM = 0.12  # length of a drawn camera, in distances of the cameras from what they see
MARGIN = 0.06  # around everything, in widths
JPEG_QUALITY = 85
PAPER, INK = (255, 255, 255), (30, 90, 200)
# The world's axes that run to the right and upwards in the pictures
SIDES = ((0, 1), (0, 2))

Floats = NDArray[np.float64]


def camera_picture(seen: Sequence[View], placed: Mapping[str, Camera]) -> bytes:
    """A JPEG of all cameras, by view name, and the points that their views measured: from above and the side (z up)."""
    cameras = list(placed.values())
    points, colours = _cloud(seen, placed)
    centres = np.array([camera.centre for camera in cameras])
    middle = np.median(points if len(points) else centres, axis=0)
    length = FRUSTUM * float(np.median(np.linalg.norm(centres - middle, axis=1)))
    frusta = np.stack([_frustum(camera, length) for camera in cameras])
    sheet = Image.new("RGB", (SIZE_PX * len(SIDES), SIZE_PX), PAPER)
    everything = np.concatenate([points, frusta.reshape(-1, 3)])
    low, high = np.percentile(everything, [0.5, 99.5], axis=0)
    low, high = np.minimum(low, frusta.min(axis=(0, 1))), np.maximum(high, frusta.max(axis=(0, 1)))
    scale = SIZE_PX * (1 - 2 * MARGIN) / max(float((high - low).max()), np.finfo(float).tiny)
    for index, (right, up) in enumerate(SIDES):

        def on_paper(places: Floats, right: int = right, up: int = up) -> Floats:
            centred = (places - (low + high) / 2) * scale
            return np.stack([SIZE_PX / 2 + centred[..., right], SIZE_PX / 2 - centred[..., up]], axis=-1)

        sheet.paste(_side(on_paper(points), colours, points[:, 3 - right - up], on_paper(frusta)), (index * SIZE_PX, 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _side(points: Floats, colours: NDArray[np.uint8], order: Floats, frusta: Floats) -> Image.Image:
    paper = np.full((SIZE_PX, SIZE_PX, 3), PAPER, np.uint8)
    # what is nearer is drawn later
    drawn = np.argsort(order if len(order) and len(points) else np.empty(0), kind="stable")
    column, row = np.floor(points[drawn]).astype(int).reshape(-1, 2).T
    inside = (column >= 0) & (row >= 0) & (column < SIZE_PX) & (row < SIZE_PX)
    paper[row[inside], column[inside]] = colours[drawn][inside]
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    for eye, *corners in frusta:
        for corner, following in zip(corners, [*corners[1:], corners[0]], strict=True):
            draw.line([*eye, *corner], INK)
            draw.line([*corner, *following], INK)
    return picture


def _frustum(camera: Camera, length: float) -> Floats:
    """Eye and the four corners of the image (5, 3), in the world."""
    corners = np.array([[0, 0], [camera.width, 0], [camera.width, camera.height], [0, camera.height]], np.float64)
    return np.vstack([camera.centre, camera.centre + length * camera.directions(corners)])


def _cloud(seen: Sequence[View], placed: Mapping[str, Camera]) -> tuple[Floats, NDArray[Any]]:
    """World points (n, 3) that the views measured, and their colours (n, 3)."""
    points, colours = [np.empty((0, 3))], [np.empty((0, 3), np.uint8)]
    for view in seen:
        if view.depth is None or view.name not in placed:
            continue
        height, width = view.depth.shape
        rows, columns = np.nonzero(view.depth)
        chosen = np.linspace(0, len(rows) - 1, min(POINTS, len(rows))).astype(int)
        rows, columns = rows[chosen], columns[chosen]
        camera = placed[view.name].resized(width, height)
        points.append(camera.points(rows, columns, view.depth[rows, columns]))
        colours.append(resample(view.image, width, height)[rows, columns])
    return np.concatenate(points), np.concatenate(colours)
