"""`make stack`: the whole system as one command starts it, and as it ends."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import s3fs

from infra.stack import Stack, StackSettings, members
from tests.integration.running import ROOT, SMALL, clean_environment, free_ports, kill_group, wait_for

pytestmark = pytest.mark.system

PASSWORD = "a password of the test"
UP = "It is up"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
REFUSED = httpx.codes.FORBIDDEN


@dataclass
class Running:
    """A stack in a folder and on ports of its own, and what asks it."""

    folder: Path
    ports: tuple[int, int]
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        ui, s3 = self.ports
        self.settings = StackSettings(folder=self.folder, ui_port=ui, s3_port=s3, password=PASSWORD)
        self.s3 = f"http://127.0.0.1:{s3}"
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{ui}/api", auth=("admin", PASSWORD), timeout=30)
        self.output = self.folder.with_suffix(".out")

    def command(self, name: str) -> subprocess.Popen[bytes]:
        ui, s3 = self.ports
        env = clean_environment() | {
            "CAPTURE2MESH_STACK_FOLDER": str(self.folder),
            "CAPTURE2MESH_STACK_UI_PORT": str(ui),
            "CAPTURE2MESH_STACK_S3_PORT": str(s3),
            "CAPTURE2MESH_STACK_PASSWORD": PASSWORD,
            "CUDA_VISIBLE_DEVICES": "",
        }
        with self.output.open("wb") as stream:
            command = [sys.executable, "infra/stack.py", name]
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start(self) -> None:
        self.process = self.command("up")

        def up() -> bool:
            assert self.process is not None and self.process.poll() is None, self.told
            return UP in self.told

        wait_for("the stack", up)

    @property
    def told(self) -> str:
        return self.output.read_text()

    def ask(self, method: str, path: str, **body: Any) -> Any:
        def answer() -> httpx.Response | None:
            response = self.api.request(method, path, json=body or None)
            return None if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else response

        return wait_for(path, answer).raise_for_status().json()

    def processes(self) -> list[Path]:
        """Everything that has the stack's folder in its environment or its command, whatever the stack thinks."""
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


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    ui, s3 = free_ports(2)
    running = Running(tmp_path_factory.mktemp("stack") / "state", (ui, s3))
    try:
        running.start()
        yield running
    finally:
        if running.process is not None:
            running.process.terminate()
            try:
                running.process.wait(timeout=60)
            finally:
                kill_group(running.process)
                for pid in members(running.folder):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(stack: Running) -> dict[str, Any]:
    """A reconstruction of the uploaded sample, asked for as the UI does it."""
    parameters: dict[str, Any] = {}
    for name, value in SMALL.items():
        *groups, leaf = name.split(".")
        group = parameters
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = int(value)
    asked = {"capture": "s3://captures/mug", "output": "s3://assets", "parameters": parameters}
    deployment = stack.ask("GET", "/deployments/name/reconstruct/default")["id"]
    run = stack.ask("POST", f"/deployments/{deployment}/create_flow_run", parameters=asked, state={"type": "SCHEDULED"})

    def ended() -> dict[str, Any] | None:
        found = stack.ask("GET", f"/flow_runs/{run['id']}")
        return found if found["state_type"] in ENDED else None

    return wait_for("the run", ended)


def test_pools_queues_and_deployments_are_there(stack: Running) -> None:
    for pool, limit in ("cpu", stack.settings.cpu_runs), ("cuda", 1):
        assert stack.ask("GET", f"/work_pools/{pool}")["concurrency_limit"] == limit
        queues = stack.ask("POST", f"/work_pools/{pool}/queues/filter", limit=10)
        assert [(queue["name"], queue["priority"]) for queue in queues] == [("interactive", 1), ("default", 2)]
    deployed = {each["entrypoint"]: each for each in stack.ask("POST", "/deployments/filter", limit=10)}
    assert deployed.keys() == {"flows.reconstruct.reconstruct", "flows.infer.infer_capture"}
    assert str(ROOT) not in str(deployed)


def test_run_goes_through_both_workers_and_its_link_opens(stack: Running, finished: dict[str, Any]) -> None:
    logs = "".join(log.read_text() for log in (stack.folder / "logs").glob("worker*.log"))
    assert finished["state_name"] == "Completed", logs
    runs = stack.ask("POST", "/flow_runs/filter", limit=10)
    assert sorted((run["work_pool_name"], run["state_name"]) for run in runs) == [
        ("cpu", "Completed"),
        ("cuda", "Completed"),
    ]
    (link,) = stack.ask("POST", "/artifacts/filter", artifacts={"key": {"any_": ["mesh-mug"]}})
    url = link["data"].partition("(")[2].partition(")")[0]
    assert url.startswith(f"{stack.s3}/assets/mug/") and url.endswith("/mesh.glb")
    assert httpx.get(url).raise_for_status().content[:4] == b"glTF"


def test_nobody_may_more_than_needed(stack: Running) -> None:
    for path in ("captures/mug/transforms.json", "captures", "store", "assets"):
        assert httpx.get(f"{stack.s3}/{path}").status_code == REFUSED, path
    assert httpx.put(f"{stack.s3}/assets/mine", content=b"").status_code == REFUSED
    assert httpx.post(f"{stack.api.base_url}/flow_runs/filter", json={}).status_code == httpx.codes.UNAUTHORIZED

    def client(identity: str) -> s3fs.S3FileSystem:
        return Stack(stack.settings).bucket_client(identity)

    client("worker").pipe_file("store/probe", b"")
    assert client("worker").cat_file("captures/mug/transforms.json")
    with pytest.raises(PermissionError):
        client("worker").pipe_file("captures/mug/transforms.json", b"")
    client("uploader").pipe_file("captures/probe/transforms.json", b"")
    with pytest.raises(PermissionError):
        client("uploader").cat_file("captures/mug/transforms.json")
    with pytest.raises(PermissionError):
        client("uploader").pipe_file("assets/probe", b"")


def test_keys_are_private(stack: Running, finished: dict[str, Any]) -> None:
    keys = stack.folder / "s3" / "keys.json"
    assert stat.S_IMODE(keys.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR
    hidden = [Stack(stack.settings).key_of(identity)[1].encode() for identity in ("worker", "uploader")]
    shown = [log.read_bytes() for log in (stack.folder / "logs").iterdir()]
    shown += [read(process / "cmdline") for process in stack.processes()]
    shown += [stack.output.read_bytes(), *(path.read_bytes() for path in (stack.folder / "prefect").glob("*.db*"))]
    for secret in (*hidden, PASSWORD.encode()):
        assert not any(secret in each for each in shown)


@pytest.mark.parametrize(("elsewhere", "reason"), [(False, "is running already"), (True, "CAPTURE2MESH_STACK_UI_PORT")])
def test_second_stack_is_told_why_not(stack: Running, elsewhere: bool, reason: str, tmp_path: Path) -> None:
    second = Running(tmp_path / "second" if elsewhere else stack.folder, stack.ports)
    second.output = tmp_path / "second.out"
    assert second.command("up").wait(timeout=30) == 1
    assert reason in second.told


def test_folder_of_others_is_neither_used_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").touch()
    for command in ("up", "reset"):
        running = Running(folder, tuple(free_ports(2)))  # type: ignore[arg-type]
        assert running.command(command).wait(timeout=30) == 1, running.told
    assert list(folder.iterdir()) == [folder / "file"]


def test_stack_ends_whole_and_comes_back_with_its_state(stack: Running, finished: dict[str, Any]) -> None:
    assert stack.process is not None
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(timeout=60) == 0, stack.told
    stack.assert_gone()

    stack.start()
    assert stack.ask("GET", f"/flow_runs/{finished['id']}")["state_name"] == "Completed"
    worker = next(each for each in stack.processes() if b"--pool\0cuda" in read(each / "cmdline"))
    os.kill(int(worker.name), signal.SIGKILL)
    assert stack.process.wait(timeout=60) == 1
    assert "worker-cuda-0 ended with status -9" in stack.told
    stack.assert_gone()

    assert stack.command("reset").wait(timeout=30) == 0, stack.told
    assert not stack.folder.exists()
