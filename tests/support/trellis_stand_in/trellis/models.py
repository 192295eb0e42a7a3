"""Networks that know only their device."""

from __future__ import annotations

from typing import Any

import torch


class Network:
    resolution, in_channels = 16, 8

    def __init__(self, name: str) -> None:
        self.name, self.device = name, torch.state.device

    def to(self, device: Any) -> Network:
        self.device = str(device)
        return self

    def eval(self) -> Network:
        return self
