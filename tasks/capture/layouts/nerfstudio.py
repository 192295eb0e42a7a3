"""Folders whose transforms.json names the pictures: nerfstudio, instant-ngp, NeRFCapture, Spectacular AI, Blender.

nerfstudio: https://docs.nerf.studio/quickstart/data_conventions.html; its ns-process-data also writes what Polycam,
Record3D, Metashape, RealityCapture and ODM give. instant-ngp: docs/nerf_dataset_tips.md in its repository. Blender and
nerf_synthetic: a transforms_train.json (and _val, _test) each (https://github.com/bmild/nerf).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from tasks.capture.folder_tree import Folder, suffix
from tasks.capture.layout import DEPTH_SUFFIXES, IMAGE_SUFFIXES, TRANSFORMS, Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.own import with_frames
from tasks.capture.layouts.pairing import by_name, grouped_by, paired, without_kind
from tasks.capture.transforms import TransformsFile, WrittenFrame, given_cameras, parse_transforms
from tasks.errors import Problem

# A list of cameras beside fewer pictures is not a capture
_FEWEST = 2
# Copies of pictures at a half, a quarter ... of their size: images_2, masks_4
_REDUCED = re.compile(r"(.+)_\d+")
# What trainings and renderings leave beside the capture
_RESULTS = frozenset({"outputs", "renders", "exports", "nerfstudio_models", "colmap", "sparse"})
_DEPTH_FOLDER = re.compile(r"(?:.*[_-])?depths?(?:[_-].*)?", re.IGNORECASE)
_MASK_FOLDER = re.compile(
    r"(?:.*[_-])?(?:masks?|segmentation|normals?|semantics?|confidence)(?:[_-].*)?", re.IGNORECASE
)
_DEPTH_NAME = re.compile(r".*[._-](?:depth|normal)(?:[._-]?\d+)?", re.IGNORECASE)


class NerfstudioLayout(LayoutReader):
    """transforms.json beside folders of any name."""

    name = "nerfstudio"
    title = "nerfstudio: transforms.json, images/"
    lists: tuple[str, ...] = (TRANSFORMS,)

    def recognises(self, folder: Folder) -> bool:
        return any(name in folder.files for name in self.lists) and len(_sorted_out(folder)[0]) >= _FEWEST

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _sorted_out(folder)[0]

    def content(self, folder: Folder) -> Iterable[str]:
        yield from (folder.files[name] for name in self.lists if name in folder.files)
        for paths in _sorted_out(folder):
            yield from paths

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pictures, depth_maps, masks = _sorted_out(folder)
        lists = [folder.files[name] for name in self.lists if name in folder.files]
        files = [parse_transforms(read(path), pictures, depth_maps, masks, path) for path in lists]
        found = _together(files)
        problems = found.problems
        if found.lens is not None and not found.frames:  # intrinsics without poses
            views = paired(pictures, depth_maps).views
            return Layout(
                self.name, tuple(views), given_cameras(found, {view.image: view.name for view in views}, lists[0])
            )
        named = {frame.image for frame in found.frames}
        found.frames = [_of_reduced(frame) for frame in found.frames]
        chosen, cameras = with_frames(_views(named, depth_maps, found), found, lists[0])
        left_out = [path for path in pictures if path not in named] if named else []
        return Layout(
            self.name,
            chosen,
            cameras,
            tuple(problems),
            warnings=tuple(
                Problem(where=path, what=f"has no frame in {lists[0]}", todo="it is left out") for path in left_out
            ),
        )


class BlenderLayout(NerfstudioLayout):
    """transforms_train.json and its like."""

    name = "blender"
    title = "nerf_synthetic (Blender): transforms_train.json"
    lists = ("transforms_train.json", "transforms_val.json", "transforms_test.json")


def _views(named: set[str], depth_maps: list[str], found: TransformsFile) -> list[ViewFiles]:
    """The views that frames name; a depth map that no frame names belongs to the view with its name."""
    by_frames = {frame.depth for frame in found.frames}
    free = [] if by_frames - {None} else depth_maps
    names = {group[0]: name for name, group in by_name(named).items()}
    depths = grouped_by(without_kind, free)
    views = []
    for image in sorted(named, key=lambda path: names.get(path, path)):
        alike = depths.get(without_kind(image), [])
        here = [path for path in alike if path.rpartition("/")[0] == image.rpartition("/")[0]] or alike
        views.append(ViewFiles(names.get(image, image), image, here[0] if len(here) == 1 else None))
    return views


def _of_reduced(written: WrittenFrame) -> WrittenFrame:
    """A frame whose picture lies in a folder such as images_2: it may have the camera of the whole picture."""
    reduced = re.search(r"_(\d+)/[^/]+$", written.image)
    if reduced is None or written.frame is None or not int(reduced.group(1)):
        return written
    return replace(written, frame=replace(written.frame, reduced=int(reduced.group(1))))


def _sorted_out(folder: Folder) -> tuple[list[str], list[str], list[str]]:
    """Pictures, depth maps and masks below a folder, by the names of the folders that they are in."""
    pictures, depth_maps, masks = list[str](), list[str](), list[str]()
    for name, below in folder.folders.items():
        reduced = _REDUCED.fullmatch(name)
        if name in _RESULTS or (reduced and reduced.group(1) in folder.folders):
            continue
        if _DEPTH_FOLDER.fullmatch(name):
            depth_maps += [path for path in below.all_files() if suffix(path) in DEPTH_SUFFIXES]
        elif _MASK_FOLDER.fullmatch(name):
            masks += [path for path in below.all_files() if suffix(path) in IMAGE_SUFFIXES]
        else:
            for found, inner in zip((pictures, depth_maps, masks), _sorted_out(below), strict=True):
                found += inner
    for name, path in folder.files.items():
        if _DEPTH_NAME.fullmatch(name.rpartition(".")[0]) or suffix(path) in DEPTH_SUFFIXES - IMAGE_SUFFIXES:
            depth_maps += [path] if suffix(path) in DEPTH_SUFFIXES and "normal" not in name else []
        elif suffix(path) in IMAGE_SUFFIXES:
            pictures.append(path)
    return pictures, depth_maps, masks


def _together(files: list[TransformsFile]) -> TransformsFile:
    """Several lists of frames as one; what they say of all views is the first one's."""
    first, seen = files[0], set[str]()
    frames = []
    for frame in (frame for each in files for frame in each.frames):
        if frame.image not in seen:
            seen.add(frame.image)
            frames.append(frame)
    problems = [problem for each in files for problem in each.problems]
    return replace(first, frames=frames, problems=problems)
