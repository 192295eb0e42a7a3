"""Several GPUs of one machine, on the stand-in: each has a model's process of its own, and they work side by side."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tasks.errors import DeviceLost
from tasks.inference.trellis.gpu_models import LOSSES
from tasks.inference.trellis.model_process import Runtime
from tasks.inference.trellis.trellis_engine import Trellis
from tasks.inference.trellis.trellis_output import TrellisOutput
from tests.support.gpu_machine import STAND_IN, list_gpus
from tests.support.pictures import asked, views

GPUS = ["GPU 0", "GPU 1"]
PATIENCE = 60.0


@pytest.fixture
def trellis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trellis]:
    """The engine on a machine whose driver lists two GPUs."""
    list_gpus(tmp_path / "bin", 2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runtime = Runtime("some/weights", tmp_path / "scratch", root=STAND_IN, time_limit_s=PATIENCE)
    made = Trellis(lambda: runtime)
    yield made
    made.close()


def processes(trellis: Trellis) -> dict[str, int]:
    """The process of each GPU's model."""
    models = trellis.models().models
    return {f"GPU {model.gpu}": model.process.pid for model in models if model.process is not None}


def at_once(trellis: Trellis, in_the_middle: Callable[[str], None] = lambda gpu: None) -> list[Future[TrellisOutput]]:
    """Two inferences that meet in their middle, where `in_the_middle` is told the GPU of each.

    If they did not run at the same time, the first would wait for the other, and fail.
    """
    meeting = Barrier(2, timeout=PATIENCE)

    def one() -> TrellisOutput:
        met: list[str] = []

        def progressed(fraction: float, note: str = "") -> None:
            if not met and fraction > 0:
                met.append(note)
                meeting.wait()
                in_the_middle(note)

        return trellis.reconstruct(views(1), asked(), progressed)

    with ThreadPoolExecutor(2) as threads:
        return [threads.submit(one) for _ in range(2)]


def visible(process: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process."""
    variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    return dict(line.split("=", 1) for line in variables if line)["CUDA_VISIBLE_DEVICES"]


def test_each_gpu_has_a_process_that_sees_it_alone(trellis: Trellis) -> None:
    seen: list[str] = []
    first, second = [ended.result() for ended in at_once(trellis, seen.append)]
    assert sorted(seen) == GPUS
    assert {gpu: visible(process) for gpu, process in processes(trellis).items()} == {"GPU 0": "0", "GPU 1": "1"}
    assert first.to_safetensors() == second.to_safetensors()


def test_one_inference_after_the_other_loads_one_model(trellis: Trellis) -> None:
    for _ in range(2):
        trellis.reconstruct(views(1), asked(), silent_on("GPU 0"))
    assert list(processes(trellis)) == ["GPU 0"]


def silent_on(gpu: str) -> Callable[..., None]:
    def progressed(_: float, note: str = "") -> None:
        assert note == gpu

    return progressed


def test_the_user_says_which_gpus(trellis: Trellis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8f1, 7")
    assert [model.gpu for model in trellis.models().models] == ["5", "GPU-8f1", "7"]
    trellis.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert trellis.models_at_once() == 1
    trellis.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert trellis.missing() is not None and "CUDA_VISIBLE_DEVICES" in trellis.missing()


def test_a_process_that_dies_harms_its_own_capture_alone(trellis: Trellis) -> None:
    def kill(gpu: str) -> None:
        if gpu == "GPU 1":
            os.kill(processes(trellis)["GPU 1"], signal.SIGKILL)

    for loss in range(LOSSES):
        ended = at_once(trellis, kill)
        assert [type(each.exception()) for each in ended if each.exception()] == [DeviceLost]
        assert [each.result().views for each in ended if not each.exception()] == [("view_000",)]
        # a GPU that loses one model after the other would be free for each capture, and fail it
        assert trellis.models_at_once() == (2 if loss + 1 < LOSSES else 1)
    assert trellis.reconstruct(views(1), asked(), silent_on("GPU 0")).views
