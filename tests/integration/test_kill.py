"""A run that is killed at any stage can be run again: nothing is done twice, nothing half-written is left."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.dataset_runs import leftovers
from tests.support.running import STAGES, CommandLine, assert_published, assert_whole, contents_of, kill_group

pytestmark = pytest.mark.system

CHANCE = random.Random(7)
"""When publish is killed the second time."""


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


def test_run_killed_at_every_stage_can_be_run_again(capture: Callable[[str], Path], command_line: CommandLine) -> None:
    """It is killed at each stage in turn, at publish twice; each run goes on where the one before was killed."""
    ball, entries = capture("ball"), Counter[tuple[str, int]]()
    for stage, delay in [*((stage, 0.0) for stage in (*STAGES, "publish")), ("publish", CHANCE.uniform(0, 0.05))]:
        kill_at(command_line.start(*command_line.reconstruct_arguments(ball)), stage, delay)
        for done in STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES:
            (entry,) = command_line.store.glob(f"{done}/*/manifest.json")
            entries[done, entry.stat().st_ino] += 1
    assert len(entries) == len(STAGES)  # each is written once

    finished = command_line.reconstruct(ball)
    assert (finished.code, finished.ran) == (0, []), finished.stderr
    report = finished.report
    assert report.status == "normal"
    (asset,) = [marker.parent for marker in command_line.output.glob("ball/*/_SUCCESS")]
    assert_published(contents_of(asset), [entry.path for entry in report.outputs])
    assert (asset.parent / "latest.json").is_file()
    assert leftovers(command_line) == []
    assert_whole(command_line.store)
