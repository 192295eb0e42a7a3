"""A dataset run that is killed or cancelled at any point can be run again and comes to the same."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.dataset.dataset_report import DatasetReport
from tests.support.dataset_runs import arguments, assert_alone, leftovers, machine, processes_of, published
from tests.support.running import (
    ROOT,
    SMALL,
    TIMEOUT,
    CommandLine,
    assignments,
    kill_group,
    post,
    prefect,
    running,
    wait_for,
)
from tests.support.running_s3 import S3
from tests.support.running_stack import read
from tests.synthetic import make_capture

pytestmark = pytest.mark.faults

CAPTURES = {"ball": "sphere", "ring": "torus", "deep/ball": "sphere"}
KILLS = 3
ORPHAN_SECONDS, CANCEL_SECONDS = 60, 60
RUN = "PREFECT__FLOW_RUN_ID="
CHANCE = random.Random(11)
"""When it is killed."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "set"
    for seed, (name, shape) in enumerate(CAPTURES.items()):
        make_capture(folder / name, shape, views=8, size=96, seed=seed)
    return folder


def completed(flows: CommandLine, dataset: Path) -> DatasetReport:
    finished = flows.run(*arguments(dataset, flows.output))
    assert finished.code == 0, finished.stderr
    report = DatasetReport.model_validate_json(finished.stdout)
    assert report.counts == {"normal": len(CAPTURES)}
    return report


@pytest.fixture(scope="module")
def undisturbed(
    dataset: Path, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], float]:
    """What is published of the dataset, and how long that took, in seconds."""
    flows = machine(tmp_path_factory.mktemp("undisturbed"), prefect_server)
    begun = time.monotonic()
    assert completed(flows, dataset).reconstructed == len(CAPTURES)
    return published(flows.output), time.monotonic() - begun


def test_run_that_is_killed_again_and_again_comes_to_the_same(
    dataset: Path, undisturbed: tuple[dict[str, bytes], float], prefect_server: str, tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    flows = machine(tmp_path, prefect_server)
    for _ in range(KILLS):
        process = flows.start(*arguments(dataset, flows.output))
        try:
            time.sleep(CHANCE.uniform(0.2, 0.9) * seconds)
            process.send_signal(signal.SIGKILL)  # it alone: what it has started has to end by itself
            process.communicate(timeout=TIMEOUT)
            assert_alone(tmp_path, ORPHAN_SECONDS)
        finally:
            kill_group(process)
    completed(flows, dataset)
    assert published(flows.output) == expected
    assert leftovers(flows) == []
    assert not list(tmp_path.glob("store/_ledger/failures/*"))


def test_cancelled_run_ends_soon_and_is_held_against_nothing(
    dataset: Path, undisturbed: tuple[dict[str, bytes], float], prefect_server: str, tmp_path: Path
) -> None:
    flows = machine(tmp_path, prefect_server)
    for number in (signal.SIGINT, signal.SIGTERM):
        before = len(list(flows.store.glob("*/*/manifest.json")))
        process = flows.start(*arguments(dataset, flows.output))
        try:
            more = before + 2
            wait_for(
                "work",
                lambda more=more: len(list(flows.store.glob("*/*/manifest.json"))) >= more,
                TIMEOUT,
                0.05,
            )
            process.send_signal(number)
            _, stderr = process.communicate(timeout=CANCEL_SECONDS)
            assert process.returncode != 0
            assert "Traceback" not in stderr
            assert_alone(tmp_path, ORPHAN_SECONDS)
        finally:
            kill_group(process)
        assert not list(tmp_path.glob("store/_ledger/failures/*"))
    completed(flows, dataset)
    assert published(flows.output) == undisturbed[0]
    assert leftovers(flows) == []


@dataclass(frozen=True)
class Machines:
    """Two machines that take batches, what hands over to them, and the server between them; all on S3."""

    server: str
    flows: CommandLine

    def kill(self, number: int) -> str:
        """One of the machines loses its power; gives the run that it was at."""
        lost = ""
        for pid in processes_of(self.flows.folder.with_name(f"machine-{number}")):
            environment = read(Path(f"/proc/{pid}/environ")).decode().split("\0")
            lost = next((each.partition("=")[2] for each in environment if each.startswith(RUN)), lost)
            os.kill(pid, signal.SIGKILL)
        return lost

    def batches(self) -> list[Any]:
        return post(self.server, "/flow_runs/filter", flows={"name": {"any_": ["batch"]}})

    def ended(self) -> dict[str, list[str]]:
        """Captures by the batch that they have ended in."""
        runs = post(self.server, "/task_runs/filter", flows={"name": {"any_": ["batch"]}})
        ended: dict[str, list[str]] = {batch["id"]: [] for batch in self.batches()}
        for run in runs:
            ended[run["flow_run_id"]].append(run["name"])
        return ended


@pytest.fixture
def machines(s3: S3, tmp_path: Path) -> Iterator[Machines]:
    env = {
        **s3.env,
        "CAPTURE2MESH_STORE": f"s3://store/{tmp_path.name}",
        "CAPTURE2MESH_BATCH_DEPLOYMENT": "batch/cuda",
        "CAPTURE2MESH_BATCH_PROCESSES": "1",
    }
    with ExitStack() as stack:
        server = stack.enter_context(prefect(tmp_path))
        with temporary_settings(updates={PREFECT_API_URL: server}):
            template = json.loads((ROOT / "infra" / "cuda-pool.json").read_text())
            post(server, "/work_pools/", name="cuda", type="process", base_job_template=template)
            source = flow.from_source(source=str(ROOT), entrypoint="tests/support/short_leases.py:batch")
            source.deploy("cuda", work_pool_name="cuda", parameters={"engine": "fusion"}, print_next_steps=False)
        for number in range(2):
            own = CommandLine(tmp_path / f"machine-{number}", server, env)
            own.folder.mkdir()
            command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "cuda", "--limit", "1"]
            log = own.folder / "worker.log"
            stack.enter_context(running([*command, "--name", f"gpu-{number}"], own.environment, log))
        wait_for("both workers", lambda: len(post(server, "/work_pools/cuda/workers/filter")) == 2)
        yield Machines(server, CommandLine(tmp_path / "asks", server, env))


def test_batches_of_two_machines_share_a_dataset_and_one_may_die(
    dataset: Path, undisturbed: tuple[dict[str, bytes], float], s3: S3, machines: Machines, tmp_path: Path
) -> None:
    name = tmp_path.name
    for number in range(2):
        for capture in CAPTURES:
            s3.upload(dataset / capture, f"captures/{name}/{number}/{capture}")
    names = {f"{number}/{capture}" for number in range(2) for capture in CAPTURES}
    asked = ["dataset", f"s3://captures/{name}", f"s3://assets/{name}", "--json", *assignments(SMALL)]
    process = machines.flows.start(*asked)
    try:

        def shared() -> bool:
            assert process.poll() is None, process.communicate()
            return len([captures for captures in machines.ended().values() if captures]) == 2

        wait_for("work of both", shared, TIMEOUT)
        lost = machines.kill(0)
        # as the automation for runs whose heartbeat is missing does, later
        crashed = {"type": "CRASHED", "name": "Crashed"}
        post(machines.server, f"/flow_runs/{lost}/set_state", state=crashed)
        before = machines.ended()
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        kill_group(process)
    assert process.returncode == 0, stderr
    report = DatasetReport.model_validate_json(stdout)
    assert (report.counts, report.reconstructed) == ({"normal": len(names)}, len(names))
    # the server notes the end of a task run some time after it has ended
    wait_for("all captures", lambda: names <= {each for captures in machines.ended().values() for each in captures})
    assert machines.ended()[lost] == before[lost]
    for number in range(2):
        keys = s3.keys(f"assets/{name}/{number}")
        meshes = {path: data for path, data in keys.items() if path.endswith("/mesh.glb")}
        assert meshes == {path: data for path, data in undisturbed[0].items() if path.endswith("/mesh.glb")}
    assert [path for path in s3.keys(f"store/{name}") if path.startswith(("_ledger/", "_plans/"))] == []
