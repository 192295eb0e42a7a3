"""Many captures uploaded at once to a stack that watches: each is reconstructed exactly once, by a few batches.

The `trellis` engine on its stand-in does the work, so that what is uploaded goes through `batch/cuda`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gpu_machine import views_only
from tests.support.running import wait_for
from tests.support.watching_stack import batches, done, inferences, published, upload, watching

pytestmark = pytest.mark.faults

UPLOADS = 16
SECONDS_EACH = 20
"""At most, on a busy machine."""


def test_each_is_reconstructed_once(tmp_path: Path, capture: Callable[[str], Path]) -> None:
    views = views_only(capture("ball")) / "views"
    names = [f"upload {number:02}" for number in range(UPLOADS)]
    with watching(tmp_path) as stack:
        upload(stack, views, names)
        wait_for("all captures", lambda: done(stack, names), UPLOADS * SECONDS_EACH, pause=2)
        assert published(stack) == Counter([*names, "mug"])  # the stack's own sample lies there as well
        assert inferences(tmp_path) == UPLOADS + 1
        assert {run["state_name"] for run in batches(stack)} == {"Completed"}
        assert len(batches(stack)) < UPLOADS / 2
        assert stack.ask("POST", "/flow_runs/count", flows={"name": {"any_": ["reconstruct", "infer"]}}) == 0
