"""The engines that there are, and which of them a run uses."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tasks.capture.capture_checks import CaptureReport
from tasks.errors import EngineUnavailable
from tasks.inference.engine import Engine
from tasks.inference.fusion.fusion_engine import Fusion
from tasks.inference.trellis.trellis_engine import Trellis
from tasks.settings import EngineName
from tasks.weights.local import find
from tasks.weights.pins import Weights, bundle

TRELLIS = Trellis()
ENGINES: dict[str, Engine] = {"fusion": Fusion(), "trellis": TRELLIS}


class EngineChoice(BaseModel):
    """The engine that a run uses, resolved before any key is made, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    reason: str


def resolve_engine(asked: EngineName) -> EngineChoice:
    """What `auto` means on this machine: trellis where GPU, package and weights are there, else fusion."""
    if asked != "auto":
        return EngineChoice(name=asked, version=ENGINES[asked].version, reason="asked for")
    lacking = TRELLIS.missing() or ("its weights are not fetched" if find(bundle()) is None else None)
    if lacking is None:
        return EngineChoice(name="trellis", version=TRELLIS.version, reason="auto: GPU, trellis and weights are here")
    return EngineChoice(
        name="fusion", version=ENGINES["fusion"].version, reason=f"auto: no trellis on this machine: {lacking}"
    )


def require_engine(engine: EngineChoice) -> None:
    """Raise EngineUnavailable where the engine cannot run on this machine, before anything is fetched for it."""
    if (lacking := ENGINES[engine.name].missing()) is not None:
        raise EngineUnavailable(f"engine {engine.name}: {lacking}; run `python -m flows doctor`")


def weights_for(engine: EngineChoice, report: CaptureReport) -> Weights | None:
    """The weights that a capture's inference loads, known before any download; None for an engine without weights."""
    return Weights.of(bundle(masks=report.lacks_masks)) if ENGINES[engine.name].has_weights else None
