"""The probe of the model's process: the packages that it can import, the GPU that it sees, and whether the GPU works.

`Model` answers the operation `probe` with it, for the doctor.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from .faults import GIB, fault_of

NEEDED = ("torch", "safetensors")
OF_TO_GLB = ("trellis.pipelines", "nvdiffrast.torch", "diff_gaussian_rasterization", "fast_simplification")
"""Packages of upstream's exporter only."""


def probe() -> dict[str, Any]:
    """The answer's header: `imports` by package, `cuda` (what torch says of it), and `device` (None without a GPU)."""
    imports = {name: _imported(name) for name in (*NEEDED, *OF_TO_GLB)}
    found: dict[str, Any] = {"imports": imports, "cuda": None, "device": None}
    if imports["torch"]["error"]:
        return found
    torch = importlib.import_module("torch")
    found["cuda"] = {"built_for": torch.version.cuda, "error": ""}
    try:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
        found["device"] = {"name": torch.cuda.get_device_name(), "free_gib": free / GIB, "total_gib": total / GIB}
        found["device"]["trial_seconds"] = _trial(torch)
    except Exception as error:  # a driver that is too old, no GPU, kernels that are not built for this GPU
        found["cuda"]["error"] = fault_of(error)["message"]
    return found


def _trial(torch: Any) -> float:
    """Seconds of the smallest computation of an inference's kind: attention in half precision on the GPU."""
    begun = time.perf_counter()
    tokens = torch.ones(1, 1, 16, 64, dtype=torch.float16, device="cuda")
    torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).cpu()
    return time.perf_counter() - begun


def _imported(name: str) -> dict[str, str]:
    """Import a package; return its version, or the error if it fails."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken package may raise anything
        return {"version": "", "error": fault_of(error)["message"]}
    package = sys.modules[name.partition(".")[0]]
    return {"version": str(getattr(package, "__version__", "")), "error": ""}
