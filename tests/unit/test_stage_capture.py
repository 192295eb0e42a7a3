"""stage_capture reads what was listed, or says that it is another upload by now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.capture.listing import list_capture
from tasks.capture.stage_capture import stage_capture
from tasks.errors import CaptureReplaced
from tasks.settings import settings
from tasks.store.location import Location
from tasks.store.results import store
from tests.support.tiny import tiny_capture


@pytest.fixture
def capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CAPTURE2MESH_STORE", str(tmp_path / "store"))
    for function in (settings, store):
        function.cache_clear()
    for path, data in tiny_capture().items():
        file = tmp_path / "mug" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    yield tmp_path / "mug"
    for function in (settings, store):
        function.cache_clear()


@pytest.mark.parametrize("written", ["views/view_000.png", "depth/view_003.png", "views/view_009.png", "manifest.json"])
def test_upload_anew_while_it_is_read(written: str, capture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, read = list_capture(str(capture)), Location.read

    def while_it_is_read(location: Location) -> bytes:
        if location.name == "transforms.json":
            (capture / written).write_bytes(b"of another upload")
        return read(location)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "read", while_it_is_read)
        with pytest.raises(CaptureReplaced, match="anew"):
            stage_capture(listing)
    assert stage_capture.stored(listing) is None
    anew = list_capture(str(capture))
    assert stage_capture(anew).files != ()
    assert not listing.same_upload(anew)


def test_marker_that_comes_while_it_is_read_changes_nothing(capture: Path) -> None:
    listing = list_capture(str(capture))
    (capture / "_COMPLETE").touch()
    staged = stage_capture(listing)
    assert [file.path for file in staged.files] == [file.path for file in listing.files]
