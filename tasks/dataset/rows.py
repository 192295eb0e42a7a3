"""The rows of a dataset report, one for each capture, written as JSON lines and as CSV.

The dataset report makes them, its page shows them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from csv import DictWriter
from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.report import Report

RowState = Literal["normal", "warning", "failure", "failed", "invalid", "pending"]
"""How a capture stands after a run.

normal, warning, failure: the status of its published asset. failed: it could not be reconstructed. invalid: it cannot
be reconstructed as it is. pending: nothing has been done yet.
"""

# a spreadsheet reads a cell that begins with one of these as a formula (OWASP: CSV injection)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# how CaptureRefused lists its problems
_PROBLEM = "  - "
# paths, numbers, keys: the parts in which two messages of one kind differ
_VARIABLE = re.compile(r"[^\s:;,()]*[/\d][^\s:;,()]*")
_ANYTHING = "…"
# how problems of one kind are listed in one line
_SEVERAL = re.compile(r"\d+ files \(.*?\): ")


class Row(BaseModel):
    """A capture of a dataset, as it stands after a run."""

    model_config = ConfigDict(frozen=True)

    id: str
    """The capture's id."""
    uri: str
    """Folder or URL of the capture."""
    state: RowState
    reason: str = ""
    """Why it is failed, invalid or pending."""
    seconds: float | None = None
    """Time that this run spent on it; None if it did nothing for it."""
    gpu_seconds: float | None = None
    """The part of `seconds` in which the GPU was used; None if it was not."""
    report: Report | None = None
    """The report of its asset; None if nothing is published."""
    folder: str = ""
    """Path of the published folder below the output (`mug/ab12cd34`); empty if nothing is published."""


class Record(BaseModel):
    """A line of report.jsonl and report.csv; the whole report lies at `<output>/<folder>/report.json`."""

    id: str
    """The capture's id."""
    uri: str
    """Folder or URL of the capture."""
    state: RowState
    reason: str
    """Why it is failed, invalid or pending; else empty."""
    failed_checks: tuple[str, ...] = ()
    """Names of the checks that its mesh has not passed."""
    engine: str | None = None
    """Name of the engine."""
    vertices: int | None = None
    """Number of vertices of the mesh."""
    faces: int | None = None
    """Number of triangles of the mesh."""
    psnr_db: float | None = None
    """Likeness of renders to the views, in dB; None if it was not measured."""
    seconds: float | None
    """Time that the run spent on it; None if it did nothing for it."""
    gpu_seconds: float | None
    """The part of `seconds` in which the GPU was used; None if it was not."""
    folder: str
    """Path of the published folder below the output; empty if nothing is published."""

    @staticmethod
    def of(row: Row) -> Record:
        """The record of a row."""
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
    """The content of report.jsonl: one record on each line, UTF-8."""
    return "".join(f"{Record.of(row).model_dump_json()}\n" for row in rows).encode()


def csv(rows: Sequence[Row]) -> bytes:
    """The content of report.csv, for spreadsheets, UTF-8. Text like a formula gets an apostrophe in front."""
    stream = io.StringIO()
    writer = DictWriter(stream, Record.model_fields)
    writer.writeheader()
    for row in rows:
        record = Record.of(row)
        cells = record.model_dump() | {"failed_checks": " ".join(record.failed_checks)}
        writer.writerow({name: _inert(value) if isinstance(value, str) else value for name, value in cells.items()})
    return stream.getvalue().encode()


def reasons(row: Row) -> tuple[str, ...]:
    """The reasons why a capture is not normal, each once, without its own paths and numbers: captures share them."""
    if row.reason:
        listed = [
            _SEVERAL.sub("", line.removeprefix(_PROBLEM), count=1)
            for line in row.reason.splitlines()
            if line.startswith(_PROBLEM)
        ]
        texts = [_general(text, row) for text in listed or [row.reason]]
    else:
        texts = [f"check failed: {name}" for name in Record.of(row).failed_checks]
    return tuple(dict.fromkeys(texts))


def _general(text: str, row: Row) -> str:
    """A message without paths, numbers and keys."""
    for name in (row.uri, row.id):
        if name:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", _ANYTHING, text)
    return _VARIABLE.sub(_ANYTHING, text).removeprefix(f"{_ANYTHING}: ").strip()


def _inert(text: str) -> str:
    """Text that no spreadsheet reads as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
