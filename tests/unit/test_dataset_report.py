"""The dataset report: records for machines, reasons in groups, and a page that no data can break out of."""

from __future__ import annotations

import base64
import csv as csv_module
import hashlib
import io
import json
import re
import time
import tomllib
from datetime import UTC, datetime
from fnmatch import fnmatch
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tasks.dataset.page import EMBED_BYTES, Totals, embeddable, page
from tasks.dataset.rows import Row, csv, jsonl, reasons
from tests.support.published import FACES, failed_row, published_row, refused_row, report

EVIL = "<img src=x onerror=alert(1)>"
BREAKING_OUT = "boom </script><script>alert(1)</script><!-- {{data}}"
TOTALS = Totals(finished_at=datetime(2026, 11, 22, 12, tzinfo=UTC), seconds=600, reconstructed=2)
ROWS = [
    published_row("chairs/oak #1"),
    published_row("mug", failed=["watertight"]),
    refused_row("lamp", 3),
    failed_row(EVIL, BREAKING_OUT),
    Row(id="later", uri="s3://c/later", state="pending"),
]


class _Elements(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and the texts of its scripts by id."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self._in_script = False
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            key = self.found[-1][1].get("id")
            self.scripts[key] = self.scripts.get(key, "") + data

    def data(self) -> Any:
        return json.loads(self.scripts["data"])


def rendered(rows: list[Row] = ROWS, **more: Any) -> _Elements:
    return _Elements(page("autumn <b>", rows, TOTALS, **more))


def test_a_line_of_json_for_each_capture() -> None:
    lines = [json.loads(line) for line in jsonl(ROWS).splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in ROWS]
    good, warned, refused, failed, pending = lines
    assert (good["faces"], good["engine"], good["gpu_seconds"], good["folder"]) == (
        FACES,
        "fusion",
        4.5,
        "chairs/oak #1/ab12",
    )
    assert warned["failed_checks"] == ["watertight"]
    assert refused["reason"] == ROWS[2].reason and refused["faces"] is None
    assert failed["reason"] == BREAKING_OUT
    assert pending["seconds"] is None and pending["folder"] == ""


def test_csv_has_the_same_and_runs_in_no_spreadsheet() -> None:
    rows = [*ROWS, failed_row("=HYPERLINK(1)", '-1+2, "x"\nand more')]
    found = list(csv_module.DictReader(io.StringIO(csv(rows).decode())))
    assert [line["state"] for line in found] == [row.state for row in rows]
    assert found[0]["faces"] == str(FACES) and found[1]["failed_checks"] == "watertight"
    assert found[-1]["id"] == "'=HYPERLINK(1)"
    assert found[-1]["reason"] == '\'-1+2, "x"\nand more'


def test_fidelity_is_told_where_it_was_measured() -> None:
    row = published_row("mug", report=report("mug", fidelity={"psnr_db": 31.5}))
    assert json.loads(jsonl([row]))["psnr_db"] == 31.5


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (refused_row("lamp", 3), ("has no depth map; add …", "transforms.json: is missing; add it")),
        (failed_row("lamp", "lamp: took longer than 600 s"), ("took longer than … s",)),
        (failed_row("a", "s3://c/a/views/1.png: access denied"), ("access denied",)),
        (published_row("mug", failed=["views"]), ("check failed: views",)),
        (published_row("mug"), ()),
    ],
)
def test_reasons_are_words_that_captures_share(row: Row, expected: tuple[str, ...]) -> None:
    assert reasons(row) == expected


def test_reasons_are_counted_by_capture_and_lead_back_to_the_rows() -> None:
    data = rendered([refused_row(f"lamp-{index}", index) for index in range(1, 5)] + [published_row("mug")]).data()
    counted = {reason["text"]: reason["captures"] for reason in data["reasons"]}
    assert counted == {"has no depth map; add …": 4, "transforms.json: is missing; add it": 4}
    assert [sorted(row["reasons"]) for row in data["rows"]] == [[0, 1]] * 4 + [[]]


def test_no_data_becomes_markup() -> None:
    elements = rendered()
    (script,) = [text for key, text in elements.scripts.items() if key is None]
    assert "img" not in {tag for tag, _ in elements.found} and "alert(1)" not in script
    assert [attributes.get("id") for tag, attributes in elements.found if tag == "script"] == ["data", None, "viewer"]
    shown = elements.data()["rows"][3]
    assert (shown["id"], shown["reason"]) == (EVIL, BREAKING_OUT)
    assert b"autumn &lt;b&gt;" in page("autumn <b>", ROWS, TOTALS)


def test_only_the_pages_own_script_may_run() -> None:
    elements = rendered()
    (policy,) = [attributes["content"] for _, attributes in elements.found if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(elements.scripts[None].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "http" not in policy and "unsafe-inline' blob" not in policy


def test_nothing_is_linked_to_another_host() -> None:
    links = [attributes[name] for _, attributes in rendered().found for name in ("src", "href") if name in attributes]
    assert set(links) == {"data:,", "report.csv", "report.jsonl"}


def test_urls_are_relative_and_quoted() -> None:
    good, *_, hostile = rendered([*ROWS, published_row("javascript:alert(1)")]).data()["rows"]
    assert good["folder"] == "../chairs/oak%20%231/ab12/"
    assert good["preview"] == "previews/preview_000.png"
    assert hostile["folder"] == "../javascript%3Aalert%281%29/ab12/"


def test_totals() -> None:
    html = page("autumn", ROWS, TOTALS).decode()
    found = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert found == {
        "captures": "5",
        "published": "2",
        "reconstructed in this run": "2",
        "captures per hour": "12",
        "wall time": "10 min 00 s",
        "GPU seconds": "608.0",
        "GPU seconds per capture": "304.00",
    }


def test_nothing_done_and_nothing_there() -> None:
    html = page("empty", [], Totals(finished_at=TOTALS.finished_at, seconds=0, reconstructed=0)).decode()
    assert "<dt>captures per hour</dt><dd>-</dd>" in html
    assert jsonl([]) == b"" and csv([]).startswith(b"id,uri,state,reason")


def test_meshes_are_embedded_up_to_a_limit() -> None:
    assert rendered(meshes={"mug": b"glTF"}).scripts["mesh-1"] == base64.b64encode(b"glTF").decode()
    mesh = report("mug").mesh
    half = published_row("mug", report=report("mug", mesh=mesh.model_copy(update={"glb_bytes": EMBED_BYTES // 2})))
    assert embeddable([half, half, refused_row("lamp", 1)])
    assert not embeddable([half, half, published_row("chair")])


def test_ten_thousand_captures_stay_one_small_page() -> None:
    rows = [
        published_row(f"shelf/object-{index:05d}") if index % 10 else refused_row(f"shelf/object-{index:05d}", 30)
        for index in range(10_000)
    ]
    begun = time.monotonic()
    html = page("shelf", rows, TOTALS)
    assert time.monotonic() - begun < 60
    assert len(html) < 10_000_000
    assert len(_Elements(html).data()["rows"]) == 10_000


def test_the_viewer_is_what_its_licence_file_says() -> None:
    package = files("tasks.dataset")
    licences = (package / "model-viewer.LICENSES").read_text()
    assert hashlib.sha256((package / "model-viewer.min.js").read_bytes()).hexdigest() in licences
    assert "Apache License" in licences and "MIT License" in licences and "Redistribution and use" in licences
    assert "Apache License" in page("autumn", ROWS, TOTALS).decode()


def test_an_installed_distribution_has_the_pages_files() -> None:
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    there = [path.name for path in (root / "tasks" / "dataset").iterdir() if path.is_file()]
    others = [name for name in there if not name.endswith(".py")]
    assert len(others) == 5
    for name in others:
        assert any(fnmatch(name, pattern) for pattern in declared["tasks.dataset"]), name
