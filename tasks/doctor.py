"""Finds out what this machine can run, and what is missing for the rest. The command `doctor` calls it."""

from __future__ import annotations

import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from tasks.errors import Capture2MeshError
from tasks.inference.gpus import query_gpus
from tasks.inference.trellis.model_process import Runtime, TrellisProcess
from tasks.settings import EngineName
from tasks.store.location import Location
from tasks.weights.local import find, require
from tasks.weights.pins import bundle

MIN_PYTHON = (3, 11)

Purpose = Literal["every run", "trellis", "to_glb", "speed"]
UPSTREAM = "https://github.com/GAP-LAB-CUHK-SZ/ReconViaGen"


@dataclass(frozen=True)
class Finding:
    """One thing that was examined."""

    name: str
    """The thing."""
    found: str
    """The finding, for people."""
    needed_for: Purpose
    """The runs that need it."""
    ok: bool
    """True if it is as those runs need it."""
    todo: str = ""
    """The remedy."""


def findings(runtime: Runtime, weights: Callable[[], str], store: Location) -> list[Finding]:
    """Examine everything. weights: says which are here, or raises a Capture2MeshError that says what to do."""
    return [
        _python(),
        _store(store),
        _server(),
        _driver(),
        *_model_process(runtime),
        _weights(weights),
    ]


def weights_here() -> str:
    """Describe the bundle on this machine; raises an InputError that says what to do if none is complete."""
    wanted = bundle()
    if find(wanted) is None:
        wanted.refuse_unpinned()
    masks = " with masks" if find(bundle(masks=True)) is not None else ""
    return f"bundle {wanted.digest[:12]}{masks} in {require(wanted).parent}"


def can_run(engine: EngineName, found: Sequence[Finding], exporter: str = "auto") -> bool:
    """Return whether this machine can run an engine with an exporter. `auto` needs only what every run needs.

    By default trellis uses the exporter to_glb, which needs packages of its own; `native` needs no others.
    """
    needed: set[Purpose] = {"every run"}
    if engine == "trellis":
        needed |= {"trellis"} if exporter == "native" else {"trellis", "to_glb"}
    return all(each.ok for each in found if each.needed_for in needed)


def table(found: Sequence[Finding]) -> Table:
    """Make the table that people read."""
    made = Table("check", "found", "needed for", "", "to do")
    for each in found:
        mark = "[green]ok" if each.ok else "[red]NO"
        made.add_row(each.name, escape(each.found), each.needed_for, mark, "" if each.ok else escape(each.todo))
    return made


def _python() -> Finding:
    wanted = ".".join(map(str, MIN_PYTHON))
    return Finding(
        "Python",
        platform.python_version(),
        "every run",
        sys.version_info >= MIN_PYTHON,
        f"use Python {wanted} or newer",
    )


def _store(location: Location) -> Finding:
    probe = location / f".doctor-{uuid.uuid4().hex}"
    todo = "set CAPTURE2MESH_STORE to a folder or URL that this user may write to"
    try:
        probe.write(b"doctor")
        probe.delete()
    except (Capture2MeshError, OSError) as error:
        return Finding("store", _first_line(error), "every run", False, todo)
    return Finding("store", f"writable: {location.url}", "every run", True)


def _server() -> Finding:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return Finding("Prefect server", "none set: each run starts its own", "every run", True)
    with get_client(sync_client=True) as client:
        fault = client.api_healthcheck()
    if fault is not None:
        todo = "start it, or correct or unset PREFECT_API_URL"
        return Finding("Prefect server", f"{url} does not answer: {_first_line(fault)}", "every run", False, todo)
    return Finding("Prefect server", f"answers: {url}", "every run", True)


def _driver() -> Finding:
    name, todo = (
        "NVIDIA driver",
        "use a machine with an NVIDIA GPU and its driver; in a container, pass the GPU through",
    )
    try:
        gpus = query_gpus()
    except FileNotFoundError:
        return Finding(name, "no nvidia-smi", "trellis", False, todo)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name, f"nvidia-smi fails: {_first_line(error)}", "trellis", False, todo)
    found = ", ".join(gpu.name if gpu.memory_gib is None else f"{gpu.name} {gpu.memory_gib:.0f} GiB" for gpu in gpus)
    return Finding(name, f"{gpus[0].driver}: {found}" if gpus else "no GPU", "trellis", bool(gpus), todo)


def _model_process(runtime: Runtime) -> list[Finding]:
    """Examine what the model's process can import and sees, by asking one: this process imports nothing of it."""
    process = TrellisProcess(runtime)
    try:
        told = process.request("probe").header
    except Capture2MeshError as error:
        return [Finding("trellis", str(error), "trellis", False, f"see {UPSTREAM} for its installation")]
    finally:
        process.shutdown()
    imports, device = told["imports"], told["device"]
    return [
        _package(imports, "torch", ["torch"], "trellis", "pip install 'capture2mesh[gpu]'"),
        _gpu(device, runtime),
        _package(
            imports,
            "trellis (ReconViaGen)",
            ["trellis.pipelines"],
            "trellis",
            f"install {UPSTREAM} and set CAPTURE2MESH_TRELLIS_ROOT to its checkout; `trellis` on PyPI is not it",
        ),
        _package(imports, "spconv", ["spconv.pytorch"], "trellis", "pip install spconv-cu126"),
        _package(
            imports,
            "sparse attention",
            ["flash_attn", "xformers.ops"],
            "trellis",
            "install flash-attn, or xformers and set ATTN_BACKEND=xformers",
        ),
        _package(imports, "nvdiffrast", ["nvdiffrast.torch"], "to_glb", "install it, or use export.exporter=native"),
        _package(
            imports,
            "gaussian rasteriser",
            ["diff_gaussian_rasterization"],
            "to_glb",
            "install the mip-splatting fork, or use export.exporter=native",
        ),
        _package(imports, "fast-simplification", ["fast_simplification"], "speed", "pip install fast-simplification"),
    ]


def _gpu(device: Mapping[str, Any] | None, runtime: Runtime) -> Finding:
    needed = runtime.min_free_vram_gib
    if device is None:
        return Finding("GPU", "torch sees none", "trellis", False, "check the driver and CUDA_VISIBLE_DEVICES")
    found = f"{device['name']}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free"
    todo = f"free {needed:g} GiB, or use a larger GPU"
    return Finding("GPU", found, "trellis", device["free_gib"] >= needed, todo)


def _package(
    imports: Mapping[str, Mapping[str, str]], name: str, modules: Sequence[str], purpose: Purpose, todo: str
) -> Finding:
    """Look for the first module that can be imported; one is enough. If none can, say why."""
    for module in modules:
        if not imports[module]["error"]:
            package = module.partition(".")[0]
            return Finding(name, f"{package} {imports[module]['version']}".strip(), purpose, True)
    reasons = "; ".join(dict.fromkeys(imports[module]["error"] for module in modules))
    return Finding(name, reasons, purpose, False, todo)


def _weights(weights: Callable[[], str]) -> Finding:
    try:
        return Finding("weights", weights(), "trellis", True)
    except Capture2MeshError as error:
        return Finding("weights", str(error), "trellis", False, "run `capture2mesh weights fetch`")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
