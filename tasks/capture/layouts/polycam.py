"""Polycam's raw export (developer mode): keyframes/ with images, depth, confidence and a JSON file a camera.

https://github.com/PolyCam/polyform describes it: camera-to-world t_00 ... t_23 of ARKit, with y up; depth is 16-bit
PNG in millimetres; confidence is 0 (low), 54 or 255 (high). `corrected_*` are after Polycam's own optimisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, FiniteFloat, PositiveInt

from tasks.capture.folder_tree import Folder, stem
from tasks.capture.given_cameras import Positive
from tasks.capture.layout import Reader
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import paired
from tasks.capture.layouts.parsing import BadFile, intrinsics, json_file
from tasks.capture.layouts.poses import CameraList, from_y_up

_KEYFRAMES = "keyframes"
_CONFIDENCE_LEVELS = (0, 54, 255)
_AXES = (0, 1, 2)


class _Keyframe(BaseModel):
    fx: Positive
    fy: Positive
    cx: FiniteFloat
    cy: FiniteFloat
    width: PositiveInt
    height: PositiveInt
    t_00: float
    t_01: float
    t_02: float
    t_03: float
    t_10: float
    t_11: float
    t_12: float
    t_13: float
    t_20: float
    t_21: float
    t_22: float
    t_23: float


class PolycamLayout(LayoutReader):
    """keyframes/images, keyframes/cameras, keyframes/depth."""

    name = "polycam"
    title = "Polycam's raw export: keyframes/images, keyframes/cameras, keyframes/depth"

    def recognises(self, folder: Folder) -> bool:
        pictures, cameras = _folders(_keyframes(folder))
        return bool(pictures.pictures() and cameras.matching(r".+\.json"))

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _folders(_keyframes(folder))[0].pictures()

    def content(self, folder: Folder) -> Iterable[str]:
        keyframes = _keyframes(folder)
        pictures, cameras = _folders(keyframes)
        yield from pictures.pictures()
        yield from cameras.matching(r".+\.json")
        yield from keyframes.at("depth").depth_maps()
        yield from keyframes.at("confidence").pictures()

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        keyframes = _keyframes(folder)
        pictures, cameras = _folders(keyframes)
        pairs = paired(
            pictures.pictures(),
            keyframes.at("depth").depth_maps(),
            (),
            keyframes.at("confidence").pictures(),
            _CONFIDENCE_LEVELS,
            key=stem,
        )
        files = {stem(path): path for path in cameras.matching(r".+\.json")}
        found = CameraList(f"{cameras.path}/*.json")
        for view in pairs.views:
            if view.name not in files:
                continue
            try:
                given = json_file(_Keyframe, read, files[view.name])
            except BadFile as error:
                found.problems.append(error.problem)
                continue
            lens = intrinsics(
                files[view.name], w=given.width, h=given.height, fl_x=given.fx, fl_y=given.fy, cx=given.cx, cy=given.cy
            )
            pose = np.eye(4)
            pose[:3] = [[getattr(given, f"t_{row}{column}") for column in range(4)] for row in _AXES]
            found.add(view.name, lens, from_y_up(pose), files[view.name])
        return self.recorded(pairs, found, keyframes.at("depth").path)


def _keyframes(folder: Folder) -> Folder:
    return folder.folders.get(_KEYFRAMES, folder)


def _folders(keyframes: Folder) -> tuple[Folder, Folder]:
    """The folders of pictures and cameras: the corrected ones, if both are there."""
    corrected = keyframes.at("corrected_images"), keyframes.at("corrected_cameras")
    if corrected[0].pictures() and corrected[1].files:
        return corrected
    return keyframes.at("images"), keyframes.at("cameras")
