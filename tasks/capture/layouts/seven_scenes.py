"""7-Scenes, and what follows its names: frame-000000.color.png, frame-000000.depth.png, frame-000000.pose.txt.

https://www.microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes/: camera-to-world with y down and z ahead, depth
in millimetres, 65535 for no reading; a focal length of 585 and a principal point of (320, 240) pixels, unless a file of
intrinsics lies beside (as in https://github.com/andyzeng/tsdf-fusion-python).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from tasks.capture.folder_tree import Folder
from tasks.capture.given_cameras import MILLIMETRE, Intrinsics
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import paired, without_kind
from tasks.capture.layouts.parsing import BadFile, lens, lens_file, matrix
from tasks.capture.layouts.poses import CameraList, from_opencv
from tasks.errors import Problem

_COLOUR, _DEPTH, _POSE = (rf"frame-\d+\.{kind}" for kind in (r"color\.\w+", r"depth\.\w+", r"pose\.txt"))
_KINECT = Intrinsics(w=640, h=480, fl_x=585, fl_y=585, cx=320, cy=240, camera_model="PINHOLE")


class SevenScenesLayout(LayoutReader):
    """frame-000000.color.png, .depth.png, .pose.txt."""

    name = "7-scenes"
    title = "7-Scenes: frame-000000.color.png, .depth.png, .pose.txt"

    def recognises(self, folder: Folder) -> bool:
        return bool(folder.matching(_COLOUR) and (folder.matching(_DEPTH) or folder.matching(_POSE)))

    def pictures(self, folder: Folder) -> Sequence[str]:
        return folder.matching(_COLOUR)

    def content(self, folder: Folder) -> Iterable[str]:
        for pattern in (_COLOUR, _DEPTH, _POSE):
            yield from folder.matching(pattern)
        yield from filter(None, [lens_file(folder)])

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pairs = paired(folder.matching(_COLOUR), folder.matching(_DEPTH))
        views = [replace(view, name=without_kind(view.image)) for view in pairs.views]
        found, unit, tracked = CameraList("frame-*.pose.txt"), MILLIMETRE, list[ViewFiles]()
        warnings = []
        beside = lens_file(folder)
        try:
            camera, given_unit = (_KINECT, None) if beside is None else lens(read, beside)
            unit = given_unit or unit
            for view in views:
                path = folder.files.get(f"{view.name}.pose.txt")
                pose = None if path is None else matrix(read, path)
                if pose is not None and not np.isfinite(pose).all():
                    warnings.append(lost(path or view.image))
                    continue
                tracked.append(view)
                found.add(view.name, camera, None if pose is None else from_opencv(pose), path or "")
        except BadFile as error:
            found.problems.append(error.problem)
            tracked = views
        return Layout(
            self.name,
            tuple(tracked),
            found.cameras(unit),
            tuple(found.problems),
            warnings=tuple(warnings),
        )


def lost(path: str) -> Problem:
    """A frame without a pose, because the device did not know where it was."""
    return Problem(where=path, what="has no finite pose: tracking was lost", todo="its view is left out")
