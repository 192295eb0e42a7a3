"""stage_capture reads what was listed, or says that it is another upload by now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.capture.listing import list_capture
from tasks.capture.stage_capture import stage_capture
from tasks.errors import CaptureReplaced
from tasks.store.location import Location
from tests.support.tiny import write_tiny_capture


@pytest.fixture
def capture(own_store: Path, tmp_path: Path) -> Path:
    return write_tiny_capture(tmp_path / "mug")


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
