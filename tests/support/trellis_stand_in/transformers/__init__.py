"""The one loader that upstream takes from transformers."""

from __future__ import annotations

from typing import Any

import faults


class _Mask:
    def __init__(self, probability: Any) -> None:
        self._probability = probability

    def sigmoid(self) -> Any:
        return self

    def cpu(self) -> Any:
        return self._probability


class BiRefNet:
    """Its mask is every pixel that is not black."""

    def to(self, device: Any) -> BiRefNet:
        return self

    def eval(self) -> BiRefNet:
        return self

    def __call__(self, batch: Any) -> list[Any]:
        return [_Mask(batch.max(axis=-1) > 0)]


class AutoModelForImageSegmentation:
    @classmethod
    def from_pretrained(cls, name: str, trust_remote_code: bool = False) -> BiRefNet:
        faults.note(f"network {name}")
        if faults.asked("NO_BIREFNET"):
            raise OSError(f"We couldn't connect to the hub to load {name}") from ConnectionError("offline mode")
        return BiRefNet()
