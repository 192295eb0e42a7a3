"""Errors of the model's process, in the words that cross the channel. `model.py` raises and translates them."""

from __future__ import annotations

import re
import sys
from typing import Any

GIB = 2**30

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
DEVICE_LOST = re.compile(r"CUDA error|Cuda error|CUDA driver error|STATUS_EXECUTION_FAILED|STATUS_INTERNAL_ERROR")
NOT_BUILT_FOR_DEVICE = re.compile(r"no kernel image", re.IGNORECASE)
# On the CPU the size is in bytes
ALLOCATION = re.compile(r"tried to allocate ([\d.]+) (?:([KMG])iB|bytes)", re.IGNORECASE)
# PyTorch's message goes on with the size of its cache and with settings to try
ADVICE = " Of the allocated memory"
# Errors of urllib, huggingface_hub and safetensors, by name; other libraries' errors are found by their base class
WEIGHTS_ERRORS = {"URLError", "HTTPError", "RepositoryNotFoundError", "EntryNotFoundError", "SafetensorError"}


class Fault(Exception):
    """An error that the parent has a class for.

    kind: OutOfMemory, MissingImport, NoCuda, Unsupported, WeightsCorrupt or EmptyResult. facts: values beside the
    message, for example `needed_gib`.
    """

    def __init__(self, kind: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.kind, self.facts = kind, facts


def fault_of(error: BaseException, loading: bool = False) -> dict[str, Any]:
    """Describe an error for the parent: its kind (`fault`), a message and facts.

    The message begins with the first cause, because upstream's handlers hide it. loading: True while weights are read;
    a missing file then means missing weights.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    chain.reverse()
    message = _line(chain[0])
    if len(chain) > 1:
        message += f" (it surfaced as {_line(error)})"
    for cause in chain:
        if isinstance(cause, Fault):
            return {"fault": cause.kind, "message": str(cause), **cause.facts}
    for cause in chain:
        exhausted = isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError"
        if exhausted or OUT_OF_MEMORY.search(str(cause)):
            return {"fault": "OutOfMemory", "message": message, **_memory(str(cause))}
    for cause in chain:
        if DEVICE_LOST.search(str(cause)) and not NOT_BUILT_FOR_DEVICE.search(str(cause)):
            return {"fault": "DeviceLost", "message": message}
        if isinstance(cause, ImportError):
            return {"fault": "MissingImport", "message": message, "name": cause.name or str(cause)}
        names = {base.__name__ for base in type(cause).__mro__}
        if loading and (isinstance(cause, FileNotFoundError | ConnectionError) or names & WEIGHTS_ERRORS):
            return {"fault": "WeightsMissing", "message": message}
    return {"fault": "Other", "message": message}


def _line(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition(ADVICE)[0]}" if lines else type(error).__name__


def _memory(message: str) -> dict[str, float | None]:
    """Return the GiB that were asked for, if the message names them, and the GiB of GPU memory that were free."""
    allocation = ALLOCATION.search(message)
    size = {None: 1, "K": 2**10, "M": 2**20, "G": 2**30}
    needed = float(allocation[1]) * size[allocation[2]] / GIB if allocation else None
    torch = sys.modules.get("torch")
    free = torch.cuda.mem_get_info()[0] / GIB if torch is not None and torch.cuda.is_available() else None
    return {"needed_gib": needed, "free_gib": free}
