"""The colour camera of a simulated sensor: pictures with the faults of automatic exposure, hands and JPEG.

Used by `tabletop` and `rooms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.synthetic.seen import Map


@dataclass(frozen=True)
class ColourCamera:
    """How far pictures are from the true colours; the sizes are ours, those of common video modes."""

    exposure_drift: float = 0.25
    """Stops (factors of 2 in linear light) that the exposure strays to either side."""
    white_balance_drift: float = 0.05
    """Share that red and blue stray to either side, against each other."""
    blurred_share: float = 0.15
    """Share of frames with motion blur."""
    blur: float = 0.012
    """Longest motion in a frame, in widths of the picture."""
    noise: float = 1.5
    """Standard deviation of a pixel, 8-bit levels."""
    quality: int = 92
    """JPEG's."""

    def gains(self, frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Factors (frames, 3) of linear red, green and blue: slow waves from frame to frame."""
        time = np.arange(frames)
        exposure, balance = (
            np.mean([np.sin(2 * np.pi * (time / period + rng.random())) for period in (9.7, 23.3)], axis=0)
            for _ in range(2)
        )
        red, blue = 1 + self.white_balance_drift * balance, 1 - self.white_balance_drift * balance
        return 2 ** (self.exposure_drift * exposure)[:, None] * np.column_stack([red, np.ones(frames), blue])

    def picture(
        self, image: NDArray[np.uint8], gain: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """A true picture (h, w, 3) as this camera takes it."""
        light = _LINEAR[image] * gain.astype(np.float32)
        if rng.random() < self.blurred_share:
            light = _moved(light, self.blur * image.shape[1] * rng.uniform(0.4, 1), rng.uniform(0, np.pi))
        levels = 255 * _srgb(np.clip(light, 0, 1)) + self.noise * rng.standard_normal(image.shape, np.float32)
        return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)

    def save(self, image: NDArray[np.uint8], path: Path) -> None:
        """Writes a picture as JPEG, or as PNG where the path ends so."""
        Image.fromarray(image).save(path, **({"quality": self.quality} if path.suffix == ".jpg" else {}))


def linear(levels: NDArray[np.floating]) -> NDArray[np.floating]:
    """sRGB 0..1 -> linear light 0..1 (IEC 61966-2-1)."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


_LINEAR = linear(np.arange(256) / 255).astype(np.float32)


def _srgb(light: Map) -> Map:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** np.float32(1 / 2.4) - 0.055)


def _moved(light: Map, length: float, angle: float) -> Map:
    """A picture (h, w, 3) smeared along a line of `length` pixels."""
    half = length / 2 * np.array([np.sin(angle), np.cos(angle)])
    steps = [np.rint(share * half).astype(int) for share in np.linspace(-1, 1, max(int(length) + 1, 2))]
    reach = int(np.ceil(length / 2)) + 1
    padded = np.pad(light, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = light.shape[:2]
    views = [padded[reach + y : reach + y + height, reach + x : reach + x + width] for y, x in steps]
    return np.mean(views, axis=0, dtype=np.float32)
