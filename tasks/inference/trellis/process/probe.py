"""The probe of the model's process: the packages that it can import, the GPU that it sees, and a trial inference.

`Model` answers the operation `probe` with it, for the doctor.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from .faults import GIB, fault_of

NEEDED = ("torch", "safetensors")
OF_TO_GLB = ("trellis.pipelines", "nvdiffrast.torch", "diff_gaussian_rasterization", "fast_simplification")
"""Packages of upstream's exporter only."""


def probe(device: str, trial: Callable[[], float]) -> dict[str, Any]:
    """The answer's header: `imports` by package, `cuda` (what torch says of it), `device`, and `trial`.

    device: `cuda` or `cpu`. trial: seconds of the smallest inference on it; it is left out where CUDA does not work.
    `cuda` and `device` are None where they do not apply.
    """
    imports = {name: _imported(name) for name in (*NEEDED, *OF_TO_GLB)}
    found: dict[str, Any] = {"imports": imports, "cuda": None, "device": None, "trial": None}
    if imports["torch"]["error"]:
        return found
    if device == "cuda":
        found |= _cuda(importlib.import_module("torch"))
        if found["device"] is None:
            return found
    try:
        found["trial"] = {"seconds": trial(), "error": ""}
    except Exception as error:  # kernels that are not built for this GPU, libraries that do not fit each other
        found["trial"] = {"seconds": None, "error": fault_of(error)["message"]}
    return found


def _cuda(torch: Any) -> dict[str, Any]:
    cuda = {"built_for": torch.version.cuda, "error": ""}
    try:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
        device = {"name": torch.cuda.get_device_name(), "free_gib": free / GIB, "total_gib": total / GIB}
    except Exception as error:  # a driver that is too old, no GPU
        return {"cuda": cuda | {"error": fault_of(error)["message"]}, "device": None}
    return {"cuda": cuda, "device": device}


def _imported(name: str) -> dict[str, str]:
    """Import a package; return its version, or the error if it fails."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken package may raise anything
        return {"version": "", "error": fault_of(error)["message"]}
    package = sys.modules[name.partition(".")[0]]
    return {"version": str(getattr(package, "__version__", "")), "error": ""}
