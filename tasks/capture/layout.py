"""Layout of a capture: the names of its files, and which of them belong together."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, Field, StringConstraints

from tasks.store.location import FileEntry

VIEWS, DEPTH, TRANSFORMS, MANIFEST, MARKER = "views", "depth", "transforms.json", "manifest.json", "_COMPLETE"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
DEPTH_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".exr", ".npy"})
_CHAINED_URL = "::"  # to fsspec

Reader = Callable[[str], bytes]
"""Reads one file of a capture by its relative path."""


class DeclaredFile(BaseModel, frozen=True):
    """A file as an uploader's manifest.json lists it; `size` is accepted for `bytes`."""

    path: str
    """Relative to the capture"""
    bytes: int | None = Field(None, validation_alias=AliasChoices("bytes", "size"))
    """Size; None if the manifest does not give it"""
    sha256: Annotated[str, StringConstraints(to_lower=True)] | None = None
    """Hexadecimal; None if the manifest does not give it"""


class _UploadManifest(BaseModel):
    schema_: Literal[1] = Field(1, alias="schema")
    files: tuple[DeclaredFile, ...]


@dataclass(frozen=True)
class ViewFiles:
    """A view's name (its stem) and its files."""

    name: str
    image: str
    """Path relative to the capture"""
    depth: str | None
    """Path of the depth map with the view's name"""


@dataclass(frozen=True)
class Layout:
    """A capture's files put together by name; all paths are relative to the capture."""

    views: tuple[ViewFiles, ...]
    """Sorted by name"""
    unmatched_depth: tuple[str, ...]
    """Depth maps without a view"""
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files with one name; the first of each group is used"""
    ignored: tuple[str, ...]
    """Other files in views/ and depth/"""
    has_transforms: bool
    """True if there is a transforms.json"""


def digest(files: Iterable[FileEntry]) -> str:
    """The capture digest: sha256 (hex) over the sorted [path, bytes, sha256] of its files as compact JSON."""
    listing = sorted([file.path, file.bytes, file.sha256] for file in files)
    return hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()


def declared_files(manifest: str) -> tuple[DeclaredFile, ...]:
    """The files that a manifest.json lists; raises ValueError (ValidationError) if the text is not a manifest."""
    return _UploadManifest.model_validate_json(manifest).files


def leaves_folder(path: str) -> bool:
    """True if a name could point outside of its capture: absolute, `..`, backslash, drive, URL, control bytes."""
    return (
        path.startswith("/")
        or ".." in path.split("/")
        or "\\" in path
        or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path) is not None
        or any(ord(character) < ord(" ") for character in path)
    )


def is_id(path: str) -> bool:
    """True if a path below a root can be a capture's id: it stays below, and means the same as part of a URL."""
    return not leaves_folder(path) and _CHAINED_URL not in path and not {"", "."} & {*path.split("/")}


def capture_of(path: str) -> str | None:
    """The folder of the capture that a file below a root belongs to, relative to the root ("" is the root itself).

    None if it belongs to no capture: it is not in views/ or depth/, and has none of the names beside them.
    """
    *folders, name = path.split("/")
    for index in reversed(range(len(folders))):
        if folders[index] in (VIEWS, DEPTH):
            return "/".join(folders[:index])
    return "/".join(folders) if name in (TRANSFORMS, MANIFEST, MARKER) else None


def belongs(path: str) -> bool:
    """True if a file is content of the capture (and so part of its digest)."""
    return path == TRANSFORMS or _is_child(path, VIEWS, IMAGE_SUFFIXES) or _is_child(path, DEPTH, DEPTH_SUFFIXES)


def pair(paths: Iterable[str]) -> Layout:
    """Put a capture's files together: every view with its depth map, `depth/<stem>.*` or `depth_000` for `view_000`."""
    paths = sorted(set(paths))
    images = _by_stem(path for path in paths if _is_child(path, VIEWS, IMAGE_SUFFIXES))
    depths = _by_stem(path for path in paths if _is_child(path, DEPTH, DEPTH_SUFFIXES))
    views = []
    for name in sorted(images):
        source = next((stem for stem in (name, _depth_stem(name)) if stem in depths), None)
        views.append(ViewFiles(name, images[name][0], depths[source][0] if source is not None else None))
    used = {view.depth for view in views}
    return Layout(
        views=tuple(views),
        unmatched_depth=tuple(group[0] for group in depths.values() if group[0] not in used),
        duplicates=tuple(tuple(group) for group in [*images.values(), *depths.values()] if len(group) > 1),
        ignored=tuple(path for path in paths if path.startswith((f"{VIEWS}/", f"{DEPTH}/")) and not belongs(path)),
        has_transforms=TRANSFORMS in paths,
    )


def _is_child(path: str, folder: str, suffixes: frozenset[str]) -> bool:
    """True if `path` is a visible file directly in `folder` with one of the suffixes."""
    if leaves_folder(path) or path.count("/") != 1 or not path.startswith(f"{folder}/"):
        return False
    file = PurePosixPath(path)
    return not file.name.startswith(".") and file.suffix.lower() in suffixes


def _by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[PurePosixPath(path).stem].append(path)
    return dict(groups)


def _depth_stem(view: str) -> str:
    return "depth_" + view.removeprefix("view_") if view.startswith("view_") else view
