"""The page of a dataset report: one HTML file that needs nothing but the published folders beside it.

The dataset report writes it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from urllib.parse import quote

from pydantic import BaseModel

from tasks.dataset.rows import Record, Row, RowState, reasons
from tasks.store.location import MEBIBYTE

# the page is published in a folder of the output, beside the captures' own
TO_OUTPUT = "../"
# a page that is opened from the disk cannot read other files: meshes up to this size in total are put into it
EMBED_BYTES = 64 * MEBIBYTE
# report.jsonl has the whole texts; a refused capture can have hundreds of problems
REASON_CHARACTERS = 600
SHOWN_REASONS = 50


class Totals(BaseModel):
    """The run as a whole."""

    finished_at: datetime
    """When the run ended."""
    seconds: float
    """Wall time of the run."""
    reconstructed: int
    """Number of captures that the run reconstructed; the others were published before, or failed."""


class _Reason(BaseModel):
    """A reason that captures share, and how many have it."""

    state: RowState
    text: str
    captures: int


class _Entry(BaseModel):
    """A capture as page.js reads it; URLs are relative to the page, `reasons` are indices of `_Data.reasons`."""

    id: str
    state: RowState
    reason: str
    engine: str | None
    faces: int | None
    psnr_db: float | None
    seconds: float | None
    gpu_seconds: float | None
    folder: str | None
    preview: str | None
    reasons: list[int]


class _Data(BaseModel):
    """The data of the page."""

    rows: list[_Entry]
    reasons: list[_Reason]


def embeddable(rows: Sequence[Row]) -> bool:
    """True if all meshes together are small enough to be put into the page."""
    return sum(row.report.mesh.glb_bytes for row in rows if row.report) <= EMBED_BYTES


def page(title: str, rows: Sequence[Row], totals: Totals, meshes: Mapping[str, bytes] | None = None) -> bytes:
    """The page as HTML, to be written to `<output>/<any folder>/index.html`.

    meshes: GLB files by capture id. They are embedded, so that the viewer works in a page that is opened from the disk.
    Without them the viewer loads the published files, which browsers allow over http only.
    """
    script = _source("page.js")
    data = _data(rows)
    number = {row.id: index for index, row in enumerate(rows)}
    parts = {
        "policy": _policy(script),
        "title": html.escape(title),
        "style": _source("page.css"),
        "finished_at": f"{totals.finished_at:%Y-%m-%d %H:%M %Z}".strip(),
        "totals": "".join(
            f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _totals(rows, totals).items()
        ),
        "data": _inert_json(data.model_dump_json()),
        "script": script,
        "viewer": _inert_json(json.dumps(_source("model-viewer.min.js"))),
        "licences": html.escape(_source("model-viewer.LICENSES")),
        "meshes": "".join(
            f'<script type="text/plain" id="mesh-{number[name]}">{base64.b64encode(mesh).decode()}</script>\n'
            for name, mesh in (meshes or {}).items()
        ),
    }
    return re.sub(r"{{(\w+)}}", lambda place: parts[place[1]], _source("page.html")).encode()


def _totals(rows: Sequence[Row], totals: Totals) -> dict[str, str]:
    gpu = sum(row.gpu_seconds or 0 for row in rows)
    per_hour = totals.reconstructed / totals.seconds * 3600 if totals.seconds else 0
    return {
        "captures": f"{len(rows):,}",
        "published": f"{sum(bool(row.folder) for row in rows):,}",
        "reconstructed in this run": f"{totals.reconstructed:,}",
        "captures per hour": f"{per_hour:,.0f}" if totals.reconstructed else "-",
        "wall time": _duration(totals.seconds),
        "GPU seconds": f"{gpu:,.1f}",
        "GPU seconds per capture": f"{gpu / totals.reconstructed:,.2f}" if totals.reconstructed else "-",
    }


def _data(rows: Sequence[Row]) -> _Data:
    """The data of the page. Only the most frequent reasons are listed; the table finds the others as well."""
    by_row = [[(row.state, text) for text in reasons(row)] for row in rows]
    counts = Counter(reason for found in by_row for reason in found).most_common(SHOWN_REASONS)
    place = {reason: index for index, (reason, _) in enumerate(counts)}
    return _Data(
        rows=[
            _entry(row, [place[reason] for reason in found if reason in place])
            for row, found in zip(rows, by_row, strict=True)
        ],
        reasons=[
            _Reason(state=state, text=text[:REASON_CHARACTERS], captures=count) for (state, text), count in counts
        ],
    )


def _entry(row: Row, places: list[int]) -> _Entry:
    record = Record.of(row)
    outputs = row.report.outputs if row.report else ()
    preview = next((output.path for output in outputs if output.path.startswith("previews/")), None)
    checks = f"failed checks: {', '.join(record.failed_checks)}" if record.failed_checks else ""
    return _Entry(
        **record.model_dump(include={"id", "state", "engine", "faces", "psnr_db", "seconds", "gpu_seconds"}),
        reason=(record.reason or checks)[:REASON_CHARACTERS],
        folder=f"{TO_OUTPUT}{quote(row.folder.strip('/'))}/" if row.folder else None,
        preview=quote(preview) if preview else None,
        reasons=places,
    )


def _policy(script: str) -> str:
    """Content security policy: only this page's script and the viewer run, nothing is loaded from another host.

    unsafe-eval lets the viewer compile its WebAssembly, and browser tests wait for conditions; markup cannot use it.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}' 'unsafe-eval' blob:; style-src 'unsafe-inline'; "
        "img-src 'self' file: data: blob:; connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'"
    )


def _inert_json(text: str) -> str:
    """JSON that is safe in a script element: it cannot contain `</script>` or `<!--`."""
    return text.replace("<", r"\u003c")


def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
