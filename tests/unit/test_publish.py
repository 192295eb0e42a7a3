"""publish: whole or not at all, the same twice, and latest.json never goes back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.capture_checks import CaptureReport
from tasks.capture.stage_capture import Capture
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import EngineChoice
from tasks.mesh.convert import FormatFailure, Formats
from tasks.mesh.export import Mesh
from tasks.mesh.publish import Latest, Results, is_published, publish, run_key
from tasks.mesh.validate import MeshReport
from tasks.report import Check, MeshSummary, Report
from tasks.settings import Parameters
from tasks.store.location import FileEntry, Location, sha256_of
from tasks.store.results import StoredResult, store
from tasks.weights.pins import Weights
from tests.support.running import assert_published, contents_of, snapshot

FILES = {"mesh.glb": b"glb", "mesh.obj": b"obj", "previews/preview_000.png": b"picture"}
UPLOAD = "upload"
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
THREADS = 8
PARAMETERS = Parameters()
CHOICE = EngineChoice(name="fusion", version="1", reason="asked for")
RECONSTRUCTION = Reconstruction(
    engine=CHOICE,
    parameters=PARAMETERS.infer,
    weights=None,
    views=("a", "b"),
    views_asked=2,
    to_capture=None,
    registration=None,
)


pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def stored(stage: str, result: StoredResult, *paths: str) -> Any:
    """A stage's result with some of FILES, in the store."""
    key = sha256_of(result.model_dump_json().encode())
    with store().working_folder(stage, key) as folder:
        for path in paths:
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(FILES.get(path, b"internal"))
        return store().commit(stage, key, folder, result)


def results(uploaded_at: datetime = NOON, *, passed: bool = True, failures: tuple[FormatFailure, ...] = ()) -> Results:
    """What a run has made; `passed`: of a check of the floor."""
    summary = MeshSummary(
        vertices=5000,
        faces=9000,
        glb_bytes=3,
        watertight=True,
        components=1,
        degenerate_faces=0,
        exporter="native",
        decimated_by="fast-simplification",
        texture_px=256,
        texture_coverage=1.0,
        extent_m=(0.1, 0.2, 0.3),
        metric=True,
    )
    check = Check(name="vertices", passed=passed, value=5000, limit=1000, floor=True)
    return Results(
        capture=Capture(
            uri="/captures/mug",
            id="mug",
            uploaded_at=uploaded_at,
            files=(),
            manifest=None,
            others=(),
            links_outside=(),
            digest="d1",
        ),
        capture_report=CaptureReport(views=(), warnings=(), has_cameras=True),
        cameras=CaptureCameras(source="given", views=()),
        engine=CHOICE,
        reconstruction=RECONSTRUCTION,
        mesh=stored(
            "export_glb",
            Mesh(
                exporter="native", decimated_by="fast-simplification", texture_px=256, texture_coverage=1.0, metric=True
            ),
            "mesh.glb",
        ),
        formats=stored("convert_formats", Formats(failures=failures), "mesh.obj"),
        mesh_report=stored(
            "validate_mesh", MeshReport(mesh=summary, checks=(check,)), "previews/preview_000.png", "previews.jpg"
        ),
    )


def with_views(**values: Any) -> Results:
    """The results of an engine that used other views of `a`, `b` and `c`."""
    made = results()
    files = tuple(FileEntry(path=f"views/{name}.png", bytes=1, sha256="") for name in "abc")
    capture = made.capture.model_copy(update={"files": files})
    return made.model_copy(update={"capture": capture, "reconstruction": RECONSTRUCTION.model_copy(update=values)})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"views_asked": 2}, ()),
        ({"views_asked": 3}, ("1 view(s) do not show the subject and were left out: c",)),
        ({"views_asked": 2, "views": ("b",)}, ("1 view(s) do not show the subject and were left out",)),
        (
            {"views_asked": 3, "reusable": False},
            ("2 of 3 views were used: too little free GPU memory for more",),
        ),
    ],
    ids=["all", "one misses the subject", "one of those chosen", "too little memory"],
)
def test_views_that_were_not_used_are_told(values: dict[str, Any], told: tuple[str, ...]) -> None:
    report = with_views(**values).report(PARAMETERS, ())
    assert report.warnings == told
    assert report.status == ("warning" if told else "normal")


def publish_to(output: Path, made: Results, key: str = "key") -> Path:
    url = publish(made, made.report(PARAMETERS, ()), str(output), key, UPLOAD)
    return Path(url)


def latest(output: Path) -> Latest:
    return Latest.model_validate_json((output / "mug" / "latest.json").read_bytes())


def test_asset_is_whole(output: Path) -> None:
    folder = publish_to(output, results())
    assert folder == output / "mug" / "key"
    contents = contents_of(folder)
    assert_published(contents, list(FILES))
    assert {path: contents[path] for path in FILES} == FILES
    report = Report.model_validate_json(contents["report.json"])
    assert report == results().report(PARAMETERS, ())
    assert report.status == "normal"
    assert latest(output) == Latest(run_key="key", upload_key=UPLOAD, uploaded_at=NOON, report="key/report.json")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "latest.json"]


def test_publishing_again_writes_nothing_in_the_folder(output: Path) -> None:
    folder = publish_to(output, results())
    before = snapshot(folder)
    assert publish_to(output, results()) == folder
    assert snapshot(folder) == before


def _alter(folder: Path) -> None:
    (folder / "mesh.glb").write_bytes(b"bad")


def _cut(folder: Path) -> None:
    (folder / "mesh.obj").write_bytes(b"")


def _lose_file(folder: Path) -> None:
    (folder / "previews" / "preview_000.png").unlink()


def _lose_marker(folder: Path) -> None:
    (folder / "_SUCCESS").unlink()


def _lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [_alter, _cut, _lose_file, _lose_marker, _lose_manifest, _break_manifest])
def test_broken_asset_is_published_again(damage: Callable[[Path], None], output: Path) -> None:
    folder = publish_to(output, results())
    damage(folder)
    assert not is_published(Location.of(folder))
    publish_to(output, results())
    assert is_published(Location.of(folder))
    assert_published(contents_of(folder), list(FILES))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "latest.json"]


@pytest.mark.parametrize(
    ("minutes", "moves"), [(1, True), (0, True), (-1, False)], ids=["newer", "of the same time", "older"]
)
def test_latest_moves_only_forward(minutes: int, moves: bool, output: Path) -> None:
    publish_to(output, results(), "first")
    publish_to(output, results(NOON + timedelta(minutes=minutes)), "second")
    assert latest(output).run_key == ("second" if moves else "first")
    assert is_published(Location.of(output / "mug" / "second"))


def test_failure_is_published_but_never_latest(output: Path) -> None:
    rejected = results(NOON + timedelta(days=1), passed=False)
    assert rejected.report(PARAMETERS, ()).status == "failure"
    folder = publish_to(output, rejected, "rejected")
    assert_published(contents_of(folder), list(FILES))
    assert not (output / "mug" / "latest.json").exists()
    publish_to(output, results(), "good")
    publish_to(output, rejected, "rejected")
    assert latest(output).run_key == "good"


def test_latest_that_cannot_be_read_is_replaced(output: Path) -> None:
    (output / "mug").mkdir(parents=True)
    (output / "mug" / "latest.json").write_text("{")
    publish_to(output, results())
    assert latest(output).run_key == "key"


def test_format_that_failed_is_a_warning() -> None:
    made = results(failures=(FormatFailure(format="ply", reason="no colours"),))
    report = made.report(PARAMETERS, ())
    assert report.status == "warning"
    (check,) = [check for check in report.checks if not check.passed]
    assert (check.name, check.value) == ("format_ply", "no colours")


def test_same_asset_published_at_once(output: Path) -> None:
    made = results()
    with ThreadPoolExecutor(THREADS) as pool:
        folders = set(pool.map(lambda _: publish_to(output, made), range(THREADS)))
    (folder,) = folders
    assert_published(contents_of(folder), list(FILES))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "latest.json"]


def test_results_published_at_once_leave_the_newest_latest(output: Path) -> None:
    made = [results(NOON + timedelta(minutes=minute)) for minute in range(THREADS)]
    order = random.Random(3).sample(range(THREADS), THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda index: publish_to(output, made[index], f"key-{index}"), order))
    assert latest(output).run_key == f"key-{THREADS - 1}"
    for index in range(THREADS):
        assert_published(contents_of(output / "mug" / f"key-{index}"), list(FILES))


def test_run_key_names_the_work() -> None:
    capture = results().capture
    key = run_key(RECONSTRUCTION, capture, PARAMETERS)
    elsewhere = capture.model_copy(update={"uri": "s3://captures/mug", "uploaded_at": NOON + timedelta(days=1)})
    assert run_key(RECONSTRUCTION, elsewhere, PARAMETERS) == key
    weights = [Weights(bundle=digest, revisions={}) for digest in ("w1", "w2")]
    others = [
        run_key(RECONSTRUCTION, capture.model_copy(update={"digest": "d2"}), PARAMETERS),
        *(
            run_key(RECONSTRUCTION.model_copy(update=changes), capture, PARAMETERS)
            for changes in (
                {"engine": CHOICE.model_copy(update={"version": "2"})},
                {"weights": weights[0]},
                {"weights": weights[1]},
                {"views": ("a",)},
            )
        ),
        *(
            run_key(RECONSTRUCTION, capture, Parameters.model_validate(values))
            for values in (
                {"infer": {"seed": 7}},
                {"export": {"texture_px": 2048}},
                {"formats": ["obj"]},
                {"limits": {"min_vertices": 7}},
            )
        ),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_report_is_what_the_design_says(output: Path) -> None:
    report = json.loads((publish_to(output, results()) / "report.json").read_text())
    assert list(report) == [
        "schema",
        "capture",
        "engine",
        "weights",
        "cameras",
        "sensor",
        "subject",
        "mesh",
        "registration",
        "fidelity",
        "status",
        "checks",
        "warnings",
        "stages",
        "outputs",
    ]
    assert sorted(report["capture"]) == ["digest", "has_cameras", "id", "uri", "views", "views_used"]
    assert sorted(report["engine"]) == ["name", "parameters", "reason", "version"]
