"""`capture2mesh look` says what a folder holds and what would happen, and runs nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from tests.support.tiny import Content, tiny_capture
from tests.synthetic.layouts import WRITERS, bop, scene

SHOTS = scene()


def look(folder: Path, content: Content, *more: str) -> tuple[int, dict[str, str], str]:
    """Exit status, the facts by label, and everything that was printed."""
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    result = CliRunner().invoke(app, ["look", str(folder), "--engine", "fusion", *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if " " in line.strip())
    return result.exit_code, facts, result.output


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_told(layout: str, tmp_path: Path, own_store: Path) -> None:
    code, facts, _ = look(tmp_path / "scan", WRITERS[layout][1](SHOTS))
    assert code == 0
    assert facts["layout"].startswith(f"{WRITERS[layout][0]} (")
    assert facts["views"].startswith("5, 5 with depth")
    assert facts["cameras"].startswith("5 of 5 by ") and "focal length 66.0 px" in facts["cameras"]
    assert facts["pictures"] == "64 x 48 px"
    assert "m, steps of" in facts["depth"]
    assert facts["would"].startswith("run  fusion")
    assert not list(own_store.rglob("*"))


def test_the_distance_and_the_heights_of_the_cameras(tmp_path: Path) -> None:
    _, facts, _ = look(tmp_path / "scan", WRITERS["own"][1](SHOTS))
    # they rise from 0.2 to 0.6 radians, and look past the middle by up to 0.03
    assert re.match(r"(9|10|11|12|13) to 3[2-6] degrees high, largest gap around 7[0-4] degrees", facts["around"])


def test_a_capture_that_would_be_refused_has_every_reason(tmp_path: Path) -> None:
    content = tiny_capture()
    del content["depth/view_002.png"]
    content["depth/view_001.png"] = b""
    code, _, output = look(tmp_path / "mug", content)
    assert code == 2
    assert "view_002" in output
    assert "  - depth/view_001.png: is empty" in output


def test_what_is_not_a_capture_is_an_error(tmp_path: Path) -> None:
    code, _, output = look(tmp_path / "scans", {"mug.zip": b"x"})
    assert code == 2 and "unpack it" in output


def test_one_object_of_a_scene(tmp_path: Path) -> None:
    look(tmp_path / "000048", bop(SHOTS, objects=2))
    code, facts, _ = look(tmp_path / "000048" / "object_6", {})
    assert code == 0 and facts["layout"].endswith(", object_6")
