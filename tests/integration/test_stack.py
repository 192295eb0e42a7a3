"""`make stack`: the whole system as one command starts it, and as it ends; with a PostgreSQL of one's own.

All other tests of a stack use the SQLite file in its folder.
"""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import s3fs

from infra.deploy import AUTOMATIONS
from infra.s3 import free_ports
from infra.stack import Stack
from tasks.report import Report
from tests.support.postgresql import postgresql
from tests.support.running import ROOT, assert_published, clean_environment, wait_for
from tests.support.running_stack import PASSWORD, PATIENCE, Running, read, started

pytestmark = pytest.mark.system

REFUSED = httpx.codes.FORBIDDEN


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("stack") / "state"
    with postgresql() as url, started(folder, CAPTURE2MESH_STACK_DATABASE_URL=url) as running:
        yield running


@pytest.fixture(scope="module")
def finished(stack: Running) -> dict[str, Any]:
    """A reconstruction of the uploaded sample, asked for as the UI does it."""
    return stack.ended(stack.run())


def test_pools_queues_and_deployments_are_there(stack: Running) -> None:
    for pool, limit in ("cpu", stack.settings.cpu_runs), ("cuda", 1):
        assert stack.ask("GET", f"/work_pools/{pool}")["concurrency_limit"] == limit
        queues = stack.ask("POST", f"/work_pools/{pool}/queues/filter", limit=10)
        assert [(queue["name"], queue["priority"]) for queue in queues] == [("interactive", 1), ("default", 2)]
    deployed = {each["entrypoint"]: each for each in stack.ask("POST", "/deployments/filter", limit=50)}
    assert deployed.keys() >= {"flows.reconstruct.reconstruct", "flows.infer.infer_capture"}
    assert str(ROOT) not in str(deployed)
    assert not list((stack.folder / "prefect").glob("*.db*"))


def test_run_goes_through_both_workers_and_its_link_opens(stack: Running, finished: dict[str, Any]) -> None:
    assert (finished["work_pool_name"], finished["state_name"]) == ("cpu", "Completed"), stack.logs
    children = stack.children(finished["id"])
    assert [(run["work_pool_name"], run["state_name"]) for run in children] == [("cuda", "Completed")]
    wanted = {"key": {"any_": ["mesh-mug"]}, "flow_run_id": {"any_": [finished["id"]]}}
    (link,) = stack.ask("POST", "/artifacts/filter", artifacts=wanted)
    url = link["data"].partition("(")[2].partition(")")[0]
    assert url.startswith(f"{stack.s3}/assets/mug/") and url.endswith("/mesh.glb")
    assert httpx.get(url).raise_for_status().content[:4] == b"glTF"
    client, asset = (
        Stack(stack.settings).s3.client("worker"),
        url.removeprefix(f"{stack.s3}/").removesuffix("/mesh.glb"),
    )
    contents = {path.removeprefix(f"{asset}/"): client.cat_file(path) for path in client.find(asset)}
    report = Report.model_validate_json(contents["report.json"])
    assert report.status == "normal"
    assert report.engine.reason == "the setting of deployment infer/cuda"
    assert_published(contents, [entry.path for entry in report.outputs])


def test_deploying_again_changes_nothing_that_people_have_set(stack: Running, finished: dict[str, Any]) -> None:
    automations = stack.ask("POST", "/automations/filter")
    names = [each["name"] for each in automations]
    assert {each["name"] for each in json.loads(AUTOMATIONS.read_text())} <= set(names)
    stack.ask("PATCH", "/work_pools/cuda", concurrency_limit=3)
    own = {"PREFECT_API_URL": str(stack.api.base_url), "PREFECT_API_AUTH_STRING": f"admin:{PASSWORD}"}
    environment = clean_environment() | own | {"PREFECT_HOME": str(stack.folder.with_name("client"))}
    command = [sys.executable, "infra/deploy.py", "--auto", "trellis"]
    deployed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert deployed.returncode == 0, deployed.stderr
    assert sorted(each["name"] for each in stack.ask("POST", "/automations/filter")) == sorted(names)
    pool = stack.ask("GET", "/work_pools/cuda")
    assert (pool["type"], pool["concurrency_limit"]) == ("process", 3)
    for name in "infer/cuda", "batch/cuda":
        assert stack.ask("GET", f"/deployments/name/{name}")["parameters"]["engine"] == "trellis"


def test_nobody_may_more_than_needed(stack: Running) -> None:
    for path in ("captures/mug/transforms.json", "captures", "store", "assets"):
        assert httpx.get(f"{stack.s3}/{path}").status_code == REFUSED, path
    assert httpx.put(f"{stack.s3}/assets/mine", content=b"").status_code == REFUSED
    assert httpx.post(f"{stack.api.base_url}/flow_runs/filter", json={}).status_code == httpx.codes.UNAUTHORIZED

    def client(identity: str) -> s3fs.S3FileSystem:
        return Stack(stack.settings).s3.client(identity)

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
    hidden = [Stack(stack.settings).s3.key_of(identity)[1].encode() for identity in ("worker", "uploader")]
    shown = [log.read_bytes() for log in (stack.folder / "logs").iterdir()]
    shown += [read(process / "cmdline") for process in stack.processes()]
    shown += [stack.output.read_bytes(), *(path.read_bytes() for path in (stack.folder / "prefect").glob("*.db*"))]
    for secret in (*hidden, PASSWORD.encode()):
        assert not any(secret in each for each in shown)


@pytest.mark.parametrize(("elsewhere", "reason"), [(False, "is running already"), (True, "CAPTURE2MESH_STACK_UI_PORT")])
def test_second_stack_is_told_why_not(stack: Running, elsewhere: bool, reason: str, tmp_path: Path) -> None:
    second = Running(tmp_path / "second" if elsewhere else stack.folder, stack.ports)
    second.output = tmp_path / "second.out"
    assert second.command("up").wait(timeout=PATIENCE) == 1
    assert reason in second.told


def test_folder_of_others_is_neither_used_nor_removed(tmp_path: Path) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "file").touch()
    for command in ("up", "reset"):
        running = Running(folder, tuple(free_ports(2)))  # type: ignore[arg-type]
        assert running.command(command).wait(timeout=PATIENCE) == 1, running.told
    assert list(folder.iterdir()) == [folder / "file"]


def test_stack_that_never_was_is_down(tmp_path: Path) -> None:
    for command in ("down", "reset"):
        running = Running(tmp_path / "never", tuple(free_ports(2)))  # type: ignore[arg-type]
        assert running.command(command).wait(timeout=PATIENCE) == 0, running.told
        assert "no stack has been started here" in running.told


def test_stack_ends_whole_and_comes_back_with_its_state(
    stack: Running, finished: dict[str, Any], capture: Callable[[str], Path]
) -> None:
    """A run that its end has hit is run again. At last the stack is reset; no test of this file follows."""
    assert stack.process is not None
    Stack(stack.settings).s3.upload(capture("ball"), "ball")
    hit = stack.run("ball", engine="fusion")
    wait_for("the run", lambda: stack.read(hit)["state_name"] == "Running", PATIENCE)
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(timeout=PATIENCE) == 0, stack.told
    stack.assert_gone()

    stack.start()
    assert stack.read(finished["id"])["state_name"] == "Completed"
    wait_for("the run that was hit", lambda: stack.read(hit)["state_name"] == "Completed", PATIENCE)
    assert stack.read(hit)["run_count"] == 2

    assert stack.command("reset").wait(timeout=PATIENCE) == 0, stack.told
    stack.process.wait(timeout=PATIENCE)
    assert not stack.folder.exists()
    stack.assert_gone()
