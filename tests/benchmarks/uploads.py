"""Uploads on a stack that runs: `python tests/benchmarks/uploads.py latency|many` (`make stack` first).

latency: from the last file of an upload, its marker, to its run in state Running; one upload at a time.
many: 50 captures at once; every one is reconstructed, by one run each.

The stack's ports and folder are those of CAPTURE2MESH_STACK_*.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from infra.stack import Stack, StackSettings  # noqa: E402
from tests.synthetic import make_capture  # noqa: E402

VIEWS, SIZE, UPLOADS, MANY = 8, 96, 15, 50
POLL_SECONDS, PATIENCE = 0.1, 1800
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def upload(stack: Stack, capture: Path, name: str) -> None:
    """The marker last."""
    client = stack.s3.client("uploader")
    for path in sorted(filter(Path.is_file, capture.rglob("*"))):
        client.pipe_file(f"captures/{name}/{path.relative_to(capture).as_posix()}", path.read_bytes())
    client.pipe_file(f"captures/{name}/_COMPLETE", b"")


def runs(stack: Stack, names: list[str]) -> list[dict[str, Any]]:
    """Flow runs of the captures by their names."""
    asked = {"flow_runs": {"name": {"any_": names}}, "flows": {"name": {"any_": ["reconstruct"]}}, "limit": 200}
    found: list[dict[str, Any]] = stack.server.request("POST", "/flow_runs/filter", asked).json()
    return found


def latency(stack: Stack, capture: Path) -> None:
    seconds = []
    for _ in range(UPLOADS):
        name = uuid.uuid4().hex
        upload(stack, capture, name)
        uploaded, begun = datetime.now(UTC), None
        while begun is None:
            time.sleep(POLL_SECONDS)
            begun = next((run["start_time"] for run in runs(stack, [name])), None)
        seconds.append((datetime.fromisoformat(begun) - uploaded).total_seconds())
        while any(run["state_type"] not in ENDED for run in runs(stack, [name])):
            time.sleep(1)
    print(f"last file -> Running: median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s of {UPLOADS}")


def many(stack: Stack, capture: Path) -> None:
    names = [uuid.uuid4().hex for _ in range(MANY)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: upload(stack, capture, name), names))
    begun = time.perf_counter()
    while time.perf_counter() - begun < PATIENCE:
        found = runs(stack, names)
        if len(found) >= MANY and all(run["state_type"] in ENDED for run in found):
            break
        time.sleep(1)
    states = Counter(run["state_name"] for run in found)
    once = all(count == 1 for count in Counter(run["name"] for run in found).values())
    print(f"{MANY} at once: {time.perf_counter() - begun:.0f} s, {dict(states)}, one run each: {once}")


def main() -> None:
    measures = {"latency": latency, "many": many}
    if len(sys.argv) != 2 or sys.argv[1] not in measures:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        capture = Path(folder) / "ball"
        make_capture(capture, "sphere", views=VIEWS, size=SIZE)
        measures[sys.argv[1]](Stack(StackSettings()), capture)


if __name__ == "__main__":
    main()
