"""What an operator lives through, on a real stack: cancelled, failed and lost runs, priorities, killed processes.

Inference is slow where it has to be hit: the `trellis` engine on its stand-in, whose steps take 0.1 s each.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from infra.deploy import AUTOMATIONS
from infra.stack import SAMPLE, Stack
from infra.stack_members import members
from tests.support.gpu_machine import gpu_environment, views_only
from tests.support.running import STAGES, wait_for
from tests.support.running_stack import (
    PATIENCE,
    Running,
    assets,
    parameters,
    read,
    report,
    started,
    with_database,
)

pytestmark = pytest.mark.faults

SECONDS = 10
"""Of a slow inference."""
UNBEGUN_SECONDS = 60
GONE_SECONDS = 90
"""Within which a process that was told to end is gone."""
STAND_IN = {"engine": "trellis", "export__exporter": '"native"'}
"""Its inference takes four seconds."""
SLOW = STAND_IN | {"infer__trellis__ss_steps": str(SECONDS * 10)}
UNLEASED_SECONDS = 5
"""For so long nothing may begin without a slot; it would begin within two."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A running stack on a machine that seems to have a GPU: the engine `trellis` runs on its stand-in."""
    folder = tmp_path_factory.mktemp("stack")
    once = folder / "once"
    once.touch()  # a test that wants an empty mesh removes it
    stand_in = {"STAND_IN_STEP_SECONDS": "0.1", "STAND_IN_EMPTY": "structure", "STAND_IN_ONCE": str(once)}
    with started(with_database(folder / "state"), **gpu_environment(folder), **stand_in) as running:
        yield running


@pytest.fixture(scope="module")
def upload(stack: Running, capture: Callable[[str], Path]) -> Callable[[str], str]:
    """Puts a small capture, views only, into the bucket; gives its id."""
    files = [path for path in views_only(capture("ball")).rglob("*") if path.is_file()]
    uploader = Stack(stack.settings).s3.client("uploader")

    def put(name: str) -> str:
        for path in files:
            uploader.pipe_file(f"captures/{name}/views/{path.name}", path.read_bytes())
        return name

    return put


def models(stack: Running) -> list[int]:
    """Processes that hold the model."""
    return [int(each.name) for each in stack.processes() if b"inference/trellis/process" in read(each / "cmdline")]


def inferring(stack: Running, run: str) -> None:
    """Wait until a run's inference is running."""

    def running() -> bool:
        assert stack.read(run)["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"), stack.logs
        return any(child["state_name"] == "Running" for child in stack.children(run)) and bool(models(stack))

    wait_for("the inference", running, PATIENCE)


def completed(stack: Running, run: str) -> None:
    """Wait until a run is done, which may have crashed before."""

    def done() -> bool:
        found = stack.read(run)
        assert found["state_type"] not in ("FAILED", "CANCELLED"), stack.logs
        return found["state_type"] == "COMPLETED"

    wait_for("the end", done, PATIENCE)


def kill(stack: Running, command: bytes) -> None:
    """SIGKILL the process of the stack that was started by a command."""
    (process,) = [each for each in stack.processes() if command in read(each / "cmdline")]
    os.kill(int(process.name), signal.SIGKILL)


def killed(stack: Running, part: str) -> list[int]:
    """SIGKILL what there still is of a part of the stack."""
    found = members(stack.folder, part=part)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


@pytest.fixture(scope="module", autouse=True)
def lost(stack: Running, upload: Callable[[str], str]) -> str:
    """A run whose machine is gone: worker and process are killed at once, and nobody tells the server.

    It is begun before all other tests, since it takes the server two minutes to see that.
    """
    assert stack.process is not None
    run = stack.run(upload("lost"), infer__seed="6", **SLOW)
    inferring(stack, run)
    stack.process.send_signal(signal.SIGSTOP)
    # all are gone before the stack goes on: it would tell the server of a run that it still finds
    wait_for("the end of the machine", lambda: not killed(stack, "worker-cpu-0"), PATIENCE)
    stack.process.send_signal(signal.SIGCONT)
    return run


@pytest.fixture(scope="module", autouse=True)
def unbegun(stack: Running, capture: Callable[[str], Path]) -> str:
    """A run that its worker took, and then died: begun before all other tests as well, its ten minutes made one."""
    (automation,) = [each for each in json.loads(AUTOMATIONS.read_text()) if "does not begin" in each["name"]]
    known = {each["name"]: each["id"] for each in stack.ask("POST", "/automations/filter")}
    automation["trigger"]["within"] = UNBEGUN_SECONDS
    stack.ask("PUT", f"/automations/{known[automation['name']]}", **automation)
    # not by the stand-in: one test makes that fail, and this run may begin during any of them
    Stack(stack.settings).s3.upload(capture("ball"), "unbegun")
    run = stack.run("unbegun", at="2100-01-01T00:00:00Z", infer__seed="9", engine="fusion")
    stack.set_state(run, "PENDING", "Pending")
    return run


def test_cancelled_in_mid_inference(stack: Running, upload: Callable[[str], str]) -> None:
    run = stack.run(upload("cancelled"), infer__seed="1", **SLOW)
    inferring(stack, run)
    stack.set_state(run, "CANCELLING", "Cancelling")
    wait_for("the end of the inference", lambda: not models(stack), seconds=GONE_SECONDS)
    assert stack.ended(run)["state_name"] == "Cancelled", stack.logs
    wait_for("the end of the handed over run", lambda: stack.children(run)[-1]["state_name"] == "Cancelled", PATIENCE)
    assert assets(stack, "cancelled") == []


def test_failed_run_goes_on_where_it_failed(stack: Running, upload: Callable[[str], str], lost: str) -> None:
    """The UI's Retry button, after the stand-in has given an empty mesh once."""
    # the lost run's inference, which goes on, must not be the one that fails
    wait_for("its end", lambda: [each["state_name"] for each in stack.children(lost)] == ["Completed"], PATIENCE)
    fault = Path(stack.env["STAND_IN_ONCE"])
    fault.unlink()
    try:
        run = stack.run(upload("failed"), infer__seed="2", **STAND_IN)
        failed = stack.ended(run)
        assert failed["state_name"] == "Failed", stack.logs
    finally:
        fault.touch()
    assert assets(stack, "failed") == []

    stack.set_state(run, "SCHEDULED", "AwaitingRetry")
    wait_for("the run's next state", lambda: stack.read(run)["state_name"] not in ("AwaitingRetry", "Failed"), PATIENCE)
    finished = stack.ended(run)
    assert (finished["state_name"], finished["run_count"]) == ("Completed", 2), stack.logs
    cached = [stage["name"] for stage in report(stack, "failed")["stages"] if stage["cached"]]
    assert cached == list(STAGES[:3])


def test_inference_waits_for_a_slot_of_the_gpu(stack: Running, upload: Callable[[str], str]) -> None:
    """Which another process of the same machine may have, one that no worker has started."""
    path = "/v2/concurrency_limits"
    lease = stack.ask("POST", f"{path}/increment-with-lease", names=["gpu"], slots=1)["lease_id"]
    run = stack.run(upload("slot"), infer__seed="8", **STAND_IN)
    wait_for("the inference's run", lambda: any(each["start_time"] for each in stack.children(run)), PATIENCE)
    time.sleep(UNLEASED_SECONDS)
    assert models(stack) == [] and stack.read(run)["state_name"] == "Running"
    stack.ask("POST", f"{path}/decrement-with-lease", lease_id=lease)
    assert stack.ended(run)["state_name"] == "Completed", stack.logs
    assert stack.ask("GET", f"{path}/gpu")["active_slots"] == 0


def test_interactive_overtakes_what_waits(stack: Running, upload: Callable[[str], str]) -> None:
    capture = upload("queued")
    stack.ask("PATCH", "/work_pools/cuda", is_paused=True)
    try:
        runs = []
        for queue in "default", "interactive":
            runs.append(stack.run(capture, queue, infer__seed=str(len(runs)), **STAND_IN))
            (waiting,) = wait_for("the inference in the queue", lambda: stack.children(runs[-1]), PATIENCE)
            assert waiting["work_queue_name"] == queue
    finally:
        stack.ask("PATCH", "/work_pools/cuda", is_paused=False)
    assert [stack.ended(run)["state_name"] for run in runs] == ["Completed", "Completed"], stack.logs
    ordinary, urgent = (stack.children(run)[0]["start_time"] for run in runs)
    assert urgent < ordinary


@pytest.mark.parametrize(("pool", "ends"), [("cuda", ["Crashed", "Completed"]), ("cpu", ["Cancelled", "Completed"])])
def test_killed_worker_comes_back_and_its_run_completes(
    pool: str, ends: list[str], stack: Running, upload: Callable[[str], str]
) -> None:
    run = stack.run(upload(f"killed-{pool}"), infer__seed={"cuda": "3", "cpu": "4"}[pool], **SLOW)
    inferring(stack, run)
    held = models(stack)
    kill(stack, f"--pool\0{pool}".encode())
    wait_for("the end of the inference", lambda: not set(held) & set(models(stack)), seconds=GONE_SECONDS)
    wait_for("the stack's word", lambda: f"worker-{pool}-0 ended with status -9" in stack.told)
    completed(stack, run)
    assert [child["state_name"] for child in stack.children(run)] == ends


def test_killed_server_comes_back_and_the_run_completes(stack: Running, upload: Callable[[str], str]) -> None:
    run = stack.run(upload("kept"), infer__seed="5", **SLOW)
    inferring(stack, run)
    kill(stack, b"server\0start")
    wait_for("the server", lambda: "prefect is started again" in stack.told)
    completed(stack, run)
    assert report(stack, "kept")["status"] == "normal"


def test_run_of_a_lost_machine_is_seen_and_run_again(stack: Running, lost: str) -> None:
    completed(stack, lost)
    history = stack.ask("GET", f"/flow_run_states/?flow_run_id={lost}")
    (crash,) = [state for state in history if state["type"] == "CRASHED"]
    assert crash["message"].startswith("No heartbeat")
    # what it had handed over went on, and was found in the store
    assert [child["state_name"] for child in stack.children(lost)] == ["Completed"]


def test_run_that_did_not_begin_is_given_to_a_worker_again(stack: Running, unbegun: str) -> None:
    completed(stack, unbegun)
    history = stack.ask("GET", f"/flow_run_states/?flow_run_id={unbegun}")
    (crash,) = [state for state in history if state["type"] == "CRASHED"]
    assert crash["message"].startswith("Not begun")
    assert stack.read(unbegun)["run_count"] == 1


def test_missed_nights_are_caught_up_by_one_run(stack: Running) -> None:
    Stack(stack.settings).s3.upload(SAMPLE, "nights/mug")
    deployment = stack.ask("GET", "/deployments/name/reconstruct-dataset/nightly")["id"]
    asked = {"dataset": "s3://captures/nights", "output": "s3://assets/nights"}
    asked["parameters"] = parameters(infer__seed="10")  # what is stored of the sample is for other tests

    def late(night: int) -> str:
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": f"2026-01-0{night}T02:00:00Z"}}
        path = f"/deployments/{deployment}/create_flow_run"
        return stack.ask("POST", path, parameters=asked, state=state)["id"]

    runs = [late(night) for night in (1, 2)]
    ends = [stack.ended(run) for run in runs]
    assert {run["state_name"] for run in ends} <= {"Completed", "Cancelled"}, stack.logs
    worked = sorted((run["start_time"], run["end_time"]) for run in ends if run["state_name"] == "Completed")
    assert all(end <= begun for (_, end), (begun, _) in pairwise(worked))
    assert sum(len(stack.children(run)) for run in runs) == 1  # batches: what the one has done, the next finds
    assert [path for path in assets(stack, "nights/mug") if path.endswith("/_SUCCESS")]
