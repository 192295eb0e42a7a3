"""Time and memory of captures with many frames: `python tests/benchmarks/many_frames.py [FRAMES ...] [--keep FOLDER]`.

A simulated walk through a room with a Kinect v1, 640 x 480, reconstructed by the whole command with default settings
and an empty store. Making a capture takes some 0.4 s a frame, so `--keep` names a folder in which captures stay for the
next time. Seconds are those of the stages; CPU seconds (all cores, what other work on the machine does not change much)
and peak memory are those of the command's process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.running import STAGES
from tests.synthetic.rooms import make_room_capture

ROOT = Path(__file__).parents[2]
MARKER = "_COMPLETE"
SHOWN = (*STAGES, "publish")


def capture(folder: Path, frames: int) -> Path:
    """A capture of so many frames, made unless the folder has it."""
    target = folder / f"room-{frames}"
    if not (target / MARKER).exists():
        make_room_capture(target, frames)
        (target / MARKER).touch()
    return target


def measured(source: Path, folder: Path) -> tuple[dict[str, float], float, float, str]:
    """Seconds by stage of a reconstruction, CPU seconds and peak MB of its process, and the mesh's status."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CAPTURE2MESH_", "PREFECT_"))},
        "PREFECT_HOME": str(folder / "home"),
        "CAPTURE2MESH_STORE": str(folder / "store"),
        "CAPTURE2MESH_SCRATCH": str(folder / "scratch"),
    }
    command = [sys.executable, "-m", "flows", "reconstruct", str(source), str(folder / "out"), "--json"]
    with (folder / "report.json").open("w+") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        printed.seek(0)
        text = printed.read()
    if not text:
        raise SystemExit(f"the command failed: {status}")
    report = json.loads(text)
    seconds = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    failed = ", ".join(f"{check['name']} {check['value']}" for check in report["checks"] if not check["passed"])
    print(f"{source.name}: {report['subject']}; failed: {failed or 'nothing'}", file=sys.stderr)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, report["status"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frames", nargs="*", type=int, default=[1000])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where captures stay")
    asked = parser.parse_args()
    print(f"| frames | {' | '.join(SHOWN)} | all, s | s a frame | CPU s | peak MB | status |")
    print("|---" * (len(SHOWN) + 6) + "|")
    for frames in asked.frames:
        with tempfile.TemporaryDirectory() as name:
            seconds, cpu, peak, status = measured(capture(asked.keep or Path(name), frames), Path(name))
        total = sum(seconds.values())
        stages = " | ".join(f"{seconds.get(stage, 0):.1f}" for stage in SHOWN)
        print(
            f"| {frames} | {stages} | {total:.1f} | {total / frames:.3f} | {cpu:.1f} | {peak:.0f} | {status} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
