"""What a run tells: report.json, and the artifacts in the Prefect UI."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast
from urllib.parse import quote
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from pydantic import BaseModel, ConfigDict, Field

from tasks.capture.checks import CaptureReport
from tasks.capture.sheet import CONTACT_SHEET
from tasks.settings import settings
from tasks.stage import StageTiming, in_flow, report_progress
from tasks.storage import FileEntry, Location
from tasks.store import store
from tasks.weights.pins import Weights

Status = Literal["normal", "warning", "failure"]

# each update is a request to the server
PROGRESS_SECONDS = 0.5


class CaptureSummary(BaseModel):
    """The capture a report is about."""

    id: str
    uri: str
    digest: str
    views: int
    views_used: int
    has_cameras: bool


class EngineSummary(BaseModel):
    """The engine that made the geometry, why it was chosen, and every parameter of the run."""

    name: str
    version: str
    reason: str
    parameters: dict[str, Any]


class RegistrationSummary(BaseModel):
    """How well a mesh of unknown pose and size was found in the capture's depth readings.

    residual_m: root mean square distance of the readings near the mesh. inlier_share: of the readings near it.
    stray_share: of the mesh, what lies in space that the views see to be free. Without `accepted` nothing was moved.
    """

    model_config = ConfigDict(frozen=True)

    accepted: bool
    residual_m: float
    inlier_share: float
    stray_share: float


class MeshSummary(BaseModel):
    """The published mesh, measured on the loaded GLB; topology after welding by position."""

    vertices: int
    faces: int
    glb_bytes: int
    watertight: bool
    components: int
    degenerate_faces: int
    exporter: str
    decimated_by: str
    texture_px: int
    texture_coverage: float | None
    extent_m: tuple[float, float, float]
    metric: bool


class Check(BaseModel):
    """One comparison of a value with its limit. One that is of the `floor` and fails makes the status `failure`."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    value: bool | int | float | str
    limit: bool | int | float | str
    floor: bool = False


class Report(BaseModel):
    """report.json: what was reconstructed, how, and whether it can be trusted."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[1] = Field(1, alias="schema")
    capture: CaptureSummary
    engine: EngineSummary
    weights: Weights | None = None
    mesh: MeshSummary
    registration: RegistrationSummary | None = None
    fidelity: dict[str, float] | None = None
    status: Status
    checks: tuple[Check, ...]
    stages: tuple[StageTiming, ...]
    outputs: tuple[FileEntry, ...]


def status_of(checks: tuple[Check, ...]) -> Status:
    """failure where a check of the floor failed, warning where any other did."""
    failed = [check for check in checks if not check.passed]
    if any(check.floor for check in failed):
        return "failure"
    return "warning" if failed else "normal"


class Progress(Protocol):
    """Moves a progress display: 0 to 1, and what a terminal says beside it."""

    def __call__(self, fraction: float, note: str = "") -> None: ...


@contextmanager
def progress_artifact(stage: str) -> Iterator[Progress]:
    """A progress artifact of the running task or flow, moved by the function it gives (0 to 1, and a note for who sees
    the terminal); observers hear of it too."""
    key = stage.replace("_", "-")
    artifact = cast(UUID, create_progress_artifact(0.0, key=key, description=stage)) if in_flow() else None
    shown_at = time.monotonic()

    def show(fraction: float, note: str = "") -> None:
        nonlocal shown_at
        report_progress(stage, fraction, note)
        if artifact is not None and (fraction >= 1 or time.monotonic() - shown_at >= PROGRESS_SECONDS):
            shown_at = time.monotonic()
            update_progress_artifact(artifact, progress=round(100 * fraction, 1))

    yield show
    show(1.0)


def show_capture(name: str, report: CaptureReport) -> None:
    """Artifacts of the flow run: a table with one row a view, and the contact sheet."""
    create_table_artifact(
        key=artifact_key("capture", name),
        description=f"Views of **{name}**: {len(report.views)}, warnings: {len(report.warnings)}",
        table=[_row(view.model_dump()) for view in report.views],
    )
    warnings = "\n".join(f"- {warning}" for warning in report.warnings)
    sheet = _picture("input views", store().read(report, CONTACT_SHEET))
    create_markdown_artifact(
        key=artifact_key("views", name),
        description=f"Input views of {name}",
        markdown=f"# {name}: input views\n\n{sheet}\n\n{warnings}",
    )


def show_report(report: Report, folder: str, url: str | None, previews: bytes) -> None:
    """Artifacts of the flow run: the report with previews and checks, and a link to the GLB where one works."""
    name = report.capture.id
    create_markdown_artifact(
        key=artifact_key("report", name),
        description=f"{name}: {report.status}",
        markdown=markdown_of(report, folder, url, previews),
    )
    if url is not None:
        create_link_artifact(
            key=artifact_key("mesh", name), link=f"{url}/mesh.glb", link_text=f"{name}: mesh.glb", description="GLB"
        )


def markdown_of(report: Report, folder: str, url: str | None, previews: bytes) -> str:
    """The report as a page for people."""
    mesh = report.mesh
    extent = " x ".join(f"{length:.3f}" for length in mesh.extent_m)
    seen = "" if mesh.texture_coverage is None else f" ({mesh.texture_coverage:.0%} seen by a view)"
    unit = "m" if mesh.metric else "(not metric)"
    names = {file.path: f"[{file.path}]({url}/{file.path})" if url else f"`{file.path}`" for file in report.outputs}
    files = "\n".join(f"| {names[file.path]} | {file.bytes:,} | `{file.sha256[:12]}` |" for file in report.outputs)
    checks = "\n".join(
        f"| {'passed' if check.passed else '**FAILED**'} | {check.name} | {_cell(check.value)} | {_cell(check.limit)} |"
        for check in report.checks
    )
    stages = "\n".join(
        f"| {stage.name} | {stage.seconds:.2f} | {'cached' if stage.cached else 'ran'} |" for stage in report.stages
    )
    return f"""# {report.capture.id}: {report.status}

{_picture("the mesh from several sides", previews)}

{mesh.vertices:,} vertices, {mesh.faces:,} faces, {mesh.components} component(s), {extent} {unit}, \
{"watertight" if mesh.watertight else "not watertight"}, texture {mesh.texture_px} px{seen}.
Exported by {mesh.exporter}, decimated by {mesh.decimated_by}.
 Engine: {report.engine.name} {report.engine.version} \
({report.engine.reason}), {report.capture.views_used} of {report.capture.views} views.

| verdict | check | value | limit |
|---|---|---|---|
{checks}

| published in `{folder}` | bytes | sha256 |
|---|---|---|
{files}

| stage | seconds | |
|---|---|---|
{stages}
"""


def public_url(folder: str, output: str) -> str | None:
    """Where readers find a published folder: the public URL and the key in the bucket, or the path below `output`."""
    base = settings().public_url.rstrip("/")
    if not base:
        return None
    published, root = Location.of(folder), Location.of(output)
    key = published.path.removeprefix(f"{root.path}/") if root.local else published.path.partition("/")[2]
    return f"{base}/{quote(key)}"


def artifact_key(kind: str, name: str) -> str:
    """A key as Prefect allows them: lowercase letters, digits and dashes."""
    return f"{kind}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}".rstrip("-")


def _picture(title: str, jpeg: bytes) -> str:
    return f"![{title}](data:image/jpeg;base64,{base64.b64encode(jpeg).decode()})"


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): _cell(value) for name, value in values.items()}


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, (tuple, list)):
        return " - ".join(str(_cell(item)) for item in value)
    return "" if value is None else value
