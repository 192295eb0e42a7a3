"""infra/deploy.py on a real server: everything is there, and applying it again changes nothing that people have set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.deploy import AUTOMATIONS, QUEUES, Server
from tests.support.running import ROOT, clean_environment, prefect

pytestmark = pytest.mark.system


def deploy(url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"PREFECT_API_URL": url, "PREFECT_HOME": str(folder / "client")}
    command = [sys.executable, "infra/deploy.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_server_has_what_the_workers_expect(tmp_path: Path) -> None:
    with prefect(tmp_path) as url:
        server = Server(url)

        def named(path: str) -> dict[str, dict[str, Any]]:
            return {each["name"]: each for each in server.request("POST", path, {}).json()}

        deployed = deploy(url, tmp_path, "--auto", "trellis")
        assert deployed.returncode == 0, deployed.stderr
        automations = named("/automations/filter")
        assert {each["name"] for each in json.loads(AUTOMATIONS.read_text())} <= set(automations)
        assert {name: pool["type"] for name, pool in named("/work_pools/filter").items()} == {
            "cpu": "process",
            "cuda": "process",
        }
        for pool in "cpu", "cuda":
            queues = named(f"/work_pools/{pool}/queues/filter")
            assert {name: queue["priority"] for name, queue in queues.items()} == QUEUES

        for name in "infer/cuda", "batch/cuda":
            assert server.request("GET", f"/deployments/name/{name}").json()["parameters"]["engine"] == "trellis"

        server.request("PATCH", "/work_pools/cuda", {"concurrency_limit": 3})
        server.make_automations()
        server.make_pool("cuda", "process")
        assert named("/automations/filter").keys() == automations.keys()
        assert named("/work_pools/filter")["cuda"]["concurrency_limit"] == 3
