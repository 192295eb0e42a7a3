"""What this machine can run, and what is missing for the rest."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from tasks.errors import Capture2MeshError
from tasks.inference.trellis.trellis_engine import NVIDIA_SMI_SECONDS, Runtime, TrellisProcess
from tasks.settings import EngineName
from tasks.store.location import Location
from tasks.weights.local import find, require
from tasks.weights.pins import bundle

MIN_PYTHON = (3, 11)
MIB_PER_GIB = 1024

Purpose = Literal["every run", "trellis", "to_glb", "speed"]
UPSTREAM = "https://github.com/GAP-LAB-CUHK-SZ/ReconViaGen"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, what needs it, and what to do where it is not well."""

    name: str
    found: str
    needed_for: Purpose
    ok: bool
    todo: str = ""


def checks(runtime: Runtime, weights: Callable[[], str], store: Location) -> list[Check]:
    """Look at everything. weights: tells which are there, or raises a Capture2MeshError that says what to do."""
    return [
        _python(),
        _store(store),
        _server(),
        _driver(),
        *_model_process(runtime),
        _weights(weights),
    ]


def weights_here() -> str:
    """The bundle that is on this machine; raises an InputError that says what to do where none is whole."""
    wanted = bundle()
    if find(wanted) is None:
        wanted.refuse_unpinned()
    masks = " with masks" if find(bundle(masks=True)) is not None else ""
    return f"bundle {wanted.digest[:12]}{masks} in {require(wanted).parent}"


def can_run(engine: EngineName, found: Sequence[Check], exporter: str = "auto") -> bool:
    """Whether an engine's runs would get as far as their inputs; `auto` needs no more than any run.

    The engine's own choice of an exporter is to_glb; the `native` one needs nothing more.
    """
    needed: set[Purpose] = {"every run"}
    if engine == "trellis":
        needed |= {"trellis"} if exporter == "native" else {"trellis", "to_glb"}
    return all(check.ok for check in found if check.needed_for in needed)


def table(found: Sequence[Check]) -> Table:
    """The checks for a person."""
    made = Table("check", "found", "needed for", "", "to do")
    for check in found:
        mark = "[green]ok" if check.ok else "[red]NO"
        made.add_row(check.name, escape(check.found), check.needed_for, mark, "" if check.ok else escape(check.todo))
    return made


def _python() -> Check:
    wanted = ".".join(map(str, MIN_PYTHON))
    return Check(
        "Python",
        platform.python_version(),
        "every run",
        sys.version_info >= MIN_PYTHON,
        f"use Python {wanted} or newer",
    )


def _store(location: Location) -> Check:
    probe = location / f".doctor-{uuid.uuid4().hex}"
    todo = "set CAPTURE2MESH_STORE to a folder or URL that this user may write to"
    try:
        probe.write(b"doctor")
        probe.delete()
    except (Capture2MeshError, OSError) as error:
        return Check("store", _first_line(error), "every run", False, todo)
    return Check("store", f"writable: {location.url}", "every run", True)


def _server() -> Check:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return Check("Prefect server", "none set: each run starts its own", "every run", True)
    with get_client(sync_client=True) as client:
        fault = client.api_healthcheck()
    if fault is not None:
        todo = "start it, or correct or unset PREFECT_API_URL"
        return Check("Prefect server", f"{url} does not answer: {_first_line(fault)}", "every run", False, todo)
    return Check("Prefect server", f"answers: {url}", "every run", True)


def _driver() -> Check:
    name, todo = (
        "NVIDIA driver",
        "use a machine with an NVIDIA GPU and its driver; in a container, pass the GPU through",
    )
    command = shutil.which("nvidia-smi")
    if command is None:
        return Check(name, "no nvidia-smi", "trellis", False, todo)
    query = [command, "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, f"nvidia-smi fails: {_first_line(error)}", "trellis", False, todo)
    gpus = [line.split(", ") for line in told.strip().splitlines()]
    found = ", ".join(f"{gpu} {float(total) / MIB_PER_GIB:.0f} GiB" for gpu, _, total, _ in gpus)
    return Check(name, f"{gpus[0][1]}: {found}" if gpus else "no GPU", "trellis", bool(gpus), todo)


def _model_process(runtime: Runtime) -> list[Check]:
    """What the model's own process can import and sees; asked of such a process, so that nothing of it stays here."""
    process = TrellisProcess(runtime)
    try:
        told = process.request("probe").header
    except Capture2MeshError as error:
        return [Check("trellis", str(error), "trellis", False, f"see {UPSTREAM} for its installation")]
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
            f"install {UPSTREAM} and set CAPTURE2MESH_TRELLIS_ROOT to its checkout; no package of the index is it",
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


def _gpu(device: Mapping[str, Any] | None, runtime: Runtime) -> Check:
    needed = runtime.min_free_vram_gib
    if device is None:
        return Check("GPU", "torch sees none", "trellis", False, "check the driver and CUDA_VISIBLE_DEVICES")
    found = f"{device['name']}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free"
    todo = f"free {needed:g} GiB, or use a larger GPU"
    return Check("GPU", found, "trellis", device["free_gib"] >= needed, todo)


def _package(
    imports: Mapping[str, Mapping[str, str]], name: str, modules: Sequence[str], purpose: Purpose, todo: str
) -> Check:
    """One of the modules is enough; where none can be imported, why."""
    for module in modules:
        if not imports[module]["error"]:
            package = module.partition(".")[0]
            return Check(name, f"{package} {imports[module]['version']}".strip(), purpose, True)
    reasons = "; ".join(dict.fromkeys(imports[module]["error"] for module in modules))
    return Check(name, reasons, purpose, False, todo)


def _weights(weights: Callable[[], str]) -> Check:
    try:
        return Check("weights", weights(), "trellis", True)
    except Capture2MeshError as error:
        return Check("weights", str(error), "trellis", False, "python -m flows weights fetch")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
