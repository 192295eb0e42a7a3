"""Datasets on the CPU: `python tests/benchmarks/dataset.py pipelined|overhead|planning|sharing`.

pipelined: 24 synthetic captures by the batch, beside a plain loop over the same stages in one process.
overhead: what a batch adds to captures of one second each, against a Prefect server of its own.
planning: the plan of 10,000 captures that are published already, in a folder and on a real S3 server.
sharing: 1 and 4 processes over one dataset, each capture holding a stand-in of the GPU for 5 s.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

SHAPES = ("sphere", "rounded_box", "torus", "concave")
CAPTURES, VIEWS, SIZE = 24, 24, 512
SECONDS, TIMED_CAPTURES = 1.0, 1000
PUBLISHED, FILES = 10_000, 5
GPU_SECONDS, SHARED_CAPTURES, WORKERS = 5.0, 72, 4


class Memory:
    """Proportional set size of this process and all below it, sampled every so many seconds; `peak` in MB."""

    def __init__(self, every: float = 0.5) -> None:
        self.peak, self._every, self._ended = 0.0, every, threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._ended.wait(self._every):
            self.peak = max(self.peak, sum(map(pss, family(os.getpid()))))

    def stop(self) -> float:
        self._ended.set()
        return self.peak


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        threads = [thread.name for thread in Path(f"/proc/{pid}/task").iterdir()]
        children = [c for t in threads for c in Path(f"/proc/{pid}/task/{t}/children").read_text().split()]
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def pss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


def use_store(folder: Path) -> None:
    """A store and a scratch folder of their own; before the settings are first read."""
    os.environ |= {"CAPTURE2MESH_STORE": str(folder / "store"), "CAPTURE2MESH_SCRATCH": str(folder / "scratch")}


def pipelined(folder: Path) -> None:
    from tests.synthetic import make_capture

    for index in range(CAPTURES):
        make_capture(folder / "in" / f"{index:02}", SHAPES[index % len(SHAPES)], views=VIEWS, size=SIZE, seed=index)
    results = {}
    for name in ("loop", "batch"):
        command = [sys.executable, __file__, "measured", name, str(folder)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
        results[name] = float(told[-2]), float(told[-1])
        shutil.rmtree(folder / name)
    print("| | seconds | captures an hour | peak MB |\n|---|---|---|---|")
    for name, (seconds, peak) in results.items():
        print(f"| {name} | {seconds:.1f} | {CAPTURES / seconds * 3600:.0f} | {peak:.0f} |")
    print(f"x{results['loop'][0] / results['batch'][0]:.2f}")


def _measured(name: str, folder: Path) -> None:
    """The loop or the batch, in a process of its own."""
    use_store(folder / name)
    from flows.batch import work_through
    from flows.workshop import _whole
    from tasks.dataset.plan import plan
    from tasks.inference.registry import resolve_engine
    from tasks.settings import Parameters

    engine, parameters, output = resolve_engine("fusion"), Parameters(), str(folder / name / "out")
    memory, begun = Memory(), time.perf_counter()
    captures = plan(str(folder / "in"), output, engine, parameters).pending
    assert len(captures) == CAPTURES
    if name == "batch":
        ended = work_through(captures, engine, parameters)
        assert ended == {"normal": CAPTURES}, ended
    else:
        for capture in captures:
            assert _whole(capture, engine, parameters).report.status == "normal"
    print(time.perf_counter() - begun, memory.stop())


def _one_second(*_: object) -> object:
    """Stands in for the stages of a capture."""
    time.sleep(SECONDS)
    return _Normal()


class _Normal:
    """As much of a published asset as a batch looks at."""

    def __init__(self) -> None:
        self.report, self.status, self.url = self, "normal", ""


def overhead(folder: Path) -> None:
    use_store(folder)
    os.environ |= {"PREFECT_HOME": str(folder / "prefect"), "CAPTURE2MESH_BATCH_PROCESSES": "1"}
    os.environ |= {"PREFECT_LOGGING_LEVEL": "WARNING"}
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import batch, workshop
    from flows.cli.own_server import OwnServer
    from tests.synthetic import make_capture

    make_capture(folder / "first", "sphere", views=3, size=32)
    for index in range(TIMED_CAPTURES):
        shutil.copytree(folder / "first", folder / "in" / f"{index:04}")
    workshop._whole = _one_second  # type: ignore[assignment]
    server = OwnServer()
    server.wait()
    begun = time.perf_counter()
    with temporary_settings(updates={PREFECT_API_URL: server.api}):
        assert batch.batch(str(folder / "in"), str(folder / "out"), "fusion") == {"normal": TIMED_CAPTURES}
    seconds = time.perf_counter() - begun
    work = TIMED_CAPTURES * SECONDS
    print(f"{TIMED_CAPTURES} captures of {SECONDS:g} s: {seconds:.1f} s, {100 * (seconds / work - 1):.1f} % more")


def planning(folder: Path) -> None:
    use_store(folder)
    from tasks.capture.listing import list_captures, upload_key
    from tasks.dataset.plan import plan
    from tasks.inference.registry import resolve_engine
    from tasks.settings import Parameters
    from tasks.store.location import Location
    from tests.support.published import mark_published
    from tests.support.running_s3 import seaweedfs

    engine, parameters = resolve_engine("fusion"), Parameters()
    paths = ["transforms.json"] + [f"{kind}/{index}.png" for kind in ("views", "depth") for index in range(FILES // 2)]

    def measure(name: str, captures: str, output: str, put: Callable[[str, bytes], object]) -> None:
        for index in range(PUBLISHED):
            for path in paths:
                put(f"{captures}/{index:05}/{path}", b"x")
        for listing in list_captures(captures):
            mark_published(output, listing.id, upload_key(listing, engine.name, parameters))
        begun = time.perf_counter()
        counts = plan(captures, output, engine, parameters).counts()
        print(f"{name}: {time.perf_counter() - begun:.1f} s for {counts}, {len(paths)} files each")

    def write(path: str, data: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)

    measure("folder", str(folder / "in"), str(folder / "out"), write)
    (folder / "s3").mkdir()
    with seaweedfs(folder / "s3") as s3:
        os.environ |= s3.env
        admin = s3.admin
        measure("S3", "s3://captures", "s3://assets", lambda url, data: admin.pipe_file(url, data))
        assert Location.of("s3://captures").listing()


def _hold_the_gpu(*_: object) -> object:
    time.sleep(GPU_SECONDS)
    return _Normal()


def _shard(folder: str) -> None:
    """One worker's batch."""
    use_store(Path(folder))
    os.environ |= {"CAPTURE2MESH_BATCH_PROCESSES": "1"}

    from flows import batch, workshop
    from tasks.dataset.plan import plan
    from tasks.inference.registry import resolve_engine
    from tasks.settings import Parameters

    workshop._whole = _publish_after  # type: ignore[assignment]
    engine, output = resolve_engine("fusion"), f"{folder}/out"
    captures = plan(f"{folder}/in", output, engine, Parameters()).pending
    print(batch.work_through(captures, engine, Parameters()), flush=True)


def _publish_after(planned: object, *_: object) -> object:
    """Hold the GPU, then let others see that it is done."""
    from tasks.dataset.plan import Planned
    from tests.support.published import mark_published

    assert isinstance(planned, Planned)
    result = _hold_the_gpu()
    mark_published(planned.upload.output, planned.id, planned.upload.key)
    return result


def sharing(folder: Path) -> None:
    from tests.synthetic import make_capture

    make_capture(folder / "first", "sphere", views=3, size=32)
    for index in range(SHARED_CAPTURES):
        shutil.copytree(folder / "first", folder / "in" / f"{index:04}")
    seconds = {}
    for workers in (WORKERS, 1):
        begun = time.perf_counter()
        command = [sys.executable, __file__, "shard", str(folder)]
        for process in [subprocess.Popen(command) for _ in range(workers)]:
            assert process.wait() == 0
        seconds[workers] = time.perf_counter() - begun
        shutil.rmtree(folder / "out")
        shutil.rmtree(folder / "store")
        print(f"{workers} worker(s): {seconds[workers]:.1f} s for {SHARED_CAPTURES} captures of {GPU_SECONDS:g} s")
    print(f"x{seconds[1] / seconds[WORKERS]:.2f}")


def main() -> None:
    match sys.argv[1:]:
        case ["shard", folder]:
            return _shard(folder)
        case ["measured", name, folder]:
            return _measured(name, Path(folder))
    measures = {"pipelined": pipelined, "overhead": overhead, "planning": planning, "sharing": sharing}
    if len(sys.argv) != 2 or sys.argv[1] not in measures:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        measures[sys.argv[1]](Path(folder))


if __name__ == "__main__":
    main()
