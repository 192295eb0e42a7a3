"""The layouts in which people have captures: one reader each, all giving the same typed `Layout`.

`LAYOUTS` lists the readers; the first one that recognises a folder by the names of its files reads it. `listing` asks
for the content of a folder, the stages for its views and cameras.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from tasks.capture.folder_tree import Folder
from tasks.capture.layout import Reader
from tasks.capture.layouts.bop import BopLayout
from tasks.capture.layouts.colmap import ColmapLayout
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.nerfstudio import BlenderLayout, NerfstudioLayout
from tasks.capture.layouts.own import OwnLayout
from tasks.capture.layouts.polycam import PolycamLayout
from tasks.capture.layouts.record3d import Record3DLayout
from tasks.capture.layouts.rgbd_folders import RgbdFolders
from tasks.capture.layouts.seven_scenes import SevenScenesLayout
from tasks.capture.layouts.stray_scanner import StrayScannerLayout
from tasks.capture.layouts.tum import TumLayout
from tasks.errors import Problem

OWN = OwnLayout()
LAYOUTS: tuple[LayoutReader, ...] = (
    NerfstudioLayout(),
    BlenderLayout(),
    PolycamLayout(),
    StrayScannerLayout(),
    Record3DLayout(),
    TumLayout(),
    BopLayout(),
    SevenScenesLayout(),
    ColmapLayout(),
    RgbdFolders(),
    OWN,
)


def recognised(folder: Folder) -> LayoutReader | None:
    """The reader of a folder; None if it is not a capture."""
    if OWN.pictures(folder):
        return OWN
    return next((reader for reader in LAYOUTS if reader.recognises(folder)), None)


def captures_below(folder: Folder) -> Iterator[Folder]:
    """Every folder at or below this one that is a capture."""
    reader = recognised(folder)
    if reader is not None:
        yield folder
    if reader in (None, OWN):  # captures may lie in one of this project's own, but not in another
        for below in folder.folders.values():
            yield from captures_below(below)


def content_of(paths: Iterable[str]) -> frozenset[str]:
    """The files of a capture that a reconstruction may read, of all files below its folder."""
    folder = Folder.of(paths)
    return frozenset((recognised(folder) or OWN).content(folder))


def ignored_of(paths: Iterable[str]) -> list[str]:
    """The files of a capture that look like content and are none."""
    folder = Folder.of(paths)
    reader = recognised(folder) or OWN
    return sorted(reader.others(folder, set(reader.content(folder))))


def read_layout(paths: Collection[str], read: Reader, part: str = "") -> Layout:
    """Understand a capture with these files. `part` names one of several objects in it."""
    folder = Folder.of(paths)
    reader = recognised(folder) or OWN
    layout = reader.read(folder, read, part)
    return layout if reader is OWN else _without_gaps(layout)


def _without_gaps(layout: Layout) -> Layout:
    """A recording without the frames that lack a depth map or a pose which most of the others have.

    Devices drop frames, and save colour and depth at different rates: nobody made a mistake there.
    """
    kept, warnings = layout.views, list(layout.warnings)
    for lacking, fault in (
        ({view.name for view in kept if view.depth is None}, "has no depth map"),
        ({view.name for view in kept if view.name not in layout.cameras.named}, "has no pose"),
    ):
        if lacking and 2 * len(lacking) < len(layout.views):
            warnings += [
                Problem(where=view.image, what=fault, todo="it is left out") for view in kept if view.name in lacking
            ]
            kept = tuple(view for view in kept if view.name not in lacking)
    return replace(layout, views=kept, warnings=tuple(warnings), unmatched_depth=())
