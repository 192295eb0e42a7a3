"""Input of the `trellis` engine in the tests of its process: pictures of a square, and parameters."""

from __future__ import annotations

import numpy as np

from tasks.capture.views import View
from tasks.settings import InferParameters

COLOUR = (200, 100, 50)


def view(index: int, mask: str = "object") -> View:
    """A picture of a coloured square on black."""
    image = np.zeros((60, 80, 3), np.uint8)
    foreground = np.zeros((60, 80), bool)
    foreground[10:50, 20:60] = True
    image[foreground] = COLOUR
    masks = {"object": foreground, "all": np.ones_like(foreground), "none": np.zeros_like(foreground)}
    return View(f"view_{index:03d}", image, masks[mask], None, None)


def views(count: int, mask: str = "object") -> list[View]:
    return [view(index, mask) for index in range(count)]


def asked(seed: int = 42, **parameters: float) -> InferParameters:
    return InferParameters.model_validate({"seed": seed, "trellis": parameters})


def silent(_: float) -> None:
    """A progress callback that does nothing."""
