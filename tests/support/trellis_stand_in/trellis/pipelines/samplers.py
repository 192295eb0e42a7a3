"""The samplers' interface, with the guidance of either variant."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import faults
import torch


class FlowEulerGuidanceIntervalSampler:
    def _inference_model(
        self,
        model: Any,
        x_t: Any,
        t: float,
        cond: Any,
        neg_cond: Any,
        cfg_strength: float,
        cfg_interval: Any,
        **kw: Any,
    ) -> Any:
        if not cfg_interval[0] <= t <= cfg_interval[1]:
            return model(x_t, t, cond, **kw)
        weight = cfg_strength + {"ES": 1, "GM": 0, "unknown": -1}[faults.setting("VARIANT", "GM")]
        return weight * model(x_t, t, cond, **kw) + (1 - weight) * model(x_t, t, neg_cond, **kw)

    def sample_once(self, model: Any, x_t: Any, t: float, t_prev: float, cond: Any = None, **kw: Any) -> Any:
        assert not torch.state.grad, "a step records gradients that are not needed"
        time.sleep(float(faults.setting("STEP_SECONDS", "0")))
        velocity = self._inference_model(model, x_t, t, cond, **kw)
        return SimpleNamespace(pred_x_prev=x_t - (t - t_prev) * velocity)

    def sample(
        self,
        model: Any,
        noise: Any,
        cond: Any,
        neg_cond: Any,
        steps: int = 50,
        rescale_t: float = 1.0,
        cfg_strength: float = 3.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        verbose: bool = True,
        **kw: Any,
    ) -> Any:
        sample = noise
        for step in range(steps):
            t, t_prev = 1 - step / steps, 1 - (step + 1) / steps
            sample = self.sample_once(
                model, sample, t, t_prev, cond, neg_cond=neg_cond, cfg_strength=cfg_strength, cfg_interval=cfg_interval
            ).pred_x_prev
        return SimpleNamespace(samples=sample)
