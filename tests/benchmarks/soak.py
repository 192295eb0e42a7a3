"""A dataset run that is killed 20 times: `python tests/benchmarks/soak.py [KILLS] [SEED]`.

At random points SIGKILL takes the run alone, the run with all its processes (the machine), one of its processes, or the
Prefect server, which is started again. In the end the same is published as by an undisturbed run, byte for byte.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.s3 import free_ports
from tests.support.dataset_runs import arguments, assert_alone, leftovers, machine, processes_of, published
from tests.support.running import TIMEOUT, CommandLine, kill_group, prefect
from tests.synthetic import SHAPES, make_capture

KILLS, CAPTURES = 20, 12
ORPHAN_SECONDS = 20
VICTIMS = ("the run", "the machine", "one process", "the server")


class Server:
    """A Prefect server that can be killed and started again, with the same port and database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.folder.mkdir()
        self.start()

    def start(self) -> None:
        self._stack = ExitStack()
        self.url = self._stack.enter_context(prefect(self.folder, self.port))

    def kill(self) -> None:
        for pid in processes_of(self.folder):
            os.kill(pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        self._stack.close()


def disturbed(flows: CommandLine, dataset: Path, server: Server, victim: str, after: float) -> int:
    """A run whose victim is killed after so many seconds; gives its exit status."""
    process = flows.start(*arguments(dataset, flows.output))
    try:
        time.sleep(after)
        others = [pid for pid in processes_of(flows.folder) if pid != process.pid]
        if victim == "the run":
            process.kill()
        elif victim == "the machine":
            kill_group(process)
        elif victim == "one process" and others:
            os.kill(random.choice(others), signal.SIGKILL)
        elif victim == "the server":
            server.kill()
            server.start()
        process.communicate(timeout=TIMEOUT)
        assert_alone(flows.folder, ORPHAN_SECONDS)
    finally:
        kill_group(process)
    return process.returncode


def soak(folder: Path, kills: int, server: Server) -> None:
    dataset = folder / "set"
    for number in range(CAPTURES):
        make_capture(dataset / f"{number:02}", list(SHAPES)[number % len(SHAPES)], views=8, size=96, seed=number)
    flows = machine(folder / "undisturbed", server.url)
    begun = time.monotonic()
    finished = flows.run(*arguments(dataset, flows.output))
    seconds, expected = time.monotonic() - begun, published(flows.output)
    assert finished.code == 0, finished.stderr
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} files")

    ends: Counter[str] = Counter()
    generation = 0
    for kill in range(kills):
        flows = machine(folder / f"disturbed-{generation}", server.url)
        victim, after = random.choice(VICTIMS), random.uniform(0, seconds)
        code = disturbed(flows, dataset, server, victim, after)
        print(f"{kill + 1:3} {victim:12} after {after:5.1f} s: exit {code}", flush=True)
        ends[victim] += 1
        if code == 0 or kill + 1 == kills:  # all is done: from the start
            compare(flows, dataset, expected)
            generation += 1
    print(f"{kills} kills ({dict(ends)}), {generation} times to the end: the same bytes each time, nothing left behind")


def compare(flows: CommandLine, dataset: Path, expected: dict[str, bytes]) -> None:
    finished = flows.run(*arguments(dataset, flows.output))
    assert finished.code == 0, finished.stderr
    assert published(flows.output) == expected
    assert leftovers(flows) == []
    assert not list(flows.store.glob("_ledger/failures/*"))


def main() -> None:
    given = [int(value) for value in sys.argv[1:]]
    kills, seed = (*given, *(KILLS, time.time_ns())[len(given) :])
    random.seed(seed)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        server = Server(Path(name) / "server")
        try:
            soak(Path(name), kills, server)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
