"""What lies in a folder or bucket: which captures there are, their ids, and what names their uploads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
import s3fs

from tasks.capture.layout import capture_of
from tasks.capture.listing import Listing, list_capture, list_captures, upload_key
from tasks.errors import InputError
from tasks.settings import ExportParameters, Parameters
from tasks.store.location import sha256_of
from tests.support.running_s3 import S3

FILES = ("views/a.png", "views/b.jpg", "depth/a.png", "transforms.json")
LITTER = (".DS_Store", "views/.DS_Store", "views/._a.png", "views/Thumbs.db", "views/desktop.ini", "views/.a.png.swp")
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
PARAMETERS = Parameters()

Put = Callable[..., str]
"""Puts files (a capture by default) below a path and gives the path's URL."""


@pytest.fixture(params=["folder", "bucket"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Put:
    if request.param == "folder":
        return lambda path, *files: put_in(tmp_path / path, *files)
    s3: S3 = request.getfixturevalue("s3")
    request.getfixturevalue("worker_here")
    prefix = f"captures/{request.node.name.replace('[', '-').rstrip(']')}"

    def upload(path: str, *files: str) -> str:
        for file in files or FILES:
            s3.admin.pipe_file(f"{prefix}/{path}/{file}".replace("/./", "/"), file.encode())
        return f"s3://{prefix}/{path}"

    return upload


def put_in(folder: Path, *files: str) -> str:
    for file in files or FILES:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return str(folder)


def root_of(url: str, path: str) -> str:
    return url.removesuffix(f"/{path}")


def paths(listing: Listing) -> set[str]:
    return {file.path for file in listing.files}


@pytest.mark.parametrize(
    ("path", "capture"),
    [
        ("views/a.png", ""),
        ("transforms.json", ""),
        ("mug/depth/a.png", "mug"),
        ("mug/views/deeper/a.png", "mug"),
        ("set/mug/_COMPLETE", "set/mug"),
        ("views/views/a.png", "views"),
        ("depth/mug/views/a.png", "depth/mug"),
        ("mug/readme.txt", None),
        ("readme.txt", None),
        ("mug/views.png", None),
    ],
)
def test_capture_that_a_file_is_of(path: str, capture: str | None) -> None:
    assert capture_of(path) == capture


def test_every_capture_of_a_dataset_is_found_as_it_is_listed_alone(put: Put) -> None:
    ids = ["cup", "mug", "mug/lid", "set 1/a+b", "set 1/ü", "zoo/depths", "zoo/x.png"]
    for path in ids:
        put(path)
    put("cup", "manifest.json", "notes.txt", "views/raw/a.png", "views/readme.txt", *LITTER, "_COMPLETE")
    put("no-capture", "transforms.json", "notes.txt", "manifest.json")
    put("no-capture/views-of-it", "a.png")
    root = root_of(put("mug"), "mug")

    found = list_captures(root)
    assert [listing.id for listing in found] == sorted(ids)
    assert found == [list_capture(f"{root}/{name}", root) for name in sorted(ids)]
    assert list_captures(f"{root}/") == found
    for listing in found:
        assert listing.uri == f"{root}/{listing.id}"
        assert paths(listing) == set(FILES)
    cup = found[0]
    assert cup.manifest == "manifest.json"
    assert set(cup.others) == {"views/raw/a.png", "views/readme.txt"}
    assert [listing.id for listing in found if listing.marker] == ["cup"]


def test_id_without_a_root_is_the_folders_name(put: Put) -> None:
    url = put("set/mug")
    assert list_capture(url).id == list_capture(f"{url}/").id == "mug"


def test_root_that_is_itself_a_capture_has_its_own_name(put: Put) -> None:
    url = put("mug")
    inner = put("mug/lid")
    whole, lid = list_captures(url)
    assert (whole.id, lid.id) == ("mug", "lid")
    assert whole == list_capture(url) == list_capture(url, url)
    assert lid == list_capture(inner)
    assert paths(whole) == set(FILES)


def test_bucket_that_is_itself_a_capture(s3: S3, worker_here: None) -> None:
    s3.admin.mkdir("mugbucket")
    try:
        for file in FILES:
            s3.admin.pipe_file(f"mugbucket/{file}", b"x")
        keys = {"AWS_ACCESS_KEY_ID": "admin-key-id", "AWS_SECRET_ACCESS_KEY": "admin-secret-0123456789"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            (found,) = list_captures("s3://mugbucket")
            assert found.id == "mugbucket"
            assert list_capture("s3://mugbucket") == list_capture("s3://mugbucket", "s3://mugbucket") == found
    finally:
        s3.admin.rm("mugbucket", recursive=True)


@pytest.mark.parametrize("files", [(), ("readme.txt",), LITTER])
def test_no_capture(files: tuple[str, ...], put: Put) -> None:
    url = put("mug", "views.txt", *files)
    with pytest.raises(InputError, match=r"mug: no capture there"):
        list_capture(url)
    assert list_captures(url) == []
    with pytest.raises(InputError, match="no capture there"):
        list_capture(f"{url}/nowhere")


def test_capture_outside_of_the_root_is_refused(put: Put) -> None:
    inside, outside = put("set/mug"), put("set-2/mug")
    root = root_of(inside, "mug")
    assert list_capture(inside, root).id == "mug"
    with pytest.raises(InputError, match="is not below"):
        list_capture(outside, root)


@pytest.mark.parametrize("name", ["a\\b", "c:x", "line\nfeed"])
def test_id_that_would_leave_the_output_is_refused(name: str, tmp_path: Path) -> None:
    put_in(tmp_path / name)
    with pytest.raises(InputError, match="cannot be the id of a capture"):
        list_capture(str(tmp_path / name), str(tmp_path))


def test_key_that_would_leave_the_output_is_refused() -> None:
    """A bucket's keys may contain `..`; SeaweedFS refuses them, not every storage does."""
    memory = fsspec.filesystem("memory")
    for file in FILES:
        memory.pipe_file(f"/dots/a/../../etc/{file}", b"x")
    with pytest.raises(InputError, match="cannot be the id of a capture"):
        list_capture("memory://dots/a/../../etc", "memory://dots")


def test_unknown_protocol_is_bad_input() -> None:
    for listed in (list_capture, list_captures):
        with pytest.raises(InputError, match="nowhere"):
            listed("nowhere://captures")


def test_links_that_leave_the_capture_are_told_and_not_read(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    put_in(elsewhere, "secret.png", "depth/a.png")
    root = tmp_path / "set"
    put_in(root / "mug", "views/a.png", "spare/b.png", "transforms.json")
    (root / "mug/views/b.png").symlink_to(root / "mug/spare/b.png")
    (root / "mug/views/out.png").symlink_to(elsewhere / "secret.png")
    (root / "mug/views/chain.png").symlink_to(root / "mug/views/out.png")
    (root / "mug/depth").symlink_to(elsewhere / "depth")
    (found,) = list_captures(str(root))
    assert found == list_capture(str(root / "mug"))
    assert paths(found) == {"views/a.png", "views/b.png", "transforms.json"}
    assert set(found.links_outside) <= {"views/out.png", "views/chain.png", "depth/a.png"}
    assert set(found.links_outside) >= {"views/out.png", "views/chain.png"}


def test_capture_that_is_a_link_itself_is_one(tmp_path: Path) -> None:
    put_in(tmp_path / "elsewhere" / "mug")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "cup").symlink_to(tmp_path / "elsewhere" / "mug")
    found = list_capture(str(tmp_path / "set" / "cup"))
    assert (found.id, found.links_outside) == ("cup", ())
    assert paths(found) == set(FILES)


def test_link_that_leads_round_in_a_circle_ends(tmp_path: Path) -> None:
    put_in(tmp_path / "set" / "mug")
    (tmp_path / "set" / "mug" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "mug" / "views" / "loop.png").symlink_to("loop.png")
    (tmp_path / "set" / "mug" / "views" / "dangling.png").symlink_to("nowhere.png")
    (found,) = list_captures(str(tmp_path / "set"))
    assert found == list_capture(str(tmp_path / "set" / "mug"))
    assert paths(found) == set(FILES)
    assert set(found.links_outside) == {"views/loop.png", "views/dangling.png"}


def test_newest_file_says_when_it_was_uploaded(tmp_path: Path) -> None:
    url = put_in(tmp_path / "mug", *FILES, "_COMPLETE")
    for path in (tmp_path / "mug").rglob("*.*"):
        os.utime(path, (NOON - 60, NOON - 60))
    os.utime(tmp_path / "mug" / "_COMPLETE", (NOON, NOON))
    assert list_capture(url).uploaded_at == datetime.fromtimestamp(NOON, UTC)
    assert list_capture(url).marker
    os.utime(tmp_path / "mug" / "depth/a.png", (NOON + 1, NOON + 1))
    later = list_capture(url)
    assert later.uploaded_at == datetime.fromtimestamp(NOON + 1, UTC)
    assert not later.marker  # an upload anew has begun


def key(url: str, engine: str = "fusion", parameters: Parameters = PARAMETERS) -> str:
    return upload_key(list_capture(url), engine, parameters)


def test_upload_key_is_of_all_that_changes_the_result(put: Put) -> None:
    url = put("mug")
    first = key(url)
    assert key(f"{url}/") == first
    assert key(url, "trellis") != first
    assert key(url, parameters=Parameters(export=ExportParameters(texture_px=2048))) != first
    put("mug", "readme.txt", *LITTER)
    assert key(url) == first
    put("mug", "depth/b.png")
    assert key(url) != first
    other = put("cup")
    assert key(other) != key(url)


def test_upload_key_takes_content_from_the_manifest_where_it_is_declared(put: Put, tmp_path: Path) -> None:
    url = put("mug")
    files = [{"path": path, "size": len(path), "sha256": sha256_of(path.encode())} for path in FILES]
    text = json.dumps({"schema": 1, "files": files})
    write(url, "manifest.json", text)
    declared = key(url)
    put("mug")  # written again, with the same content
    assert key(url) == declared
    write(url, "manifest.json", json.dumps({"schema": 1, "files": [{**files[0], "sha256": "0" * 64}, *files[1:]]}))
    assert key(url) != declared
    write(url, "manifest.json", "no JSON")
    undeclared = key(url)
    assert undeclared != declared
    write(url, "views/a.png", "other bytes")
    assert key(url) != undeclared


def test_upload_key_sees_a_manifest_that_was_put_right(put: Put) -> None:
    """It declared a file that nobody uploads, and was refused for it; what is there has not changed."""
    url = put("mug")
    files = [{"path": path, "size": len(path), "sha256": sha256_of(path.encode())} for path in FILES]
    write(url, "manifest.json", json.dumps({"schema": 1, "files": [*files, {**files[0], "path": "views/z.png"}]}))
    wrong = key(url)
    write(url, "manifest.json", json.dumps({"schema": 1, "files": files}))
    assert key(url) != wrong


def write(url: str, path: str, text: str) -> None:
    """As the uploader."""
    if url.startswith("s3://"):
        fs = s3fs.S3FileSystem(key="admin-key-id", secret="admin-secret-0123456789")
        fs.pipe_file(f"{url}/{path}", text.encode())
    else:
        (Path(url) / path).write_text(text)
