"""The sampler of both flows: Euler's method with classifier-free guidance in an interval of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

TIME_SCALE = 1000.0

Velocity = Callable[[Tensor, float, bool], Tensor]
"""Takes latents, a time 0..1000 and whether the condition counts; gives the latents' velocity."""


@dataclass(frozen=True)
class Sampling:
    """The parameters of a sampling."""

    steps: int
    """Number of steps."""
    strength: float
    """Strength s of the guidance: (1 + s) p - s n of the conditional velocity p and the unconditional one n."""
    interval: tuple[float, float] = (0.5, 1.0)
    """Times at which the guidance acts, both ends included."""
    rescale_t: float = 3.0
    """Factor that makes the steps of early times shorter; 1 for equal steps."""


def sample(velocity: Velocity, noise: Tensor, sampling: Sampling, stepped: Callable[[], None] = lambda: None) -> Tensor:
    """Latents at time 0 from noise at time 1. `stepped` is called after each step."""
    times = np.linspace(1, 0, sampling.steps + 1)
    times = sampling.rescale_t * times / (1 + (sampling.rescale_t - 1) * times)
    low, high = sampling.interval
    x = noise
    for t, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        v = velocity(x, TIME_SCALE * t, True)
        if sampling.strength and low <= t <= high:
            v = (1 + sampling.strength) * v - sampling.strength * velocity(x, TIME_SCALE * t, False)
        x = x - (t - following) * v
        stepped()
    return x
