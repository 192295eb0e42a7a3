"""Readers of layouts, and what they make of a capture: its views and cameras, the same for every layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tasks.capture.folder_tree import Folder
from tasks.capture.given_cameras import MILLIMETRE, GivenCameras
from tasks.capture.layout import DEPTH, Reader, ViewFiles
from tasks.capture.layouts.poses import CameraList
from tasks.errors import Problem


@dataclass(frozen=True)
class Layout:
    """A capture as its layout's reader understands it; all paths are relative to the capture."""

    name: str
    """Of the layout, as in the report"""
    views: tuple[ViewFiles, ...]
    """Sorted by name"""
    cameras: GivenCameras = field(default_factory=GivenCameras)
    camera_problems: tuple[Problem, ...] = ()
    """Problems of the cameras"""
    problems: tuple[Problem, ...] = ()
    """Problems for every engine"""
    warnings: tuple[Problem, ...] = ()
    unmatched_depth: tuple[str, ...] = ()
    """Depth maps without a view"""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Groups of files with one name; the first of each group is used"""
    depth_folder: str = DEPTH
    """Folder that its depth maps belong in"""


@dataclass
class Pairs:
    """Pictures and depth maps of a capture, put together by name."""

    views: list[ViewFiles] = field(default_factory=list)
    unmatched_depth: list[str] = field(default_factory=list)
    """Depth maps without a view"""
    duplicates: list[tuple[str, ...]] = field(default_factory=list)
    """Groups of files with one name"""


class LayoutReader(ABC):
    """Reads the captures of one layout."""

    name: ClassVar[str]
    """As in the report"""
    title: ClassVar[str]
    """For people"""

    @abstractmethod
    def recognises(self, folder: Folder) -> bool:
        """True if a folder is a capture of this layout, by the names of its files."""

    @abstractmethod
    def pictures(self, folder: Folder) -> Sequence[str]:
        """Paths of the pictures that may be views."""

    @abstractmethod
    def content(self, folder: Folder) -> Iterable[str]:
        """Paths of the files that a reconstruction of the folder may read."""

    @abstractmethod
    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        """Understand a capture. `part` names one of several objects in it."""

    def parts(self, folder: Folder, read: Reader) -> Sequence[str]:
        """Names of the objects in a folder that holds several, each a capture of its own."""
        return ()

    def others(self, folder: Folder, content: Collection[str]) -> Iterable[str]:
        """Paths of files that look like content and are ignored."""
        return ()

    def recorded(self, pairs: Pairs, found: CameraList, depth_folder: str = DEPTH) -> Layout:
        """The capture of a device that saves pictures, depth maps in millimetres or metres, and its own cameras."""
        return Layout(
            self.name,
            tuple(pairs.views),
            found.cameras(MILLIMETRE),
            tuple(found.problems),
            duplicates=tuple(pairs.duplicates),
            depth_folder=depth_folder.lstrip("/"),
        )
