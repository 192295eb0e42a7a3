"""A list of captures that lies in a bucket."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.dataset.plan import plan
from tasks.inference.registry import resolve_engine
from tasks.settings import Parameters
from tests.support.running_s3 import S3
from tests.support.tiny import write_tiny_capture


def test_paths_of_a_list_in_a_bucket_are_relative_to_it(s3: S3, worker_here: None, tmp_path: Path) -> None:
    mug = write_tiny_capture(tmp_path / "mug")
    url = s3.upload(mug, "captures/planned/day/mug")
    s3.admin.pipe_file("captures/planned/list.txt", f"day/mug\n{url}/views\n{mug}-2\n".encode())
    shutil.copytree(mug, f"{mug}-2")  # an absolute path is a path of this machine
    found = plan("s3://captures/planned/list.txt", str(tmp_path / "out"), resolve_engine("fusion"), Parameters())
    assert {each.id: (each.upload.uri, each.state) for each in found.captures} == {
        "mug": (url, "new"),
        "mug-2": (f"{mug}-2", "new"),
        "views": (f"{url}/views", "invalid"),
    }
