"""When an upload is complete: manifest, marker, quiet period; and by whose clock."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.capture.completeness import StorageState, awaited
from tasks.capture.listing import ListedFile, Listing, list_capture

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
QUIET, VIEWS = 60.0, 2
LONG_AGO, JUST_NOW = NOW - timedelta(hours=1), NOW - timedelta(seconds=QUIET - 1)
URI = "s3://captures/mug"


def listing(
    uploaded_at: datetime = LONG_AGO, manifest: object = None, *, marker: bool = False, views: int = VIEWS
) -> Listing:
    text = manifest if isinstance(manifest, str | None) else json.dumps({"schema": 1, "files": manifest})
    return Listing(
        uri=URI,
        id="mug",
        files=tuple(ListedFile(path=f"views/{number}.png", bytes=100, version="1") for number in range(views)),
        manifest=text,
        marker=marker,
        others=(),
        links_outside=(),
        uploaded_at=uploaded_at,
    )


def missing(capture: Listing, now: datetime = NOW, *open_uploads: str) -> str | None:
    return awaited(capture, StorageState(now, frozenset(open_uploads)), QUIET, VIEWS)


@pytest.mark.parametrize(
    "files",
    [
        [{"path": "views/0.png", "bytes": 100}, {"path": "views/1.png", "size": 100}],
        [{"path": "views/0.png"}],
        [{"path": "views/1.png", "bytes": 100}, {"path": "notes.txt", "bytes": 7}, {"path": "../x", "bytes": 1}],
    ],
)
def test_manifest_is_enough_where_all_is_there(files: object) -> None:
    assert missing(listing(NOW, files), NOW, f"{URI}/views/2.png") is None


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([{"path": "views/7.png", "bytes": 100}], "views/7.png"),
        ([{"path": "views/0.png", "bytes": 99}], "views/0.png"),
        ([{"path": "views/0.png", "bytes": 101}], "views/0.png"),
        ([{"path": f"depth/{number}.png", "bytes": 1} for number in range(9)], "depth/2.png and 6 more"),
        ("{", "that can be read"),
        ('{"schema": 2, "files": []}', "that can be read"),
    ],
)
def test_manifest_says_what_is_missing_whatever_else_speaks_for_it(files: object, reason: str) -> None:
    found = missing(listing(LONG_AGO, files, marker=True))
    assert found is not None and reason in found


def test_marker_is_enough() -> None:
    assert missing(listing(NOW, marker=True, views=0), NOW, f"{URI}/views/2.png") is None


def test_quiet_period() -> None:
    assert missing(listing(LONG_AGO)) is None
    assert missing(listing(NOW - timedelta(seconds=QUIET))) is None
    assert "12:00:01" in (missing(listing(JUST_NOW)) or "")
    assert missing(listing(NOW + timedelta(days=1))) is not None
    assert "1 of at least 2" in (missing(listing(views=1)) or "")


def test_open_upload_is_waited_for() -> None:
    assert "views/9.png" in (missing(listing(), NOW, f"{URI}/views/9.png") or "")
    assert missing(listing(), NOW, f"{URI}2/views/9.png") is None


def test_marker_of_an_older_upload_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    view, marker = tmp_path / "views" / "0.png", tmp_path / "_COMPLETE"
    for path in view, marker:
        path.touch()
    os.utime(marker, (1000, 1000))
    for written, complete in (900, True), (1000, True), (1001, False):
        os.utime(view, (written, written))
        assert list_capture(str(tmp_path)).marker is complete
