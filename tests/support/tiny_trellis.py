"""The engine's real networks, tiny, on the CPU: weights for them, and pictures. Needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.capture.views import View
from tasks.inference.trellis.model_process import Runtime
from tasks.settings import InferParameters
from tests.benchmarks.random_weights import TINY, TINY_CHANNELS, make

TIME_LIMIT_SECONDS = 600
PARAMETERS = InferParameters.model_validate({"seed": 3, "trellis": {"ss_steps": 3, "slat_steps": 2}})


def tiny_runtime(folder: Path) -> Runtime:
    """A runtime on the CPU with tiny random weights, which are made below the folder."""
    environment = make(folder / "weights", TINY, TINY_CHANNELS, "cpu")
    return Runtime("", folder / "scratch", environment, device="cpu", time_limit_s=TIME_LIMIT_SECONDS)


def picture(name: str = "front", height: int = 64, width: int = 64) -> View:
    """A view of noise with a rectangle as its foreground."""
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.bool_)
    mask[height // 4 : -height // 4, width * 5 // 16 : -width * 5 // 16] = True
    return View(name=name, image=image, mask=mask, depth=None, camera=None)
