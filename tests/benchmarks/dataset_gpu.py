"""Datasets on one GPU: `python tests/benchmarks/dataset_gpu.py --trellis-root ROOT --weights RANDOM [ROUTE[=COUNT]]`.

The same captures by several routes, one after the other on one machine, each with a store of its own:
loop:    the stages one after the other in one process, the model loaded once, no Prefect
command: a process per capture, `python -m flows reconstruct`
batch:   the flow `reconstruct-dataset`, with Prefect's own server
each as `loop-native` or `loop-to_glb`, by the exporter. RANDOM is what `random_weights.py` made; see `forced_geometry`
for what it takes to have an object then. The captures are that object's: 8 views of 1080 x 1080, cameras and depth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.dataset import Memory, use_store  # noqa: E402  (the path comes first)

VIEWS, SIZE = 8, 1080
METRES = 0.34  # of the forced object's unit cube
NOISE = 2.0  # of a sensor, 8-bit steps: views have a photograph's file size
COUNTS = {
    "command-native": 2,
    "loop-to_glb": 3,
    "batch-native": 48,
    "loop-native": 3,
    "batch-to_glb": 6,
}
GPU_POLL_SECONDS = 1.0


@dataclass
class Measured:
    """What a route took, in seconds since its start; load and servers included.

    ends: when each capture was published. requests: what the model was asked (operation, begun, ended), where that was
    seen. parts: of each inference, as the model's process tells them, in seconds and GiB. stages: median seconds.
    """

    seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    requests: list[tuple[str, float, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    gpu_peak_gib: float = 0.0

    @property
    def warm_per_hour(self) -> float:
        """Captures an hour once the first is done, to the very end."""
        return 3600 * (len(self.ends) - 1) / (self.seconds - self.ends[0])

    @property
    def last_inference(self) -> float:
        return max(end for operation, _, end in self.requests if operation == "infer")

    def in_flight(self, until: float, *operations: str) -> float:
        """Share of the time from the first published capture that the model works on a request."""
        first = self.ends[0]
        busy = [max(0, min(end, until) - max(start, first)) for name, start, end in self.requests if name in operations]
        return sum(busy) / (until - first)

    def took(self, operation: str) -> str:
        return " ".join(f"{end - start:.1f}" for name, start, end in self.requests if name == operation)

    @property
    def inference(self) -> dict[str, float]:
        """Medians of the parts of all inferences but the first; outside: what they take beside upstream's work."""
        each = self.parts[1:]
        return {name: round(statistics.median(parts[name] for parts in each), 2) for name in each[0]}


class GpuMemory:
    """Memory in use on the GPU, sampled; `peak` in GiB."""

    def __init__(self) -> None:
        self.peak, self._ended = 0.0, threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(GPU_POLL_SECONDS):
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            self.peak = max(self.peak, *(int(mebibytes) / 1024 for mebibytes in told if mebibytes.isdigit()), 0.0)

    def stop(self) -> float:
        self._ended.set()
        return self.peak


def make_capture(folder: Path, seed: int) -> None:
    """The forced object, some 0.25 m across, in colours and from cameras of its own."""
    import numpy as np

    from tasks.geometry.render import RayScene, render
    from tests.benchmarks.forced_geometry.sitecustomize import FREQUENCY, RADIUS, WAVE
    from tests.synthetic import OBJECT_CENTRE, field_mesh, orbit_cameras, pattern, solid_colours, write_capture

    def blob(points: Any) -> Any:
        return np.linalg.norm(points, axis=1) - RADIUS - WAVE * np.sin(FREQUENCY * points).prod(axis=1)

    rng = np.random.default_rng(seed)
    mesh = field_mesh(blob, half=0.5, cells=120)
    mesh.apply_scale(METRES)
    mesh.apply_translation(OBJECT_CENTRE)
    tint = rng.uniform(0.6, 1.0, 3)
    scene = RayScene(mesh, solid_colours(lambda points: tint * pattern(points)))
    cameras = orbit_cameras(mesh, VIEWS, SIZE, rng=rng)
    renderings = [render(scene, camera) for camera in cameras]
    for view in renderings:
        view.image[:] = (view.image + rng.normal(scale=NOISE, size=view.image.shape)).clip(0, 255)
    write_capture(folder, cameras, renderings, [view.depth for view in renderings], alpha=True, depth_scale=0.0001)


def make_captures(folder: Path, count: int) -> None:
    """So many captures, those that are there already apart."""
    missing = [index for index in range(count) if not (folder / f"{index:03}" / "transforms.json").exists()]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(make_capture, [folder / f"{index:03}" for index in missing], missing))


def observe_requests(measured: Measured) -> None:
    """From now on every request of this process to the model is kept."""
    from tasks.inference.trellis.model_process import TrellisProcess

    ask = TrellisProcess.request

    def request(self: TrellisProcess, operation: str, *arguments: Any) -> Any:
        asked = time.time()
        try:
            answer = ask(self, operation, *arguments)
        finally:
            ended = time.time()
            measured.requests.append((operation, asked, ended))
        if operation == "infer":
            seconds = answer.header["seconds"]
            outside = ended - asked - sum(seconds.values())
            measured.parts.append(seconds | {"outside": outside, "peak_gib": answer.header["peak_gib"]})
        return answer

    TrellisProcess.request = request  # type: ignore[method-assign]


def loop(dataset: Path, output: Path, exporter: Any) -> None:
    from flows.workshop import _whole
    from tasks.dataset.plan import plan
    from tasks.inference.registry import TRELLIS, resolve_engine
    from tasks.settings import ExportParameters, Parameters

    engine, parameters = resolve_engine("trellis"), Parameters(export=ExportParameters(exporter=exporter))
    for planned in plan(str(dataset), str(output), engine, parameters).pending:
        _whole(planned, engine, parameters)
    TRELLIS.close()


def batch(dataset: Path, output: Path, exporter: Any) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.cli.own_server import OwnServer
    from flows.dataset import reconstruct_dataset
    from tasks.inference.registry import TRELLIS
    from tasks.settings import ExportParameters, Parameters

    server = OwnServer()
    server.wait()
    parameters = Parameters(export=ExportParameters(exporter=exporter))
    with temporary_settings(updates={PREFECT_API_URL: server.api}):
        print(f"# {reconstruct_dataset(str(dataset), str(output), 'trellis', parameters).counts}")
    TRELLIS.close()


def command(dataset: Path, output: Path, exporter: str) -> None:
    for capture in sorted(dataset.iterdir()):
        arguments = [str(capture), str(output), "--engine", "trellis", "--set", f"export.exporter={exporter}"]
        subprocess.run([sys.executable, "-m", "flows", "reconstruct", *arguments], cwd=ROOT, check=True)


ROUTES = {"loop": loop, "command": command, "batch": batch}


def measure(route: str, dataset: Path, folder: Path) -> Measured:
    """Run a route; in a process of its own, as settings and libraries' threads are a process's."""
    from flows.cli.conventions import PREFECT_DEFAULTS

    use_store(folder)
    os.environ |= {"PREFECT_HOME": str(folder.parent / "prefect"), **PREFECT_DEFAULTS}
    name, _, exporter = route.partition("-")
    measured, output = Measured(), folder / "out"
    observe_requests(measured)
    memory, gpu_memory, begun = Memory(), GpuMemory(), time.time()
    ROUTES[name](dataset, output, exporter)
    measured.seconds = time.time() - begun
    measured.peak_mb, measured.gpu_peak_gib = memory.stop(), gpu_memory.stop()
    measured.ends = sorted(marker.stat().st_mtime - begun for marker in output.glob("*/*/_SUCCESS"))
    measured.requests = [(operation, start - begun, end - begun) for operation, start, end in measured.requests]
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


def show(route: str, measured: Measured) -> None:
    """One route's figures."""
    ends, requests = measured.ends, {operation for operation, _, _ in measured.requests}
    print(f"{route}: {len(ends)} captures in {measured.seconds:.1f} s, the first after {ends[0]:.1f} s")
    if len(ends) > 1:
        print(f"  {measured.warm_per_hour:.0f} captures an hour after the first")
    if "infer" in requests and measured.last_inference > ends[0]:
        for name, until in (("the last inference", measured.last_inference), ("the end", measured.seconds)):
            shares = [measured.in_flight(until, *names) for names in (("infer",), ("infer", "to_glb"))]
            print(f"  from the first capture to {name}: inference {shares[0]:.1%}, the model's process {shares[1]:.1%}")
    for operation in ("load", "infer", "to_glb"):
        if operation in requests:
            print(f"  {operation}: {measured.took(operation)} s")
    if len(measured.parts) > 1:
        print(f"  of an inference, medians: {measured.inference}")
    print(f"  stages, median s: {measured.stages}")
    print(f"  peak {measured.peak_mb:.0f} MB of all processes, {measured.gpu_peak_gib:.1f} GiB of the GPU", flush=True)


def counts_of(routes: Sequence[str]) -> dict[str, int]:
    asked = (route.partition("=") for route in routes)
    return {name: int(count or COUNTS[name]) for name, _, count in asked}


def use(trellis_root: Path | None, weights: Path | None) -> None:
    """Set this process's environment; before its settings are first read."""
    if trellis_root is not None:
        os.environ["CAPTURE2MESH_TRELLIS_ROOT"] = str(trellis_root.resolve())
    if weights is not None:
        os.environ["CAPTURE2MESH_WEIGHTS"] = str(weights.resolve() / "weights")
        os.environ["CAPTURE2MESH_WEIGHTS_LIST"] = str(weights.resolve() / "weights.json")
        paths = [str(Path(__file__).resolve().parent / "forced_geometry"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trellis-root", type=Path, help="run upstream's package, not our networks")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--captures", type=Path, help="where captures are made, or were made before")
    parser.add_argument("routes", nargs="*", metavar="ROUTE[=COUNT]", default=list(COUNTS))
    asked = parser.parse_args()
    use(asked.trellis_root, asked.weights)
    counts = counts_of(asked.routes)
    with tempfile.TemporaryDirectory() as temporary:
        captures = asked.captures or Path(temporary) / "captures"
        make_captures(captures, max(counts.values()))
        for route, count in counts.items():
            folder = Path(temporary) / route
            for index in range(count):
                shutil.copytree(captures / f"{index:03}", folder / "in" / f"{index:03}")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                show(route, pool.submit(measure, route, folder / "in", folder).result())
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
