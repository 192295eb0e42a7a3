"""The dataset report: rows, page and totals, published beside the assets.

The flow `reconstruct-dataset` publishes it.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from tasks.artifacts import public_url, show_dataset
from tasks.dataset.page import Totals, embeddable, page
from tasks.dataset.plan import Plan, Planned
from tasks.dataset.rows import Row, csv, jsonl
from tasks.errors import StorageUnavailable
from tasks.inference.registry import ENGINES
from tasks.progress import in_flow
from tasks.report import Report
from tasks.stage import retried, step
from tasks.store.location import Location, parsed_or_none

PUBLISH_RETRIES = 3
_PARALLEL_READS = 32


class DatasetReport(BaseModel):
    """The result of a run over a dataset."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    """Folder or URL above the captures, or of their list."""
    counts: dict[str, int]
    """The number of captures in each state."""
    reconstructed: int
    """The number of captures that this run reconstructed; the others were published before, or failed."""
    url: str
    """Folder or URL of the report: index.html, report.jsonl, report.csv."""

    @property
    def whole(self) -> bool:
        """True if every capture has a usable mesh."""
        return not self.counts.keys() - {"normal", "warning"}


@step(**retried(PUBLISH_RETRIES, StorageUnavailable))
def publish_dataset_report(before: Plan, after: Plan, output: str, seconds: float) -> DatasetReport:
    """Write index.html, report.jsonl and report.csv to `<output>/_dataset-<name>/`.

    before, after: the plans before and after the run. seconds: wall time of the run.
    """
    name = Location.of(before.dataset).name
    done = {planned.id for planned in before.pending}
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        rows = list(pool.map(lambda planned: _row(planned, output, planned.id in done), after.captures))
    reconstructed = sum(row.id in done and row.report is not None for row in rows)
    totals = Totals(finished_at=datetime.now(UTC), seconds=seconds, reconstructed=reconstructed)
    meshes = _meshes(rows, output) if Location.of(output).local and embeddable(rows) else None
    folder = Location.of(output) / f"_dataset-{name}"
    (folder / "report.jsonl").write(jsonl(rows))
    (folder / "report.csv").write(csv(rows))
    (folder / "index.html").write(page(name, rows, totals, meshes))
    states = [row.state for row in rows]
    counts: dict[str, int] = {state: states.count(state) for state in sorted(set(states))}
    report = DatasetReport(dataset=before.dataset, counts=counts, reconstructed=reconstructed, url=folder.url)
    if in_flow():
        wrong = [(row.id, row.state, row.reason) for row in rows if row.state in ("failed", "failure", "invalid")]
        show_dataset(name, counts, reconstructed, wrong, folder.url, public_url(folder.url, output))
    return report


def _row(planned: Planned, output: str, done: bool) -> Row:
    """The row of a capture as it stands after the run; done: the run had something to do for it."""
    known = {"id": planned.id, "uri": planned.upload.uri}
    if planned.state == "invalid":
        return Row(**known, state="invalid", reason=planned.reason)
    failure = None if planned.state == "published" else planned.upload.failure()
    folder = planned.folder or (failure.folder if failure else "")
    report = _report(output, folder) if folder else None
    if report is None:
        state, reason = ("failed", failure.reason) if failure else ("pending", planned.reason)
        return Row(**known, state=state, reason=reason)
    ran = [stage for stage in report.stages if not stage.cached] if done else []
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
    """The report of a published asset; None if it is gone or cannot be read."""
    return parsed_or_none(Report, (Location.of(output) / folder / "report.json").read_or_none())


def _meshes(rows: Collection[Row], output: str) -> dict[str, bytes]:
    """The published GLB files, by capture id."""
    return {row.id: (Location.of(output) / row.folder / "mesh.glb").read() for row in rows if row.folder}
