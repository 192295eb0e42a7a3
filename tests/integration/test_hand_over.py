"""Inference handed over to the `cuda` pool: a real worker runs the deployments of prefect.yaml.

That `reconstruct/default` runs in a worker of the pool `cpu` and hands over, tests/integration/test_stack.py shows.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.deploy import POOLS, Server
from tests.support.gpu_machine import gpu_environment, views_only
from tests.support.running import (
    ROOT,
    TIMEOUT,
    CommandLine,
    post,
    running,
    wait_for,
)

pytestmark = pytest.mark.system


@dataclass(frozen=True)
class House:
    """A server with the deployments, and a worker of the pool `cuda`; both see one store."""

    server: str
    flows: CommandLine
    log: Path

    def inferences(self) -> list[tuple[str, str]]:
        """Pool and state of every flow run of `infer`."""
        runs = post(self.server, "/flow_runs/filter", flows={"name": {"any_": ["infer"]}})
        return [(run["work_pool_name"], run["state_name"]) for run in runs]


@pytest.fixture(scope="module")
def house(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The worker ends with this module; pools and deployments stay on the shared server, where they disturb nothing."""
    folder = tmp_path_factory.mktemp("house")
    line = CommandLine(folder, prefect_server, {"CAPTURE2MESH_STORE_SHARED": "1", **gpu_environment(folder)})
    with ExitStack() as stack:
        for pool in POOLS:
            Server(prefect_server).make_pool(pool, "process")
        deploy(line)
        log = folder / "worker.log"
        worker = ["worker", "start", "--pool", "cuda", "--type", "process", "--limit", "1", "--name", "cuda-0"]
        stack.enter_context(running([sys.executable, "-m", "prefect", *worker], line.environment, log))
        wait_for("the worker", lambda: post(prefect_server, "/work_pools/cuda/workers/filter"))
        yield House(prefect_server, line, log)


def deploy(line: CommandLine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=ROOT,
        env=line.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def handing_over(house: House, folder: Path, **env: str) -> CommandLine:
    """A machine of its own: other scratch, other Prefect home; by default the same store."""
    shared = {"CAPTURE2MESH_STORE": str(house.flows.store), "CAPTURE2MESH_STORE_SHARED": "1"}
    return CommandLine(folder, house.server, {"CAPTURE2MESH_INFER_DEPLOYMENT": "infer/cuda", **shared, **env})


def test_trellis_infers_and_exports_in_the_worker(house: House, capture: Callable[[str], Path], tmp_path: Path) -> None:
    """The machine that hands over has no GPU, weights or upstream's code; it knows the weights list and the model."""
    ball = views_only(capture("given"))
    known = {"CAPTURE2MESH_WEIGHTS_LIST": house.flows.env["CAPTURE2MESH_WEIGHTS_LIST"]}
    known["CAPTURE2MESH_TRELLIS_ROOT"] = "/on/the/worker/only"  # that it is set says that the model is upstream's
    flows = handing_over(house, tmp_path, **known)
    before = house.inferences()
    asked = [*flows.reconstruct_arguments(ball, export__simplify="0.5"), "--engine", "trellis"]
    first = flows.run(*asked)
    assert first.code == 0, first.stderr + house.log.read_text()
    assert (first.report.status, first.report.engine.name) == ("normal", "trellis")
    assert first.report.mesh.exporter == "to_glb"
    assert "export_glb" not in first.ran  # the worker has done it
    assert house.inferences() == [*before, ("cuda", "Completed")]
    # another size of the texture needs the GPU again, and no inference
    larger = flows.run(*asked, "--set", "export.texture_px=512")
    assert larger.code == 0, larger.stderr
    assert larger.report.mesh.texture_px == 512
    log = Path(house.flows.env["STAND_IN_LOG"]).read_text().splitlines()
    assert sum(line.startswith("run") for line in log) == 1


def test_handing_over_needs_a_store_that_both_see(house: House, capture: Callable[[str], Path], tmp_path: Path) -> None:
    flows = handing_over(house, tmp_path, CAPTURE2MESH_STORE=str(tmp_path / "store"), CAPTURE2MESH_STORE_SHARED="0")
    before = house.inferences()
    finished = flows.reconstruct(capture("ball"))
    assert (finished.code, finished.stdout) == (2, "")
    assert "CAPTURE2MESH_STORE_SHARED" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert house.inferences() == before
    assert not flows.output.exists()


def test_deployment_that_is_not_there_is_told(house: House, capture: Callable[[str], Path], tmp_path: Path) -> None:
    flows = handing_over(house, tmp_path, CAPTURE2MESH_INFER_DEPLOYMENT="infer/nowhere")
    finished = flows.reconstruct(capture("ball"))
    assert (finished.code, finished.stdout) == (2, "")
    assert "infer/nowhere" in finished.stderr
    assert "Traceback" not in finished.stderr
