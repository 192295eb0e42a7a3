"""The files of a listing as a tree of folders, and the search for a file that another one names.

All readers of layouts, the listing and its refusals work on it: no file is opened here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath

from tasks.capture.layout import DEPTH_SUFFIXES, IMAGE_SUFFIXES

# What operating systems, editors and storages leave in folders: names, endings, and folders with all below them.
_LITTER_NAMES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LITTER_ENDINGS = (":Zone.Identifier", "_$folder$", "/", "~")
_LITTER_FOLDERS = frozenset({"@eaDir", "@Recycle", "#recycle", "__MACOSX", "$RECYCLE.BIN", "__pycache__"})


def is_litter(path: str) -> bool:
    """True for files that nobody put there: those of operating systems, and the markers of a storage's folders."""
    *folders, name = path.split("/")
    return (
        any(part.startswith(".") and part not in (".", "..") for part in (*folders, name))
        or name.lower() in _LITTER_NAMES
        or path.endswith(_LITTER_ENDINGS)
        or not _LITTER_FOLDERS.isdisjoint(folders)
    )


def suffix(path: str) -> str:
    """A file's suffix in lower case, with its dot."""
    return PurePosixPath(path).suffix.lower()


def stem(path: str) -> str:
    """A file's name without its suffix, in Unicode's form NFC: macOS may store another one."""
    return unicodedata.normalize("NFC", PurePosixPath(path).stem)


class Folder:
    """One folder of a listing."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        """Relative to the listing's root, empty for the root."""
        self.files: dict[str, str] = {}
        """Paths of the files directly in it, relative to the listing's root, by name."""
        self.folders: dict[str, Folder] = {}
        """The folders directly in it, by name."""

    @staticmethod
    def of(paths: Iterable[str]) -> Folder:
        """The root folder of files with these paths."""
        root = Folder()
        for path in sorted(set(paths)):
            *parts, name = path.split("/")
            folder = root
            for part in parts:
                below = f"{folder.path}/{part}" if folder.path else part
                folder = folder.folders.setdefault(part, Folder(below))
            folder.files[name] = path
        return root

    def at(self, path: str) -> Folder:
        """The folder below at a path; an empty one if there is none."""
        folder = self
        for part in path.split("/"):
            folder = folder.folders.get(part, Folder(f"{folder.path}/{part}"))
        return folder

    def all_files(self) -> Iterator[str]:
        """Paths of all files in it, at any depth."""
        yield from self.files.values()
        for folder in self.folders.values():
            yield from folder.all_files()

    def pictures(self) -> list[str]:
        """Paths of the pictures directly in it."""
        return [path for path in self.files.values() if suffix(path) in IMAGE_SUFFIXES]

    def depth_maps(self) -> list[str]:
        """Paths of the files directly in it that may be depth maps."""
        return [path for path in self.files.values() if suffix(path) in DEPTH_SUFFIXES]

    def matching(self, pattern: str) -> list[str]:
        """Paths of the files directly in it whose name matches a regular expression."""
        return [path for name, path in self.files.items() if re.fullmatch(pattern, name)]


class FileIndex:
    """Finds the file of a capture that a path in another file means.

    Writers disagree about `./`, backslashes, suffixes, upper case, Unicode's forms, and the folder's name.
    """

    def __init__(self, paths: Collection[str]) -> None:
        self._exact = {normal(path): path for path in paths}
        self._alike: dict[str, set[str]] = defaultdict(set)
        for written, path in self._exact.items():
            for key in (written, _without_suffix(written), written.rpartition("/")[2], stem(written)):
                self._alike[key.casefold()].add(path)

    def find(self, written: str) -> str | None:
        """The path that is meant; None if there is none, or if it could be any of several."""
        path = normal(written)
        if path in self._exact:
            return self._exact[path]
        name = path.rpartition("/")[2]
        for key in (path, _without_suffix(path), name, _without_suffix(name)):
            found = self._alike.get(key.casefold(), set())
            if len(found) == 1:
                return next(iter(found))
        return None


def normal(path: str) -> str:
    """A path with forward slashes, without `./`, in Unicode's form NFC."""
    return unicodedata.normalize("NFC", str(PurePosixPath(path.replace("\\", "/"))))


def _without_suffix(path: str) -> str:
    """The path without the suffix of a picture or depth map; names of timestamps have other dots."""
    return path[: -len(suffix(path))] if suffix(path) in IMAGE_SUFFIXES | DEPTH_SUFFIXES else path
