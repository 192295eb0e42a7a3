"""Datasets: planned, reconstructed, reported; what is done stays done, and a capture that fails stops no other."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

import flows.gpu
import flows.workshop
from flows.dataset import reconstruct_dataset
from infra.deploy import Server
from tasks.dataset.dataset_report import DatasetReport
from tasks.dataset.plan import Plan, plan
from tasks.dataset.rows import Record
from tasks.errors import EngineUnavailable, WeightsUnavailable
from tasks.inference.registry import TRELLIS
from tasks.mesh.publish import Latest
from tasks.settings import Parameters
from tasks.store.claims import Failure
from tests.support.gpu_machine import gpu_environment, views_only
from tests.support.own_settings import forget
from tests.support.running import (
    SMALL,
    STAGES,
    TIMEOUT,
    CommandLine,
    Snapshot,
    assert_published,
    assignments,
    contents_of,
    kill_group,
    post,
    snapshot,
    task_runs,
    wait_for,
)
from tests.support.running_stack import parameters
from tests.synthetic import make_capture

pytestmark = pytest.mark.system

VIEWS, SIZE = 8, 96
FAILURES = "store/_ledger/failures/*.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures that the tests copy. Half of `astray`'s depth readings are: no mesh comes near them."""
    folder = tmp_path_factory.mktemp("originals")
    make_capture(folder / "ball", "sphere", views=VIEWS, size=SIZE)
    make_capture(folder / "other ball", "sphere", views=VIEWS, size=SIZE, seed=7)
    make_capture(folder / "ring", "torus", views=VIEWS, size=SIZE)
    make_capture(folder / "astray", "sphere", views=VIEWS, size=SIZE, depth_outliers=0.6)
    return folder


@pytest.fixture
def put(originals: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts a copy of one of the originals into the dataset."""

    def put(name: str, original: str = "ball") -> Path:
        return Path(shutil.copytree(originals / original, tmp_path / "set" / name, dirs_exist_ok=True))

    return put


@dataclass(frozen=True)
class Ran:
    """What a run over the dataset came to."""

    report: DatasetReport
    tasks: dict[str, str]
    """What the UI lists: each capture that has ended, and how it ended at last."""
    records: dict[str, Record]

    @property
    def states(self) -> dict[str, str]:
        return {name: record.state for name, record in self.records.items()}

    @property
    def worked_on(self) -> set[str]:
        return {name for name, record in self.records.items() if record.seconds is not None}


@dataclass(frozen=True)
class Here:
    """This process as the machine that reconstructs a dataset."""

    folder: Path
    server: str

    @property
    def dataset(self) -> Path:
        return self.folder / "set"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def run(self, dataset: Path | None = None, engine: Any = "fusion", retry: bool = False, **values: str) -> Ran:
        asked = Parameters.model_validate(parameters(**values))
        state = reconstruct_dataset(
            str(dataset or self.dataset), str(self.output), engine, asked, retry, return_state=True
        )
        report = state.result()
        run = str(state.state_details.flow_run_id)

        def told() -> dict[str, str] | None:
            """The task runs, once the server has noted the last one: it does so some time after it has ended."""
            asked = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
            names = {each["name"]: each["state_name"] for each in post(self.server, "/task_runs/filter", **asked)}
            return names if names.get("publish_dataset_report") == "Completed" else None

        ended = wait_for("the task runs", told)
        ended.pop("publish_dataset_report")
        folder = Path(report.url)
        records = [Record.model_validate_json(line) for line in (folder / "report.jsonl").read_text().splitlines()]
        assert Counter(record.state for record in records) == report.counts
        return Ran(report, ended, {record.id: record for record in records})

    def assets(self) -> Snapshot:
        """Of what is published of the captures."""
        return {path: was for path, was in snapshot(self.output).items() if not path.startswith("_dataset")}

    def assert_published(self, name: str) -> Path:
        latest = Latest.model_validate_json((self.output / name / "latest.json").read_bytes())
        folder = self.output / name / latest.run_key
        contents = contents_of(folder)
        outputs = [each["path"] for each in json.loads(contents["report.json"])["outputs"]]
        assert_published(contents, outputs)
        return folder


@pytest.fixture
def here(own_store: Path, tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setenv("CAPTURE2MESH_BATCH_PROCESSES", "2")
    forget()
    with temporary_settings(updates={PREFECT_API_URL: prefect_server, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield Here(tmp_path, prefect_server)
    TRELLIS.close()


def test_mixed_dataset_to_the_last_repair(here: Here, put: Callable[..., Path]) -> None:
    put("ball")
    put("deep/er/ring", "ring")
    put("astray", "astray")
    shutil.rmtree(put("blind") / "views")
    torn = put("torn") / "views" / "view_003.png"
    torn.write_bytes(torn.read_bytes()[:500])
    expected = {
        "astray": "failure",
        "ball": "normal",
        "blind": "invalid",
        "deep/er/ring": "normal",
        "torn": "invalid",
    }

    first = here.run()
    assert first.states == expected
    assert first.report.counts == {"failure": 1, "invalid": 2, "normal": 2}
    assert (first.report.reconstructed, first.report.whole) == (3, False)
    assert first.tasks == {"astray": "Failed", "ball": "Completed", "deep/er/ring": "Completed", "torn": "Failed"}
    assert first.worked_on == {"astray", "ball", "deep/er/ring"}
    assert "view_003.png" in first.records["torn"].reason
    assert first.records["blind"].reason == "has no views"
    assert first.records["astray"].failed_checks
    for name in ("ball", "deep/er/ring"):
        assert here.output / first.records[name].folder == here.assert_published(name)
    assert not (here.output / "astray" / "latest.json").exists()
    assert (here.output / first.records["astray"].folder / "mesh.glb").is_file()
    table = list(csv.DictReader(StringIO(Path(first.report.url, "report.csv").read_text())))
    assert {row["id"]: row["state"] for row in table} == expected
    page = Path(first.report.url, "index.html").read_text()
    assert all(name in page for name in expected)

    stored, assets = snapshot(here.folder / "store"), here.assets()
    second = here.run()
    assert (second.states, second.tasks, second.worked_on) == (expected, {}, set())
    assert second.report.reconstructed == 0
    assert (snapshot(here.folder / "store"), here.assets()) == (stored, assets)

    put("ball", "other ball")
    changed = here.run()
    assert (changed.states, changed.tasks) == (expected, {"ball": "Completed"})
    assert changed.worked_on == {"ball"}
    assert changed.records["ball"].folder != first.records["ball"].folder
    now = here.assets()
    assert {path: now[path] for path in assets if not path.startswith("ball")} == {
        path: was for path, was in assets.items() if not path.startswith("ball")
    }

    put("torn")
    repaired = here.run()
    expected["torn"] = "normal"
    assert (repaired.states, repaired.tasks) == (expected, {"torn": "Completed"})
    here.assert_published("torn")

    asked = here.run(retry=True)
    assert (asked.states, asked.tasks) == (expected, {"astray": "Failed"})
    assert not list(here.folder.glob("store/_ledger/claims/*"))
    assert not list(here.folder.glob("scratch/*"))


def test_list_of_captures(here: Here, put: Callable[..., Path]) -> None:
    put("ball")
    put("not in the list", "ring")
    path = here.dataset / "list.csv"
    path.write_text("capture,id\nball,first\nnowhere,second\n")
    ran = here.run(path)
    assert (ran.states, ran.tasks) == ({"first": "normal", "second": "invalid"}, {"first": "Completed"})
    assert "no capture there" in ran.records["second"].reason
    here.assert_published("first")
    assert sorted(path.name for path in here.output.iterdir()) == ["_dataset-list.csv", "first"]


@pytest.fixture
def gpu(here: Here, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """Makes this machine look as if it had a GPU; gives what the model's process says it did."""
    for name, value in gpu_environment(here.folder).items():
        monkeypatch.setenv(name, value)
    forget()
    log = here.folder / "log"
    return lambda: Counter(line.split()[0] for line in log.read_text().splitlines() if not line.startswith("empty"))


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Notes the calls of a function in this process."""
    calls: list[str] = []
    function = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, noting)
    return calls


def test_one_model_for_all_captures(
    here: Here, put: Callable[..., Path], gpu: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the model cannot do (it has too many views for the memory) is tried three times, and given up."""
    monkeypatch.setenv("STAND_IN_OOM_ABOVE", "3")
    good = {f"ball {number}" for number in range(2)}
    for name in good:
        views, first = sorted((views_only(put(name)) / "views").iterdir()), int(name[-1])
        for path in (*views[:first], *views[first + 3 :]):
            path.unlink()
    views_only(put("many"))
    fetched, textured = counted(monkeypatch, flows.workshop, "fetch_weights"), counted(monkeypatch, TRELLIS, "to_glb")

    first = here.run(engine="trellis", export__simplify="0.5")
    assert first.states == {**dict.fromkeys(good, "normal"), "many": "failed"}
    assert first.tasks == {**dict.fromkeys(good, "Completed"), "many": "Failed"}
    assert "memory" in first.records["many"].reason
    assert first.report.reconstructed == 2
    assert len(fetched) == 1
    assert len(textured) == 2
    assert (gpu()["loaded"], gpu()["run"]) == (1, 2)
    for name in good:
        assert first.records[name].gpu_seconds is not None
        report = json.loads((here.assert_published(name) / "report.json").read_text())
        assert report["mesh"]["exporter"] == "to_glb"
        assert [stage["name"] for stage in report["stages"] if stage["name"] != "fetch_weights"] == [*STAGES]

    second = here.run(engine="trellis", export__simplify="0.5")
    assert (second.states, second.tasks) == (first.states, {})
    monkeypatch.setenv("STAND_IN_OOM_ABOVE", "100")  # of the next process of the model
    TRELLIS.close()
    asked = here.run(engine="trellis", export__simplify="0.5", retry=True)
    assert (asked.report.counts, asked.tasks) == ({"normal": 3}, {"many": "Completed"})
    assert asked.report.whole
    assert (gpu()["loaded"], gpu()["run"], len(textured)) == (2, 3, 3)

    for folder in ("mirror", "weights"):  # what is inferred needs none
        shutil.rmtree(here.folder / folder)
    native = here.run(engine="trellis", export__exporter='"native"')  # in the processes of the batch
    assert native.report.counts == {"normal": 3}
    assert native.report.reconstructed == 3
    assert (gpu()["loaded"], gpu()["run"], len(textured)) == (2, 3, 3)
    for name in good:
        report = json.loads((here.assert_published(name) / "report.json").read_text())
        assert report["mesh"]["exporter"] == "native"
        assert {stage["name"] for stage in report["stages"] if stage["cached"]} == set(STAGES[:4])


def test_captures_go_to_whichever_gpu_is_free(
    here: Here, put: Callable[..., Path], gpu: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"ball {number}" for number in range(4)}
    for name in names:  # each without another view: what is the same is inferred once
        (views_only(put(name)) / "views" / f"view_00{name[-1]}.png").unlink()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("STAND_IN_STEP_SECONDS", "0.02")
    limit = here.folder.name  # its own: the server has other tests
    monkeypatch.setattr(flows.gpu, "LIMIT", limit)
    Server(here.server).make_limit(limit, 1)
    with pytest.raises(EngineUnavailable, match=r"fewer slots than this process sees GPUs \(2\)"):
        here.run(engine="trellis")
    Server(here.server).make_limit(limit, 2)
    assert here.run(engine="trellis").states == dict.fromkeys(names, "normal")
    assert (gpu()["loaded"], gpu()["run"]) == (2, 4)
    shown = post(here.server, "/artifacts/filter", artifacts={"key": {"any_": ["captures"]}}, sort="CREATED_DESC")[0]
    assert shown["data"] == 100
    for lane in ("GPU 0: ball ", "GPU 1: ball "):
        assert lane in shown["description"]


@pytest.mark.faults
def test_what_no_capture_can_help_is_held_against_none(
    here: Here, put: Callable[..., Path], gpu: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not work: the first that needs it ends the run, whatever the others are at."""
    for number in range(7):
        views_only(put(f"ball {number}"))
    monkeypatch.setenv("STAND_IN_NO_CUDA", "1")
    with pytest.raises(EngineUnavailable, match="CUDA"):
        here.run(engine="trellis")
    time.sleep(1)  # for what may still go on
    failures = [Failure.model_validate_json(path.read_bytes()) for path in here.folder.glob(FAILURES)]
    assert [failure for failure in failures if failure.strikes or failure.final] == []
    assert not here.output.exists()
    monkeypatch.delenv("STAND_IN_NO_CUDA")
    TRELLIS.close()
    assert here.run(engine="trellis").report.counts == {"normal": 7}
    assert not list(here.folder.glob(FAILURES))


@pytest.mark.faults
def test_weights_that_cannot_be_fetched_end_the_run(
    here: Here, put: Callable[..., Path], gpu: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        views_only(put(f"ball {number}"))
    (here.folder / "mirror").rename(here.folder / "elsewhere")
    fetched = counted(monkeypatch, flows.workshop, "fetch_weights")
    with pytest.raises(WeightsUnavailable, match="the mirror does not have it"):
        here.run(engine="trellis")
    assert len(fetched) == 1
    assert not here.output.exists()
    (here.folder / "elsewhere").rename(here.folder / "mirror")
    assert here.run(engine="trellis").report.counts == {"normal": 3}


def test_capture_that_is_uploaded_anew_meanwhile_is_left_to_the_next_run(
    here: Here, put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("ball")
    put("ring", "ring")

    def planned_before(*args: Any, **kwargs: Any) -> Plan:
        found = plan(*args, **kwargs)
        put("ring", "other ball")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("flows.dataset.plan", planned_before)
        assert here.run().tasks == {"ball": "Completed"}
    assert not (here.output / "ring").exists()
    assert not list(here.folder.glob(FAILURES))
    ran = here.run()
    assert (ran.states, ran.tasks) == ({"ball": "normal", "ring": "normal"}, {"ring": "Completed"})
    assert ran.report.whole


@pytest.mark.faults
def test_two_runs_at_once_do_nothing_twice(prefect_server: str, put: Callable[..., Path], tmp_path: Path) -> None:
    names = {f"ball {number}" for number in range(4)}
    for name in names:
        put(name, "ring" if name[-1] in "12" else "ball")
    line = CommandLine(tmp_path, prefect_server, {"CAPTURE2MESH_BATCH_PROCESSES": "1"})
    both = [line.start(*asked(tmp_path), "--json") for _ in range(2)]
    try:
        ended = [process.communicate(timeout=TIMEOUT) for process in both]
    finally:
        for process in both:
            kill_group(process)
    assert [process.returncode for process in both] == [0, 0], ended
    reports = [DatasetReport.model_validate_json(stdout) for stdout, _ in ended]
    assert [report.counts for report in reports] == [{"normal": 4}] * 2
    assert {path.parent.parent.name for path in tmp_path.glob("out/*/*/_SUCCESS")} == names
    runs = task_runs(
        prefect_server,
        len(names),
        flow_runs={"name": {"any_": [tmp_path.name]}},
        task_runs={"name": {"any_": sorted(names)}},
    )
    assert Counter(run["name"] for run in runs) == Counter(names)
    assert not list(tmp_path.glob("store/_ledger/*/*"))
    assert [path for root in ("store", "out") for path in (tmp_path / root).rglob(".*")] == []


def asked(folder: Path, *more: str) -> list[str | Path]:
    # the flow run has the name of the dataset
    link = folder / folder.name
    if not link.exists():
        link.symlink_to(folder / "set")
    return ["dataset", link, folder / "out", "--engine", "fusion", *assignments(SMALL), *more]


def test_command_line(prefect_server: str, put: Callable[..., Path], tmp_path: Path) -> None:
    put("ball")
    shutil.rmtree(put("blind") / "views")
    line = CommandLine(tmp_path, prefect_server)
    (tmp_path / "prefect").mkdir()  # Prefect makes its home by itself
    before = snapshot(tmp_path)
    dry = line.run("dataset", tmp_path / "set", tmp_path / "out", "--engine", "fusion", "--dry-run", "--json")
    assert (dry.code, dry.stderr) == (0, "")
    planned = json.loads(dry.stdout)
    assert planned["counts"] == {"new": 1, "invalid": 1}
    assert {each["id"]: each["state"] for each in planned["captures"]} == {"ball": "new", "blind": "invalid"}
    assert snapshot(tmp_path) == before

    arguments = ["dataset", tmp_path / "set", tmp_path / "out", "--engine", "fusion", *assignments(SMALL)]
    finished = line.run(*arguments)
    assert finished.code == 1
    assert [text.split() for text in finished.stdout.splitlines()] == [
        ["invalid", "1"],
        ["normal", "1"],
        ["report", f"{tmp_path}/out/_dataset-set/index.html"],
    ]
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("dataset", "more", "told"),
    [
        ("nowhere.csv", (), "no such list"),
        ("odd://set", (), "odd"),
        ("set", ("--engine", "trellis"), "no NVIDIA GPU"),
    ],
)
def test_bad_input(
    dataset: str, more: tuple[str, ...], told: str, prefect_server: str, put: Callable[..., Path], tmp_path: Path
) -> None:
    put("ball")
    line = CommandLine(tmp_path, prefect_server, {"PATH": "/usr/bin:/bin"})
    url = dataset if "://" in dataset else tmp_path / dataset
    finished = line.run("dataset", url, tmp_path / "out", "--json", *more)
    assert (finished.code, finished.stdout) == (2, "")
    assert told in finished.stderr and "Traceback" not in finished.stderr
    assert not (tmp_path / "out").exists()
