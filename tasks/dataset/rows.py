"""What a run over a dataset knows of each capture: the rows of the report, as JSON lines and as CSV."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from csv import DictWriter
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.report import Report

State = Literal["normal", "warning", "failure", "failed", "invalid", "pending"]

# a spreadsheet takes a cell that begins so for a formula (OWASP: CSV injection)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# how CaptureRefused lists its problems
_PROBLEM = "  - "
# paths, numbers, keys: what makes two messages of one kind differ
_VARIABLE = re.compile(r"[^\s:;,()]*[/\d][^\s:;,()]*")
_ANYTHING = "…"


class Row(BaseModel):
    """One capture of a dataset.

    reason: why it is failed or invalid. seconds, gpu_seconds: spent on it, None where nothing was done in this run.
    folder: path of the published folder below the output (`mug/ab12cd34`), empty where nothing is published.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    uri: str
    state: State
    reason: str = ""
    seconds: float | None = None
    gpu_seconds: float | None = None
    report: Report | None = None
    folder: str = ""


class Record(BaseModel):
    """A row of report.jsonl and report.csv; the whole report lies at `<output>/<folder>/report.json`."""

    id: str
    uri: str
    state: State
    reason: str
    failed_checks: tuple[str, ...] = ()
    engine: str | None = None
    vertices: int | None = None
    faces: int | None = None
    psnr_db: float | None = None
    seconds: float | None
    gpu_seconds: float | None
    folder: str

    @staticmethod
    def of(row: Row) -> Record:
        report = row.report
        record = Record.model_validate(row.model_dump(exclude={"report"}))
        if report is None:
            return record
        return record.model_copy(
            update={
                "failed_checks": tuple(check.name for check in report.checks if not check.passed),
                "engine": report.engine.name,
                "vertices": report.mesh.vertices,
                "faces": report.mesh.faces,
                "psnr_db": (report.fidelity or {}).get("psnr_db"),
            }
        )


def jsonl(rows: Sequence[Row]) -> bytes:
    """report.jsonl: one record a line."""
    return "".join(f"{Record.of(row).model_dump_json()}\n" for row in rows).encode()


def csv(rows: Sequence[Row]) -> bytes:
    """report.csv: the same for spreadsheets. Text that one would take for a formula gets an apostrophe in front."""
    stream = io.StringIO()
    writer = DictWriter(stream, Record.model_fields)
    writer.writeheader()
    for row in rows:
        record = Record.of(row)
        cells = record.model_dump() | {"failed_checks": " ".join(record.failed_checks)}
        writer.writerow({name: _inert(value) if isinstance(value, str) else value for name, value in cells.items()})
    return stream.getvalue().encode()


def reasons(row: Row) -> tuple[str, ...]:
    """What is wrong with a capture, each thing once, in words that other captures share: for grouping."""
    if row.reason:
        listed = [line.removeprefix(_PROBLEM) for line in row.reason.splitlines() if line.startswith(_PROBLEM)]
        texts = [_general(text, row) for text in listed or [row.reason]]
    else:
        texts = [f"check failed: {name}" for name in Record.of(row).failed_checks]
    return tuple(dict.fromkeys(texts))


def _general(text: str, row: Row) -> str:
    for name in (row.uri, row.id):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _ANYTHING, text)
    return _VARIABLE.sub(_ANYTHING, text).removeprefix(f"{_ANYTHING}: ").strip()


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
