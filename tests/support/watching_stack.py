"""A stack that watches its bucket, and many uploads to it; used by a test and by tests/benchmarks/uploads.py.

The `trellis` engine on its stand-in does the work, so that what is uploaded goes through `batch/cuda`.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from infra.stack import Stack
from tests.support.gpu_machine import gpu_environment
from tests.support.running_stack import ENDED, Running, started

UPLOADERS = 8
"""Threads."""


@contextmanager
def watching(folder: Path) -> Iterator[Running]:
    """A stack whose engine is the stand-in, which writes its log to `folder`/log."""
    with started(folder / "state", CAPTURE2MESH_STACK_WATCH="1", **gpu_environment(folder)) as stack:
        Stack(stack.settings).server.set_engine("trellis")
        yield stack


def upload(stack: Running, views: Path, names: Sequence[str]) -> None:
    """Upload one capture for each name, all different, several at a time, the marker last."""
    uploader = Stack(stack.settings).s3.client("uploader")
    first, *others = sorted(path for path in views.iterdir())

    def put(name: str) -> None:
        for path in others:
            uploader.pipe_file(f"captures/{name}/views/{path.name}", path.read_bytes())
        uploader.pipe_file(f"captures/{name}/views/{first.name}", marked(first, names.index(name)))
        uploader.pipe_file(f"captures/{name}/_COMPLETE", b"")

    with ThreadPoolExecutor(UPLOADERS) as pool:
        list(pool.map(put, names))


def marked(view: Path, number: int) -> bytes:
    """A view with a number in its first pixel."""
    image = Image.open(view)
    image.putpixel((0, 0), (number // 256, number % 256, 0, 0))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def published(stack: Running) -> Counter[str]:
    """How many assets there are of each capture."""
    assets = Stack(stack.settings).s3.client("worker").find("assets")
    return Counter(path.split("/")[1] for path in assets if path.endswith("/_SUCCESS"))


def batches(stack: Running) -> list[Any]:
    found: list[Any] = stack.ask("POST", "/flow_runs/filter", flows={"name": {"any_": ["batch"]}})
    return found


def done(stack: Running, names: Sequence[str]) -> bool:
    """True if all are published and no batch waits or runs."""
    return published(stack).keys() >= set(names) and all(run["state_type"] in ENDED for run in batches(stack))


def inferences(folder: Path) -> int:
    """How often the stand-in has run."""
    return sum(line.startswith("run") for line in (folder / "log").read_text().splitlines())
