"""TUM RGB-D: rgb/, depth/, groundtruth.txt, and rgb.txt and depth.txt that list the pictures by time.

https://cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats: depth has 5000 steps a metre; a pose is a position and a
quaternion with its real part last, of the colour camera (y down, z ahead) in a world with z up. The calibration is
not in the folder: the three rigs of the data set are known by the header of groundtruth.txt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

from tasks.capture.folder_tree import FileIndex, Folder, stem
from tasks.capture.given_cameras import Intrinsics
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.parsing import BadFile, lens, lens_file, lines
from tasks.capture.layouts.poses import PIXEL_CENTRE, CameraList, Matrix, from_opencv, rigid
from tasks.errors import Problem

_UNIT = 1 / 5000
_POSES = "groundtruth.txt"
# Colour and depth belong together within this time, as in the data set's own associate.py. Seconds.
_SAME_TIME_S = 0.02
# Between two poses so far apart in time nothing is known of the way. Seconds.
_GAP_S = 0.1
# Colour cameras of freiburg1, 2, 3: fx fy cx cy k1 k2 p1 p2 k3
_RIGS = {
    "1": (517.3, 516.5, 318.6, 255.3, 0.2624, -0.9531, -0.0054, 0.0026, 1.1633),
    "2": (520.9, 521.0, 325.1, 249.7, 0.2312, -0.7849, -0.0033, -0.0001, 0.9172),
    "3": (535.4, 539.2, 320.1, 247.6, 0.0, 0.0, 0.0, 0.0, 0.0),
}
_SIZE = (640, 480)


class TumLayout(LayoutReader):
    """rgb/, depth/, groundtruth.txt."""

    name = "tum"
    title = "TUM RGB-D: rgb/, depth/, groundtruth.txt"

    def recognises(self, folder: Folder) -> bool:
        listed = {"rgb.txt", "depth.txt"} <= folder.files.keys()
        return bool(folder.at("rgb").pictures()) and (_POSES in folder.files or listed)

    def pictures(self, folder: Folder) -> Sequence[str]:
        return folder.at("rgb").pictures()

    def content(self, folder: Folder) -> Iterable[str]:
        yield from (folder.files[name] for name in (_POSES, "rgb.txt", "depth.txt") if name in folder.files)
        yield from filter(None, [lens_file(folder)])
        yield from folder.at("rgb").pictures()
        yield from folder.at("depth").depth_maps()

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pictures, depth_maps = folder.at("rgb").pictures(), folder.at("depth").depth_maps()
        found = CameraList(folder.files.get(_POSES, ""))
        views, moments = list[ViewFiles](), dict[str, float]()
        try:
            images = _by_time(folder.files.get("rgb.txt"), pictures, read)
            depths = _by_time(folder.files.get("depth.txt"), depth_maps, read)
            for time, image in images:
                name = stem(image)
                moments[name] = time
                views.append(ViewFiles(name, image, _nearest(time, depths)))
            camera = _lens(folder, read)
            poses = None if _POSES not in folder.files else _trajectory(folder.files[_POSES], read)
        except BadFile as error:
            found.problems.append(error.problem)
        else:
            if camera is None:
                todo = "add intrinsics.txt with fx fy cx cy (pixels, the first pixel's centre at 0, 0)"
                what = "gives poses without intrinsics"
                found.problems.append(Problem(where=found.source or "rgb.txt", what=what, todo=todo))
            for view in views:
                found.add(view.name, camera, None if poses is None else _pose_at(moments[view.name], *poses))
        return Layout(self.name, tuple(sorted(views, key=_name)), found.cameras(_UNIT), tuple(found.problems))


def _name(view: ViewFiles) -> str:
    return view.name


def _by_time(listed: str | None, files: Sequence[str], read: Reader) -> list[tuple[float, str]]:
    """Files with their times, in order: as a list gives them, else by their names."""
    if listed is None:
        try:
            return sorted((float(stem(path)), path) for path in files)
        except ValueError as error:
            raise BadFile(files[0], f"is not named by its time ({error})", "add rgb.txt and depth.txt") from error
    index, found = FileIndex(files), []
    for fields in lines(read, listed):
        path = index.find(fields[1]) if len(fields) > 1 else None
        if path is not None:
            try:
                found.append((float(fields[0]), path))
            except ValueError as error:
                raise BadFile(listed, f"has a line that does not begin with a time ({error})") from error
    return sorted(found)


def _nearest(time: float, files: Sequence[tuple[float, str]]) -> str | None:
    """The file nearest to a time, None if none is near enough."""
    if not files:
        return None
    distance, path = min((abs(time - other), path) for other, path in files)
    return path if distance <= _SAME_TIME_S else None


def _lens(folder: Folder, read: Reader) -> Intrinsics | None:
    beside = lens_file(folder)
    if beside is not None:
        return lens(read, beside)[0]
    header = read(folder.files[_POSES])[:500].decode(errors="replace") if _POSES in folder.files else ""
    rig = re.search(r"freiburg([123])", header)
    if rig is None:
        return None
    fl_x, fl_y, cx, cy, k1, k2, p1, p2, k3 = _RIGS[rig.group(1)]
    centre = {"cx": cx + PIXEL_CENTRE, "cy": cy + PIXEL_CENTRE}
    return Intrinsics(w=_SIZE[0], h=_SIZE[1], fl_x=fl_x, fl_y=fl_y, k1=k1, k2=k2, p1=p1, p2=p2, k3=k3, **centre)


def _trajectory(path: str, read: Reader) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times (n,) and positions with quaternions (n, 7), sorted by time."""
    try:
        rows = np.array([[float(value) for value in fields] for fields in lines(read, path)])
    except ValueError as error:
        raise BadFile(path, f"holds something that is not a number ({error})") from error
    if rows.ndim != 2 or rows.shape[1] != 8:
        raise BadFile(path, "has lines that are not timestamp tx ty tz qx qy qz qw")
    rows = rows[np.isfinite(rows).all(axis=1) & (np.abs(rows[:, 4:]) > 0).any(axis=1)]
    rows = rows[np.argsort(rows[:, 0])]
    if not len(rows):
        raise BadFile(path, "holds no pose")
    rows = rows[np.concatenate([[True], np.diff(rows[:, 0]) > 0])]
    return rows[:, 0], rows[:, 1:]


def _pose_at(time: float, times: NDArray[np.float64], rows: NDArray[np.float64]) -> Matrix | None:
    """Camera-to-world at a time, between two poses; None if they are too far away."""
    after = int(np.searchsorted(times, time))
    nearest = min(max(after, 0), len(times) - 1)
    if after in (0, len(times)) or times[after] - times[after - 1] > _GAP_S:
        nearest = min(range(max(after - 1, 0), min(after + 1, len(times))), key=lambda i: abs(times[i] - time))
        if abs(times[nearest] - time) > _SAME_TIME_S:
            return None
        position, rotation = rows[nearest, :3], Rotation.from_quat(rows[nearest, 3:])
    else:
        share = (time - times[after - 1]) / (times[after] - times[after - 1])
        position = (1 - share) * rows[after - 1, :3] + share * rows[after, :3]
        rotation = Slerp([0.0, 1.0], Rotation.from_quat(rows[after - 1 : after + 1, 3:]))([share])[0]
    return from_opencv(rigid(rotation.as_matrix(), position))
