"""Processor time of a capture beside its inference: `python -m tests.benchmarks.beside_the_gpu [COUNT]`.

The engine `trellis` is given a geometry of the size that dataset_gpu.py has (621,000 faces, 430,000 gaussians) at once,
in the place of an inference. All stages run one after the other in one process. What is printed are processor seconds,
of all threads together: wall time depends on what else the machine does.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.dataset import use_store
from tests.benchmarks.forced_model import blob, make_captures
from tests.synthetic import field_mesh

CELLS = 178  # of the grid in which the object is meshed, each face then in four: some 620,000 faces
GAUSSIANS = 430_000

spent: dict[str, list[float]] = {}
"""Processor seconds of each call, by name."""


class Spent:
    """An observer of the stages."""

    def started(self, name: str) -> None:
        self._begun = time.process_time()

    def progressed(self, name: str, fraction: float, note: str) -> None:
        pass

    def finished(self, timing: Any) -> None:
        spent.setdefault(timing.name, []).append(time.process_time() - self._begun)


def measured(owner: Any, name: str, shown: str) -> None:
    """From now on the calls of a function are measured."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def measuring(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent.setdefault(shown, []).append(time.process_time() - begun)

    setattr(owner, name, measuring)


def geometry(names: Sequence[str]) -> Any:
    """The forced object as an output of the engine."""
    from tasks.inference.trellis.trellis_output import TrellisOutput

    rng = np.random.default_rng(0)
    mesh = field_mesh(blob, half=0.5, cells=CELLS).subdivide()
    normals = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    points = mesh.vertices - blob(mesh.vertices)[:, None] * normals  # the new vertices too lie on the surface
    colours = 0.5 + 0.3 * np.sin(10 * points)
    shapes = {"xyz": (3,), "features_dc": (1, 3), "scaling": (3,), "rotation": (4,), "opacity": (1,)}
    return TrellisOutput(
        vertices=points.astype(np.float32),
        faces=mesh.faces.astype(np.int32),
        vertex_attrs=np.concatenate([colours, normals], axis=1).astype(np.float32),
        gaussians={name: rng.random((GAUSSIANS, *shape), np.float32) for name, shape in shapes.items()},
        gaussian_init={},
        variant="none",
        views=tuple(names),
        reduced=False,
    )


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        use_store(folder)
        make_captures(folder / "in", count)
        from flows.reconstruct import finish, prepare
        from tasks.dataset.plan import plan
        from tasks.inference import reconstruction
        from tasks.inference.registry import TRELLIS, EngineChoice
        from tasks.inference.trellis.trellis_engine import Trellis
        from tasks.progress import Timings, observed_by
        from tasks.settings import Parameters

        Trellis.has_weights = False
        TRELLIS.reconstruct = lambda views, *_: geometry([view.name for view in views])  # type: ignore[method-assign]
        measured(TRELLIS, "reconstruct", "  (the stand-in, part of infer)")
        measured(reconstruction, "register", "  register, part of infer")
        engine, parameters = EngineChoice(name="trellis", version="0", reason=""), Parameters()
        for planned in plan(str(folder / "in"), str(folder / "out"), engine, parameters).pending:
            assert planned.listing is not None
            timings = Timings()
            with observed_by(timings), observed_by(Spent()):
                prepared = prepare(planned.listing, engine, parameters, planned.upload)
                with prepared.capture.in_scratch():
                    made = reconstruction.infer(prepared.capture, prepared.cameras, engine, parameters.infer, None)
                    report = finish(prepared, made, parameters, timings).report
                    print(report.status, [check for check in report.checks if not check.passed], made.registration)
    for name, seconds in spent.items():
        print(f"{name:32}{statistics.median(seconds):6.2f}")
    print(f"{len(spent['publish'])} captures, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
