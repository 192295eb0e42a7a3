"""The Python example of the README runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.running import ROOT, TIMEOUT, CommandLine


def test_python_example_reconstructs_the_sample(tmp_path: Path, prefect_server: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # its output is relative as well, and lands in this folder
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    finished = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=CommandLine(tmp_path, prefect_server).environment | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    folder, status, faces = finished.stdout.split()
    assert (status, Path(folder).parent) == ("normal", tmp_path / "out" / "mug")
    assert int(faces) > 1000 and (Path(folder) / "mesh.glb").is_file()
