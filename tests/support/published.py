"""Results of runs that never ran: rows of a dataset report, and the published folders that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from tasks.dataset.rows import Row
from tasks.errors import CaptureRefused, Problem
from tasks.mesh.publish import Latest
from tasks.report import CaptureSummary, Check, EngineSummary, MeshSummary, Report, status_of
from tasks.store.location import FileEntry, Location
from tests.support.tiny import encoded

FACES = 320
PREVIEW = "previews/preview_000.png"


def report(name: str, failed: Sequence[str] = (), **changes: Any) -> Report:
    """A report with these checks failed."""
    checks = tuple(Check(name=check, passed=check not in failed, value=0, limit=0) for check in ("watertight", "views"))
    mesh = MeshSummary(
        vertices=162,
        faces=FACES,
        glb_bytes=5000,
        watertight=True,
        components=1,
        degenerate_faces=0,
        exporter="native",
        decimated_by="",
        texture_px=0,
        texture_coverage=None,
        extent_m=(1, 1, 1),
        metric=True,
    )
    made = Report(
        capture=CaptureSummary(id=name, uri=f"s3://c/{name}", digest="", views=8, views_used=8, has_cameras=True),
        engine=EngineSummary(name="fusion", version="1", reason="", parameters={}),
        mesh=mesh,
        status=status_of(checks),
        checks=checks,
        stages=(),
        outputs=tuple(FileEntry(path=path, bytes=1, sha256="") for path in ("mesh.glb", PREVIEW)),
    )
    return made.model_copy(update=changes)


def published_row(name: str, failed: Sequence[str] = (), **changes: Any) -> Row:
    """A capture that was reconstructed; `changes` of the row."""
    made = report(name, failed)
    facts = {"state": made.status, "seconds": 10.0, "gpu_seconds": 4.5, "report": made, "folder": f"{name}/ab12"}
    return Row(**{"id": name, "uri": f"s3://c/{name}"} | facts | changes)


def refused_row(name: str, views: int) -> Row:
    """A capture without cameras, and without the depth maps of so many views."""
    problems = [
        Problem(where=f"views/v{view}.png", what="has no depth map", todo=f"add depth/v{view}.png")
        for view in range(views)
    ]
    problems.append(Problem(where="transforms.json", what="is missing", todo="add it"))
    uri = f"s3://c/{name}"
    return Row(id=name, uri=uri, state="invalid", reason=str(CaptureRefused(uri, problems)))


def failed_row(name: str, reason: str) -> Row:
    return Row(id=name, uri=f"s3://c/{name}", state="failed", reason=reason, seconds=600, gpu_seconds=599)


def mark_published(output: str, capture: str, upload_key: str) -> None:
    """Write what a run that published a capture leaves: the marker, and the pointer to it."""
    latest = Latest(run_key="0123456789abcdef", upload_key=upload_key, uploaded_at=datetime.now(UTC), report="")
    folder = Location.of(output) / capture
    (folder / latest.run_key / "_SUCCESS").write(b"")
    (folder / "latest.json").write(latest.model_dump_json().encode())


def publish_files(output: Path, row: Row) -> bytes:
    """Write a mesh and a preview to where a row says they are; gives the GLB."""
    folder = output / row.folder
    (folder / PREVIEW).parent.mkdir(parents=True)
    glb: bytes = trimesh.creation.icosphere(subdivisions=2).export(file_type="glb")
    (folder / "mesh.glb").write_bytes(glb)
    (folder / PREVIEW).write_bytes(encoded(np.full((40, 40, 3), 90, np.uint8)))
    return glb
