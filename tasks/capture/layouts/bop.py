"""A scene of BOP: rgb/ or gray/, depth/, mask/, mask_visib/, scene_camera.json, scene_gt.json.

https://github.com/thodan/bop_toolkit/blob/master/docs/bop_datasets_format.md: depth times depth_scale is millimetres;
cam_R_m2c and cam_t_m2c (millimetres) take the model to the camera, with y down and z ahead; the first pixel's centre
is at (0, 0). mask/ has an object's whole silhouette, mask_visib/ the part that is seen. Each object is a capture of
its own, in the frame of its model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from pydantic import BaseModel

from tasks.capture.folder_tree import Folder, stem
from tasks.capture.given_cameras import MILLIMETRE, Positive
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.parsing import BadFile, json_file, pinhole
from tasks.capture.layouts.poses import PIXEL_CENTRE, CameraList, Matrix, from_opencv, inverse, rigid
from tasks.errors import Problem

_CAMERAS, _OBJECTS = "scene_camera.json", "scene_gt.json"
_COLOUR = ("rgb", "gray")
_METRES = 0.001


class _Camera(BaseModel):
    cam_K: tuple[float, float, float, float, float, float, float, float, float]  # noqa: N815 (BOP's name)
    depth_scale: Positive = 1.0
    cam_R_w2c: tuple[float, float, float, float, float, float, float, float, float] | None = None  # noqa: N815
    cam_t_w2c: tuple[float, float, float] | None = None


class _Object(BaseModel):
    obj_id: int
    cam_R_m2c: tuple[float, float, float, float, float, float, float, float, float]  # noqa: N815
    cam_t_m2c: tuple[float, float, float]


_Objects = dict[str, list[_Object]]
PART = re.compile(r"object_\d+(?:_\d+)?")
"""The name of an object in a scene"""


class BopLayout(LayoutReader):
    """rgb/, depth/, mask_visib/, scene_camera.json, scene_gt.json."""

    name = "bop"
    title = "BOP scene: rgb/, depth/, mask_visib/, scene_camera.json, scene_gt.json"

    def recognises(self, folder: Folder) -> bool:
        return _CAMERAS in folder.files and any(folder.at(name).pictures() for name in _COLOUR)

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _colour(folder)

    def content(self, folder: Folder) -> Iterable[str]:
        yield from (folder.files[name] for name in (_CAMERAS, _OBJECTS) if name in folder.files)
        yield from _colour(folder)
        yield from folder.at("depth").depth_maps()
        yield from folder.at("mask").pictures()
        yield from folder.at("mask_visib").pictures()

    def parts(self, folder: Folder, read: Reader) -> Sequence[str]:
        """The objects of a scene with several, such as `object_5`, or `object_5_2` for the second of a kind."""
        if _OBJECTS not in folder.files:
            return ()
        try:
            objects = json_file(_Objects, read, folder.files[_OBJECTS])
        except BadFile:
            return ()
        names = sorted({name for image in objects.values() for name, _ in _named(image)})
        return names if len(names) > 1 else ()

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        found, unit = CameraList(_OBJECTS if _OBJECTS in folder.files else _CAMERAS), MILLIMETRE
        views = list[ViewFiles]()
        depth = {stem(path): path for path in folder.at("depth").depth_maps()}
        masks = {(kind, stem(path)): path for kind in ("mask", "mask_visib") for path in folder.at(kind).pictures()}
        warnings = []
        try:
            cameras = json_file(dict[str, _Camera], read, folder.files[_CAMERAS])
            objects = json_file(_Objects, read, folder.files[_OBJECTS]) if _OBJECTS in folder.files else None
            scales = {camera.depth_scale for camera in cameras.values()}
            if len(scales) > 1:
                raise BadFile(folder.files[_CAMERAS], f"has several depth_scale: {sorted(scales)}")
            unit = next(iter(scales), 1.0) * _METRES
            for path in _colour(folder):
                number = str(int(stem(path))) if stem(path).isdigit() else stem(path)
                lens = None
                if number in cameras:
                    camera = np.array(cameras[number].cam_K).reshape(3, 3)
                    lens = pinhole(folder.files[_CAMERAS], camera, shift=PIXEL_CENTRE)
                index, pose = (None, None) if objects is None else _object(objects.get(number, []), part)
                if objects is None and number in cameras:
                    pose = _in_world(cameras[number])
                if objects is not None and pose is None:
                    what = f"does not show {part or 'the object'} by {_OBJECTS}"
                    warnings.append(Problem(where=path, what=what, todo="it is left out"))
                    continue
                whole, seen = (masks.get((kind, f"{stem(path)}_{index or 0:06d}")) for kind in ("mask", "mask_visib"))
                views.append(ViewFiles(stem(path), path, depth.get(stem(path)), whole or seen, seen))
                found.add(stem(path), lens, pose)
        except BadFile as error:
            found.problems.append(error.problem)
        return Layout(self.name, tuple(views), found.cameras(unit), tuple(found.problems), warnings=tuple(warnings))


def _colour(folder: Folder) -> list[str]:
    return next((paths for name in _COLOUR if (paths := folder.at(name).pictures())), [])


def _named(objects: Sequence[_Object]) -> Iterator[tuple[str, int]]:
    """Names and places of the objects in an image; the second one of a kind has a number."""
    seen = Counter[int]()
    for index, each in enumerate(objects):
        seen[each.obj_id] += 1
        count = seen[each.obj_id]
        yield (f"object_{each.obj_id}" if count == 1 else f"object_{each.obj_id}_{count}"), index


def _in_world(camera: _Camera) -> Matrix | None:
    """A camera's pose in the scene's own frame, for a scene that says nothing of its objects."""
    if camera.cam_R_w2c is None or camera.cam_t_w2c is None:
        return None
    world_to_camera = rigid(np.array(camera.cam_R_w2c).reshape(3, 3), np.array(camera.cam_t_w2c) * _METRES)
    return from_opencv(inverse(world_to_camera))


def _object(objects: Sequence[_Object], part: str) -> tuple[int | None, Matrix | None]:
    """An object's place in an image, and the camera's pose in its frame; the only object's without a name."""
    index = next((index for name, index in _named(objects) if part in ("", name)), None)
    if index is None:
        return None, None
    each = objects[index]
    model_to_camera = rigid(np.array(each.cam_R_m2c).reshape(3, 3), np.array(each.cam_t_m2c) * _METRES)
    return index, from_opencv(inverse(model_to_camera))
