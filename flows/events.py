"""Events that say how an upload ended, for other automations: notices, clean-up, later processing.

The flow `reconstruct` emits them for its capture, a batch for each of its captures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prefect.events import emit_event

from tasks.dataset.upload import Upload
from tasks.errors import CaptureRefused, CaptureReplaced, MeshRejected
from tasks.mesh.publish import Published

OutcomeName = Literal["reconstructed", "rejected", "failed"]


def emit_outcome(upload: Upload, outcome: OutcomeName, report: str = "", reason: str = "") -> None:
    """Emit `capture.<outcome>`. report: URL of report.json, empty if none was published."""
    emit_event(
        f"capture.{outcome}",
        resource={"prefect.resource.id": f"capture2mesh.capture.{upload.id}", "prefect.resource.name": upload.id},
        payload={"capture": upload.uri, "id": upload.id, "report": report, "reason": reason},
    )


def emit_published(upload: Upload, published: Published) -> None:
    """Emit that a capture is reconstructed."""
    emit_outcome(upload, "reconstructed", report=f"{published.url}/report.json")


@contextmanager
def failure_emitted(upload: Upload) -> Iterator[None]:
    """Within the block a capture is worked on: an error is emitted as rejected or failed."""
    try:
        yield
    except CaptureReplaced:  # only the end of the newer upload is of interest
        raise
    except Exception as error:
        report = f"{error.published.url}/report.json" if isinstance(error, MeshRejected) else ""
        outcome: OutcomeName = "rejected" if isinstance(error, (CaptureRefused, MeshRejected)) else "failed"
        emit_outcome(upload, outcome, report, str(error))
        raise
