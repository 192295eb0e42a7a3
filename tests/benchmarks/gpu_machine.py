"""The whole system on a GPU machine: `python -m tests.benchmarks.gpu_machine --weights FOLDER`.

It starts what `make stack` starts. Then a run is handed over to the pool `cuda`, a dataset runs in batches, a run is
cancelled and a worker is killed in mid-inference. The weights are random (`forced_model.py`). It prints a line for each
step with its seconds, and exits with 1 if one failed. It needs no network and no root. `--tiny`: the same on a machine
without a GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.s3 import free_ports
from infra.stack import Stack
from infra.stack_members import environments, runs_of
from tasks.inference.gpus import visible_gpus
from tests.benchmarks.dataset_gpu import TINY_STEPS, used_gib
from tests.benchmarks.forced_model import environment, make_captures
from tests.support.running import wait_for
from tests.support.running_stack import Running, assets, parameters, read, report

PATIENCE_SECONDS = {False: 150.0, True: 480.0}
"""Of one wait in a step: on a GPU, with tiny weights on the CPU."""
LONG_STEPS = "400"  # of an inference that is still at work when it is cancelled: 9 s of an H100
POLL_SECONDS = 0.1
MEMORY_NOISE_GIB = 0.2  # of a GPU without a process of ours
LOG_LINES = 25
MODEL = b"trellis/process"  # in the command of a model's process
SET = "set"


@dataclass
class Trial:
    """A stack, and what is tried on it."""

    stack: Running
    tiny: bool
    before: dict[str, float] = field(default_factory=used_gib)
    """GPU memory in use, GiB by index, before the stack's first inference."""

    @property
    def patience(self) -> float:
        return PATIENCE_SECONDS[self.tiny]

    @property
    def engine(self) -> str:
        """On a GPU machine `auto` means trellis."""
        return "trellis" if self.tiny else "auto"

    def parameters(self, **values: str) -> dict[str, str]:
        steps = {f"infer__trellis__{name}": str(count) for name, count in TINY_STEPS.items()} if self.tiny else {}
        return steps | values

    def start(self) -> str:
        """Start the stack, and upload the captures."""
        self.stack.start()
        s3 = Stack(self.stack.settings).s3
        with tempfile.TemporaryDirectory() as temporary:
            count = 2 if self.tiny else 4
            for number, capture in enumerate(make_captures(Path(temporary), 1 + count, self.tiny)):
                s3.upload(capture, f"{SET}/{number}" if number else "one")
        engine = self.stack.ask("GET", "/deployments/name/infer/cuda")["parameters"]["engine"]
        assert self.tiny or engine == "trellis", f"auto means {engine} here:\n{self.log('doctor')}"
        workers = ", ".join(path.stem for path in sorted((self.stack.folder / "logs").glob("worker*.log")))
        return f"{workers}; auto means {engine}; {count + 1} captures uploaded"

    def hand_over(self) -> str:
        """A run whose inference is handed over to the pool `cuda` publishes an asset."""
        run = self.stack.run("one", engine=self.engine, **self.parameters())
        self.completed(run)
        (child,) = self.stack.children(run)
        assert child["work_pool_name"] == "cuda" and child["state_type"] == "COMPLETED", child
        told = report(self.stack, "one")
        assert told["engine"]["name"] == "trellis" and told["weights"]["bundle"], told["engine"]
        seconds = {stage["name"]: stage["seconds"] for stage in told["stages"]}
        return f"{told['status']}; infer {seconds['infer']:.1f} s of {sum(seconds.values()):.1f} s of all stages"

    def dataset(self) -> str:
        """A dataset runs as a batch on each worker of the pool, and all of its captures are published."""
        deployment = self.stack.ask("GET", "/deployments/name/reconstruct-dataset/nightly")["id"]
        asked = {"dataset": f"s3://captures/{SET}", "output": f"s3://assets/{SET}", "engine": self.engine}
        asked["parameters"] = parameters(**self.parameters())  # type: ignore[assignment]
        run = self.stack.ask("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked)["id"]
        self.completed(run)
        batches = self.stack.children(run)
        expected = 2 if self.tiny else 4
        published = [path for path in assets(self.stack, SET) if path.endswith("/_SUCCESS")]
        assert len(published) == expected, f"{len(published)} of {expected} captures are published"
        return f"{len(published)} captures in {len(batches)} batches"

    def cancel(self) -> str:
        """A run that is cancelled in mid-inference lets go of the GPU."""
        run = self.stack.run("one", engine=self.engine, **self.parameters(infer__seed="1", **long()))
        child = self.inferring(run)
        held = self.held()
        begun = time.monotonic()
        self.stack.set_state(run, "CANCELLING", "Cancelling")
        self.wait("the end of the model's process", lambda: not self.models())
        gone = time.monotonic() - begun
        self.wait("the GPU's memory", lambda: self.held() < MEMORY_NOISE_GIB)
        free = time.monotonic() - begun
        for each in (run, child):
            state = self.stack.ended(each, self.patience)["state_type"]
            assert state == "CANCELLED", f"run {each} ended {state}"
        return f"held {held:.1f} GiB; {gone:.1f} s to the process's end, {free:.1f} s until the memory was free"

    def kill_worker(self) -> str:
        """A run whose worker is killed in mid-inference is done by the worker that is started next."""
        run = self.stack.run("one", engine=self.engine, **self.parameters(infer__seed="2", **long()))
        child = self.inferring(run)
        os.kill(self.worker_of(child), signal.SIGKILL)
        begun = time.monotonic()
        self.completed(run)
        first, *others = self.stack.children(run)
        assert (first["id"], first["state_type"]) == (child, "CRASHED"), first
        assert others and others[-1]["state_type"] == "COMPLETED", others
        return f"completed {time.monotonic() - begun:.1f} s after the SIGKILL"

    def stop(self) -> str:
        """Ctrl-C ends every process, and no GPU memory stays in use."""
        assert self.stack.process is not None
        self.stack.process.terminate()
        self.stack.process.wait(self.patience)
        self.wait("the end of all processes", lambda: not self.stack.processes())
        self.wait("the GPU's memory", lambda: self.held() < MEMORY_NOISE_GIB)
        return "no process is left"

    def completed(self, run: str) -> None:
        ended = self.stack.ended(run, self.patience)
        assert ended["state_type"] == "COMPLETED", f"{ended['state_name']}: {ended['state']['message']}"

    def inferring(self, run: str) -> str:
        """Wait until the inference of a run is at work; gives the id of the run that it was handed to."""

        def at_work() -> str | None:
            for child in self.stack.children(run):
                wanted = {"flow_run_id": {"any_": [child["id"]]}, "key": {"any_": ["infer"]}}
                if any(
                    float(each["data"]) > 0 for each in self.stack.ask("POST", "/artifacts/filter", artifacts=wanted)
                ):
                    return str(child["id"])
            state = self.stack.read(run)["state"]
            assert state["type"] in ("SCHEDULED", "PENDING", "RUNNING"), state
            return None

        return str(self.wait("an inference at work", at_work))

    def worker_of(self, run: str) -> int:
        """The process id of the worker that executes a run."""
        folder = self.stack.folder
        parts = {path.stem for path in (folder / "logs").glob("worker-cuda-*.log")}
        (part,) = [part for part in parts if run in runs_of(folder, part)]
        name = part.removeprefix("worker-").encode()
        commands = {pid: read(Path(f"/proc/{pid}/cmdline")).split(b"\0") for pid, _ in environments(folder, part)}
        (worker,) = [pid for pid, command in commands.items() if b"worker" in command and name in command]
        return worker

    def models(self) -> list[Path]:
        """The processes of models."""
        return [process for process in self.stack.processes() if MODEL in read(process / "cmdline")]

    def held(self) -> float:
        """GPU memory in use, GiB, beyond what was before."""
        return sum(used_gib().values()) - sum(self.before.values())

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        return wait_for(what, condition, self.patience, POLL_SECONDS)

    def log(self, name: str) -> str:
        """The last lines of a part's log."""
        path = self.stack.folder / "logs" / f"{name}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:]) if path.exists() else "(no log)"


def long() -> dict[str, str]:
    return {"infer__trellis__ss_steps": LONG_STEPS}


def done(name: str, step: Callable[[], str]) -> bool:
    """Run a step and print its line; False if it failed."""
    begun = time.monotonic()
    try:
        told, ended = step(), "ok"
    except Exception as error:
        told, ended = f"{type(error).__name__}: {error}", "FAILED"
        traceback.print_exc()
    print(f"{name:16}{ended:8}{time.monotonic() - begun:7.1f} s  {told}", flush=True)
    return ended == "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of random weights; made if it has none")
    parser.add_argument("--tiny", action="store_true", help="tiny weights on the CPU, to try this script")
    asked = parser.parse_args()
    prepared: dict[str, str] = {}

    def prepare() -> str:
        prepared.update(environment(asked.weights.resolve(), asked.tiny))
        return str(asked.weights)

    if not done("random weights", prepare):
        sys.exit(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        prepared["CUDA_VISIBLE_DEVICES"] = "" if asked.tiny else ",".join(visible_gpus())
        ui, s3 = free_ports(2)
        trial = Trial(Running(Path(temporary) / "stack", (ui, s3), prepared), asked.tiny)
        steps = {
            "hand over": trial.hand_over,
            "dataset": trial.dataset,
            "cancel": trial.cancel,
            "killed worker": trial.kill_worker,
        }
        try:
            passed = [done("stack", trial.start)]
            if all(passed):
                for name, step in steps.items():
                    passed.append(done(name, step))
                    if not passed[-1]:
                        for log in sorted((trial.stack.folder / "logs").glob("worker*.log")):
                            print(f"--- {log.name}\n{trial.log(log.stem)}", flush=True)
                passed.append(done("stop", trial.stop))
            else:
                print(trial.stack.told)
        finally:
            trial.stack.stop()
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
