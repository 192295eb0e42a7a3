"""Accuracy of the fusion engine and the texture on captures of known truth: `python tests/benchmarks/quality.py`.

Figures are of the mesh as it would be published, at 20,000 faces. The last line is the bundled sample with every 6th
view held out; the captures above it use all of their views.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.routes import SAMPLE, Figures, figures, load, our_route, split
from tests.data.make_sample import mug_scene
from tests.synthetic import SHAPES, make_capture, shape_mesh

CONDITIONS: dict[str, dict[str, Any]] = {
    "noise-free": {},
    "noise 0.5 %, holes 5 %": {"depth_noise": 0.005, "depth_holes": 0.05},
    "outliers 1 %": {"depth_outliers": 0.01},
    "all of these": {"depth_noise": 0.005, "depth_holes": 0.05, "depth_outliers": 0.01},
    "no alpha, mm steps": {"alpha": False, "depth_scale": 0.001},
    "8 views": {"views": 8},
}
LINE = "{:12} {:24} {:>9} {:>8} {:>10} {:>10} {:>7} {:>8}  {}"


def report(shape: str, condition: str, got: Figures, steps: dict[str, float]) -> None:
    numbers = (
        f"{got.chamfer:.4f}",
        f"{got.f_score:.4f}",
        str(got.watertight),
        got.components,
        "" if np.isnan(got.psnr_covered) else f"{got.psnr_covered:.1f}",
    )
    spent = "  ".join(f"{step} {seconds:.1f}" for step, seconds in steps.items())
    print(LINE.format(shape, condition, *numbers, f"{got.seconds:.1f}", spent), flush=True)


def main() -> None:
    print(LINE.format("shape", "condition", "chamfer %", "F 1 %", "watertight", "components", "PSNR", "seconds", ""))
    for shape in SHAPES:
        for condition, settings in CONDITIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                make_capture(Path(folder), shape, **settings)
                views = load(Path(folder))
            mesh, steps = our_route(views)
            report(shape, condition, figures(mesh, shape_mesh(shape), [], sum(steps.values())), steps)
    used, held_out = split(load(SAMPLE))
    mesh, steps = our_route(used)
    truth, _ = mug_scene()
    report("mug (sample)", "held out every 6th", figures(mesh, truth, held_out, sum(steps.values())), steps)
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB, captures and metrics included"
    )


if __name__ == "__main__":
    main()
