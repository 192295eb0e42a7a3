"""The dataset report is published beside the assets, and the Prefect UI links to it."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import BaseModel, ConfigDict

from tasks.artifacts import artifact_key, public_url
from tasks.dataset.page import Totals, embeddable, page
from tasks.dataset.plan import Plan, Planned
from tasks.dataset.rows import Row, csv, jsonl
from tasks.errors import StorageUnavailable
from tasks.inference.registry import ENGINES
from tasks.progress import in_flow
from tasks.report import Report
from tasks.stage import retried, step
from tasks.store.claims import failure_of
from tasks.store.location import Location, parsed_or_none

PUBLISH_RETRIES = 3
SHOWN_ROWS = 200
_PARALLEL_READS = 32


class DatasetReport(BaseModel):
    """What a run over a dataset came to: captures by state, and the URL of the report's folder."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    counts: dict[str, int]
    reconstructed: int
    url: str

    @property
    def whole(self) -> bool:
        """Whether every capture has a usable mesh."""
        return not self.counts.keys() - {"normal", "warning"}


def show_plan(planned: Plan, name: str) -> None:
    """A table of the run: what is to be done, and what cannot be."""
    if not in_flow():
        return
    counts = ", ".join(f"{count} {state}" for state, count in planned.counts().items())
    told = [each for each in planned.captures if each.state != "published"]
    shown = f"; the first {SHOWN_ROWS}" if len(told) > SHOWN_ROWS else ""
    create_table_artifact(
        key=artifact_key("plan", name),
        description=f"Plan of **{planned.dataset}**: {counts}{shown}",
        table=[each.model_dump(include={"id", "state", "reason", "attempts"}) for each in told[:SHOWN_ROWS]],
    )


@step(**retried(PUBLISH_RETRIES, StorageUnavailable))
def publish_dataset_report(before: Plan, after: Plan, output: str, seconds: float) -> DatasetReport:
    """Write index.html, report.jsonl and report.csv to `<output>/_dataset-<name>/`."""
    name = Location.of(before.dataset).name
    done = {each.id for each in before.pending}
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        rows = list(pool.map(lambda each: _row(each, output, done), after.captures))
    reconstructed = sum(row.id in done and row.report is not None for row in rows)
    totals = Totals(finished_at=datetime.now(UTC), seconds=seconds, reconstructed=reconstructed)
    meshes = _meshes(rows, output) if Location.of(output).local and embeddable(rows) else None
    folder = Location.of(output) / f"_dataset-{name}"
    (folder / "report.jsonl").write(jsonl(rows))
    (folder / "report.csv").write(csv(rows))
    (folder / "index.html").write(page(name, rows, totals, meshes))
    states = [row.state for row in rows]
    counts = {state: states.count(state) for state in sorted(set(states))}
    report = DatasetReport(dataset=before.dataset, counts=counts, reconstructed=reconstructed, url=folder.url)
    if in_flow():
        _show(report, name, rows, public_url(folder.url, output))
    return report


def _row(capture: Planned, output: str, done: Collection[str]) -> Row:
    """A capture as it stands after the run."""
    known = {"id": capture.id, "uri": capture.uri}
    if capture.state == "invalid":
        return Row(**known, state="invalid", reason=capture.reason)
    failure = None if capture.state == "published" else failure_of(output, capture.upload_key)
    folder = capture.folder or (failure.folder if failure else "")
    report = _report(output, folder) if folder else None
    if report is None:
        state, reason = ("failed", failure.reason) if failure else ("pending", capture.reason)
        return Row(**known, state=state, reason=reason)
    ran = [stage for stage in report.stages if not stage.cached] if capture.id in done else []
    on_gpu = ENGINES[report.engine.name].shares_model
    return Row(
        **known,
        state=report.status,
        seconds=round(sum(stage.seconds for stage in ran), 3) if ran else None,
        gpu_seconds=round(sum(stage.seconds for stage in ran if stage.name == "infer"), 3) if ran and on_gpu else None,
        report=report,
        folder=folder,
    )


def _report(output: str, folder: str) -> Report | None:
    return parsed_or_none(Report, (Location.of(output) / folder / "report.json").read_or_none())


def _meshes(rows: Collection[Row], output: str) -> dict[str, bytes]:
    return {row.id: (Location.of(output) / row.folder / "mesh.glb").read() for row in rows if row.folder}


def _show(report: DatasetReport, name: str, rows: Collection[Row], url: str | None) -> None:
    """Artifacts of the flow run: the counts and what went wrong, and a link to the page where one works."""
    counts = "\n".join(f"| {state} | {count:,} |" for state, count in report.counts.items())
    wrong = [row for row in rows if row.state in ("failed", "failure", "invalid")][:SHOWN_ROWS]
    reasons = "\n".join(f"- **{row.id}** ({row.state}): {row.reason.partition(chr(10))[0]}" for row in wrong)
    create_markdown_artifact(
        key=artifact_key("dataset", name),
        description=f"{name}: {report.reconstructed} reconstructed",
        markdown=f"""# {name}

| state | captures |
|---|---|
{counts}

{reasons}

Report: `{report.url}/index.html`
""",
    )
    if url is not None:
        link = f"{url}/index.html"
        create_link_artifact(key=artifact_key("gallery", name), link=link, link_text=f"{name}: gallery and table")
