"""Which files belong to a capture, and which belong together."""

from __future__ import annotations

import hashlib

import pytest

from tasks.capture.layout import declared_files, digest, leaves_folder
from tasks.capture.layouts import content_of, ignored_of, read_layout
from tasks.capture.layouts.layout_reader import Layout
from tasks.store.location import FileEntry


@pytest.mark.parametrize(
    "path", ["views/a.png", "views/b.JPG", "views/c.jpeg", "depth/a.exr", "depth/b.npy", "transforms.json"]
)
def test_content(path: str) -> None:
    assert path in content_of(["views/v.png", path])


@pytest.mark.parametrize(
    "path",
    [
        *("views/notes.txt", "views/deeper/a.png", "views/../a.png", "/views/a.png", "views\\a.png"),
        *("depth/transforms.json", "manifest.json", "_COMPLETE", "a.png"),
    ],
)
def test_no_content(path: str) -> None:
    assert path not in content_of(["views/v.png", path])


def layout_of(*paths: str) -> Layout:
    return read_layout(paths, {}.__getitem__)


@pytest.mark.parametrize(
    "path", ["/etc/x", "../x", "views/../../x", "a\\..\\x", "C:/x", "s3://b/x", "file:x", "views/\0.png"]
)
def test_names_that_leave_the_folder(path: str) -> None:
    assert leaves_folder(path)


@pytest.mark.parametrize("path", ["views/a.png", "./views/a.png", "views/..a.png", "views/12:30.png"])
def test_names_that_stay(path: str) -> None:
    assert not leaves_folder(path)


def test_views_are_sorted_and_have_their_depth() -> None:
    layout = layout_of("views/view_001.jpg", "views/view_000.png", "depth/depth_000.png", "depth/view_001.npy")
    assert [(view.name, view.depth) for view in layout.views] == [
        ("view_000", "depth/depth_000.png"),
        ("view_001", "depth/view_001.npy"),
    ]
    assert not layout.unmatched_depth
    assert not layout.cameras.source


def test_depth_of_the_views_own_name_comes_first() -> None:
    layout = layout_of("views/view_000.png", "depth/depth_000.png", "depth/view_000.png")
    assert layout.views[0].depth == "depth/view_000.png"
    assert layout.unmatched_depth == ("depth/depth_000.png",)


def test_duplicates_and_strangers_are_told() -> None:
    layout = layout_of("views/a.png", "views/a.jpg", "depth/a.png", "depth/a.exr", "views/notes.txt", "depth/b.png")
    assert layout.duplicates == (("views/a.jpg", "views/a.png"), ("depth/a.exr", "depth/a.png"))
    assert ignored_of(["views/a.png", "views/notes.txt", "views/deeper/a.png"]) == [
        "views/deeper/a.png",
        "views/notes.txt",
    ]
    assert layout.unmatched_depth == ("depth/b.png",)


def test_digest_is_of_content_in_any_order() -> None:
    a, b = FileEntry(path="views/a.png", bytes=1, sha256="aa"), FileEntry(path="views/b.png", bytes=2, sha256="bb")
    expected = hashlib.sha256(b'[["views/a.png",1,"aa"],["views/b.png",2,"bb"]]').hexdigest()
    assert digest([a, b]) == digest([b, a]) == expected


def test_declared_files() -> None:
    manifest = '{"schema":1,"files":[{"path":"views/a.png","size":3,"sha256":"AB"},{"path":"views/b.png","bytes":1}]}'
    declared = [(file.path, file.bytes, file.sha256) for file in declared_files(manifest)]
    assert declared == [("views/a.png", 3, "ab"), ("views/b.png", 1, None)]
    with pytest.raises(ValueError, match="JSON"):
        declared_files("no manifest")
