"""The whole system on this machine: Prefect server, S3 server, workers, deployments (`make stack`).

Everything listens on the loopback interface only. Its state lies in one folder and survives a restart. A process that
ends is started again; runs that end with their worker are run again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from platformdirs import user_data_path
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.console import Console

from infra.deploy import POOLS, Server
from infra.s3 import BUCKETS, HOST, REGION, S3Server
from infra.stack_members import MEMBER, PART, POLL_SECONDS, STOP_SECONDS, end, runs_of
from tasks.inference.gpus import gpus

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "mug"
PREFECT = [sys.executable, "-m", "prefect"]
PREFECT_SERVER = [sys.executable, "-m", "infra.prefect_server"]
DOCTOR = [sys.executable, "-m", "flows", "doctor", "--engine", "trellis"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PID_FILE = "capture2mesh-stack.pid"  # locked by the stack that runs; tells a stack's folder from others
LEFT = {"PENDING": ("SCHEDULED", "AwaitingRetry"), "RUNNING": ("CRASHED", "Crashed")}  # what becomes of runs
HEARTBEAT_SECONDS = 30  # of runs; infra/automations.json waits for three to be missing
START_SECONDS, LOG_LINES = 120, 20
LONGEST_PAUSE_SECONDS = 60  # before a process that keeps ending is started again


def say(text: str) -> None:
    Console(highlight=False, markup=False).print(text, soft_wrap=True)


class StackError(Exception):
    """Why the stack cannot start, or had to stop."""


class Stopped(Exception):
    """Someone wants the stack to stop."""


class StackSettings(BaseSettings):
    """How the stack runs; read from `CAPTURE2MESH_STACK_*` environment variables."""

    model_config = SettingsConfigDict(env_prefix="CAPTURE2MESH_STACK_", env_ignore_empty=True, frozen=True)

    folder: Path = Field(
        default_factory=lambda: user_data_path("capture2mesh") / "stack", description="Database, buckets, keys, logs."
    )
    ui_port: int = Field(4200, description="Of Prefect's UI and API.")
    s3_port: int = Field(8333, description="Of the S3 server.")
    receive_port: int = Field(8380, description="Of the receiver of the S3 server's notifications.")
    database_url: SecretStr | None = Field(None, description="postgresql+asyncpg://...; empty: SQLite in the folder.")
    password: SecretStr | None = Field(None, description="Of the user admin of UI and API; empty: none is asked for.")
    watch: bool = Field(True, description="Reconstruct what is uploaded to s3://captures by itself.")
    cpu_runs: int = Field(max(2, (os.cpu_count() or 1) // 2), ge=1, description="Reconstructions at a time.")


@dataclass
class Child:
    """A process of a stack, and what starts it again."""

    command: list[str]
    env: Mapping[str, str]
    cwd: Path
    process: subprocess.Popen[bytes]
    begun: float
    pause: float = 1.0
    """Seconds to wait before the next start; doubled each time it ends soon."""
    due: float | None = None
    """When it is started again; None while it runs."""


class Stack:
    """The processes of a stack."""

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self.folder = settings.folder.expanduser().resolve()
        self.logs = self.folder / "logs"
        self.ui, self.s3 = f"http://{HOST}:{settings.ui_port}", S3Server(self.folder / "s3", settings.s3_port)
        self.auth = f"admin:{settings.password.get_secret_value()}" if settings.password else ""
        self.receiver = f"http://{HOST}:{settings.receive_port}"
        self.server = Server(f"{self.ui}/api", self.auth)
        self.children: dict[str, Child] = {}

    def start(self) -> None:
        """Start everything; returns when a run can be submitted."""
        check_ports(self.settings)
        for name in ("logs", "prefect", "scratch"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.s3.prepare()
        self.start_server()
        self.start_s3()
        self.wait_for("Prefect's API", lambda: answers(f"{self.ui}/api/health"))
        self.server.make_automations()
        devices = visible_gpus()
        self.server.make_pool("cpu", "process", self.settings.cpu_runs)
        self.server.make_pool("cuda", "process", max(1, len(devices)))
        self.server.make_limit("gpu", max(1, len(devices)))
        self.start_worker("cpu", "0", self.settings.cpu_runs)
        for device in devices:
            self.start_worker("cuda", device, 1, CUDA_VISIBLE_DEVICES=device)
        if not devices:
            self.start_worker("cuda", "0", 1)
        if self.settings.watch:
            self.start_receiver()
        if self.call("deploy", [*PREFECT, "--no-prompt", "deploy", "--all"]):
            raise StackError(f"the deployments could not be applied:\n{self.last_lines('deploy')}")
        self.engine = "trellis" if devices and not self.call("doctor", DOCTOR) else "fusion"
        self.server.set_engine(self.engine)
        if self.settings.watch:
            self.wait_for("the receiver", lambda: answers(f"{self.receiver}/health"))
        self.wait_for("the workers", self.workers_online)

    def start_server(self) -> None:
        """Prefect's server and UI."""
        # in the memory, where they lie by default, they would be lost by a restart, and their slots with them
        env = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
        if self.auth:
            env["PREFECT_SERVER_API_AUTH_STRING"] = self.auth
        if self.settings.database_url:
            env["PREFECT_API_DATABASE_CONNECTION_URL"] = self.settings.database_url.get_secret_value()
        command = [*PREFECT_SERVER, "server", "start", "--host", HOST, "--port", str(self.settings.ui_port)]
        self.spawn("prefect", command, env)

    def start_s3(self) -> None:
        """The buckets; the sample is uploaded once."""
        command = self.s3.command(notifies=self.settings.watch)
        self.spawn("s3", command, self.s3.env(self.receiver), self.s3.folder)
        self.wait_for("the S3 server", lambda: answers(f"{self.s3.url}/healthz"))
        self.wait_for("the buckets", self.s3.has_buckets)
        self.s3.upload_once(SAMPLE, "mug")

    def start_receiver(self) -> None:
        """What takes the S3 server's notifications."""
        settings = {"HOST": HOST, "PORT": str(self.settings.receive_port), "TOKEN": self.s3.token}
        env = {f"CAPTURE2MESH_RECEIVE_{name}": value for name, value in settings.items()}
        self.spawn("receiver", [sys.executable, "-m", "flows", "receive"], self.worker_env | env)

    def start_worker(self, pool: str, number: str, limit: int, **env: str) -> None:
        name = f"{pool}-{number}"
        options = {"pool": pool, "type": "process", "name": name, "limit": limit}
        arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        self.spawn(f"worker-{name}", [*PREFECT, "worker", "start", *arguments], self.worker_env | env)

    def workers_online(self) -> bool:
        expected = {name.removeprefix("worker-") for name in self.children if name.startswith("worker-")}
        answers = [self.server.request("POST", f"/work_pools/{pool}/workers/filter", {}) for pool in POOLS]
        found = [worker for answer in answers for worker in answer.json()]
        return expected <= {worker["name"] for worker in found if worker["status"] == "ONLINE"}

    @cached_property
    def env(self) -> dict[str, str]:
        """Of every process: ours, without what configures another server, other storage, or this stack."""
        foreign = ("PREFECT_", "AWS_", "FSSPEC_", "CAPTURE2MESH_STACK_")
        auth = {"PREFECT_API_AUTH_STRING": self.auth} if self.auth else {}
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            MEMBER: str(self.folder),
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": f"{self.ui}/api",
            "PREFECT_UI_API_URL": f"{self.ui}/api",  # else the UI looks for it at port 4200
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            **auth,
        }

    @cached_property
    def worker_env(self) -> dict[str, str]:
        """Of the workers and their runs."""
        key, secret = self.s3.key_of("worker")
        return {
            "AWS_ENDPOINT_URL": self.s3.url,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "CAPTURE2MESH_STORE": "s3://store",
            "CAPTURE2MESH_SCRATCH": str(self.folder / "scratch"),
            "CAPTURE2MESH_PUBLIC_URL": f"{self.s3.url}/assets",
            "CAPTURE2MESH_WATCHED": "s3://captures" if self.settings.watch else "",
            "CAPTURE2MESH_OUTPUT": "s3://assets",
            "CAPTURE2MESH_INFER_DEPLOYMENT": "",
        }

    def spawn(self, name: str, command: list[str], env: Mapping[str, str], cwd: Path = ROOT) -> None:
        """Start a process in a group and a session of its own, with a log of its own; the last one's log is kept."""
        log = self.logs / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**self.env, **env, PART: name},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children[name] = Child(command, env, cwd, process, time.monotonic())

    def call(self, name: str, command: list[str]) -> int:
        """Run a command to its end; gives its exit status."""
        self.spawn(name, command, self.worker_env)
        self.wait_for(name, lambda: self.children[name].process.poll() is not None, but=name)
        return self.children.pop(name).process.returncode

    def last_lines(self, name: str) -> str:
        log = self.logs / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([*(f"  {line}" for line in lines), f"(the last lines of {log})"])

    def watch(self, but: str = "") -> None:
        """Raise StackError where a process has ended."""
        for name, child in self.children.items():
            if name != but and child.process.poll() is not None:
                raise StackError(f"{name} ended with status {child.process.returncode}:\n{self.last_lines(name)}")

    def wait_for(self, what: str, condition: Callable[[], bool], but: str = "") -> None:
        begun = time.monotonic()
        while not condition():
            self.watch(but)
            if time.monotonic() > begun + START_SECONDS:
                raise StackError(f"{what}: not there after {START_SECONDS} s; see {self.logs}")
            time.sleep(POLL_SECONDS)
        say(f"{what}: {time.monotonic() - begun:.1f} s")

    def keep_up(self) -> None:
        """Start again what has ended, later each time; what it has left, as a killed worker its runs, is ended."""
        for name, child in list(self.children.items()):
            now = time.monotonic()
            if child.due is None and child.process.poll() is not None:
                lived_long = now - child.begun > LONGEST_PAUSE_SECONDS
                child.pause = 1.0 if lived_long else min(2 * child.pause, LONGEST_PAUSE_SECONDS)
                say(f"{name} ended with status {child.process.returncode}; it is started again in {child.pause:.0f} s")
                self.end_runs(part=name)
                child.due = now + child.pause
            elif child.due is not None and now >= child.due:
                self.spawn(name, child.command, child.env, child.cwd)
                self.children[name].pause = child.pause
                say(f"{name} is started again")

    def end_runs(self, but: Container[int] = (), part: str = "") -> None:
        """End runs, and whatever else a part of the stack has left; tell the server of those that cannot do it.

        What infra/automations.json says of crashed runs, or the run that waits for one, has them run again.
        """
        before = {run: self.state_of(run) for run in runs_of(self.folder, part)}
        end(self.folder, but, part)
        for run, state in before.items():
            # a run's log goes through its worker: where that is dead, Prefect's engine fails at telling of its end
            if state and state["type"] in LEFT and self.state_of(run) == state:
                kind, name = LEFT[state["type"]]
                new = {"type": kind, "name": name, "message": "Its worker has died or was stopped."}
                with suppress(httpx.HTTPError):  # the heartbeats that are missing tell it as well
                    self.server.request("POST", f"/flow_runs/{run}/set_state", {"state": new})

    def state_of(self, run: str) -> dict[str, Any] | None:
        """A run's state; None where the server does not answer."""
        try:
            return self.server.request("GET", f"/flow_runs/{run}").json()["state"]
        except httpx.HTTPError:
            return None

    def stop(self) -> None:
        """End every process: runs first, while they can tell the server of it, then the workers."""
        processes = {name: child.process for name, child in self.children.items()}
        workers = [process for name, process in processes.items() if name.startswith("worker-")]
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)  # else they would take the runs again that end now
        self.end_runs({process.pid for process in processes.values()})
        for wave in workers, [process for process in processes.values() if process not in workers]:
            for process in wave:
                process.terminate()
                process.send_signal(signal.SIGCONT)
            for process in wave:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        end(self.folder)

    def show(self) -> None:
        """Where everything is, and what to try."""
        lines = {
            "Prefect UI": self.ui + (" (sign in with admin:<the password>)" if self.auth else ""),
            "S3": f"{self.s3.url} (buckets {', '.join(BUCKETS)}; keys in {self.s3.keys})",
            "Assets": f"{self.s3.url}/assets/ (anyone on this machine may read)",
            "Workers": ", ".join(name for name in self.children if name.startswith("worker-")),
            "Watched": "s3://captures, published in s3://assets" if self.settings.watch else "nothing",
            "auto means": self.engine,
            "Logs": str(self.logs),
            "Try it": f"{self.ui}/v2/deployments: default > Run > Custom run,"
            " with capture s3://captures/mug and output s3://assets",
            "or": f"PREFECT_API_URL={self.ui}/api {sys.executable} -m prefect deployment run reconstruct/default"
            " -p capture=s3://captures/mug -p output=s3://assets",
        }
        for name, text in lines.items():
            say(f"{name:12}{text}")
        say("It is up; Ctrl-C stops it.")


def visible_gpus() -> list[str]:
    """Numbers of the GPUs of this machine; those that CUDA_VISIBLE_DEVICES names, if it is set."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in visible.split(",") if device not in ("", "-1")]
    return [gpu.index for gpu in gpus()]


def check_ports(settings: StackSettings) -> None:
    """Raise StackError where someone else listens."""
    for name in "ui_port", "s3_port", "receive_port":
        port = getattr(settings, name)
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                variable = f"CAPTURE2MESH_STACK_{name.upper()}"
                raise StackError(f"port {port} is taken ({error.strerror}); free it, or set {variable}") from error


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def check_folder(folder: Path) -> None:
    """Raise StackError where the folder is someone else's."""
    if folder.exists() and not (folder / PID_FILE).exists() and any(folder.iterdir()):
        raise StackError(f"{folder}: holds something else than a stack; set CAPTURE2MESH_STACK_FOLDER to a new folder")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Within the block this is the folder's only stack; raises StackError where another one runs."""
    pid_file = folder / PID_FILE
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with pid_file.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError(f"{folder}: its stack is running already; make stack-down stops it") from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def up(settings: StackSettings) -> None:
    """Run the stack until a signal comes; raises StackError where it cannot start."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Stopped

    stack = Stack(settings)
    with lock(stack.folder):
        end(stack.folder)  # what a stack has left that was killed itself
        for number in SIGNALS:
            # nohup ignores one; a shell's `&` ignores SIGINT, which children would inherit and workers end by
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
        try:
            stack.start()
            stack.show()
            while True:
                stack.keep_up()
                time.sleep(POLL_SECONDS)
        except Stopped:
            say("stopping")
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            stack.stop()


def down(folder: Path) -> None:
    """Stop the folder's stack, wherever it was started, and wait for its end."""
    check_folder(folder)
    pid_file = folder / PID_FILE
    if not pid_file.exists():
        say(f"{folder}: no stack has been started here; there is nothing to stop")
        return
    with pid_file.open() as stream:
        # a lock that is held shows that the number is a running stack's
        with suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            end(folder)
            return
        with suppress(ProcessLookupError):
            os.kill(int(stream.read()), signal.SIGTERM)
        fcntl.flock(stream, fcntl.LOCK_SH)


def reset(folder: Path) -> None:
    """Stop the folder's stack and remove its state; a database of your own (PostgreSQL) stays."""
    down(folder)
    if folder.exists():
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["up", "down", "reset"])
    command = parser.parse_args().command
    for name in "NO_PROXY", "no_proxy":  # what listens on the loopback interface is reached through no proxy
        os.environ[name] = ",".join(filter(None, (HOST, os.environ.get(name))))
    settings = StackSettings()
    folder = settings.folder.expanduser().resolve()
    try:
        if command == "up":
            up(settings)
        else:
            {"down": down, "reset": reset}[command](folder)
    except (StackError, httpx.HTTPError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
