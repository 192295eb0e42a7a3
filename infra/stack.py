"""The whole system on this machine: Prefect server, S3 server, workers, deployments (`make stack`).

`python -m infra.stack up|down|reset`. Everything listens on the loopback interface only. The state lies in one folder
and survives a restart. A process that ends is started again, and so are the runs that ended with their worker.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Container
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from platformdirs import user_data_path
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.deploy import POOLS, Server
from infra.s3 import BUCKETS, HOST, REGION, S3Server
from infra.stack_folder import PID_FILE, check_folder, lock
from infra.stack_members import MEMBER, POLL_SECONDS, end, runs_of
from infra.supervisor import ROOT, StackError, Supervisor, say
from tasks.inference.gpus import visible_gpus

SAMPLE = ROOT / "tests" / "data" / "mug"
PREFECT = [sys.executable, "-m", "prefect"]
PREFECT_SERVER = [sys.executable, "-m", "infra.prefect_server"]
DOCTOR = [sys.executable, "-m", "flows", "doctor", "--engine", "trellis"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# the state that a run gets if its worker has died, by the state that it was in
LEFT = {"PENDING": ("SCHEDULED", "AwaitingRetry"), "RUNNING": ("CRASHED", "Crashed")}
HEARTBEAT_SECONDS = 30  # of runs; infra/automations.json waits until three are missing


class Stopped(Exception):
    """A signal asks the stack to stop."""


class StackSettings(BaseSettings):
    """How the stack runs; read from `CAPTURE2MESH_STACK_*` environment variables."""

    model_config = SettingsConfigDict(env_prefix="CAPTURE2MESH_STACK_", env_ignore_empty=True, frozen=True)

    folder: Path = Field(
        default_factory=lambda: user_data_path("capture2mesh") / "stack",
        description="Folder with the database, buckets, keys and logs.",
    )
    ui_port: int = Field(4200, description="Port of Prefect's UI and API.")
    s3_port: int = Field(8333, description="Port of the S3 server.")
    receive_port: int = Field(8380, description="Port of the receiver, which the S3 server notifies.")
    database_url: SecretStr | None = Field(
        None, description="Prefect's database, postgresql+asyncpg://...; empty: SQLite in the folder."
    )
    password: SecretStr | None = Field(
        None, description="Password of the user admin of UI and API; empty: no password."
    )
    watch: bool = Field(True, description="Reconstruct whatever is uploaded to s3://captures.")
    cpu_runs: int = Field(
        max(2, (os.cpu_count() or 1) // 2), ge=1, description="Number of reconstructions at the same time."
    )


class Stack:
    """The servers and workers of a stack, in the order of their start."""

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self.folder = settings.folder.expanduser().resolve()
        self.ui, self.s3 = f"http://{HOST}:{settings.ui_port}", S3Server(self.folder / "s3", settings.s3_port)
        self.auth = f"admin:{settings.password.get_secret_value()}" if settings.password else ""
        self.receiver = f"http://{HOST}:{settings.receive_port}"
        self.server = Server(f"{self.ui}/api", self.auth)
        self.processes = Supervisor(self.folder / "logs", self.env)

    def start(self) -> None:
        """Start everything; returns when a run can be submitted. Raises StackError."""
        check_ports(self.settings)
        for name in ("logs", "prefect", "scratch"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.s3.prepare()
        self.start_server()
        self.start_s3()
        self.processes.wait_for("Prefect's API", lambda: answers(f"{self.ui}/api/health"))
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
        if self.processes.call("deploy", [*PREFECT, "--no-prompt", "deploy", "--all"], self.worker_env):
            raise StackError(f"the deployments could not be applied:\n{self.processes.last_lines('deploy')}")
        self.engine = "trellis" if devices and not self.processes.call("doctor", DOCTOR, self.worker_env) else "fusion"
        self.server.set_engine(self.engine)
        if self.settings.watch:
            self.processes.wait_for("the receiver", lambda: answers(f"{self.receiver}/health"))
        self.processes.wait_for("the workers", self.workers_online)

    def start_server(self) -> None:
        """Start Prefect's server and UI."""
        # by default leases lie in memory: a restart would lose them, and their slots would stay taken
        env = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
        if self.auth:
            env["PREFECT_SERVER_API_AUTH_STRING"] = self.auth
        if self.settings.database_url:
            env["PREFECT_API_DATABASE_CONNECTION_URL"] = self.settings.database_url.get_secret_value()
        command = [*PREFECT_SERVER, "server", "start", "--host", HOST, "--port", str(self.settings.ui_port)]
        self.processes.spawn("prefect", command, env)

    def start_s3(self) -> None:
        """Start the S3 server with its buckets; at the first start the sample is uploaded."""
        command = self.s3.command(notifies=self.settings.watch)
        self.processes.spawn("s3", command, self.s3.env(self.receiver), self.s3.folder)
        self.processes.wait_for("the S3 server", lambda: answers(f"{self.s3.url}/healthz"))
        self.processes.wait_for("the buckets", self.s3.has_buckets)
        self.s3.upload_once(SAMPLE, "mug")

    def start_receiver(self) -> None:
        """Start the receiver of the S3 server's notifications."""
        settings = {"HOST": HOST, "PORT": str(self.settings.receive_port), "TOKEN": self.s3.token}
        env = {f"CAPTURE2MESH_RECEIVE_{name}": value for name, value in settings.items()}
        self.processes.spawn("receiver", [sys.executable, "-m", "flows", "receive"], self.worker_env | env)

    def start_worker(self, pool: str, number: str, limit: int, **env: str) -> None:
        """Start a worker of a pool that executes at most `limit` runs at the same time."""
        name = f"{pool}-{number}"
        options = {"pool": pool, "type": "process", "name": name, "limit": limit}
        arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        self.processes.spawn(f"worker-{name}", [*PREFECT, "worker", "start", *arguments], self.worker_env | env)

    def workers_online(self) -> bool:
        """True if the server has heard of every worker."""
        expected = {name.removeprefix("worker-") for name in self.processes.children if name.startswith("worker-")}
        answers = [self.server.request("POST", f"/work_pools/{pool}/workers/filter", {}) for pool in POOLS]
        found = [worker for answer in answers for worker in answer.json()]
        return expected <= {worker["name"] for worker in found if worker["status"] == "ONLINE"}

    @cached_property
    def env(self) -> dict[str, str]:
        """Environment of every process: ours, but nothing that configures another server, a storage, or this stack."""
        foreign = ("PREFECT_", "AWS_", "FSSPEC_", "CAPTURE2MESH_STACK_")
        auth = {"PREFECT_API_AUTH_STRING": self.auth} if self.auth else {}
        return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            MEMBER: str(self.folder),
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": f"{self.ui}/api",
            "PREFECT_UI_API_URL": f"{self.ui}/api",  # else the UI asks port 4200
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            **auth,
        }

    @cached_property
    def worker_env(self) -> dict[str, str]:
        """Variables that the workers and their runs get in addition."""
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

    def end_runs(self, but: Container[int] = (), part: str = "") -> None:
        """End the runs and other processes of a part of the stack, and report the runs that cannot do so themselves.

        The automations of infra/automations.json, or the run that waits for a crashed one, start them again.
        """
        before = {run: self.state_of(run) for run in runs_of(self.folder, part)}
        end(self.folder, but, part)
        for run, state in before.items():
            # a run writes its log through its worker; if the worker is dead, the run cannot report its own end
            if state and state["type"] in LEFT and self.state_of(run) == state:
                kind, name = LEFT[state["type"]]
                new = {"type": kind, "name": name, "message": "Its worker has died or was stopped."}
                with suppress(httpx.HTTPError):  # the missing heartbeats show it as well
                    self.server.request("POST", f"/flow_runs/{run}/set_state", {"state": new})

    def state_of(self, run: str) -> dict[str, Any] | None:
        """A run's state; None if the server does not answer."""
        try:
            return self.server.request("GET", f"/flow_runs/{run}").json()["state"]
        except httpx.HTTPError:
            return None

    def stop(self) -> None:
        """End every process: first the runs, while they can tell the server of it, then the workers, then the rest."""
        children = self.processes.children
        workers = [name for name in children if name.startswith("worker-")]
        for name in workers:
            children[name].process.send_signal(signal.SIGSTOP)  # else they would start the runs again that end now
        self.end_runs({child.process.pid for child in children.values()})
        self.processes.end(workers)
        self.processes.end(name for name in children if name not in workers)
        end(self.folder)

    def show(self) -> None:
        """Print where everything is, and what to try."""
        lines = {
            "Prefect UI": self.ui + (" (sign in with admin:<the password>)" if self.auth else ""),
            "S3": f"{self.s3.url} (buckets {', '.join(BUCKETS)}; keys in {self.s3.keys})",
            "Assets": f"{self.s3.url}/assets/ (anyone on this machine may read)",
            "Workers": ", ".join(name for name in self.processes.children if name.startswith("worker-")),
            "Watched": "s3://captures, published in s3://assets" if self.settings.watch else "nothing",
            "auto means": self.engine,
            "Logs": str(self.processes.logs),
            "Try it": f"{self.ui}/v2/deployments: default > Run > Custom run,"
            " with capture s3://captures/mug and output s3://assets",
            "or": f"PREFECT_API_URL={self.ui}/api {sys.executable} -m prefect deployment run reconstruct/default"
            " -p capture=s3://captures/mug -p output=s3://assets",
        }
        for name, text in lines.items():
            say(f"{name:12}{text}")
        say("It is up; Ctrl-C stops it.")


def check_ports(settings: StackSettings) -> None:
    """Raise StackError if another program listens on one of the ports."""
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
    """True if a GET succeeds."""
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


def up(settings: StackSettings) -> None:
    """Run the stack until a signal comes; raises StackError if it cannot start."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Stopped

    stack = Stack(settings)
    with lock(stack.folder):
        end(stack.folder)  # processes of a stack that was killed
        for number in SIGNALS:
            # nohup ignores SIGHUP, and it stays so; a shell's `&` ignores SIGINT, which ends the workers: it may not
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
        try:
            stack.start()
            stack.show()
            while True:
                stack.processes.keep_up(lambda name: stack.end_runs(part=name))
                time.sleep(POLL_SECONDS)
        except Stopped:
            say("stopping")
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            stack.stop()


def down(folder: Path) -> None:
    """Stop the folder's stack, whichever terminal started it, and wait until it has ended."""
    check_folder(folder)
    pid_file = folder / PID_FILE
    if not pid_file.exists():
        say(f"{folder}: no stack has been started here; there is nothing to stop")
        return
    with pid_file.open() as stream:
        # the number is that of a running stack only while the lock is held
        with suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            end(folder)
            return
        with suppress(ProcessLookupError):
            os.kill(int(stream.read()), signal.SIGTERM)
        fcntl.flock(stream, fcntl.LOCK_SH)


def reset(folder: Path) -> None:
    """Stop the folder's stack and remove its state; a PostgreSQL database is not touched."""
    down(folder)
    if folder.exists():
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["up", "down", "reset"])
    command = parser.parse_args().command
    for name in "NO_PROXY", "no_proxy":  # no proxy between the processes of this machine
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
