"""Uploads that become meshes by themselves: `python tests/benchmarks/uploads.py latency|many [COUNT]`.

latency: from the last file of an upload, its marker, to its run in state Running, one upload at a time; on the stack
that runs (`make stack`, whose ports and folder are those of CAPTURE2MESH_STACK_*).
many: so many captures at once, by default 1,000, on a stack of its own; a stand-in of the `trellis` engine infers, all
else is real. Every one has to be published once, by one inference.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from infra.stack import Stack, StackSettings  # noqa: E402
from tests.support import watching_stack  # noqa: E402
from tests.support.gpu_machine import views_only  # noqa: E402
from tests.support.running import wait_for  # noqa: E402
from tests.support.running_stack import ENDED  # noqa: E402
from tests.synthetic import make_capture  # noqa: E402

VIEWS, SIZE, UPLOADS, MANY = 8, 96, 15, 1000
POLL_SECONDS, PATIENCE = 0.1, 7200


def runs(stack: Stack, name: str) -> list[dict[str, Any]]:
    """Flow runs of a capture."""
    asked = {"flow_runs": {"name": {"any_": [name]}}, "flows": {"name": {"any_": ["reconstruct"]}}}
    found: list[dict[str, Any]] = stack.server.request("POST", "/flow_runs/filter", asked).json()
    return found


def latency(capture: Path, count: int) -> None:
    stack, seconds = Stack(StackSettings()), []
    uploader = stack.s3.client("uploader")
    for _ in range(count):
        name = uuid.uuid4().hex
        stack.s3.upload(capture, name)
        uploader.pipe_file(f"captures/{name}/_COMPLETE", b"")
        uploaded, begun = datetime.now(UTC), None
        while begun is None:
            time.sleep(POLL_SECONDS)
            begun = next((run["start_time"] for run in runs(stack, name)), None)
        seconds.append((datetime.fromisoformat(begun) - uploaded).total_seconds())
        while any(run["state_type"] not in ENDED for run in runs(stack, name)):
            time.sleep(1)
    print(f"last file -> Running: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s of {count}")


def many(capture: Path, count: int) -> None:
    names = [f"upload {number:04}" for number in range(count)]
    folder = capture.parent
    with watching_stack.watching(folder) as stack:
        begun = time.perf_counter()
        watching_stack.upload(stack, views_only(capture) / "views", names)
        uploaded = time.perf_counter() - begun
        wait_for("all captures", lambda: watching_stack.done(stack, names), PATIENCE, pause=5)
        published, batches = watching_stack.published(stack), watching_stack.batches(stack)
        print(
            f"{count} at once: uploaded in {uploaded:.0f} s, done after {time.perf_counter() - begun:.0f} s;"
            f" one asset each: {published == Counter([*names, 'mug'])}, inferences less the sample's:"
            f" {watching_stack.inferences(folder) - 1}, batches: {dict(Counter(run['state_name'] for run in batches))}"
        )


def main() -> None:
    measures = {"latency": (latency, UPLOADS), "many": (many, MANY)}
    match sys.argv[1:]:
        case [name, *count] if name in measures and len(count) <= 1:
            measure, default = measures[name]
        case _:
            raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        make_capture(Path(folder) / "ball", "sphere", views=VIEWS, size=SIZE)
        measure(Path(folder) / "ball", int(count[0]) if count else default)


if __name__ == "__main__":
    main()
