"""Time and memory of the `trellis` engine's network at full size: `python -m tests.benchmarks.trellis` on a GPU.

Random weights (8 GB) are written to a folder first. They show no object, so the geometry is forced (`forced_geometry`);
every network runs all the same. Each measurement is a process of its own. It needs torch, safetensors, numpy and
Pillow, not the whole project.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.inference.trellis.process.network import pipeline
from tasks.inference.trellis.process.network.loader import WeightPlaces, load
from tests.benchmarks.forced_geometry.sitecustomize import force_networks
from tests.benchmarks.random_weights import FULL, FULL_CHANNELS, make

GIB = 2**30
ASKED = pipeline.Request(seed=42, structure_steps=30, structure_strength=7.5, latent_steps=12, latent_strength=3.0)
RUNS = 4


def measure(counts: list[int], compiles: bool, limit_gib: float) -> None:
    """Print a line of JSON for the loading and for each number of views."""
    if limit_gib:
        whole = torch.cuda.get_device_properties("cuda").total_memory
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / whole)
    begun = time.perf_counter()
    torch.zeros(1, device="cuda")
    context = time.perf_counter()
    networks = load(WeightPlaces.of(os.environ), torch.device("cuda"))
    torch.cuda.synchronize()
    ready = time.perf_counter()
    gc.collect()
    torch.cuda.empty_cache()
    force_networks(pipeline)
    made = pipeline.ViewsToMesh(networks, compiles)
    tell(
        {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "compiled": compiles,
            "limit_gib": limit_gib, "cuda_start_s": context - begun, "load_s": ready - context,
            "resident_gib": torch.cuda.memory_allocated() / GIB,
        }
    )  # fmt: skip
    random = np.random.default_rng(0)
    for count in counts:
        views = list(random.integers(0, 255, (count, 518, 518, 3), dtype=np.uint8))
        walls, outputs = [], list[list[Tensor]]()
        torch.cuda.reset_peak_memory_stats()
        result: Any = None
        for _ in range(RUNS):
            gc.collect()
            begun = time.perf_counter()
            result = made.run(views, ASKED, lambda fraction: None)
            tensors = [result.mesh.vertices, result.mesh.faces, result.mesh.attributes, *result.gaussians.values()]
            outputs = [*outputs[-1:], [tensor.cpu() for tensor in tensors]]
            walls.append(time.perf_counter() - begun)
        same = all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        tell(
            {
                "views": count, "cold_s": walls[0], "warm_s": walls[1:], "phases_s": result.seconds,
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                "same_bytes": same, "finite": all(bool(tensor.isfinite().all()) for tensor in outputs[-1]),
                "vertices": len(outputs[-1][0]), "faces": len(outputs[-1][1]), "gaussians": len(outputs[-1][3]),
            }
        )  # fmt: skip


def tell(values: dict[str, Any]) -> None:
    """Print the values, rounded, as one line."""
    print(json.dumps(values, default=str), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of random weights; made if it is not there")
    parser.add_argument("--views", type=int, nargs="+", default=[6, 8, 16])
    parser.add_argument("--limit-gib", type=float, default=12, help="memory of the smaller card that 8 views must fit")
    parser.add_argument("--one", choices=["plain", "compiled", "limit"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        limit = asked.limit_gib if asked.one == "limit" else 0
        measure([8] if limit else asked.views, asked.one == "compiled", limit)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.weights or Path(scratch) / "weights"
        if not folder.exists():
            make(folder, FULL, FULL_CHANNELS, "cuda")
            torch.cuda.empty_cache()
        os.environ |= {"HF_HOME": str(folder / "hf"), "TORCH_HOME": str(folder / "torch")}
        for name in ("plain", "limit", "compiled"):
            command = [sys.executable, "-m", "tests.benchmarks.trellis", "--one", name]
            command += ["--limit-gib", str(asked.limit_gib), "--views", *map(str, asked.views)]
            print(f"# {name}", flush=True)
            subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
