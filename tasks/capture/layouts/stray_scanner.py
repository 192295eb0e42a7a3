"""Stray Scanner: depth/, confidence/, camera_matrix.csv, odometry.csv, and rgb/ with the frames of its video.

https://github.com/strayrobots/scanner, docs/format.md: odometry has timestamp, frame, x, y, z and a quaternion with its
real part last: camera-to-world with y down and z ahead, in ARKit's world with y up. Depth is in millimetres, confidence
0 (low), 1 or 2 (high).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tasks.capture.folder_tree import Folder
from tasks.capture.layout import Reader
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import frame_number, paired
from tasks.capture.layouts.parsing import BadFile, lines, numbers, pinhole
from tasks.capture.layouts.poses import CameraList, from_opencv, from_y_up, of_quaternion

_ODOMETRY, _CAMERA = "odometry.csv", "camera_matrix.csv"
_FIELDS = 9


class StrayScannerLayout(LayoutReader):
    """odometry.csv, camera_matrix.csv, rgb/, depth/."""

    name = "stray-scanner"
    title = "Stray Scanner: odometry.csv, camera_matrix.csv, rgb/, depth/"

    def recognises(self, folder: Folder) -> bool:
        return {_ODOMETRY, _CAMERA} <= folder.files.keys() and bool(folder.at("rgb").pictures())

    def pictures(self, folder: Folder) -> Sequence[str]:
        return folder.at("rgb").pictures()

    def content(self, folder: Folder) -> Iterable[str]:
        yield folder.files[_ODOMETRY]
        yield folder.files[_CAMERA]
        yield from folder.at("rgb").pictures()
        yield from folder.at("depth").depth_maps()
        yield from folder.at("confidence").pictures()

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pairs = paired(
            folder.at("rgb").pictures(),
            folder.at("depth").depth_maps(),
            (),
            folder.at("confidence").pictures(),
            key=frame_number,
        )
        found = CameraList(folder.files[_ODOMETRY])
        try:
            camera = numbers(read, folder.files[_CAMERA])
            if camera.size != 9:
                raise BadFile(folder.files[_CAMERA], f"holds {camera.size} numbers, a camera matrix has 9")
            lens = pinhole(folder.files[_CAMERA], camera.reshape(3, 3))
            poses = dict(_poses(read, folder.files[_ODOMETRY]))
        except BadFile as error:
            found.problems.append(error.problem)
        else:
            for view in pairs.views:
                row = poses.get(frame_number(view.name))
                pose = None if row is None else from_y_up(from_opencv(of_quaternion(row[3:], row[:3])))
                found.add(view.name, lens, pose)
        return self.recorded(pairs, found)


def _poses(read: Reader, path: str) -> Iterable[tuple[str, list[float]]]:
    """x, y, z and the quaternion of each frame, by its number."""
    for fields in lines(read, path):
        if fields[0] == "timestamp":
            continue
        try:
            values = [float(value) for value in fields[2:_FIELDS]]
            number = str(int(fields[1]))
        except (ValueError, IndexError) as error:
            raise BadFile(
                path, f"has a line that is not timestamp, frame, x, y, z, qx, qy, qz, qw: {fields}"
            ) from error
        if len(values) != _FIELDS - 2:
            raise BadFile(path, f"has a line of {len(fields)} values, not {_FIELDS}")
        yield number, values
