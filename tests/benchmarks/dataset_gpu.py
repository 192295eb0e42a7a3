"""Datasets on the GPUs of this machine: `python -m tests.benchmarks.dataset_gpu --weights FOLDER [ROUTE[=COUNT] ...]`.

The same captures by several routes, one after the other on one machine, each with a store of its own:
batch:    the flow `reconstruct-dataset`, with Prefect's own server, on all GPUs that are visible; COUNT for each GPU
batch-N:  the same on the first N of them
loop:     the stages one after the other in one process, the model loaded once, no Prefect
command:  a process per capture, `capture2mesh reconstruct`
By default `batch`, and with several GPUs `batch-1` before it. The weights are random ones, made if FOLDER has none, and
show no object, so the geometry is forced: see `forced_model.py`. Captures: 8 views of 1080 x 1080, cameras and depth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

from tests.benchmarks.dataset import Memory, use_store
from tests.benchmarks.forced_model import ROOT, environment, make_captures

COUNTS = {"batch": 64, "loop": 3, "command": 2}
SAMPLE_SECONDS = 5.0  # between two looks at the memory of all processes, which cost a part of a second
GPU_POLL_SECONDS = 1.0
TINY_STEPS = {"ss_steps": 3, "slat_steps": 2}


@dataclass(frozen=True)
class Asked:
    """One request to a model: what, on which GPU (empty: the only one), begun and ended, seconds since the start."""

    operation: str
    gpu: str
    begun: float
    ended: float


@dataclass
class Measured:
    """Times of a route, in seconds since its start; load and servers included."""

    seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    """When each capture was published, ascending."""
    requests: list[Asked] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    """Of each inference, seconds and GiB as the model's process tells them; outside: what the parent waited beside."""
    stages: dict[str, float] = field(default_factory=dict)
    """Median seconds."""
    cores: float = 0.0
    """Processor cores that were busy, on average from the first capture to the end, whatever kept them busy."""
    peak_mb: float = 0.0
    gpu_peak_gib: dict[str, float] = field(default_factory=dict)

    @property
    def warm_per_hour(self) -> float:
        """Captures an hour once the first is done, to the very end."""
        return 3600 * (len(self.ends) - 1) / (self.seconds - self.ends[0])

    def inferences(self, gpu: str) -> list[Asked]:
        return [asked for asked in self.requests if (asked.operation, asked.gpu) == ("infer", gpu)]

    @property
    def gpus(self) -> list[str]:
        return sorted({asked.gpu for asked in self.requests if asked.operation == "infer"})

    def in_flight(self, gpu: str, until: float) -> float:
        """Share of the time from the first published capture that an inference runs on a GPU."""
        first = self.ends[0]
        busy = [max(0.0, min(each.ended, until) - max(each.begun, first)) for each in self.inferences(gpu)]
        return sum(busy) / (until - first)

    @property
    def inference(self) -> dict[str, float]:
        """Medians of the parts of all inferences."""
        return {name: round(statistics.median(parts[name] for parts in self.parts), 2) for name in self.parts[0]}


class GpuMemory:
    """Memory in use on each GPU, sampled; `peak` in GiB by index. Empty without nvidia-smi."""

    def __init__(self) -> None:
        self.peak, self._ended = dict[str, float](), threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._ended.wait(GPU_POLL_SECONDS):
            for index, gib in used_gib().items():
                self.peak[index] = max(self.peak.get(index, 0.0), gib)

    def stop(self) -> dict[str, float]:
        self._ended.set()
        return self.peak


def used_gib() -> dict[str, float]:
    """Memory in use, GiB, of each GPU by its index."""
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return {}
    rows = [line.split(", ") for line in told.splitlines()]
    return {index: int(mebibytes) / 1024 for index, mebibytes in rows if mebibytes.isdigit()}


def busy_seconds() -> float:
    """Processor seconds that this machine has worked since its start."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


class Cores:
    """Busy cores on average, from the first published capture below `output`."""

    def __init__(self, output: Path) -> None:
        self._output, self._ended = output, threading.Event()
        self._begun: tuple[float, float] | None = None
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while not self._ended.wait(GPU_POLL_SECONDS):
            if any(self._output.glob("*/*/_SUCCESS")):
                self._begun = time.time(), busy_seconds()
                return

    def stop(self) -> float:
        self._ended.set()
        if self._begun is None:
            return 0.0
        begun, busy = self._begun
        return (busy_seconds() - busy) / (time.time() - begun)


def observe_requests(measured: Measured) -> None:
    """From now on every request of this process to a model is kept."""
    from tasks.inference.trellis.model_process import TrellisProcess

    ask = TrellisProcess.request

    def request(self: TrellisProcess, operation: str, *arguments: Any) -> Any:
        begun = time.time()
        try:
            answer = ask(self, operation, *arguments)
        finally:
            ended = time.time()
            measured.requests.append(Asked(operation, self.runtime.gpu, begun, ended))
        if operation == "infer":
            seconds = answer.header["seconds"]
            outside = ended - begun - sum(seconds.values())
            measured.parts.append(seconds | {"outside": outside, "peak_gib": answer.header["peak_gib"]})
        return answer

    TrellisProcess.request = request  # type: ignore[method-assign]


def parameters() -> Any:
    """The defaults; few steps on the CPU."""
    from tasks.settings import Parameters, settings

    steps = TINY_STEPS if settings().trellis_device == "cpu" else {}
    return Parameters.model_validate({"infer": {"trellis": steps}})


def loop(dataset: Path, output: Path) -> None:
    from flows.workshop import _whole
    from tasks.dataset.plan import plan
    from tasks.inference.registry import resolve_engine

    engine = resolve_engine("trellis")
    for planned in plan(str(dataset), str(output), engine, parameters()).pending:
        _whole(planned, engine, parameters())


def batch(dataset: Path, output: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.cli.own_server import OwnServer
    from flows.dataset import reconstruct_dataset

    server = OwnServer()
    server.wait()
    with temporary_settings(updates={PREFECT_API_URL: server.api}):
        print(f"# {reconstruct_dataset(str(dataset), str(output), 'trellis', parameters()).counts}")


def command(dataset: Path, output: Path) -> None:
    chosen = parameters().infer.trellis
    steps = [f"infer.trellis.{name}={getattr(chosen, name)}" for name in TINY_STEPS]
    for capture in sorted(dataset.iterdir()):
        arguments = ["reconstruct", str(capture), str(output), "--engine", "trellis"]
        arguments += [part for step in steps for part in ("--set", step)]
        subprocess.run([sys.executable, "-m", "flows", *arguments], cwd=ROOT, check=True)


ROUTES = {"loop": loop, "command": command, "batch": batch}


def measure(route: str, gpus: list[str], dataset: Path, folder: Path) -> Measured:
    """Run a route on these GPUs; in a process of its own, as settings and libraries' threads are a process's."""
    from flows.cli.conventions import PREFECT_DEFAULTS

    use_store(folder)
    os.environ |= {"PREFECT_HOME": str(folder.parent / "prefect"), **PREFECT_DEFAULTS}
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    from tasks.inference.registry import TRELLIS

    measured, output = Measured(), folder / "out"
    observe_requests(measured)
    memory, gpu_memory, cores, begun = Memory(SAMPLE_SECONDS), GpuMemory(), Cores(output), time.time()
    ROUTES[route](dataset, output)
    measured.seconds, measured.cores = time.time() - begun, cores.stop()
    measured.peak_mb, measured.gpu_peak_gib = memory.stop(), gpu_memory.stop()
    TRELLIS.close()
    measured.ends = sorted(marker.stat().st_mtime - begun for marker in output.glob("*/*/_SUCCESS"))
    measured.requests = [
        Asked(asked.operation, asked.gpu, asked.begun - begun, asked.ended - begun) for asked in measured.requests
    ]
    measured.stages = stages(output)
    return measured


def stages(output: Path) -> dict[str, float]:
    """The median seconds of each stage; says how the captures ended."""
    from tasks.report import Report

    reports = [Report.model_validate_json(file.read_bytes()) for file in output.glob("*/*/report.json")]
    print(f"# {len(reports)} reports: {sorted({report.status for report in reports})}")
    seconds: dict[str, list[float]] = {}
    for stage in (stage for report in reports for stage in report.stages if not stage.cached):
        seconds.setdefault(stage.name, []).append(stage.seconds)
    return {name: round(statistics.median(each), 2) for name, each in seconds.items()}


def show(name: str, measured: Measured) -> None:
    """One route's figures."""
    ends = measured.ends
    print(f"{name}: {len(ends)} captures in {measured.seconds:.1f} s, the first after {ends[0]:.1f} s")
    if len(ends) > 1:
        print(f"  {measured.warm_per_hour:.0f} captures an hour after the first, {measured.cores:.1f} cores busy")
    for gpu in measured.gpus:
        asked = measured.inferences(gpu)
        took = [round(each.ended - each.begun, 2) for each in asked]
        told = (
            f"  GPU {gpu or 'alone'}: {len(asked)} inferences, median {statistics.median(took):.2f} s, first {took[0]}"
        )
        if len(ends) > 1 and asked[-1].ended > ends[0]:
            last, end = (measured.in_flight(gpu, until) for until in (asked[-1].ended, measured.seconds))
            told += f"; one in flight {last:.1%} of the time until its last one, {end:.1%} to the end"
        print(told)
    loads = [f"{each.ended - each.begun:.1f}" for each in measured.requests if each.operation == "load"]
    print(f"  load: {' '.join(loads)} s")
    if measured.parts:
        print(f"  of an inference, medians: {measured.inference}")
    print(f"  stages, median s: {measured.stages}")
    peaks = {index: round(gib, 1) for index, gib in measured.gpu_peak_gib.items()}
    print(f"  peak {measured.peak_mb:.0f} MB of all processes; GiB in use on the GPUs: {peaks}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder of random weights")
    parser.add_argument("--captures", type=Path, help="where captures are made, or were made before")
    parser.add_argument("--tiny", action="store_true", help="tiny weights and captures on the CPU: no figures")
    parser.add_argument("routes", nargs="*", metavar="ROUTE[=COUNT]")
    asked = parser.parse_args()
    os.environ |= environment(asked.weights.resolve(), asked.tiny)
    from tasks.inference.gpus import visible_gpus

    gpus = visible_gpus()
    with tempfile.TemporaryDirectory() as temporary:
        captures = asked.captures or Path(temporary) / "captures"
        for each in asked.routes or (["batch-1", "batch"] if len(gpus) > 1 else ["batch"]):
            name, _, count = each.partition("=")
            route, _, number = name.partition("-")
            used = gpus[: int(number or len(gpus))] if route == "batch" else gpus[:1]
            folder = Path(temporary) / name
            wanted = int(count or COUNTS[route]) * max(1, len(used))
            for capture in make_captures(captures, wanted, asked.tiny):
                copytree(capture, folder / "in" / capture.name, copy_function=os.link)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                show(name, pool.submit(measure, route, used, folder / "in", folder).result())
            with suppress(OSError):  # of files that an ending server still writes
                rmtree(folder)


if __name__ == "__main__":
    main()
