"""Makes the README's picture of a sample: its views, and the published mesh from six sides.

From the repository root, after `python -m flows reconstruct tests/data/hen out`:
python -m tests.data.make_picture tests/data/hen out/hen/<run key> tests/data/hen.jpg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from tasks.capture.contact_sheet import contact_sheet, thumbnail
from tasks.capture.views import decoded_views

HEIGHT, GAP, QUALITY = 480, 73, 88
PAPER, INK = (250, 250, 250), (32, 66, 148)


def make_picture(capture: Path, published: Path, target: Path) -> None:
    """Writes a JPEG: the views on the left, an arrow, the previews in two rows."""
    paths = [path.relative_to(capture).as_posix() for path in capture.rglob("*") if path.is_file()]
    views = decoded_views(paths, lambda path: (capture / path).read_bytes())
    sheet = Image.open(io.BytesIO(contact_sheet([thumbnail(view) for view in views])))
    sheet = sheet.resize((round(sheet.width * HEIGHT / sheet.height), HEIGHT), Image.Resampling.LANCZOS)
    previews = [Image.open(path) for path in sorted((published / "previews").iterdir())]
    side = HEIGHT // 2
    picture = Image.new("RGB", (sheet.width + GAP + side * (len(previews) // 2), HEIGHT), PAPER)
    picture.paste(sheet, (0, 0))
    for index, preview in enumerate(previews):
        row, column = divmod(index, len(previews) // 2)
        small = preview.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(small, (sheet.width + GAP + column * side, row * side))
    draw, start, tip, middle = ImageDraw.Draw(picture), sheet.width + 12, sheet.width + GAP - 10, HEIGHT // 2
    draw.rectangle((start, middle - 3, tip - 18, middle + 3), INK)
    draw.polygon([(tip - 18, middle - 13), (tip, middle), (tip - 18, middle + 13)], INK)
    picture.save(target, quality=QUALITY)


if __name__ == "__main__":
    make_picture(*map(Path, sys.argv[1:4]))
