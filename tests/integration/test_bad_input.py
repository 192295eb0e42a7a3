"""Captures that cannot be reconstructed: refused before any work, with every reason, each naming its file.

Most cases run the command line within this process, against the real server: starting Python and Prefect for each of
them would take longer than all else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    temporary_settings,
)
from typer.testing import CliRunner

from flows.__main__ import app
from tasks.report import Report
from tests.support.own_settings import forget
from tests.support.running import ROOT, CommandLine, Finished, assert_whole, put_database

VIEW, OTHER, DEPTH, CAMERAS = "views/view_003.png", "views/view_005.png", "depth/view_003.png", "transforms.json"
BOMB_SIDE = 100_000
# decoded, the bomb takes 10 GB a channel
PEAK_BYTES = 2 * 2**30

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(capture: Callable[[str], Path]) -> Path:
    return capture("ball")


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A capture of one's own, to damage."""
    folder = tmp_path / "captures" / "ball"
    shutil.copytree(whole, folder)
    return folder


@pytest.fixture(scope="module")
def prefect_here(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefect, in this process, talks to the shared server; without heartbeats, whose end costs every flow a second."""
    home = tmp_path_factory.mktemp("prefect-home")
    updates = {PREFECT_API_URL: prefect_server, PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(updates=updates):
        yield


Here = Callable[[Path], Finished]


@pytest.fixture
def reconstruct_here(
    prefect_here: None, own_store: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> Here:
    """Runs the command line in this process, with the store of `command_line`."""
    for name, value in command_line.environment.items():
        if name.startswith("CAPTURE2MESH_"):
            monkeypatch.setenv(name, value)
    forget()

    def run(capture: Path) -> Finished:
        result = CliRunner().invoke(app, list(map(str, command_line.reconstruct_arguments(capture))))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run


def edit_transforms(capture: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((capture / CAMERAS).read_text())
    change(content)
    (capture / CAMERAS).write_text(json.dumps(content))


def frame(content: dict[str, Any], path: str) -> dict[str, Any]:
    return next(frame for frame in content["frames"] if frame["file_path"] == path)


def set_frame(capture: Path, path: str, **values: Any) -> None:
    edit_transforms(capture, lambda content: frame(content, path).update(values))


def remove(path: str) -> Damage:
    return lambda capture: (capture / path).unlink()


def unnamed_depth(capture: Path) -> None:
    """A depth map that no frame names, of no view."""
    shutil.copy(capture / DEPTH, capture / "depth" / "stray.png")


def truncated(capture: Path) -> None:
    data = (capture / VIEW).read_bytes()
    (capture / VIEW).write_bytes(data[: len(data) // 2])


def emptied(path: str) -> Damage:
    return lambda capture: (capture / path).write_bytes(b"")


def cropped(capture: Path) -> None:
    """A view that is not of the size that its camera is for."""
    with Image.open(capture / VIEW) as image:
        image.crop((0, 0, 80, 96)).save(capture / VIEW)


def flat_depth(steps: int) -> Damage:
    def write(capture: Path) -> None:
        with Image.open(capture / DEPTH) as image:
            size = image.size
        Image.fromarray(np.full(size[::-1], steps, np.uint16)).save(capture / DEPTH)

    return write


def keep_views(count: int) -> Damage:
    def drop(capture: Path) -> None:
        for folder in ("views", "depth"):
            for path in sorted((capture / folder).iterdir())[count:]:
                path.unlink()
        edit_transforms(capture, lambda content: content.update(frames=content["frames"][:count]))

    return drop


def duplicated(capture: Path) -> None:
    shutil.copy(capture / VIEW, capture / OTHER)


def transparent(capture: Path) -> None:
    with Image.open(capture / VIEW) as image:
        image.putalpha(0)
        image.save(capture / VIEW)


def only_two_show_the_object(capture: Path) -> None:
    for path in sorted((capture / "depth").iterdir())[2:]:
        with Image.open(path) as image:
            size = image.size
        Image.fromarray(np.zeros(size[::-1], np.uint16)).save(path)


def plain_without_cameras(capture: Path) -> None:
    (capture / CAMERAS).unlink()
    for path in (capture / "views").iterdir():
        with Image.open(path) as image:
            grey = Image.new("RGB", image.size, "grey")
            grey.putalpha(image.getchannel("A"))
        grey.save(path)


def without_camera(capture: Path) -> None:
    edit_transforms(capture, lambda content: content["frames"].remove(frame(content, VIEW)))


def with_matrix(change: Callable[[np.ndarray], None]) -> Damage:
    def edit(content: dict[str, Any]) -> None:
        matrix = np.array(frame(content, VIEW)["transform_matrix"])
        change(matrix)
        frame(content, VIEW)["transform_matrix"] = matrix.tolist()

    return lambda capture: edit_transforms(capture, edit)


def singular(matrix: np.ndarray) -> None:
    matrix[:3, 1] = matrix[:3, 0]


def scaled(matrix: np.ndarray) -> None:
    matrix[:3, :3] *= 1.2


def text(capture: Path) -> None:
    (capture / VIEW).write_text("this is no picture\n")


def bomb(capture: Path) -> None:
    """A small PNG whose header says 100,000 x 100,000 pixels."""
    honest = (capture / VIEW).read_bytes()
    header = b"IHDR" + BOMB_SIDE.to_bytes(4, "big") * 2 + honest[24:29]
    (capture / VIEW).write_bytes(honest[:12] + header + zlib.crc32(header).to_bytes(4, "big") + honest[33:])


def linked_outside(capture: Path) -> None:
    target = capture.parent / "elsewhere.png"
    shutil.move(capture / VIEW, target)
    (capture / VIEW).symlink_to(target)


def path_outside(capture: Path) -> None:
    set_frame(capture, VIEW, file_path="../../elsewhere/view_003.png")


CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "missing depth": (remove(DEPTH), (VIEW, DEPTH)),
    "missing view": (remove(VIEW), (DEPTH,)),
    "unmatched depth": (unnamed_depth, ("depth/stray.png: is a depth map without a view",)),
    "truncated image": (truncated, (f"{VIEW}: is a broken",)),
    "empty view": (emptied(VIEW), (f"{VIEW}: is empty",)),
    "empty depth file": (emptied(DEPTH), (f"{DEPTH}: is empty",)),
    "empty transforms": (emptied(CAMERAS), (f"{CAMERAS}: is not valid JSON",)),
    "wrong size": (cropped, (f"{VIEW}: is 80 x 96 pixels",)),
    "constant depth": (flat_depth(10_000), (f"{DEPTH}: is constant",)),
    "too few views": (keep_views(2), ("views/: holds 2 view(s)",)),
    "duplicate views": (duplicated, (f"{OTHER}: has the same pixels as {VIEW}",)),
    "too few show the object": (
        only_two_show_the_object,
        ("views/: holds 2 view(s) that show the object",),
    ),
    "no cameras, and nothing to find them by": (plain_without_cameras, (f"{CAMERAS}: is missing", "not be found")),
    "one camera missing": (without_camera, (f"{VIEW}: has no camera",)),
    "singular matrix": (with_matrix(singular), (CAMERAS, "singular")),
    "non-rigid matrix": (with_matrix(scaled), (CAMERAS, "not rigid")),
    "text named .png": (text, (f"{VIEW}: is not a readable PNG or JPEG image",)),
    "decompression bomb": (bomb, (f"{VIEW}: has far too many pixels",)),
    "link out of the folder": (linked_outside, (f"{VIEW}: is a link that leaves the capture folder",)),
    "path out of the folder": (path_outside, (CAMERAS, "leaves the capture folder")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_capture_is_refused(case: str, damaged: Path, reconstruct_here: Here, command_line: CommandLine) -> None:
    damage, reasons = CASES[case]
    damage(damaged)
    assert_refused(reconstruct_here(damaged), command_line, damaged, reasons)


def test_every_fault_of_a_capture_is_told(damaged: Path, tmp_path: Path) -> None:
    """Five files with five faults, by a process of its own with Prefect's own server, which could spill a traceback."""
    flows = CommandLine(tmp_path)
    put_database(tmp_path / "prefect")
    truncated(damaged)
    (damaged / "depth" / "view_000.png").unlink()
    (damaged / "views" / "view_006.png").write_bytes(b"")
    set_frame(damaged, "views/view_001.png", transform_matrix=np.zeros((4, 4)).tolist())
    shutil.copy(damaged / "depth" / "view_002.png", damaged / "depth" / "stray.png")
    finished = flows.reconstruct(damaged)
    wrong = (f"{VIEW}: ", "depth/view_000.png", "views/view_006.png: ", f"{CAMERAS} frames[1]: ", "depth/stray.png: ")
    assert_refused(finished, flows, damaged, wrong)
    told = [line for line in finished.stderr.splitlines() if line.startswith("  - ")]
    assert all(any(part in line for line in told) for part in wrong)
    assert f"{len(told)} problem(s)" in finished.stderr


def test_capture_is_accepted_once_it_is_repaired(
    damaged: Path, whole: Path, reconstruct_here: Here, command_line: CommandLine
) -> None:
    """A refusal is never cached."""
    truncated(damaged)
    assert reconstruct_here(damaged).code == 2
    shutil.copy(whole / VIEW, damaged / VIEW)
    finished = reconstruct_here(damaged)
    assert (finished.code, finished.report.status) == (0, "normal"), finished.stderr


def test_blurred_view_is_a_warning_only(damaged: Path, reconstruct_here: Here) -> None:
    with Image.open(damaged / VIEW) as image:
        alpha = image.getchannel("A")
        blurred = image.convert("RGB").filter(ImageFilter.GaussianBlur(3))
    blurred.putalpha(alpha)
    blurred.save(damaged / VIEW)
    finished = reconstruct_here(damaged)
    assert finished.code == 0, finished.stderr
    report: Report = finished.report
    assert report.status == "warning"
    assert [(check.name, check.value) for check in report.checks if not check.passed] == [("capture_warnings", 1)]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(flat_depth(0), "has a depth map without a reading", id="depth without a reading"),
        pytest.param(transparent, "shows nothing of the object: its mask is empty", id="no foreground"),
    ],
)
def test_view_without_the_object_is_left_out_and_named(
    damage: Damage, told: str, damaged: Path, reconstruct_here: Here
) -> None:
    damage(damaged)
    finished = reconstruct_here(damaged)
    assert finished.code == 0, finished.stderr
    report: Report = finished.report
    assert (report.status, report.capture.views, report.capture.views_used) == ("warning", 8, 7)
    failed = {check.name: check.value for check in report.checks if not check.passed}
    assert failed == {"capture_warnings": 1, "views_used": 7}
    assert any(line.startswith(f"{VIEW}: {told}") and "engine fusion leaves it out" in line for line in report.warnings)


def test_decompression_bomb_takes_no_memory(damaged: Path) -> None:
    """In a process of its own, whose peak can be told."""
    bomb(damaged)
    check = (
        "import resource, sys\n"
        "from tasks.capture.capture_checks import Needs, examine\n"
        "from tasks.errors import CaptureRefused\n"
        "from tasks.store.location import entries_of\n"
        "from pathlib import Path\n"
        "root = Path(sys.argv[1])\n"
        "try:\n"
        "    examine('bomb', entries_of(root), lambda path: (root / path).read_bytes(),"
        " Needs(cameras=True, metric_depth=True, min_views=3))\n"
        "except CaptureRefused:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, damaged], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    peak = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert peak < PEAK_BYTES


def assert_refused(finished: Finished, flows: CommandLine, capture: Path, reasons: tuple[str, ...]) -> None:
    """Exit 2 with the reasons on stderr; nothing published, nothing half-written, no result of any work."""
    assert finished.code == 2, finished.stderr
    assert finished.stdout == ""
    assert f"capture {capture} is refused" in finished.stderr
    for reason in reasons:
        assert reason in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not flows.output.exists()
    assert_whole(flows.store)
    results = {entry.parent.name for entry in flows.store.glob("*/*") if not entry.parent.name.startswith("_")}
    assert results <= {"stage_capture", "validate_capture"}
