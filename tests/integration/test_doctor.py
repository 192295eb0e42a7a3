"""The findings of doctor on a machine with a GPU, which is the stand-in's, and on one without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from tasks.doctor import Finding, can_run, findings, table
from tasks.errors import WeightsMissing
from tasks.inference.trellis.model_process import Runtime
from tasks.store.location import Location
from tests.support.gpu_machine import STAND_IN

PACKAGES = ["nvdiffrast/torch", "diff_gaussian_rasterization"]


def fetched() -> str:
    return "bundle 0123456789ab"


def missing() -> str:
    raise WeightsMissing("weights: bundle 0123456789ab is not whole")


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {check.name: check for check in found}


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a machine seem to have a driver and upstream's compiled packages; the folder of these packages."""
    packages, programs = tmp_path / "packages", tmp_path / "bin"
    for name in PACKAGES:
        (packages / name).mkdir(parents=True)
        (packages / name.partition("/")[0] / "__init__.py").write_text("__version__ = '1.2.3'\n")
        (packages / name / "__init__.py").touch()
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, Stand-in GPU, 580.1, 81920'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return packages


def test_a_machine_with_a_gpu(gpu_machine: Path, tmp_path: Path) -> None:
    runtime = Runtime("w", tmp_path / "scratch", root=STAND_IN)
    found = findings(runtime, fetched, Location.of(tmp_path / "store"))
    assert [check.name for check in found if not check.ok] == []
    assert can_run("trellis", found) and can_run("auto", found)
    named = by_name(found)
    assert named["NVIDIA driver"].found == "580.1: Stand-in GPU 80 GiB"
    assert named["GPU"].found == "Stand-in GPU, 70.0 of 80.0 GiB free"
    assert named["CUDA"].found == "torch is built for CUDA 13.0"
    assert named["trial inference"].ok
    assert named["nvdiffrast"].found == "nvdiffrast 1.2.3"
    assert named["weights"].found == "bundle 0123456789ab"
    assert not list((tmp_path / "store").glob("*"))  # the probe is gone


def test_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    runtime = Runtime("w", tmp_path / "scratch")
    found = findings(runtime, missing, Location.of(tmp_path / "store"))
    named = by_name(found)
    failing = {check.name for check in found if not check.ok}
    assert failing >= {"NVIDIA driver", "trellis", "nvdiffrast", "weights"}
    assert "No module named 'trellis'" in named["trellis"].found
    assert all(check.todo for check in found if not check.ok)
    assert can_run("auto", found) and can_run("fusion", found) and not can_run("trellis", found)


def test_what_only_the_exporter_needs(gpu_machine: Path, tmp_path: Path) -> None:
    (gpu_machine / "diff_gaussian_rasterization" / "__init__.py").write_text("import a_missing_kernel\n")
    found = findings(Runtime("w", tmp_path / "scratch", root=STAND_IN), fetched, Location.of(tmp_path / "store"))
    assert "No module named 'a_missing_kernel'" in by_name(found)["diff_gaussian_rasterization"].found
    assert not can_run("trellis", found, exporter="to_glb")
    assert can_run("trellis", found)


def test_a_driver_that_is_too_old_for_torch(gpu_machine: Path, tmp_path: Path) -> None:
    runtime = Runtime("w", tmp_path / "scratch", {"STAND_IN_OLD_DRIVER": "1"}, root=STAND_IN)
    found = findings(runtime, fetched, Location.of(tmp_path / "store"))
    cuda = by_name(found)["CUDA"]
    assert not cuda.ok and "driver on your system is too old" in cuda.found and "version 580" in cuda.todo
    assert "GPU" not in by_name(found) and not can_run("trellis", found) and can_run("auto", found)


def test_the_licence_of_each_repository_is_told(tmp_path: Path) -> None:
    found = by_name(findings(Runtime("w", tmp_path / "scratch"), missing, Location.of(tmp_path / "store")))
    assert found["licence of dl.fbaipublicfiles.com/dinov2"].found == "Apache-2.0"
    assert found["licence of Stable-X/trellis-vggt-v0-2"].found.startswith("MIT")
    assert "non-commercial" in found["licence of Stable-X/vggt-object-v0-1"].found


def test_faults_of_every_run(tmp_path: Path) -> None:
    occupied = tmp_path / "store"
    occupied.write_text("a file")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # the discard port: nothing listens there
        found = by_name(findings(Runtime("w", tmp_path / "scratch"), missing, Location.of(occupied)))
    assert not found["store"].ok and "CAPTURE2MESH_STORE" in found["store"].todo
    assert not found["Prefect server"].ok and "does not answer" in found["Prefect server"].found
    assert not can_run("fusion", list(found.values()))


def test_a_server_that_answers(prefect_server: str, tmp_path: Path) -> None:
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        found = by_name(findings(Runtime("w", tmp_path / "scratch"), missing, Location.of(tmp_path / "store")))
    assert found["Prefect server"] == Finding("Prefect server", f"answers: {prefect_server}", "every run", True)


def test_too_little_memory_and_a_broken_driver(gpu_machine: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 255\n")
    runtime = Runtime("w", tmp_path / "scratch", {"STAND_IN_FREE_GIB": "9.5"}, root=STAND_IN)
    found = by_name(findings(runtime, fetched, Location.of(tmp_path / "store")))
    assert not found["GPU"].ok and "9.5 of 80.0 GiB free" in found["GPU"].found
    assert not found["NVIDIA driver"].ok and "255" in found["NVIDIA driver"].found


def test_this_process_imports_none_of_it(gpu_machine: Path, tmp_path: Path) -> None:
    findings(Runtime("w", tmp_path / "scratch", root=STAND_IN), fetched, Location.of(tmp_path / "store"))
    assert not {"torch", "trellis", "spconv"} & sys.modules.keys()


def test_the_table_says_what_to_do() -> None:
    console = Console(record=True, width=160)
    console.print(
        table([Finding("GPU", "a [b] c", "trellis", False, "get one"), Finding("Python", "3", "every run", True, "x")])
    )
    text = console.export_text()
    assert "a [b] c" in text and "get one" in text and "NO" in text
    assert " x " not in text
