"""A run that is killed at any stage can be run again: nothing is done twice, nothing half-written is left."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.running import STAGES, CommandLine, assert_published, assert_whole, contents_of, kill_group

pytestmark = pytest.mark.system

DELAYS = random.Random(7)
"""Of kills some time into a stage."""


@pytest.fixture(scope="module")
def ball(capture: Callable[[str], Path]) -> Path:
    return capture("ball")


def kill_at(process: subprocess.Popen[str], stage: str, delay: float) -> None:
    """SIGKILL the process and its children `delay` seconds after a stage has begun."""
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith(f"{stage} ..."):
                time.sleep(delay)
                return
        raise AssertionError(f"{stage} never began:\n{''.join(lines)}")
    finally:
        kill_group(process)
        process.communicate()


def leftovers(flows: CommandLine) -> list[Path]:
    """Hidden files and folders: what a run works in before it renames."""
    return [path for root in (flows.store, flows.output) for path in root.rglob(".*")]


@pytest.mark.parametrize(
    ("stage", "delay"),
    [*((stage, 0.0) for stage in (*STAGES, "publish")), ("publish", DELAYS.uniform(0, 0.05))],
)
def test_killed_run_can_be_run_again(stage: str, delay: float, ball: Path, command_line: CommandLine) -> None:
    kill_at(command_line.start(*command_line.reconstruct_arguments(ball)), stage, delay)

    finished = command_line.reconstruct(ball)
    assert finished.code == 0, finished.stderr
    report = finished.report
    assert report.status == "normal"
    done = STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES
    assert [timing.name for timing in report.stages if timing.cached][: len(done)] == list(done)
    (asset,) = [marker.parent for marker in command_line.output.glob("ball/*/_SUCCESS")]
    assert_published(contents_of(asset), [entry.path for entry in report.outputs])
    assert (asset.parent / "latest.json").is_file()
    assert leftovers(command_line) == []
    assert_whole(command_line.store)
