"""Datasets on one GPU: `python tests/benchmarks/dataset_gpu.py --trellis-root ROOT --weights RANDOM`.

The same captures by several routes, one after the other on one machine, each with a store of its own:
loop:    the stages one after the other in one process, the model loaded once, no Prefect
command: a process per capture, `python -m flows reconstruct`
batch:   the flow `reconstruct-dataset`, with Prefect's own server
each with the exporter `native` or `to_glb`. RANDOM is what `random_weights.py` made; see `forced_geometry` for what it
takes to have an object then. The captures are that object's: 8 views of 1080 x 1080 with cameras and depth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.benchmarks.dataset import Memory, use_store  # noqa: E402  (the path comes first)

VIEWS, SIZE = 8, 1080
METRES = 0.34  # of the forced object's unit cube
NOISE = 2.0  # of a sensor, 8-bit steps: each capture has other bytes, and a photograph's file size
COUNTS = {"loop-native": 5, "loop-to_glb": 5, "command-native": 3, "batch-native": 32, "batch-to_glb": 8}
GPU_POLL_SECONDS = 1


@dataclass
class Measured:
    """What a route took. seconds: all of it, with start and load. ends: when each capture was done; requests: what the
    model did (operation, begun, ended); all in seconds since the start."""

    seconds: float = 0.0
    ends: list[float] = field(default_factory=list)
    requests: list[tuple[str, float, float]] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    peak_mb: float = 0.0
    gpu_peak_gib: float = 0.0

    @property
    def warm_per_hour(self) -> float:
        """Captures an hour once the first is done, to the very end."""
        first = min(self.ends)
        return 3600 * (len(self.ends) - 1) / (self.seconds - first)

    def in_flight(self, operations: Sequence[str], until: float) -> float:
        """Share of the time from the end of the first inference that the model is asked something."""
        begun = min(end for operation, _, end in self.requests if operation == "infer")
        busy = sum(end - start for name, start, end in self.requests if name in operations and start >= begun)
        return busy / (until - begun)

    @property
    def last_inference(self) -> float:
        return max(end for operation, _, end in self.requests if operation == "infer")


def make_capture(folder: Path, seed: int) -> None:
    """The forced object, some 0.25 m across, in colours and from cameras of its own."""
    import numpy as np

    from tasks.render import RayScene, render
    from tests.benchmarks.forced_geometry.sitecustomize import FREQUENCY, RADIUS, WAVE
    from tests.synthetic import OBJECT_CENTRE, field_mesh, orbit_cameras, pattern, solid_colours, write_capture

    rng = np.random.default_rng(seed)
    mesh = field_mesh(
        lambda p: np.linalg.norm(p, axis=1) - RADIUS - WAVE * np.sin(FREQUENCY * p).prod(axis=1), half=0.5, cells=120
    )
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


def select(captures: Path, count: int, folder: Path) -> Path:
    """A dataset of the first so many captures."""
    for index in range(count):
        shutil.copytree(captures / f"{index:03}", folder / f"{index:03}")
    return folder


@contextmanager
def watched_gpu(measured: Measured) -> Iterator[None]:
    """Within the block the GPU's memory in use is sampled."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"-l{GPU_POLL_SECONDS}"]
    with tempfile.TemporaryFile("w+") as samples:
        process = subprocess.Popen(command, stdout=samples)
        try:
            yield
        finally:
            process.kill()
            process.wait()
            samples.seek(0)
            measured.gpu_peak_gib = max(
                (int(each) / 1024 for each in samples.read().split() if each.isdigit()), default=0
            )


def observe_requests(measured: Measured, begun: float) -> None:
    """From now on every request to the model is kept."""
    from tasks.inference.trellis import TrellisProcess

    ask = TrellisProcess.request

    def request(self: TrellisProcess, operation: str, *arguments: Any) -> Any:
        asked = time.perf_counter()
        try:
            return ask(self, operation, *arguments)
        finally:
            measured.requests.append((operation, asked - begun, time.perf_counter() - begun))

    TrellisProcess.request = request  # type: ignore[assignment]


def loop(folder: Path, dataset: Path, exporter: str, measured: Measured, begun: float) -> None:
    """One capture after the other."""
    from flows.batch import _whole
    from tasks.inference.infer import TRELLIS, resolve_engine
    from tasks.plan import plan
    from tasks.settings import ExportParameters, Parameters
    from tasks.weights.pins import Weights, bundle
    from tasks.weights.stages import fetch_weights

    engine, parameters = resolve_engine("trellis"), Parameters(export=ExportParameters(exporter=exporter))
    fetch_weights(Weights.of(bundle()))
    published = []
    for capture in plan(str(dataset), str(folder / "out"), engine, parameters).pending:
        published.append(_whole(capture, str(folder / "out"), engine, parameters))
        measured.ends.append(time.perf_counter() - begun)
    keep_stages(measured, [one.report for one in published])
    TRELLIS.close()


def batch(folder: Path, dataset: Path, exporter: str, measured: Measured, begun: float) -> None:
    """What `python -m flows dataset` does."""
    from flows import batch as batches
    from flows.dataset import reconstruct_dataset
    from flows.ephemeral import start_server
    from tasks.inference.infer import TRELLIS
    from tasks.report import Report
    from tasks.settings import ExportParameters, Parameters

    tell = batches._tell

    def told(outcome: batches.Outcome) -> None:
        if outcome.failed:
            print(f"# {outcome.capture.id} {outcome.state}: {outcome.reason}", file=sys.stderr)
        else:
            measured.ends.append(time.perf_counter() - begun)
        tell(outcome)

    batches._tell = told
    start_server()
    parameters = Parameters(export=ExportParameters(exporter=exporter))
    report = reconstruct_dataset(str(dataset), str(folder / "out"), "trellis", parameters)
    print(f"# {report.counts}", file=sys.stderr)
    files = (folder / "out").glob("*/*/report.json")
    keep_stages(measured, [Report.model_validate_json(file.read_bytes()) for file in files])
    TRELLIS.close()


def keep_stages(measured: Measured, reports: Sequence[Any]) -> None:
    """The median seconds of each stage, over the captures."""
    import statistics

    names = dict.fromkeys(stage.name for report in reports for stage in report.stages)
    statuses = sorted({report.status for report in reports})
    print(f"# {len(reports)} reports: {statuses}", file=sys.stderr)
    for name in names:
        seconds = [stage.seconds for report in reports for stage in report.stages if stage.name == name]
        measured.stages[name] = statistics.median(seconds)


def command(folder: Path, dataset: Path, exporter: str, measured: Measured, begun: float) -> None:
    """A process per capture."""
    for capture in sorted(dataset.iterdir()):
        arguments = [str(capture), str(folder / "out"), "--engine", "trellis", "--set", f"export.exporter={exporter}"]
        subprocess.run([sys.executable, "-m", "flows", "reconstruct", *arguments], cwd=HERE.parents[1], check=True)
        measured.ends.append(time.perf_counter() - begun)


def measure(route: str, dataset: Path, folder: Path) -> Measured:
    """Run a route; in a process of its own, as settings and libraries' threads are a process's."""
    from flows.__main__ import PREFECT_DEFAULTS

    use_store(folder)
    os.environ |= {"PREFECT_HOME": str(folder.parent / "prefect"), **PREFECT_DEFAULTS}
    name, _, exporter = route.partition("-")
    measured, begun = Measured(), time.perf_counter()
    observe_requests(measured, begun)
    memory = Memory()
    with watched_gpu(measured):
        {"loop": loop, "batch": batch, "command": command}[name](folder, dataset, exporter, measured, begun)
        measured.seconds = time.perf_counter() - begun
    measured.peak_mb = memory.stop()
    return measured


def main() -> None:
    from tests.benchmarks.trellis import use

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trellis-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--captures", type=Path, help="where captures are made, or were made before")
    parser.add_argument("routes", nargs="*", metavar="ROUTE[=COUNT]", default=list(COUNTS))
    asked = parser.parse_args()
    use(asked.trellis_root, asked.weights)
    counts = {name: int(count or COUNTS[name]) for name, _, count in (each.partition("=") for each in asked.routes)}
    with tempfile.TemporaryDirectory() as temporary:
        captures = asked.captures or Path(temporary) / "captures"
        make_captures(captures, max(counts.values()))
        for route, count in counts.items():
            folder = Path(temporary) / route
            dataset = select(captures, count, folder / "in")
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                show(route, pool.submit(measure, route, dataset, folder).result())
            shutil.rmtree(folder)


def show(route: str, measured: Measured) -> None:
    """One route's figures."""
    count = len(measured.ends)
    print(f"{route}: {count} captures in {measured.seconds:.1f} s, the first after {min(measured.ends):.1f} s")
    if count > 1:
        print(f"  {measured.warm_per_hour:.0f} captures an hour after the first")
    if len([1 for operation, _, _ in measured.requests if operation == "infer"]) > 1:
        for until, name in ((measured.last_inference, "to the last inference's end"), (measured.seconds, "to the end")):
            shares = [measured.in_flight(names, until) for names in (("infer",), ("infer", "to_glb"))]
            print(
                f"  from the first inference's end {name}: {shares[0]:.1%} inference, {shares[1]:.1%} the model in all"
            )
    for operation in ("load", "infer", "to_glb"):
        seconds = [f"{end - start:.1f}" for name, start, end in measured.requests if name == operation]
        print(f"  {operation}: {' '.join(seconds)}" if seconds else "", end="\n" if seconds else "")
    print(f"  stages, median: {measured.stages}")
    print(f"  peak {measured.peak_mb:.0f} MB of all processes, {measured.gpu_peak_gib:.1f} GiB of the GPU", flush=True)


if __name__ == "__main__":
    main()
