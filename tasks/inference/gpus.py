"""The NVIDIA GPUs of this machine, as nvidia-smi lists them. The `trellis` engine, `doctor` and the stack ask."""

from __future__ import annotations

import logging
import os
import subprocess
from dataclasses import dataclass

NVIDIA_SMI_SECONDS = 20
QUERY = ["nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader,nounits"]
COLUMNS = 4
MIB_PER_GIB = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver lists."""

    index: str
    """Its number on this machine, as `CUDA_VISIBLE_DEVICES` takes it."""
    name: str
    driver: str
    """The driver's version."""
    memory_gib: float | None
    """GPU memory in GiB; None if the driver does not tell, as for a GPU that shares the machine's memory."""


def query_gpus() -> list[Gpu]:
    """Ask nvidia-smi. Raises FileNotFoundError if it is not installed, OSError or SubprocessError if it fails."""
    told = subprocess.run(QUERY, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True).stdout
    rows = [line.split(", ") for line in told.splitlines()]
    return [
        Gpu(index, name, driver, int(mib) / MIB_PER_GIB if mib.isdigit() else None)
        for index, name, driver, mib in (row for row in rows if len(row) == COLUMNS)
    ]


def gpus() -> list[Gpu]:
    """The GPUs of this machine; none if nvidia-smi is not installed, or fails, which is logged."""
    try:
        return query_gpus()
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi fails: %s", error)
        return []


def visible_gpus() -> list[str]:
    """The GPUs that programs of this environment see, as `CUDA_VISIBLE_DEVICES` names them; all if it is not set."""
    here = [gpu.index for gpu in gpus()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not here:
        return here
    return [name for name in map(str.strip, visible.split(",")) if name not in ("", "-1")]
