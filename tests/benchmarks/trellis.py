"""Time and memory of the `trellis` engine on a GPU: `python tests/benchmarks/trellis.py --trellis-root ROOT`.

For each number of views a new process of the model takes two captures: a cold one, which waits for it, and a warm one.
Without `--weights` it runs on this machine's bundle; with it, on what `random_weights.py` made there, and then with
`forced_geometry`, as random weights show no object. Views are the bundled sample's, enlarged to a photograph's size.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from tasks.capture.views import View

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "data" / "mug"
STEPS = ("imports", "load", "ready", "preprocess", "run", "fetch", "ours", "safetensors", "to_glb", "total", "peak_gib")


def use(trellis_root: Path, weights: Path | None) -> None:
    """Set this process's environment; before its settings are first read."""
    os.environ["CAPTURE2MESH_TRELLIS_ROOT"] = str(trellis_root.resolve())
    if weights is not None:
        os.environ["CAPTURE2MESH_WEIGHTS"] = str(weights.resolve() / "weights")
        os.environ["CAPTURE2MESH_WEIGHTS_LIST"] = str(weights.resolve() / "weights.json")
        paths = [str(HERE / "forced_geometry"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def sample(count: int, pixels: int) -> list[View]:
    """Views of the bundled sample, evenly spread, without depth and cameras."""
    from tasks.capture.views import load_views

    names = [path.relative_to(SAMPLE).as_posix() for path in SAMPLE.rglob("*") if path.is_file()]
    views = load_views(names, lambda name: (SAMPLE / name).read_bytes())
    chosen = [views[index] for index in np.linspace(0, len(views), count, endpoint=False).astype(int)]
    size = (pixels, pixels)
    return [
        replace(
            view,
            image=np.asarray(Image.fromarray(view.image).resize(size)),
            mask=np.asarray(Image.fromarray(view.mask).resize(size)),
            depth=None,
            camera=None,
        )
        for view in chosen
    ]


def measure(views: Sequence[View], scratch: Path) -> Iterator[dict[str, float]]:
    """Seconds by step, and peak GiB, of a cold capture and a warm one.

    ready: from the call until the model starts on the views. ours: of a warm call, all but preprocess and run.
    """
    from tasks.inference.trellis.model_process import runtime_here
    from tasks.inference.trellis.trellis_engine import Trellis
    from tasks.settings import InferParameters

    engine = Trellis(lambda: replace(runtime_here(), scratch=scratch))
    try:
        for cold in (True, False):
            begun = time.perf_counter()
            output = engine.reconstruct(views, InferParameters(), lambda fraction: None)
            answered = time.perf_counter()
            data = output.to_safetensors()
            handed = time.perf_counter()
            textured = engine.to_glb(data)
            ended = time.perf_counter()
            inside = output.measured
            beside = answered - begun - inside["preprocess"] - inside["run"]
            assert engine._loaded is not None
            started = engine._loaded.header["seconds"] | {"ready": beside - inside["fetch"]}
            print(
                f"# {len(views)} views, {'cold' if cold else 'warm'}: {len(output.vertices)} vertices,"
                f" {len(output.faces)} faces, {len(output.gaussians['xyz'])} gaussians, {len(data) / 1e6:.0f} MB;"
                f" to_glb: {len(textured.faces)} faces, decimated by {textured.decimated_by}",
                flush=True,
            )
            yield (
                inside
                | (started if cold else {"ours": beside})
                | {
                    "safetensors": handed - answered,
                    "to_glb": ended - handed,
                    "total": ended - begun,
                }
            )
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trellis-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--views", type=int, nargs="+", default=[6, 16])
    parser.add_argument("--pixels", type=int, default=1080)
    asked = parser.parse_args()
    use(asked.trellis_root, asked.weights)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in asked.views:
            views = sample(count, asked.pixels)
            for name, seconds in zip(("cold", "warm"), measure(views, Path(scratch)), strict=True):
                rows.append(
                    f"| {count} {name} | "
                    + " | ".join(f"{seconds[step]:.2f}" if step in seconds else "" for step in STEPS)
                    + " |"
                )
    print("| views | " + " | ".join(STEPS) + " |\n|" + "---|" * (len(STEPS) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
