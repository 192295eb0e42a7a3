"""The command line: one capture in, one asset out; the same work is done once; what is wrong is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest

from flows.__main__ import main
from tasks.report import Report
from tasks.store.location import file_sha256
from tests.support.running import (
    ROOT,
    STAGES,
    CommandLine,
    Finished,
    Snapshot,
    assert_published,
    assert_whole,
    assignments,
    contents_of,
    kill_group,
    snapshot,
)

SAMPLE = ROOT / "tests" / "data" / "mug"
ASSET = [
    "mesh.glb",
    "mesh.mtl",
    "mesh.obj",
    "mesh.ply",
    "mesh.png",
    *(f"previews/preview_{index:03d}.png" for index in range(6)),
]
CACHED_RUN_SECONDS = 5
HELP_SECONDS = 1
HEAVY = ("prefect", "numpy", "torch", "trimesh", "PIL", "pydantic", "fsspec")


@dataclass(frozen=True)
class Run:
    """A finished run with the place it worked in."""

    flows: CommandLine
    finished: Finished

    @property
    def asset(self) -> Path:
        """The published folder: the only one."""
        return next(self.flows.output.glob("*/*/_SUCCESS")).parent

    def stage_entries(self) -> Snapshot:
        """The store; the time of a manifest is that of the entry's last use, which may differ."""
        return {
            path: (0, content) if path.endswith("/manifest.json") else (changed_at, content)
            for path, (changed_at, content) in snapshot(self.flows.store).items()
        }


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The sample in its full size, with Prefect's own server: as `make demo` runs it."""
    flows = CommandLine(tmp_path_factory.mktemp("sample"))
    return Run(flows, flows.run("reconstruct", SAMPLE, flows.output, "--json"))


@pytest.fixture(scope="module")
def ball(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, capture: Callable[[str], Path]) -> Path:
    """A small capture."""
    return capture("ball")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, ball: Path) -> Run:
    """The small capture, reconstructed."""
    flows = CommandLine(tmp_path_factory.mktemp("small"), prefect_server)
    return Run(flows, flows.reconstruct(ball))


def again(run: Run, folder: Path) -> CommandLine:
    """A command line that works on a copy of what a run left."""
    shutil.copytree(run.flows.store, folder / "store")
    shutil.copytree(run.flows.output, folder / "out")
    return CommandLine(folder, run.flows.server)


def test_sample_gives_a_normal_report_and_the_whole_asset(sample: Run) -> None:
    assert sample.finished.code == 0, sample.finished.stderr
    report = sample.finished.report
    assert report.status == "normal"
    assert [check for check in report.checks if not check.passed] == []
    assert (report.capture.id, report.capture.views, report.capture.views_used) == ("mug", 24, 24)
    assert (report.engine.name, report.mesh.watertight, report.mesh.metric) == ("fusion", True, True)
    assert sample.finished.ran == list(STAGES)

    assert_published(contents_of(sample.asset), ASSET)
    assert [entry.path for entry in report.outputs] == ASSET
    published = Report.model_validate_json((sample.asset / "report.json").read_text())
    assert published == report.model_copy(update={"stages": report.stages[:-1]})
    assert sorted(path.name for path in sample.asset.parent.iterdir()) == sorted([sample.asset.name, "latest.json"])
    latest = json.loads((sample.asset.parent / "latest.json").read_text())
    assert latest["run_key"] == sample.asset.name
    assert latest["report"] == f"{sample.asset.name}/report.json"
    assert sorted(latest) == ["report", "run_key", "upload_key", "uploaded_at"]
    assert [path.name for path in sample.flows.output.iterdir()] == ["mug"]
    assert_whole(sample.flows.store)


def test_second_run_of_the_sample_does_no_work(sample: Run) -> None:
    """A stage whose body ran would have made a working folder, and so touched the store."""
    asset, entries = snapshot(sample.asset), sample.stage_entries()
    process = sample.flows.start("reconstruct", SAMPLE, sample.flows.output, "--json")
    begun = ended = 0.0
    try:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.startswith("stage_capture ..."):
                begun = time.monotonic()
            elif line.startswith("publish "):
                ended = time.monotonic()
        finished = Finished(process.wait(), process.stdout.read(), "")
    finally:
        kill_group(process)
    assert (finished.code, finished.ran) == (0, [])
    assert snapshot(sample.asset) == asset
    assert sample.stage_entries() == entries
    assert 0 < ended - begun < CACHED_RUN_SECONDS


def test_another_texture_size_redoes_the_export_and_what_follows(small: Run, ball: Path, tmp_path: Path) -> None:
    finished = again(small, tmp_path).reconstruct(ball, export__texture_px="512")
    assert finished.ran == ["export_glb", "convert_formats", "validate_mesh"]
    assert finished.report.mesh.texture_px == 512


def test_another_seed_redoes_the_inference_and_what_follows(small: Run, ball: Path, tmp_path: Path) -> None:
    """`fusion` samples nothing: its mesh is the same, and so what is keyed by the mesh is not done again."""
    finished = again(small, tmp_path).reconstruct(ball, infer__seed="7")
    assert finished.ran[:2] == ["infer", "export_glb"]
    assert "validate_capture" not in finished.ran
    runs = sorted((tmp_path / "out" / "ball").glob("*/mesh.glb"))
    assert len(runs) == 2


def test_mesh_below_the_floor_is_published_for_inspection_only(small: Run, ball: Path, tmp_path: Path) -> None:
    flows = again(small, tmp_path)
    latest = (flows.output / "ball" / "latest.json").read_bytes()
    finished = flows.reconstruct(ball, limits__min_vertices="10000000")
    assert finished.code == 1
    assert finished.report.status == "failure"
    assert [check.name for check in finished.report.checks if not check.passed] == ["vertices"]
    assert "below the floor" in finished.stderr
    assert "Traceback" not in finished.stderr
    (rejected,) = [path.parent for path in flows.output.glob("ball/*/_SUCCESS") if path.parent.name != small.asset.name]
    assert_published(contents_of(rejected), ASSET)
    assert (flows.output / "ball" / "latest.json").read_bytes() == latest


def test_two_stores_give_the_same_bytes(small: Run, ball: Path, command_line: CommandLine) -> None:
    finished = command_line.reconstruct(ball)
    assert finished.ran == list(STAGES)
    asset = command_line.output / "ball" / small.asset.name
    assert file_sha256(asset / "mesh.glb") == file_sha256(small.asset / "mesh.glb")


def test_stdout_without_json_tells_the_subject_and_names_every_file(small: Run, ball: Path) -> None:
    arguments = [part for part in small.flows.reconstruct_arguments(ball) if part != "--json"]
    finished = small.flows.run(*arguments)
    assert finished.code == 0
    head, subject, *lines = finished.stdout.splitlines()
    assert head == "ball: normal"
    assert subject == "  subject: object: what the views' masks or the bounds leave"
    assert [line.strip() for line in lines] == [str(small.asset / name) for name in [*ASSET, "report.json"]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (assignments({"export.texture": "256"}), "export.texture"),
        (assignments({"export.texture_px": "300"}), "export.texture_px"),
        (assignments({"limits.min_vertices": "-1", "infer.seed": "x"}), "infer.seed"),
        (["--set", "export.texture_px"], "NAME=VALUE"),
        (assignments({"export": "1", "export.faces": "200"}), "export"),
        (assignments({"export.faces": "200", "export": "1"}), "export"),
        (["--engine", "magic"], "magic"),
        (["--engine", "trellis"], "trellis"),
    ],
)
def test_wrong_usage_says_why(options: list[str], reason: str, ball: Path, tmp_path: Path, prefect_server: str) -> None:
    flows = CommandLine(tmp_path, prefect_server)
    refused(flows, flows.run("reconstruct", ball, flows.output, "--json", *options), reason)


@pytest.mark.parametrize("capture", ["nowhere/at-all", "nosuch://bucket/capture"])
def test_capture_that_is_not_there(capture: str, command_line: CommandLine) -> None:
    refused(command_line, command_line.reconstruct(capture), capture)


def refused(flows: CommandLine, finished: Finished, reason: str) -> None:
    assert finished.code == 2
    assert finished.stdout == ""
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not flows.output.exists()


def test_help_is_quick_and_loads_nothing_heavy(tmp_path: Path) -> None:
    flows = CommandLine(tmp_path)
    seconds = []
    for _ in range(3):  # the quickest says how long it takes, the others what else the machine did
        begun = time.perf_counter()
        finished = flows.run("--help")
        seconds.append(time.perf_counter() - begun)
        assert finished.code == 0
        assert "reconstruct" in finished.stdout
    assert min(seconds) < HELP_SECONDS
    probe = (
        "import runpy, sys\n"
        "sys.argv = ['flows', '--help']\n"
        "try:\n    runpy.run_module('flows', run_name='__main__')\n"
        f"except SystemExit:\n    sys.exit(' '.join(name for name in {HEAVY} if name in sys.modules))"
    )
    probed = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert probed.stderr.split() == []


def test_version_is_that_of_the_package(tmp_path: Path) -> None:
    finished = CommandLine(tmp_path).run("--version")
    assert (finished.code, finished.stdout) == (0, f"capture2mesh {version('capture2mesh')}\n")


def test_console_script_is_the_same_command_line() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert EntryPoint("capture2mesh", scripts["capture2mesh"], "console_scripts").load() is main


def test_rig_writes_the_cameras_of_a_turntable(capture: Callable[[str], Path], tmp_path: Path) -> None:
    folder = capture("turned")
    (folder / "transforms.json").unlink()
    options = ["--kind", "turntable", "--distance", "1.0", "--fov", "40", "--elevation", "20"]
    finished = CommandLine(tmp_path).run("rig", folder, *options)
    assert finished.code == 0, finished.stderr
    assert finished.stdout.strip() == str(folder / "transforms.json")
    frames = json.loads((folder / "transforms.json").read_text())["frames"]
    assert [frame["file_path"] for frame in frames] == [f"views/view_{index:03d}.png" for index in range(8)]


def test_rig_of_an_empty_folder_says_why(tmp_path: Path) -> None:
    finished = CommandLine(tmp_path).run("rig", tmp_path, "--kind", "axes6", "--distance", "1.0", "--fov", "40")
    assert finished.code == 2
    assert str(tmp_path) in finished.stderr
    assert "Traceback" not in finished.stderr
