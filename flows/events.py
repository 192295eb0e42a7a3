"""Events that tell how a capture ended, for other automations: notices, clean-up, whatever comes after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prefect.events import emit_event

from tasks.errors import CaptureRefused, CaptureReplaced, MeshRejected
from tasks.mesh.publish import Published

OutcomeName = Literal["reconstructed", "rejected", "failed"]


def emit_outcome(capture: str, uri: str, outcome: OutcomeName, report: str = "", reason: str = "") -> None:
    """Emit `capture.<outcome>`. report: URL of report.json, where one was published."""
    emit_event(
        f"capture.{outcome}",
        resource={"prefect.resource.id": f"capture2mesh.capture.{capture}", "prefect.resource.name": capture},
        payload={"capture": uri, "id": capture, "report": report, "reason": reason},
    )


def emit_published(capture: str, uri: str, published: Published) -> None:
    """Emit that a capture is reconstructed."""
    emit_outcome(capture, uri, "reconstructed", report=f"{published.url}/report.json")


@contextmanager
def failure_emitted(capture: str, uri: str) -> Iterator[None]:
    """Within the block a capture is worked on: what it raises is emitted as rejected or failed."""
    try:
        yield
    except CaptureReplaced:  # how that upload ends is what there will be to tell
        raise
    except Exception as error:
        report = f"{error.published.url}/report.json" if isinstance(error, MeshRejected) else ""
        outcome: OutcomeName = "rejected" if isinstance(error, (CaptureRefused, MeshRejected)) else "failed"
        emit_outcome(capture, uri, outcome, report, str(error))
        raise
