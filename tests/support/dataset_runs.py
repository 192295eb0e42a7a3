"""Runs of `capture2mesh dataset` that a test or tests/benchmarks/soak.py kills, and what such a run leaves."""

from __future__ import annotations

from pathlib import Path

from tests.support.running import SMALL, CommandLine, assignments, contents_of, wait_for
from tests.support.running_stack import read


def arguments(dataset: Path, output: Path) -> list[str | Path]:
    return ["dataset", dataset, output, "--engine", "fusion", "--json", *assignments(SMALL)]


def machine(folder: Path, server: str) -> CommandLine:
    return CommandLine(folder, server, {"CAPTURE2MESH_BATCH_PROCESSES": "2"})


def published(output: Path) -> dict[str, bytes]:
    """The published files, without those that contain durations."""
    return {
        path: data
        for path, data in contents_of(output).items()
        if not path.startswith("_dataset") and path.rpartition("/")[2] not in ("report.json", "manifest.json")
    }


def processes_of(folder: Path) -> list[int]:
    """Ids of the processes with the folder in their environment: a run, and all that it has started."""
    return [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if str(folder).encode() in read(process / "environ")
        and b"Z" not in read(process / "stat").rpartition(b")")[2][:3]
    ]


def assert_alone(folder: Path, seconds: float) -> None:
    wait_for("the end of all its processes", lambda: processes_of(folder) == [], seconds)


def leftovers(flows: CommandLine) -> list[Path]:
    """Hidden files and folders: a run works in them until it renames them."""
    return [path for root in (flows.store, flows.output) for path in root.rglob(".*")]
