"""This project's own layout: views/, depth/, optional masks/ and transforms.json (README, "What a capture needs")."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from tasks.capture.folder_tree import Folder
from tasks.capture.given_cameras import GivenCameras
from tasks.capture.layout import DEPTH, MANIFEST, MARKER, TRANSFORMS, VIEWS, Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import paired
from tasks.capture.transforms import TransformsFile, given_cameras, parse_transforms

MASKS = "masks"


class OwnLayout(LayoutReader):
    """views/, depth/, transforms.json."""

    name = "capture2mesh"
    title = "views/, depth/, transforms.json"

    def recognises(self, folder: Folder) -> bool:
        if _own_files(folder.at(VIEWS)):
            return True
        # without views it is one of which they are still to come, if nothing else speaks for another layout
        return bool(_own_files(folder.at(DEPTH))) and folder.files.keys() <= {TRANSFORMS, MANIFEST, MARKER}

    def pictures(self, folder: Folder) -> Sequence[str]:
        return list(directly_or_below(folder.at(VIEWS), Folder.pictures))

    def content(self, folder: Folder) -> Iterable[str]:
        yield from folder.matching(TRANSFORMS)
        yield from self.pictures(folder)
        yield from directly_or_below(folder.at(DEPTH), Folder.depth_maps)
        yield from directly_or_below(folder.at(MASKS), Folder.pictures)

    def others(self, folder: Folder, content: Collection[str]) -> Iterable[str]:
        for name in (VIEWS, DEPTH):
            yield from (path for path in _own_files(folder.at(name)) if path not in content)

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pictures = self.pictures(folder)
        depth_maps = list(directly_or_below(folder.at(DEPTH), Folder.depth_maps))
        of_masks = list(directly_or_below(folder.at(MASKS), Folder.pictures))
        pairs = paired(pictures, depth_maps, of_masks)
        if TRANSFORMS not in folder.files:
            return Layout(
                self.name,
                tuple(pairs.views),
                unmatched_depth=tuple(pairs.unmatched_depth),
                duplicates=tuple(pairs.duplicates),
            )
        found = parse_transforms(read(folder.files[TRANSFORMS]), pictures, depth_maps, of_masks)
        chosen, cameras = with_frames(pairs.views, found)
        everything = {view.depth for view in pairs.views if view.depth} | {*pairs.unmatched_depth}
        return Layout(
            self.name,
            chosen,
            cameras,
            tuple(found.problems),
            unmatched_depth=tuple(sorted(everything - {view.depth for view in chosen})),
            duplicates=tuple(pairs.duplicates),
        )


def with_frames(
    views: Iterable[ViewFiles], found: TransformsFile, source: str = TRANSFORMS
) -> tuple[tuple[ViewFiles, ...], GivenCameras]:
    """The views with the files that their frames name, and their cameras. source: path of the file of frames."""
    named = {each.image: each for each in found.frames}
    chosen = tuple(
        replace(view, depth=frame.depth or view.depth, mask=frame.mask or view.mask)
        if (frame := named.get(view.image)) is not None
        else view
        for view in views
    )
    return chosen, given_cameras(found, {view.image: view.name for view in chosen}, source)


def _own_files(folder: Folder) -> list[str]:
    """All files below a folder, without those of captures that lie in it."""
    below = [each for name, each in folder.folders.items() if name not in (VIEWS, DEPTH)]
    return [*folder.files.values(), *(path for each in below for path in _own_files(each))]


def directly_or_below(folder: Folder, files: Callable[[Folder], list[str]]) -> Iterable[str]:
    """Files directly in a folder; if there are none, those in the folders below it, one for each camera."""
    below = [each for name, each in folder.folders.items() if name not in (VIEWS, DEPTH)]
    yield from files(folder) or [path for each in below for path in directly_or_below(each, files)]
