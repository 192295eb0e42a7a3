"""Folders of colour and depth, with what else lies beside: Open3D, Redwood, ScanNet, BundleSDF, or nothing.

Poses: trajectory.log (http://redwood-data.org/indoor/fileformat.html), a file a frame in pose/ (ScanNet's SensReader),
or the object's pose in the camera in ob_in_cam/ or annotated_poses/ (BundleSDF, FoundationPose); all with y down and z
ahead. Intrinsics: Open3D's JSON, cam_K.txt, intrinsic/intrinsic_color.txt. Without poses the cameras have to be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from tasks.capture.folder_tree import Folder
from tasks.capture.given_cameras import MILLIMETRE, Intrinsics
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts.layout_reader import Layout, LayoutReader, Pairs
from tasks.capture.layouts.pairing import frame_number, paired
from tasks.capture.layouts.parsing import BadFile, lens, lens_file, lines, matrix
from tasks.capture.layouts.poses import CameraList, Matrix, from_opencv, inverse
from tasks.capture.layouts.seven_scenes import lost

_COLOUR = ("color", "colour", "rgb", "images", "image", "pictures")
_DEPTH = ("depth", "depths", "depth_maps")
_MASKS = ("masks", "mask")
_POSES = ("pose", "poses")
_OBJECT_IN_CAMERA = ("ob_in_cam", "annotated_poses")
_LENSES = ("intrinsic", "intrinsics")
_LOG = r".*(?:trajectory|traj|odometry|scene)?.*\.log"


class RgbdFolders(LayoutReader):
    """A folder of colour beside a folder of depth."""

    name = "rgbd-folders"
    title = "folders of colour and depth (Open3D, Redwood, ScanNet, BundleSDF): color/ or rgb/, depth/"

    def recognises(self, folder: Folder) -> bool:
        return bool(_first(folder, _COLOUR).pictures() and _first(folder, _DEPTH).depth_maps())

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _first(folder, _COLOUR).pictures()

    def content(self, folder: Folder) -> Iterable[str]:
        yield from _first(folder, _COLOUR).pictures()
        yield from _first(folder, _DEPTH).depth_maps()
        yield from _first(folder, _MASKS).pictures()
        yield from _lens_files(folder)
        for name in (*_POSES, *_OBJECT_IN_CAMERA):
            yield from folder.at(name).matching(r".*\.txt")
        yield from folder.matching(_LOG)

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        pairs = _pairs(folder)
        found, unit = CameraList(_pose_source(folder)), MILLIMETRE
        lens_files = list(_lens_files(folder))
        warnings, tracked = [], list[ViewFiles]()
        try:
            camera: Intrinsics | None = None
            if lens_files:
                camera, given_unit = lens(read, lens_files[0])
                unit = given_unit or unit
            poses = _poses(folder, pairs, read)
            if poses and camera is None:
                todo = "add cam_K.txt with the 3 x 3 camera matrix, or Open3D's intrinsic.json"
                raise BadFile(found.source, "gives poses without intrinsics", todo)
            for view in pairs.views:
                pose = poses.get(view.name)
                if pose is not None and not np.isfinite(pose).all():
                    warnings.append(lost(view.image))
                    continue
                tracked.append(view)
                found.add(view.name, camera, pose)
        except BadFile as error:
            found.problems.append(error.problem)
            tracked = pairs.views
        return Layout(
            self.name,
            tuple(tracked),
            found.cameras(unit),
            tuple(found.problems),
            warnings=tuple(warnings),
            duplicates=tuple(pairs.duplicates),
            depth_folder=_first(folder, _DEPTH).path,
        )


def _first(folder: Folder, names: Iterable[str]) -> Folder:
    """The first of some folders that is there; an empty one if none is."""
    return next((folder.folders[name] for name in names if name in folder.folders), Folder("none"))


def _pairs(folder: Folder) -> Pairs:
    """Colour and depth by name; by their number where names differ (Redwood's also have the time)."""
    colour, depth = _first(folder, _COLOUR).pictures(), _first(folder, _DEPTH).depth_maps()
    masks = _first(folder, _MASKS).pictures()
    pairs = paired(colour, depth, masks)
    if any(view.depth is None for view in pairs.views):
        by_number = paired(colour, depth, masks, key=frame_number)
        if sum(view.depth is None for view in by_number.views) < sum(view.depth is None for view in pairs.views):
            return by_number
    return pairs


def _lens_files(folder: Folder) -> Iterator[str]:
    """Files of intrinsics, the best one first."""
    if (beside := lens_file(folder)) is not None:
        yield beside
    inner = _first(folder, _LENSES)
    yield from inner.matching(r"intrinsics?(?:_color)?\.txt")


def _pose_source(folder: Folder) -> str:
    for name in (*_POSES, *_OBJECT_IN_CAMERA):
        if name in folder.folders:
            return f"{name}/*.txt"
    return next(iter(folder.matching(_LOG)), "")


def _poses(folder: Folder, pairs: Pairs, read: Reader) -> Mapping[str, Matrix]:
    """Camera-to-world in OpenGL axes by view name, not finite where tracking was lost."""
    numbers = {frame_number(view.image): view.name for view in pairs.views}
    for name in (*_POSES, *_OBJECT_IN_CAMERA):
        files = folder.at(name).matching(r".*\.txt")
        if not files:
            continue
        found = {}
        for path in files:
            view = numbers.get(frame_number(path))
            if view is None:
                continue
            pose = matrix(read, path)
            if name in _OBJECT_IN_CAMERA and np.isfinite(pose).all():
                pose = inverse(pose)
            found[view] = from_opencv(pose)
        return found
    logs = folder.matching(_LOG)
    return {} if not logs else _trajectory(read, logs[0], [view.name for view in pairs.views])


def _trajectory(read: Reader, path: str, names: list[str]) -> dict[str, Matrix]:
    """Poses of a .log file: blocks of five lines, three numbers and a 4 x 4 matrix; in the order of the frames."""
    rows = list(lines(read, path))
    blocks = [rows[start : start + 5] for start in range(0, len(rows), 5)]
    try:
        indices = [int(block[0][0]) for block in blocks]
        poses = [np.array([[float(value) for value in row] for row in block[1:]]) for block in blocks]
    except (ValueError, IndexError) as error:
        raise BadFile(path, f"is not a trajectory ({error})") from error
    if not poses or any(pose.shape != (4, 4) for pose in poses):
        raise BadFile(path, "is not a trajectory: blocks of three numbers and a 4 x 4 matrix")
    return {
        names[index]: from_opencv(pose) for index, pose in zip(indices, poses, strict=True) if 0 <= index < len(names)
    }
