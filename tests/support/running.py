"""Real processes for the integration tests: the command line and a Prefect server; and functions that query them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from infra.s3 import free_ports
from tasks.report import Report
from tasks.store.location import Manifest

ROOT = Path(__file__).parents[2]
TIMEOUT = 480
"""Seconds. It is long because the machine may be busy: no test measures with it."""
STAGES = (
    "stage_capture",
    "validate_capture",
    "find_cameras",
    "infer",
    "export_glb",
    "convert_formats",
    "validate_mesh",
)
SMALL = {
    "export.texture_px": "256",
    "export.faces": "2000",
    "infer.fusion.max_voxels": "64",
    "limits.min_vertices": "100",
}
PREFECT_ENV = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_CLI_PROMPT": "false",
}

Snapshot = dict[str, tuple[int, str]]


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables that configure Prefect, storage or this project."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "CAPTURE2MESH_", "AWS_", "FSSPEC_"))
    } | PREFECT_ENV


def assignments(values: Mapping[str, str]) -> list[str]:
    """`--set` options."""
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


@dataclass(frozen=True)
class Finished:
    """The result of a run of the command line."""

    code: int
    stdout: str
    stderr: str

    @property
    def report(self) -> Report:
        """The report that --json printed; fails if stdout holds anything else."""
        return Report.model_validate_json(self.stdout)

    @property
    def ran(self) -> list[str]:
        """The stages that were not cached, without publish, which never is."""
        assert self.report.stages[-1].name == "publish"
        return [stage.name for stage in self.report.stages[:-1] if not stage.cached]


@dataclass(frozen=True)
class CommandLine:
    """`python -m flows` with a store, a scratch folder and an output of its own; without `server`, Prefect's own."""

    folder: Path
    server: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "CAPTURE2MESH_STORE": str(self.store),
            "CAPTURE2MESH_SCRATCH": str(self.folder / "scratch"),
            "PREFECT_HOME": str(self.folder / "prefect"),
        }
        server = {"PREFECT_API_URL": self.server} if self.server else {}
        return clean_environment() | own | server | dict(self.env)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `python -m flows` in a process group of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *map(str, arguments)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str | Path) -> Finished:
        """Run `python -m flows` to its end."""
        process = self.start(*arguments)
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT)
        finally:
            kill_group(process)
        return Finished(process.returncode, stdout, stderr)

    def reconstruct_arguments(
        self, capture: Path | str, output: Path | str | None = None, **values: str
    ) -> list[str | Path]:
        """A small reconstruction with --json; `values` are parameters, with `__` for the dots."""
        parameters = SMALL | {name.replace("__", "."): value for name, value in values.items()}
        return ["reconstruct", capture, output or self.output, "--json", *assignments(parameters)]

    def reconstruct(self, capture: Path | str, output: Path | str | None = None, **values: str) -> Finished:
        return self.run(*self.reconstruct_arguments(capture, output, **values))


def kill_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL a process and the group that it leads; does nothing if they have ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def running(
    arguments: list[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A background process in a group of its own; it is stopped at the end, by force if need be."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            arguments, cwd=cwd, env=dict(env), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    print(f"{arguments[:3]} had to be killed")
            kill_group(process)


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 180, pause: float = 0.2) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(pause)
    return value


def wait_until_served(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def served() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(url, timeout=5).is_success
        except httpx.TransportError:
            return False

    wait_for(url, served)


def put_database(home: Path) -> None:
    """Make the folder PREFECT_HOME with a database without runs: a server would need longer for that than for the rest.

    It is made once for this version of Prefect. That a server makes its own, tests/faults/test_uploads_at_once.py
    shows.
    """
    database = ROOT / "build" / f"prefect-{version('prefect')}.db"
    database.parent.mkdir(exist_ok=True)
    with database.with_suffix(".lock").open("w") as lock, TemporaryDirectory(dir=database.parent) as made:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            make = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            env = clean_environment() | {"PREFECT_HOME": made}
            subprocess.run(make, env=env, check=True, capture_output=True, timeout=TIMEOUT)
            (Path(made) / "prefect.db").rename(database)
    home.mkdir(parents=True)
    shutil.copy(database, home / "prefect.db")


@contextmanager
def prefect(folder: Path, port: int | None = None) -> Iterator[str]:
    """A Prefect server with a database of its own in the folder; gives the URL of its API."""
    port = port or free_ports(1)[0]
    log = folder / "prefect-server.log"
    home = folder / "prefect"
    if not home.exists():
        put_database(home)
    env = clean_environment() | {"PREFECT_HOME": str(home)}
    start = ["-m", "infra.prefect_server", "server", "start"]
    arguments = [sys.executable, *start, "--host", "127.0.0.1", "--port", str(port)]
    with running(arguments, env, log) as process:
        url = f"http://127.0.0.1:{port}/api"
        wait_until_served(f"{url}/health", process, log)
        yield url


def ask(server: str, path: str) -> Any:
    """The answer of a Prefect server to a GET."""
    return httpx.get(f"{server}{path}", timeout=30).raise_for_status().json()


def post(server: str, path: str, **body: Any) -> Any:
    """The answer of a Prefect server to a POST, repeated while it is busy (503), as it sometimes is on SQLite."""

    def answer() -> httpx.Response | None:
        response = httpx.post(f"{server}{path}", json=body, timeout=30)
        return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

    return wait_for(path, answer).raise_for_status().json()


def task_runs(server: str, count: int, **chosen: Any) -> list[dict[str, Any]]:
    """At least `count` task runs in the order of their start; waits until the server has noted their ends."""

    def ended() -> list[dict[str, Any]] | None:
        runs = post(server, "/task_runs/filter", sort="EXPECTED_START_TIME_ASC", **chosen)
        return runs if len(runs) >= count and all(run["end_time"] for run in runs) else None

    found: list[dict[str, Any]] = wait_for("the ends of the task runs", ended)
    return found


def snapshot(folder: Path) -> Snapshot:
    """Every file and folder below: when it was changed, and its content."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def assert_published(contents: Mapping[str, bytes], outputs: list[str]) -> None:
    """A published folder holds exactly `outputs` and the files that complete it, and its manifest verifies."""
    assert sorted(contents) == sorted([*outputs, "report.json", "manifest.json", "_SUCCESS"])
    entries = Manifest.model_validate_json(contents["manifest.json"]).files
    assert sorted(entry.path for entry in entries) == sorted([*outputs, "report.json"])
    for entry in entries:
        data = contents[entry.path]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256), entry.path


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(store: Path) -> None:
    """A local store holds whole entries and nothing else: no working folder, no broken entry."""
    for stage in store.iterdir() if store.exists() else ():
        assert stage.name in (*STAGES, "_ledger"), stage
        for entry in stage.iterdir():
            assert not entry.name.startswith("."), entry
            assert stage.name.startswith("_") or (entry / "manifest.json").is_file(), entry
