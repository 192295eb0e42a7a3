"""Set up a Prefect server for this project: automations, pools with their queues, deployments.

`python infra/deploy.py` applies it to the server that PREFECT_API_URL names; compose.yaml, kubernetes/ and
infra/stack.py use it. Repeating it changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
AUTOMATIONS = ROOT / "infra" / "automations.json"
TEMPLATES = {"cuda": ROOT / "infra" / "cuda-pool.json"}  # of pools of type process
POOLS = ("cpu", "cuda")
HANDED_OVER = ("infer/cuda", "batch/cuda")
QUEUES = {"interactive": 1, "default": 2}  # priorities: the lowest number goes first
BUSY_SECONDS, POLL_SECONDS, TIMEOUT_SECONDS = 60, 1.0, 30


class Server:
    """A Prefect server's API."""

    def __init__(self, url: str, auth: str = "") -> None:
        user, _, password = auth.partition(":")
        self.api = httpx.Client(base_url=url, auth=(user, password) if auth else None, timeout=TIMEOUT_SECONDS)

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """Send a request, again while the server is busy; a conflict (it exists already) is returned, not raised."""
        deadline = time.monotonic() + BUSY_SECONDS
        answer = self.api.request(method, path, json=body)
        while answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            answer = self.api.request(method, path, json=body)
        return answer if answer.status_code == httpx.codes.CONFLICT else answer.raise_for_status()

    def make_automations(self) -> None:
        """Make the automations that do not exist; existing ones stay as an operator has set them."""
        automations = json.loads(AUTOMATIONS.read_text())
        known = {each["name"] for each in self.request("POST", "/automations/filter", {}).json()}
        for automation in automations:
            if automation["name"] not in known:
                self.request("POST", "/automations/", automation)

    def make_pool(self, name: str, pool_type: str, limit: int | None = None) -> None:
        """Make a pool with its queues; a higher limit that an operator has set, for other machines, stays.

        A pool of type kubernetes gets its template from the worker's chart.
        """
        path = TEMPLATES.get(name) if pool_type == "process" else None
        changes: dict[str, Any] = {"base_job_template": json.loads(path.read_text())} if path else {}
        pool = {"name": name, "type": pool_type, "concurrency_limit": limit, **changes}
        if self.request("POST", "/work_pools/", pool).status_code == httpx.codes.CONFLICT:
            known = self.request("GET", f"/work_pools/{name}").json()["concurrency_limit"]
            if limit is not None and known is not None and known < limit:
                changes["concurrency_limit"] = limit
            if changes:
                self.request("PATCH", f"/work_pools/{name}", changes)
        for queue, priority in QUEUES.items():
            self.request("POST", f"/work_pools/{name}/queues", {"name": queue, "priority": priority})

    def make_limit(self, name: str, slots: int) -> None:
        """Make a global concurrency limit, or raise it; a higher limit that an operator has set stays."""
        made = self.request("POST", "/v2/concurrency_limits/", {"name": name, "limit": slots})
        path = f"/v2/concurrency_limits/{name}"
        if made.status_code == httpx.codes.CONFLICT and self.request("GET", path).json()["limit"] < slots:
            self.request("PATCH", path, {"limit": slots})

    def set_engine(self, engine: str) -> None:
        """Set the engine that `auto` means for work that is handed over to the pool `cuda`."""
        for name in HANDED_OVER:
            deployment = self.request("GET", f"/deployments/name/{name}").json()
            parameters = {**deployment["parameters"], "engine": engine}
            self.request("PATCH", f"/deployments/{deployment['id']}", {"parameters": parameters})


def main() -> None:
    """Apply all of it; exits with the status of `prefect deploy` if that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", choices=("process", "kubernetes"), default="process", help="their type")
    parser.add_argument("--auto", choices=("fusion", "trellis"), default="fusion", help="what the pool cuda runs")
    arguments = parser.parse_args()
    server = Server(os.environ["PREFECT_API_URL"], os.environ.get("PREFECT_API_AUTH_STRING", ""))
    server.make_automations()
    for name in POOLS:
        server.make_pool(name, arguments.pools)
    deployed = subprocess.run([sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], cwd=ROOT)
    if deployed.returncode:
        raise SystemExit(deployed.returncode)
    server.set_engine(arguments.auto)


if __name__ == "__main__":
    main()
