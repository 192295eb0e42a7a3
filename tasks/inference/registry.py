"""The engines, and which of them a run uses. The flows and the stages look engines up here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

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
    """The engine that a run uses. It is chosen before any cache key is made."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Its name in `ENGINES`."""
    version: str
    """The engine's version."""
    reason: str
    """Why this engine was chosen, for people."""


def resolve_engine(asked: EngineName) -> EngineChoice:
    """Choose the engine: the one that is asked for. `auto`: trellis if this machine can run it, else fusion."""
    if asked != "auto":
        return EngineChoice(name=asked, version=ENGINES[asked].version, reason="asked for")
    lacking = TRELLIS.missing() or ("its weights are not fetched" if find(bundle()) is None else None)
    if lacking is None:
        return EngineChoice(name="trellis", version=TRELLIS.version, reason="auto: GPU, trellis and weights are here")
    return EngineChoice(
        name="fusion", version=ENGINES["fusion"].version, reason=f"auto: no trellis on this machine: {lacking}"
    )


def require_engine(engine: EngineChoice) -> None:
    """Raise EngineUnavailable if the engine cannot run on this machine, before anything is downloaded for it."""
    if (lacking := ENGINES[engine.name].missing()) is not None:
        raise EngineUnavailable(f"engine {engine.name}: {lacking}; run `capture2mesh doctor`")


def weights_for(engine: EngineChoice) -> Weights | None:
    """The weights that an inference loads, known before any download; None for an engine without weights.

    Raises InputError if no lock file says what they are.
    """
    return Weights.of(bundle()) if ENGINES[engine.name].has_weights else None
