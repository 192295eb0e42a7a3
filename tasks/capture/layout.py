"""Names of a capture's files: suffixes, manifests, digest, and names that must not be followed.

`listing`, the readers of `layouts` and the stages use it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, Field, StringConstraints

from tasks.store.location import FileEntry

VIEWS, DEPTH, TRANSFORMS, MANIFEST, MARKER = "views", "depth", "transforms.json", "manifest.json", "_COMPLETE"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif"})
# JPEG and WebP cannot hold depth: they count, so that this can be said
DEPTH_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".exr", ".npy", ".jpg", ".jpeg", ".webp"})
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
    """Path of its depth map"""
    mask: str | None = None
    """Path of a picture that is black on known background"""
    visible: str | None = None
    """Path of a picture that is black where something hides the object: there is no depth reading of it"""
    confidence: str | None = None
    """Path of a picture that tells how far each depth reading can be trusted; not at all where it is 0"""
    confidence_levels: tuple[int, int, int] = (0, 1, 2)
    """That picture's values for low, medium and high confidence; ARKit's own by default"""


def digest(files: Iterable[FileEntry], part: str = "") -> str:
    """The capture digest: sha256 (hex) over the sorted [path, bytes, sha256] of its files as compact JSON.

    part: the name of one of several objects in the folder comes last, as a list of its own.
    """
    listing: list[list[object]] = sorted([file.path, file.bytes, file.sha256] for file in files)
    listing += [[part]] if part else []
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
