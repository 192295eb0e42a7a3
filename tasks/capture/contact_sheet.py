"""All views of a capture in one small picture: validate_capture draws it from the thumbnails of the view checks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tasks.capture.views import View

CONTACT_SHEET = "contact_sheet.jpg"

# A picture in the UI is embedded in its page, a third larger as base64.
_MAX_BYTES = 140_000
# A larger sheet has never been small enough.
_MOST_PIXELS = 8_000_000
_COLUMNS = 6
_GAP = 6
_LABEL_HEIGHT = 16
_PAPER, _INK = (250, 250, 250), (60, 60, 60)
_CHECKERS, _CHECKER_PX = (235, 210), 8
# Tried in this order until the picture is small enough: tile in pixels, JPEG quality.
_SIZES = ((160, 88), (160, 75), (128, 75), (96, 70), (64, 60), (32, 50), (16, 40))


@dataclass(frozen=True)
class Thumbnail:
    """A view in small, kept after its pixels are gone."""

    name: str
    """The view's"""
    picture: Image.Image
    """Of the largest tile's size, RGBa: its alpha is the mask"""


def thumbnail(view: View) -> Thumbnail:
    """The thumbnail of a view."""
    picture = Image.fromarray(np.dstack([view.image, view.mask.astype(np.uint8) * 255])).convert("RGBa")
    picture.thumbnail((_SIZES[0][0],) * 2, Image.Resampling.BOX)
    return Thumbnail(view.name, picture)


def contact_sheet(thumbnails: Sequence[Thumbnail]) -> bytes:
    """All views with their names as JPEG: six a row, more if there are many; on checkers outside of the mask."""
    for tile, quality in [size for size in _SIZES if len(thumbnails) * size[0] ** 2 <= _MOST_PIXELS] or _SIZES[-1:]:
        picture = io.BytesIO()
        _draw(thumbnails, tile).save(picture, "JPEG", quality=quality)
        if picture.tell() <= _MAX_BYTES:
            break
    return picture.getvalue()


def _draw(thumbnails: Sequence[Thumbnail], tile: int) -> Image.Image:
    columns = max(_COLUMNS, math.isqrt(len(thumbnails)))
    rows = math.ceil(len(thumbnails) / columns)
    pitch_x, pitch_y = tile + _GAP, tile + _LABEL_HEIGHT + _GAP
    sheet = Image.new("RGB", (min(columns, len(thumbnails)) * pitch_x + _GAP, rows * pitch_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, view in enumerate(thumbnails):
        x, y = _GAP + index % columns * pitch_x, _GAP + index // columns * pitch_y
        picture = _on_checkers(view.picture, tile)
        sheet.paste(picture, (x + (tile - picture.width) // 2, y + (tile - picture.height) // 2))
        draw.text((x + tile // 2, y + tile + 2), _shortened(view.name, tile, font), _INK, font, anchor="ma")
    return sheet


def _on_checkers(picture: Image.Image, tile: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((tile, tile), Image.Resampling.BOX)
    y, x = np.mgrid[: small.height, : small.width] // _CHECKER_PX
    checkers = np.choose((x + y) % 2, _CHECKERS).astype(np.uint8)
    background = Image.fromarray(checkers).convert("RGBA")
    return Image.alpha_composite(background, small.convert("RGBA")).convert("RGB")


def _shortened(name: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The name, or only its end if the name is wider than the tile: ends differ."""
    start = next((start for start in range(len(name)) if font.getlength(name[start:]) <= width), len(name))
    return name[start:]
