"""Makes torch's allocation of the views' tensor fail, in the process that has this folder in its PYTHONPATH.

The file at FAILING_ALLOCATIONS holds how many times it is still to fail. The error is torch's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

MORE_THAN_ANY_MACHINE_HAS = 2**60
VIEWS_DIMENSIONS = 4  # views, rows, columns, channels

_from_numpy = torch.from_numpy


def from_numpy(array: Any) -> torch.Tensor:
    left = Path(os.environ["FAILING_ALLOCATIONS"])
    if array.ndim == VIEWS_DIMENSIONS and (times := int(left.read_text())):
        left.write_text(str(times - 1))
        torch.empty(MORE_THAN_ANY_MACHINE_HAS, dtype=torch.uint8)
    return _from_numpy(array)


torch.from_numpy = from_numpy
