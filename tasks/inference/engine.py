"""What every engine offers: views go in, raw geometry comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.capture.capture_checks import Needs
from tasks.capture.views import View
from tasks.settings import ExporterName, InferParameters


class Output(Protocol):
    """What an engine gives, `vertices` and `faces` among its tensors. reduced: of fewer views than it was given."""

    @property
    def vertices(self) -> NDArray[np.float32]: ...
    @property
    def faces(self) -> NDArray[np.int32]: ...
    @property
    def colours(self) -> NDArray[np.float32] | None: ...
    @property
    def views(self) -> tuple[str, ...]: ...
    @property
    def reduced(self) -> bool: ...
    @property
    def to_capture(self) -> NDArray[np.float64] | None: ...
    def to_safetensors(self) -> bytes: ...


class Engine(Protocol):
    """What turns views into geometry."""

    version: str
    needs: Needs
    exporter: ExporterName
    has_weights: bool
    closed: bool  # whether its surfaces are closed and without defects
    shares_model: bool  # one model, loaded once, takes capture after capture; else each process runs its own

    def missing(self) -> str | None:
        """Why it cannot run on this machine, as far as is quickly seen; weights apart."""
        ...

    def most_views(self, parameters: InferParameters) -> int | None:
        """How many views it takes; None: any number."""
        ...

    def reconstruct(
        self, views: Sequence[View], parameters: InferParameters, progress: Callable[[float], None]
    ) -> Output: ...
