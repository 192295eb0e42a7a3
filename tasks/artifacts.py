"""Artifacts of a run in the Prefect UI: the views of a capture, the report with its pictures, the mesh.

Called by the flows, and by tasks/dataset for the keys and links of its own artifacts.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.cameras.find_cameras import PICTURE, CaptureCameras
from tasks.capture.capture_checks import CaptureReport
from tasks.capture.contact_sheet import CONTACT_SHEET
from tasks.errors import grouped
from tasks.report import Report
from tasks.settings import settings
from tasks.store.location import Location
from tasks.store.results import store

SHOWN_ROWS = 200  # of a dataset; they lie in Prefect's database


def show_capture(name: str, report: CaptureReport) -> None:
    """Show a table with one row for each view, and the contact sheet, in the current flow run."""
    create_table_artifact(
        key=artifact_key("capture", name),
        description=f"Views of **{name}**: {len(report.views)}, warnings: {len(report.warnings)}",
        table=[_row(view.model_dump()) for view in report.views],
    )
    warnings = "\n".join(f"- {warning}" for warning in grouped(report.warnings))
    sheet = _picture("input views", store().read(report, CONTACT_SHEET))
    create_markdown_artifact(
        key=artifact_key("views", name),
        description=f"Input views of {name}",
        markdown=f"# {name}: input views\n\n{sheet}\n\n{warnings}",
    )


def show_cameras(name: str, cameras: CaptureCameras) -> None:
    """Show a picture of the cameras around what they see, in the current flow run; nothing without cameras."""
    if not cameras.views:
        return
    left_out = "".join(f"\n- {view.name} is left out: {view.reason}" for view in cameras.left_out)
    warnings = "".join(f"\n- {warning}" for warning in grouped(cameras.warnings))
    moved = f", moved by up to {cameras.correction_deg:.2f} degrees and {cameras.correction_m * 1000:.1f} mm"
    create_markdown_artifact(
        key=artifact_key("cameras", name),
        description=f"Cameras of {name}: {cameras.source}",
        markdown=f"# {name}: cameras\n\n{_picture('from above, and from the side', store().read(cameras, PICTURE))}\n\n"
        f"{len(cameras.views)} cameras, {cameras.source}{moved if cameras.source == 'refined' else ''}."
        f"\n{left_out}{warnings}",
    )


def show_report(report: Report, folder: str, url: str | None, previews: bytes) -> None:
    """Show the report with previews and checks in the current flow run, and a link to the GLB if there is a URL.

    previews: a JPEG.
    """
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


def show_plan(dataset: str, counts: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """An artifact of the flow run: a table of a dataset's captures that are not published, `rows`."""
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    shown = f"; the first {SHOWN_ROWS}" if len(rows) > SHOWN_ROWS else ""
    create_table_artifact(
        key=artifact_key("plan", Location.of(dataset).name),
        description=f"Plan of **{dataset}**: {states}{shown}",
        table=[dict(row) for row in rows[:SHOWN_ROWS]],
    )


def show_dataset(
    name: str,
    counts: Mapping[str, int],
    reconstructed: int,
    wrong: Sequence[tuple[str, str, str]],
    folder: str,
    url: str | None,
) -> None:
    """Artifacts of the flow run: the counts and what went wrong, and a link to the dataset's page if it has a URL.

    wrong: id, state and reason of the captures that went wrong. folder, url: of the dataset report.
    """
    states = "\n".join(f"| {state} | {count:,} |" for state, count in counts.items())
    reasons = "\n".join(
        f"- **{capture_id}** ({state}): {reason.partition(chr(10))[0]}"
        for capture_id, state, reason in wrong[:SHOWN_ROWS]
    )
    create_markdown_artifact(
        key=artifact_key("dataset", name),
        description=f"{name}: {reconstructed} reconstructed",
        markdown=f"""# {name}

| state | captures |
|---|---|
{states}

{reasons}

Report: `{folder}/index.html`
""",
    )
    if url is not None:
        link = f"{url}/index.html"
        create_link_artifact(key=artifact_key("gallery", name), link=link, link_text=f"{name}: gallery and table")


def markdown_of(report: Report, folder: str, url: str | None, previews: bytes) -> str:
    """Write the report as a Markdown page."""
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
    subject = [f"Subject: {report.subject}"] if report.subject else []
    told = "".join(f"\n- {line}" for line in [*subject, *report.warnings]) + "\n"
    return f"""# {report.capture.id}: {report.status}

{_picture("the mesh from several sides", previews)}

{mesh.vertices:,} vertices, {mesh.faces:,} faces, {mesh.components} component(s), {extent} {unit}, \
{"watertight" if mesh.watertight else "not watertight"}, texture {mesh.texture_px} px{seen}.
Exported by {mesh.exporter}, decimated by {mesh.decimated_by}.
Engine: {report.engine.name} {report.engine.version} \
({report.engine.reason}), {report.capture.views_used} of {report.capture.views} views.
{told}
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
    """The URL of a published folder for readers; None without CAPTURE2MESH_PUBLIC_URL.

    It is the public URL, and the key in the bucket or the path below a local `output`.
    """
    base = settings().public_url.rstrip("/")
    if not base:
        return None
    published, root = Location.of(folder), Location.of(output)
    key = published.path.removeprefix(f"{root.path}/") if root.local else published.path.partition("/")[2]
    return f"{base}/{quote(key)}"


def artifact_key(kind: str, name: str) -> str:
    """Make an artifact's key as Prefect allows it: lowercase letters, digits and dashes."""
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
