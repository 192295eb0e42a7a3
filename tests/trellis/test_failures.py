"""The engine's process on the real networks, tiny, when it fails in mid-inference: out of memory, killed, too slow.

The tests run in their order on one engine, because each start of a process with torch takes seconds.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
from tasks.errors import DeviceLost, InferenceTimeout, OutOfMemory
from tasks.inference.trellis.model_process import TrellisProcess
from tasks.inference.trellis.trellis_engine import Trellis
from tests.support.tiny_trellis import PARAMETERS, picture, tiny_runtime

pytestmark = pytest.mark.trellis

VIEWS = [picture("front"), picture("back", 48, 80)]
FAILING_ALLOCATION = Path(__file__).parents[1] / "support" / "failing_allocation"
LIMIT_SECONDS = 3.0


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the number of allocations that are to fail."""
    made = tmp_path_factory.mktemp("failures") / "left"
    made.write_text("0")
    return made


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, failures: Path) -> Iterator[Trellis]:
    runtime = tiny_runtime(tmp_path_factory.mktemp("trellis"))
    runtime = replace(runtime, environment={**runtime.environment, "FAILING_ALLOCATIONS": str(failures)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAILING_ALLOCATION), prepend=os.pathsep)
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # else torch is compiled anew for this scratch folder
        made = Trellis(lambda: runtime)
        yield made
        made.close()


@pytest.fixture(scope="module")
def undisturbed(engine: Trellis) -> bytes:
    """The output of an inference that nothing disturbs."""
    return output(engine)


def process(engine: Trellis) -> TrellisProcess:
    (model,) = engine.models().models
    assert model.process is not None
    return model.process


def output(engine: Trellis, progress: Callable[[float], None] = lambda _: None) -> bytes:
    return engine.reconstruct(VIEWS[:1], PARAMETERS, progress).to_safetensors()


def test_out_of_memory_is_tried_again_with_the_same_views(engine: Trellis, undisturbed: bytes, failures: Path) -> None:
    before = process(engine).pid
    failures.write_text("1")
    assert output(engine) == undisturbed
    assert process(engine).pid == before and failures.read_text() == "0"


def test_out_of_memory_again_is_tried_with_half_of_the_views(
    engine: Trellis, undisturbed: bytes, failures: Path
) -> None:
    failures.write_text("2")
    reduced = engine.reconstruct(VIEWS, PARAMETERS, lambda _: None)
    assert reduced.reduced and reduced.views == ("front",)
    assert replace(reduced, reduced=False).to_safetensors() == undisturbed


def test_out_of_memory_at_last_says_what_was_needed(engine: Trellis, failures: Path) -> None:
    failures.write_text("3")
    with pytest.raises(OutOfMemory, match=r"can't allocate memory.*tried with 2, 2 and 1 views") as raised:
        engine.reconstruct(VIEWS, PARAMETERS, lambda _: None)
    assert raised.value.needed_gib == 2**30 and raised.value.free_gib is None


def test_a_process_killed_in_mid_inference_is_replaced_and_gives_the_same(engine: Trellis, undisturbed: bytes) -> None:
    lost = process(engine)
    with pytest.raises(DeviceLost, match=r"ended in infer \(signal 9"):
        output(engine, killing(lost, signal.SIGKILL))
    assert not lost.alive
    assert output(engine) == undisturbed
    assert process(engine).pid != lost.pid


def test_an_inference_over_its_limit_is_ended(engine: Trellis) -> None:
    hung = process(engine)
    hung.runtime = replace(hung.runtime, time_limit_s=LIMIT_SECONDS)
    engine._runtime = lambda: hung.runtime
    with pytest.raises(InferenceTimeout, match=r"infer took longer than 3 s; its process was ended"):
        output(engine, killing(hung, signal.SIGSTOP))
    assert not hung.alive and not Path(f"/proc/{hung.pid}").exists()


def killing(process: TrellisProcess, number: signal.Signals) -> Callable[[float], None]:
    """A progress callback that sends the process a signal after its first step."""
    fractions: list[float] = []

    def kill(fraction: float) -> None:
        if not fractions:
            os.kill(process.pid, number)
        fractions.append(fraction)

    return kill
