"""A storage that notifies, a receiver, and a Prefect server with the deployments but no workers.

Used by tests/integration/test_uploads.py and tests/benchmarks/sweep.py.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.context import refresh_global_settings_context

from infra.s3 import free_ports
from tests.support.notices import aws
from tests.support.own_settings import forget, send_the_rest
from tests.support.published import mark_published
from tests.support.running import ROOT, TIMEOUT, clean_environment, post, prefect, running, wait_for, wait_until_served
from tests.support.running_s3 import S3, seaweedfs

QUIET_SECONDS = 2
VIEWS = 3
FILES = {f"views/view_{number:03}.png": bytes([number]) * 10 for number in range(VIEWS)}
FILES |= {f"depth/view_{number:03}.png": bytes([number]) * 20 for number in range(VIEWS)}
FILES["transforms.json"] = b"{}"


@dataclass
class House:
    """A bucket, the receiver of its notifications, and a Prefect server with the deployments but no workers."""

    folder: Path
    s3: S3
    server: str
    receiver: str
    env: Mapping[str, str]
    processes: dict[str, ExitStack] = field(default_factory=dict)
    pid: int = 0  # of the receiver

    def start_server(self) -> None:
        self.processes["server"] = ExitStack()
        port = int(self.server.split(":")[2].split("/")[0])
        self.processes["server"].enter_context(prefect(self.folder, port))

    def start_receiver(self) -> None:
        port = self.receiver.rpartition(":")[2]
        log = self.folder / "receiver.log"
        command = [sys.executable, "-m", "flows", "receive"]
        stack = self.processes["receiver"] = ExitStack()
        process = stack.enter_context(running(command, {**self.env, "CAPTURE2MESH_RECEIVE_PORT": port}, log))
        wait_until_served(f"{self.receiver}/health", process, log)
        self.pid = process.pid

    def stop(self, name: str) -> None:
        self.processes.pop(name).close()

    def put(self, capture: str, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            self.s3.admin.pipe_file(f"captures/{capture}/{path}", data)

    def receiver_memory(self) -> int:
        """Memory of the receiver in bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    @property
    def bearer(self) -> dict[str, str]:
        """The header that the receiver wants."""
        return {"Authorization": f"Bearer {self.s3.server.token}"}

    def notify(self, key: str) -> int:
        """Notify the receiver of a new object; gives the status of its answer."""
        body = aws("captures", key)
        return httpx.post(f"{self.receiver}/notify", json=body, headers=self.bearer, timeout=60).status_code

    def runs(self, capture: str) -> list[dict[str, Any]]:
        """The runs of a capture, the oldest first."""
        found = post(self.server, "/flow_runs/filter", flows={"name": {"any_": ["reconstruct"]}}, sort="START_TIME_ASC")
        return [run for run in found if run["parameters"]["capture"] == f"s3://captures/{capture}"]

    def run(self, capture: str) -> dict[str, Any]:
        """The only run of a capture, once it is there."""
        wait_for(f"run of {capture}", lambda: self.runs(capture))
        (run,) = self.runs(capture)
        return run

    def end(self, run: Mapping[str, Any], state: str, publish: bool = True) -> None:
        """End a run as a worker would; a run that completes has published."""
        if state == "COMPLETED" and publish:
            name = run["parameters"]["capture"].removeprefix("s3://captures/")
            mark_published("s3://assets", name, run["idempotency_key"].split("/")[0])
        post(
            self.server, f"/flow_runs/{run['id']}/set_state", state={"type": state, "message": "so it was"}, force=True
        )


def manifest(files: Mapping[str, bytes]) -> dict[str, bytes]:
    entries = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
    ]
    return {"manifest.json": json.dumps({"schema": 1, "files": entries}).encode()}


WHOLE = FILES | manifest(FILES)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within the block this process has these variables."""

    def forget_all() -> None:
        forget()
        refresh_global_settings_context()

    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        forget_all()
        yield
        send_the_rest()
    forget_all()


@contextmanager
def at_home(folder: Path) -> Iterator[House]:
    """A house in a folder; within the block this process has its variables."""
    server_port, receiver_port = free_ports(2)
    receiver = f"http://127.0.0.1:{receiver_port}"
    (folder / "s3").mkdir()
    with seaweedfs(folder / "s3", receiver) as s3, ExitStack() as stack:
        own = {
            **s3.env,
            "PREFECT_API_URL": f"http://127.0.0.1:{server_port}/api",
            "PREFECT_HOME": str(folder / "home"),
            "CAPTURE2MESH_STORE": "s3://store",
            "CAPTURE2MESH_WATCHED": "s3://captures",
            "CAPTURE2MESH_OUTPUT": "s3://assets",
            "CAPTURE2MESH_QUIET_SECONDS": str(QUIET_SECONDS),
            "CAPTURE2MESH_RECEIVE_TOKEN": s3.server.token,
            "CAPTURE2MESH_INFER_DEPLOYMENT": "infer/cuda",
        }
        house = House(folder, s3, own["PREFECT_API_URL"], receiver, clean_environment() | own)
        stack.callback(lambda: [each.close() for each in house.processes.values()])
        house.start_server()
        for pool in "cpu", "cuda":
            post(house.server, "/work_pools/", name=pool, type="process")
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        with running(deploy, house.env, folder / "deploy.log", ROOT) as process:
            assert process.wait(timeout=TIMEOUT) == 0, (folder / "deploy.log").read_text()
        house.start_receiver()
        with environment(own):
            yield house
