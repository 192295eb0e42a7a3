"""What Prefect costs beside the stages' own work, on a stack of its own: `python -m tests.benchmarks.orchestration`.

Begin: from "run" in the UI to the first stage running. Overhead: from scheduled to completed, less the time of the
stages' task runs. Drain: queued reconstructions of the sample that find all their stages cached.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from infra.stack import Stack
from infra.stack_members import PART, environments
from tests.support.running import ROOT, SMALL, assignments, wait_for
from tests.support.running_stack import PASSWORD, Running, started

REPEATS = 5
FAR = 7200
"""Seconds; the drain takes that long at most."""
PAGE = 200
WAITING = {"Scheduled", "Late", "Pending", "Submitting", "Running", "AwaitingRetry"}
ASKED_FOR: dict[str, Any] = {"flows": {"name": {"any_": ["reconstruct"]}}, "sort": "START_TIME_DESC"}


def at(moment: str) -> datetime:
    return datetime.fromisoformat(moment.replace("Z", "+00:00"))


def stages_of(stack: Running, run: str) -> list[Any]:
    """The task runs of a run and of what it has handed over."""
    runs = [run, *(child["id"] for child in stack.children(run))]
    tasks = stack.ask("POST", "/task_runs/filter", flow_runs={"id": {"any_": runs}}, limit=PAGE)
    return [task for task in tasks if not task["state"]["state_details"]["child_flow_run_id"]]


def overhead(stack: Running, run: str) -> float:
    """Seconds from scheduled to completed, less the stages' own."""
    done = stack.ended(run, FAR)
    if done["state_name"] != "Completed":
        raise SystemExit(f"a run ended {done['state_name']}:\n{stack.logs[-5000:]}")
    time.sleep(1)  # task runs are recorded a moment later
    own = sum(task["total_run_time"] for task in stages_of(stack, run))
    return (at(done["end_time"]) - at(done["created"])).total_seconds() - own


def begin(stack: Running, run: str) -> float:
    """Seconds from a run's creation to its first stage."""
    first = min(at(task["start_time"]) for task in stages_of(stack, run) if task["start_time"])
    return (first - at(stack.read(run)["created"])).total_seconds()


def in_process(stack: Running) -> float:
    """Overhead of the command line against the stack's server."""
    parts = Stack(stack.settings)
    env = os.environ | parts.env | parts.worker_env
    env["PREFECT_API_AUTH_STRING"] = f"admin:{PASSWORD}"
    command = [sys.executable, "-m", "flows", "reconstruct", "s3://captures/mug", "s3://assets", *assignments(SMALL)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    newest = stack.ask("POST", "/flow_runs/filter", limit=1, **ASKED_FOR)[0]["id"]
    done = stack.read(newest)
    time.sleep(1)
    own = sum(task["total_run_time"] for task in stages_of(stack, newest))
    return (at(done["end_time"]) - at(done["start_time"])).total_seconds() - own


def memory(stack: Running) -> Counter[str]:
    """MB by kind: each process's share of what it has in memory (PSS)."""
    found: Counter[str] = Counter()
    for pid, environment in environments(stack.folder):
        part = next(entry for entry in environment if entry.startswith(f"{PART}=".encode())).decode().partition("=")[2]
        runs = any(entry.startswith(b"PREFECT__FLOW_RUN_ID=") for entry in environment)
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # ended meanwhile
            continue
        (line,) = [line for line in rollup.splitlines() if line.startswith("Pss:")]
        found["runs" if runs else part.partition("-")[0]] += int(line.split()[1]) // 1000
    return found


@contextmanager
def peak(stack: Running) -> Iterator[Counter[str]]:
    """The most memory by kind within the block, and of server and workers together."""
    most: Counter[str] = Counter()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            now = memory(stack)
            now["server and workers"] = now["prefect"] + now["worker"]
            now["all"] = now["server and workers"] + now["s3"] + now["runs"]
            for kind, value in now.items():
                most[kind] = max(most[kind], value)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def drain(stack: Running, count: int) -> tuple[float, Counter[str]]:
    """Minutes that `count` queued runs take, and how they ended."""
    begun = time.monotonic()
    runs = {stack.run() for _ in range(count)}

    def states() -> Counter[str]:
        pages = [
            stack.ask("POST", "/flow_runs/filter", limit=PAGE, offset=offset, **ASKED_FOR)
            for offset in range(0, count + PAGE, PAGE)
        ]
        return Counter(run["state_name"] for page in pages for run in page if run["id"] in runs)

    def done() -> Counter[str] | None:
        found = states()
        print(dict(found), file=sys.stderr)
        return None if WAITING & found.keys() else found

    ended = wait_for("the drain", done, FAR, pause=5)
    return (time.monotonic() - begun) / 60, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=200, help="runs of the drain")
    queued = parser.parse_args().queued
    with tempfile.TemporaryDirectory() as folder, started(Path(folder) / "state") as stack:
        overhead(stack, stack.run())  # fills the store
        through_worker, begins = [], []
        for _ in range(REPEATS):
            run = stack.run()
            through_worker.append(overhead(stack, run))
            begins.append(begin(stack, run))
        handed_over = [overhead(stack, stack.run(infer__seed=str(seed))) for seed in range(REPEATS)]
        alone = [in_process(stack) for _ in range(REPEATS)]
        print("| | median s | worst s |\n|---|---|---|")
        for name, values in {
            '"run" to first stage running': begins,
            "overhead through a worker": through_worker,
            "overhead with hand-over": handed_over,
            "overhead in-process": alone,
        }.items():
            print(f"| {name} | {median(values):.1f} | {max(values):.1f} |", flush=True)
        with peak(stack) as most:
            minutes, ended = drain(stack, queued)
        print(f"{queued} queued: {dict(ended)} in {minutes:.1f} min, {queued / minutes:.1f} a minute")
        print("peak MB: " + ", ".join(f"{kind} {value}" for kind, value in most.items()))


if __name__ == "__main__":
    main()
