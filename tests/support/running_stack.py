"""A real stack for the integration tests: what `make stack` starts, in a folder and on ports of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from infra.s3 import free_ports
from infra.stack import Stack, StackSettings
from infra.stack_folder import PID_FILE
from infra.stack_members import members
from tests.support.running import ROOT, SMALL, clean_environment, kill_group, put_database, wait_for

PASSWORD = "a password of the test"
UP = "It is up"
PATIENCE = 480
"""Seconds. A run takes ten and a start fifteen on an idle machine."""
POLL_SECONDS = 0.5
"""Between two questions whether a run has ended: each costs the server 10 ms."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Running:
    """A stack in a folder and on ports of its own, and functions that query it."""

    folder: Path
    ports: tuple[int, int]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of its processes."""
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        ui, s3 = self.ports
        self.settings = StackSettings(folder=self.folder, ui_port=ui, s3_port=s3, password=PASSWORD)
        self.s3 = f"http://127.0.0.1:{s3}"
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{ui}/api", auth=("admin", PASSWORD), timeout=30)
        self.output = self.folder.with_suffix(".out")

    def command(self, name: str) -> subprocess.Popen[bytes]:
        ui, s3 = self.ports
        own = {
            "CAPTURE2MESH_STACK_FOLDER": str(self.folder),
            "CAPTURE2MESH_STACK_UI_PORT": str(ui),
            "CAPTURE2MESH_STACK_S3_PORT": str(s3),
            "CAPTURE2MESH_STACK_PASSWORD": PASSWORD,
            "CAPTURE2MESH_STACK_RECEIVE_PORT": str(free_ports(1)[0]),
            "CAPTURE2MESH_STACK_WATCH": "0",  # what tests upload is theirs
            "CUDA_VISIBLE_DEVICES": "",
        }
        with self.output.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "infra.stack", name],
                cwd=ROOT,
                env=clean_environment() | own | dict(self.env),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start it; returns when a run can be submitted. The sweep is paused: it would start a process each minute."""
        self.process = self.command("up")

        def up() -> bool:
            assert self.process is not None and self.process.poll() is None, self.told
            return UP in self.told

        wait_for("the stack", up, PATIENCE)
        sweep = self.ask("GET", "/deployments/name/sweep/default")["id"]
        self.ask("PATCH", f"/deployments/{sweep}", paused=True)

    def stop(self) -> None:
        """Stop it as Ctrl-C does, and end all that is left."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=PATIENCE)
            finally:
                kill_group(self.process)
                for pid in members(self.folder):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    @property
    def told(self) -> str:
        return self.output.read_text()

    @property
    def logs(self) -> str:
        """The logs of the workers and their runs."""
        return "".join(log.read_text() for log in sorted((self.folder / "logs").glob("worker*.log")))

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """The answer of its API, asked again while it restarts or is busy (503), as it sometimes is on SQLite."""

        def answer() -> httpx.Response | None:
            try:
                response = self.api.request(method, path, json=body or None)
            except httpx.TransportError:
                return None
            return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

        response = wait_for(path, answer).raise_for_status()
        return response.json() if response.content else None

    def run(
        self, capture: str = "mug", queue: str | None = None, engine: str = "auto", at: str | None = None, **values: str
    ) -> str:
        """Ask for a small reconstruction as the UI does it, `values` being its parameters; gives the run's id."""
        asked: dict[str, Any] = {"capture": f"s3://captures/{capture}", "output": "s3://assets", "engine": engine}
        asked |= {"parameters": parameters(**values)}
        deployment = self.ask("GET", "/deployments/name/reconstruct/default")["id"]
        more = {"work_queue_name": queue} if queue else {}
        path = f"/deployments/{deployment}/create_flow_run"
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": at} if at else {}}
        return self.ask("POST", path, parameters=asked, state=state, **more)["id"]

    def read(self, run: str) -> Any:
        return self.ask("GET", f"/flow_runs/{run}")

    def ended(self, run: str, seconds: float = PATIENCE) -> Any:
        """Wait for the end of a run; gives the run."""

        def end() -> Any:
            found = self.read(run)
            return found if found["state_type"] in ENDED else None

        return wait_for(f"the end of run {run}", end, seconds, POLL_SECONDS)

    def set_state(self, run: str, kind: str, name: str) -> None:
        """Set a run's state as the UI's buttons do."""
        answer = self.ask("POST", f"/flow_runs/{run}/set_state", state={"type": kind, "name": name})
        assert answer["status"] == "ACCEPT", answer

    def children(self, run: str) -> list[Any]:
        """The runs that a run has handed over, the first one first."""
        runs = self.ask("POST", "/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run]}})
        return sorted(runs, key=lambda run: run["created"])

    def processes(self) -> list[Path]:
        """All processes with the stack's folder in their environment or command, known to the stack or not."""
        return [
            process
            for process in Path("/proc").glob("[0-9]*")
            if any(str(self.folder).encode() in read(process / name) for name in ("environ", "cmdline"))
        ]

    def assert_gone(self) -> None:
        assert self.processes() == []
        for port in self.ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, port


@contextmanager
def started(folder: Path, **env: str) -> Iterator[Running]:
    """A stack on free ports; at the end it is stopped with all its processes."""
    ui, s3 = free_ports(2)
    running = Running(folder, (ui, s3), env)
    try:
        running.start()
        yield running
    finally:
        running.stop()


def with_database(folder: Path) -> Path:
    """Make the folder of a stack that has a database already, which saves time; gives the folder.

    That a stack makes all of its folder itself, tests/faults/test_uploads_at_once.py shows.
    """
    put_database(folder / "prefect")
    (folder / PID_FILE).touch()
    return folder


def assets(stack: Running, capture: str) -> list[str]:
    """The published files of a capture."""
    return Stack(stack.settings).s3.client("worker").find(f"assets/{capture}")


def report(stack: Running, capture: str) -> Any:
    """The report of a capture's only asset."""
    (path,) = [path for path in assets(stack, capture) if path.endswith("/report.json")]
    return json.loads(Stack(stack.settings).s3.client("worker").cat_file(path))


def parameters(**values: str) -> dict[str, Any]:
    """Parameters of a small reconstruction, nested as a deployment takes them; `values` are JSON, `__` for each dot."""
    nested: dict[str, Any] = {}
    for name, value in (SMALL | {name.replace("__", "."): value for name, value in values.items()}).items():
        *groups, leaf = name.split(".")
        group = nested
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = json.loads(value)
    return nested


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""
