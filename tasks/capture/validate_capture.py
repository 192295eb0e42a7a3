"""The stage validate_capture, run by flows.reconstruct: checks a capture and makes a picture of its views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.capture.capture_checks import RULES_VERSION, CaptureReport, Needs, examine
from tasks.capture.contact_sheet import CONTACT_SHEET, contact_sheet
from tasks.capture.stage_capture import Capture
from tasks.errors import Problem
from tasks.stage import stage


def _validation_key(capture: Capture, needs: Needs) -> Any:
    return [capture.digest, capture.manifest, capture.others, capture.links_outside, needs]


@stage(key=_validation_key, version=RULES_VERSION)
def validate_capture(folder: Path, capture: Capture, needs: Needs) -> CaptureReport:
    """Refuse a capture that lacks what the engine needs, with all problems; picture the views of a good one.

    Raises CaptureRefused. Each file is read and decoded once.
    """
    links = [
        Problem(where=path, what="is a link that leaves the capture folder", todo="put the file itself there")
        for path in capture.links_outside
    ]
    report, thumbnails = examine(
        capture.uri, capture.files, capture.read, needs, capture.manifest, capture.others, links, capture.part
    )
    (folder / CONTACT_SHEET).write_bytes(contact_sheet(thumbnails))
    return report
