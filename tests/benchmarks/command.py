"""Time and memory of the whole command on the bundled sample: `python tests/benchmarks/command.py`.

Three runs as a user makes them, with no server: the very first one (new Prefect home, empty store), one with an
existing home and an empty store, and one that finds everything cached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests/data/mug"


def measure(home: Path, store: Path, output: Path) -> tuple[float, float, float, dict[str, float]]:
    """Seconds of the command, of our process between its first and last stage, peak MB of it, seconds by stage."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CAPTURE2MESH_", "PREFECT_"))},
        "PREFECT_HOME": str(home),
        "CAPTURE2MESH_STORE": str(store),
        "CAPTURE2MESH_SCRATCH": str(home / "scratch"),
    }
    begun = time.perf_counter()
    command = [sys.executable, "-m", "flows", "reconstruct", str(SAMPLE), str(output)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    stages, first, last = {}, 0.0, 0.0
    for line in process.stderr:
        words = line.decode().split()
        if words[-1] == "...":
            first = first or time.perf_counter()
        elif "s" in words[2:3]:
            stages[words[0]] = float(words[1])
            last = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"the command failed: {status}")
    return time.perf_counter() - begun, last - first, usage.ru_maxrss / 1000, stages


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        runs = {
            "first run ever": measure(root / "home", root / "store-1", root / "out-1"),
            "cold store": measure(root / "home", root / "store-2", root / "out-2"),
            "all cached": measure(root / "home", root / "store-2", root / "out-2"),
        }
    print("| run | command s | first to last stage s | stages s | peak MB |\n|---|---|---|---|---|")
    for name, (wall, ours, peak, stages) in runs.items():
        print(f"| {name} | {wall:.1f} | {ours:.1f} | {sum(stages.values()):.1f} | {peak:.0f} |")
    print(json.dumps(runs["cold store"][3]))


if __name__ == "__main__":
    main()
