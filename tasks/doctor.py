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
from tasks.weights.local import require
from tasks.weights.pins import bundle, declared

MIN_PYTHON = (3, 11)
LEAST_DRIVER = {"13": 580, "12": 525, "11": 450}
"""The oldest major version of NVIDIA's driver for each major version of CUDA (CUDA's compatibility guide)."""

Purpose = Literal["every run", "trellis", "to_glb"]
UPSTREAM = "https://github.com/GAP-LAB-CUHK-SZ/ReconViaGen"
GPU_EXTRA = "pip install 'capture2mesh[gpu]'"


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
        *([_driver()] if runtime.device == "cuda" else []),
        *_model_process(runtime),
        _weights(weights),
        *_licences(),
    ]


def weights_here() -> str:
    """Describe the bundle on this machine; raises an InputError that says what to do if none is complete."""
    wanted = bundle()
    wanted.refuse_unpinned()
    return f"bundle {wanted.digest[:12]} in {require(wanted).parent}"


def can_run(engine: EngineName, found: Sequence[Finding], exporter: str = "auto") -> bool:
    """Return whether this machine can run an engine with an exporter. `auto` needs only what every run needs."""
    needed: set[Purpose] = {"every run"}
    if engine == "trellis":
        needed |= {"trellis", "to_glb"} if exporter == "to_glb" else {"trellis"}
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
        told = process.request("probe", {"device": runtime.device}).header
    except Capture2MeshError as error:
        return [Finding("trellis", str(error), "trellis", False, GPU_EXTRA)]
    finally:
        process.shutdown()
    imports = told["imports"]
    return [
        _package(imports, "torch", "trellis", GPU_EXTRA),
        _package(imports, "safetensors", "trellis", GPU_EXTRA),
        *([] if told["cuda"] is None else [_cuda(told["cuda"])]),
        *([] if told["device"] is None else [_gpu(told["device"], runtime)]),
        *([] if told["trial"] is None else [_trial(told["trial"], runtime)]),
        _package(
            imports,
            "trellis.pipelines",
            "to_glb",
            f"only for export.exporter=to_glb: install {UPSTREAM} and set CAPTURE2MESH_TRELLIS_ROOT to its checkout;"
            " `trellis` on PyPI is not it",
        ),
        _package(imports, "nvdiffrast.torch", "to_glb", "install it, or use export.exporter=native"),
        _package(
            imports,
            "diff_gaussian_rasterization",
            "to_glb",
            "install the mip-splatting fork, or use export.exporter=native",
        ),
    ]


def _cuda(told: Mapping[str, Any]) -> Finding:
    """Say whether torch can use CUDA: it may be a build without, or one for a newer driver than the one here."""
    built_for, fault = told["built_for"], told["error"]
    if built_for is None:
        return Finding("CUDA", "this torch is built for the CPU", "trellis", False, "install a build of torch for CUDA")
    found = f"torch is built for CUDA {built_for}"
    if not fault:
        return Finding("CUDA", found, "trellis", True)
    least = LEAST_DRIVER.get(built_for.partition(".")[0])
    driver = f"a driver of version {least} or newer" if least else "a newer driver"
    todo = f"use a GPU and {driver}, or install a build of torch for an older CUDA; check CUDA_VISIBLE_DEVICES"
    return Finding("CUDA", f"{found}: {fault}", "trellis", False, todo)


def _gpu(device: Mapping[str, Any], runtime: Runtime) -> Finding:
    """The GPU and its memory."""
    needed = runtime.min_free_vram_gib
    found = f"{device['name']}, {device['free_gib']:.1f} of {device['total_gib']:.1f} GiB free"
    return Finding("GPU", found, "trellis", device["free_gib"] >= needed, f"free {needed:g} GiB, or use a larger GPU")


def _trial(told: Mapping[str, Any], runtime: Runtime) -> Finding:
    """The smallest inference: for the networks in plain PyTorch, all of them, tiny, with random weights."""
    place = "the GPU" if runtime.device == "cuda" else "the CPU"
    found = told["error"] or f"the smallest inference on {place} took {told['seconds']:.1f} s"
    todo = f"install a build of torch that works on {place}; the message says what fails"
    return Finding("trial inference", found, "trellis", not told["error"], todo)


def _package(imports: Mapping[str, Mapping[str, str]], module: str, purpose: Purpose, todo: str) -> Finding:
    name = module.partition(".")[0]
    told = imports[module]
    return Finding(name, told["error"] or f"{name} {told['version']}".strip(), purpose, not told["error"], todo)


def _weights(weights: Callable[[], str]) -> Finding:
    try:
        return Finding("weights", weights(), "trellis", True)
    except Capture2MeshError as error:
        return Finding("weights", str(error), "trellis", False, "run `capture2mesh weights fetch`")


def _licences() -> list[Finding]:
    """The terms of each repository of weights, as the list tells them. They bind you, not this program."""
    try:
        sources = declared().sources
    except Capture2MeshError:
        return []  # the weights' own finding tells it
    return [
        Finding(f"licence of {source.repository}", source.licence or "not known", "trellis", True) for source in sources
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
