"""The processes of a batch: a function whose process is killed runs once more, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flows.process_pool import Processes
from tasks.errors import CaptureRefused, InferenceInterrupted
from tests.support.running import ROOT, clean_environment, kill_group, wait_for
from tests.support.victims import PROBLEM, die_once, pid, poison, product, refuse, slowly

GONE_SECONDS = 10


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two, which the tests share: a start costs a second."""
    with Processes(2) as processes:
        yield processes


def alive(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_gone(numbers: list[int]) -> None:
    wait_for(f"the end of {numbers}", lambda: not any(map(alive, numbers)), GONE_SECONDS)


def test_results_and_errors_come_back(processes: Processes) -> None:
    assert processes.run(product, 6, b=7) == 42
    assert processes.run(pid) != os.getpid()
    with pytest.raises(CaptureRefused) as told:
        processes.run(refuse)
    assert (told.value.capture, told.value.problems) == ("mug", (PROBLEM,))


def test_what_ran_in_a_killed_process_runs_once_more(processes: Processes, tmp_path: Path) -> None:
    assert processes.run(die_once, tmp_path / "died") == "done"
    assert (tmp_path / "died").exists()


def test_what_kills_its_process_each_time_fails_on_its_own(processes: Processes, tmp_path: Path) -> None:
    """Others that work beside it get their results, though it dies twice and they last longer than both."""
    tries = tmp_path / "tries"
    with ThreadPoolExecutor(4) as threads:
        good = [threads.submit(processes.run, slowly, 1.5, word) for word in ("a", "b", "c")]
        bad = threads.submit(processes.run, poison, tries)
        with pytest.raises(InferenceInterrupted, match="was killed"):
            bad.result()
        assert [each.result() for each in good] == ["a", "b", "c"]
    assert tries.read_text().splitlines() == ["tried"] * 2
    assert processes.run(product, 2, 3) == 6


def test_no_more_at_once_than_there_are_processes(processes: Processes) -> None:
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda word: processes.run(slowly, 0.5, word), "abcd"))
    assert time.monotonic() - begun >= 1.0


PARENT = """
import sys, threading, time
from pathlib import Path
from flows.process_pool import Processes
from tests.support.victims import note_and_wait, product

def main(folder, end):
    with Processes(2) as processes:
        processes.run(product, 1, 1)
        for _ in range(2):
            threading.Thread(target=lambda: processes.run(note_and_wait, folder), daemon=True).start()
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.05)
        print("both", flush=True)
        if end == "error":
            raise RuntimeError("on purpose")
        time.sleep(600)

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT", "error"])
def test_no_process_outlives_its_parent(end: str, tmp_path: Path) -> None:
    """Signals go to the parent alone."""
    script, folder = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    folder.mkdir()
    env = clean_environment() | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder), end],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "both\n"
        if end != "error":
            parent.send_signal(getattr(signal, end))
        parent.wait(GONE_SECONDS)
        children = [int(path.name) for path in folder.iterdir()]
        assert len(children) == 2
        all_gone(children)
    finally:
        kill_group(parent)
        parent.communicate()


def test_normal_end_leaves_none() -> None:
    with Processes(2) as processes, ThreadPoolExecutor(2) as threads:
        used = set(threads.map(lambda _: processes.run(pid), range(4)))
    all_gone(list(used))
