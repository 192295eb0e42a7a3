"""Record3D's export as EXR and JPG: EXR_RGBD/ with metadata.json, rgb/ and depth/ (https://record3d.app).

metadata.json: `K` by columns, `perFrameIntrinsicCoeffs` (fx, fy, cx, cy) of pictures of w x h, `poses` a frame: a
quaternion with its real part last, and a position; camera-to-world of ARKit, with y up. Depth is in metres.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, PositiveInt

from tasks.capture.folder_tree import Folder
from tasks.capture.layout import Reader
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import frame_number, paired
from tasks.capture.layouts.parsing import BadFile, intrinsics, json_file
from tasks.capture.layouts.poses import CameraList, from_y_up, of_quaternion

_INNER = "EXR_RGBD"
_METADATA = "metadata.json"


class _Metadata(BaseModel):
    w: PositiveInt
    h: PositiveInt
    K: tuple[float, float, float, float, float, float, float, float, float]
    poses: list[tuple[float, float, float, float, float, float, float]]
    perFrameIntrinsicCoeffs: list[tuple[float, float, float, float]] | None = None  # noqa: N815 (Record3D's name)

    def lens(self, index: int) -> tuple[float, float, float, float]:
        """fx, fy, cx, cy of a frame, pixels."""
        each = self.perFrameIntrinsicCoeffs
        return each[index] if each and index < len(each) else (self.K[0], self.K[4], self.K[6], self.K[7])


class Record3DLayout(LayoutReader):
    """metadata.json, rgb/, depth/."""

    name = "record3d"
    title = "Record3D (EXR and JPG): metadata.json, rgb/, depth/"

    def recognises(self, folder: Folder) -> bool:
        inner = _inner(folder)
        return _METADATA in inner.files and bool(inner.at("rgb").pictures())

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _inner(folder).at("rgb").pictures()

    def content(self, folder: Folder) -> Iterable[str]:
        inner = _inner(folder)
        yield inner.files[_METADATA]
        yield from inner.at("rgb").pictures()
        yield from inner.at("depth").depth_maps()

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        inner = _inner(folder)
        pairs = paired(inner.at("rgb").pictures(), inner.at("depth").depth_maps())
        found = CameraList(inner.files[_METADATA])
        try:
            given = json_file(_Metadata, read, found.source)
            for view in pairs.views:
                number = frame_number(view.name)
                index = int(number) if number.isdigit() else len(given.poses)
                if index >= len(given.poses):
                    continue
                fl_x, fl_y, cx, cy = given.lens(index)
                lens = intrinsics(found.source, w=given.w, h=given.h, fl_x=fl_x, fl_y=fl_y, cx=cx, cy=cy)
                pose = of_quaternion(given.poses[index][:4], given.poses[index][4:])
                found.add(view.name, lens, from_y_up(pose), f"{found.source} poses[{index}]")
        except BadFile as error:
            found.problems.append(error.problem)
        return self.recorded(pairs, found, inner.at("depth").path)


def _inner(folder: Folder) -> Folder:
    return folder.folders.get(_INNER, folder)
