"""What a person sees of a run in Prefect: artifacts with pictures, task runs with names, tags and states."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.running import STAGES, TIMEOUT, CommandLine, Finished, kill_group, post, snapshot, task_runs

NAME = "shown"
# a concurrency limit may be set on it; the other stages need none
TAGS = {name: [] for name in (*STAGES, "publish")} | {"infer": ["inference"]}
PICTURE = re.compile(r"!\[[^\]]*\]\(data:image/jpeg;base64,([A-Za-z0-9+/=]+)\)")
PICTURE_BYTES = 200_000
LEAST_CONTRAST = 10
# fine enough for the inference to take longer than the updates of a progress artifact lie apart
FINE = {"infer__fusion__max_voxels": "256", "infer__fusion__voxel_m": "0.0012"}


@dataclass(frozen=True)
class Shown:
    """Two runs of one capture, and what the first one's inference showed while it ran."""

    server: str
    finished: tuple[Finished, Finished]
    flow_runs: tuple[str, str]
    progress: list[float]
    unchanged: bool

    def artifacts(self, run: int = 0) -> list[dict[str, Any]]:
        chosen = {"flow_run_id": {"any_": [self.flow_runs[run]]}}
        found: list[dict[str, Any]] = post(self.server, "/artifacts/filter", artifacts=chosen)
        return found

    def artifact(self, key: str, run: int = 0) -> dict[str, Any]:
        (found,) = [artifact for artifact in self.artifacts(run) if artifact["key"] == key]
        return found

    def task_runs(self, run: int) -> list[dict[str, Any]]:
        return task_runs(self.server, len(TAGS), flow_runs={"id": {"any_": [self.flow_runs[run]]}})


@pytest.fixture(scope="module")
def shown(prefect_server: str, capture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Shown:
    flows = CommandLine(tmp_path_factory.mktemp("shown"), prefect_server)
    ball = capture(NAME)
    process = flows.start(*flows.reconstruct_arguments(ball, **FINE))
    progress: list[float] = []
    end = time.monotonic() + TIMEOUT
    try:
        while process.poll() is None and time.monotonic() < end:
            progress += seen_progress(prefect_server)
            time.sleep(0.1)
        stdout, stderr = process.communicate(timeout=1)
    finally:
        kill_group(process)
    progress += seen_progress(prefect_server)
    first = Finished(process.returncode, stdout, stderr)
    asset = snapshot(flows.output)
    second = flows.reconstruct(ball, **FINE)
    # latest.json is written again, with the same content; nothing in the asset's folder is
    unchanged = {path: state for path, state in snapshot(flows.output).items() if path.count("/") > 1} == {
        path: state for path, state in asset.items() if path.count("/") > 1
    }
    earlier, later = flow_runs(prefect_server)
    return Shown(prefect_server, (first, second), (earlier["id"], later["id"]), progress, unchanged)


def flow_runs(server: str) -> list[dict[str, Any]]:
    chosen = {"name": {"any_": [NAME]}}
    found: list[dict[str, Any]] = post(server, "/flow_runs/filter", flow_runs=chosen, sort="START_TIME_ASC")
    return found


def seen_progress(server: str) -> list[float]:
    """The value of this capture's progress artifact, if there is one already."""
    chosen = {"type": {"any_": ["progress"]}}
    runs = {"name": {"any_": [NAME]}}
    return [found["data"] for found in post(server, "/artifacts/filter", artifacts=chosen, flow_runs=runs)]


def pictures(markdown: str) -> list[bytes]:
    return [base64.b64decode(data, validate=True) for data in PICTURE.findall(markdown)]


def test_both_runs_are_normal(shown: Shown) -> None:
    for finished in shown.finished:
        assert (finished.code, finished.report.status) == (0, "normal"), finished.stderr
    assert [run["state_name"] for run in flow_runs(shown.server)] == ["Completed", "Completed"]


def test_table_has_a_row_for_every_view(shown: Shown) -> None:
    (table,) = [artifact for artifact in shown.artifacts() if artifact["type"] == "table"]
    rows = json.loads(table["data"])
    assert [row["name"] for row in rows] == [f"view_{index:03d}" for index in range(8)]
    for row in rows:
        assert (row["width"], row["height"], row["verdict"]) == (96, 96, "ok")
    assert NAME in table["description"]


def test_progress_moves_to_100(shown: Shown) -> None:
    artifact = shown.artifact("infer")
    assert (artifact["type"], artifact["data"]) == ("progress", 100.0)
    assert artifact["task_run_id"] in [task["id"] for task in shown.task_runs(0) if task["name"] == "infer"]
    assert shown.progress == sorted(shown.progress)
    assert shown.progress[-1] == 100.0
    assert any(0 < value < 100 for value in shown.progress)
    assert [found for found in shown.artifacts(1) if found["type"] == "progress"] == []  # nothing was inferred


@pytest.mark.parametrize("kind", ["views", "report"])
def test_pages_have_pictures(shown: Shown, kind: str) -> None:
    artifact = shown.artifact(f"{kind}-{NAME}")
    assert artifact["type"] == "markdown"
    (data,) = pictures(artifact["data"])
    assert len(data) < PICTURE_BYTES
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 96
    assert pixels.std() > LEAST_CONTRAST


def test_report_tells_every_check_file_and_stage(shown: Shown) -> None:
    text = shown.artifact(f"report-{NAME}")["data"]
    report = shown.finished[0].report
    assert f"- Subject: {report.subject}\n" in text
    for check in report.checks:
        assert f"| passed | {check.name} |" in text
    for file in report.outputs:
        assert f"`{file.path}` | {file.bytes:,} | `{file.sha256[:12]}`" in text
    for stage in report.stages:
        assert f"| {stage.name} | {stage.seconds:.2f} | ran |" in text
    again = {stage.name: stage.seconds for stage in shown.finished[1].report.stages}
    assert f"| infer | {again['infer']:.2f} | cached |" in shown.artifact(f"report-{NAME}", run=1)["data"]


def test_no_link_without_a_public_url(shown: Shown) -> None:
    assert [artifact["key"] for artifact in shown.artifacts() if artifact["key"].startswith("mesh")] == []


@pytest.mark.parametrize(("run", "state"), [(0, "Completed"), (1, "Cached")])
def test_task_runs_are_named_tagged_and_told_apart(shown: Shown, run: int, state: str) -> None:
    tasks = shown.task_runs(run)
    assert {task["name"]: sorted(task["tags"]) for task in tasks} == TAGS
    states = {task["name"]: task["state_name"] for task in tasks}
    assert states == dict.fromkeys(STAGES, state) | {"publish": "Completed"}


def test_publishing_again_writes_nothing_in_the_folder(shown: Shown) -> None:
    assert shown.unchanged
