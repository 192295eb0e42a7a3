"""A machine with a GPU, as far as a program can see: a stand-in for nvidia-smi, TRELLIS and its published weights.

Used by the tests and benchmarks of the `trellis` engine that need no GPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tasks.store.location import sha256_of

STAND_IN = Path(__file__).with_name("trellis_stand_in")
REVISION = "a" * 40
PIPELINE = "Stable-X/trellis-vggt-v0-2"


def list_gpus(programs: Path, count: int) -> None:
    """Make the folder `programs` with an nvidia-smi that lists so many GPUs."""
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{index}, Stand-in GPU, 580.1, 81920'\n" for index in range(count)))
    smi.chmod(0o755)


def gpu_environment(folder: Path, gpus: int = 1) -> dict[str, str]:
    """Variables that make this machine look as if it had GPUs; the weights are on the mirror `folder`/mirror."""
    programs, mirror = folder / "bin", folder / "mirror"
    list_gpus(programs, gpus)
    content = f"weights of {PIPELINE}".encode()
    file = mirror / PIPELINE / REVISION / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    entry = {"path": file.name, "bytes": len(content), "sha256": sha256_of(content)}
    source = {"repository": PIPELINE, "revision": REVISION, "files": [entry]}
    (folder / "weights.json").write_text(json.dumps({"sources": [source]}))
    return {
        "PATH": f"{programs}:/usr/bin:/bin",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
        "CAPTURE2MESH_TRELLIS_ROOT": str(STAND_IN),
        "CAPTURE2MESH_WEIGHTS": str(folder / "weights"),
        "CAPTURE2MESH_WEIGHTS_LIST": str(folder / "weights.json"),
        "CAPTURE2MESH_WEIGHTS_MIRROR": mirror.as_uri(),
        "STAND_IN_LOG": str(folder / "log"),
    }


def views_only(capture: Path) -> Path:
    """The capture without depth and cameras; the alpha of its views says what the object is."""
    shutil.rmtree(capture / "depth")
    (capture / "transforms.json").unlink()
    return capture
