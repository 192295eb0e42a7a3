"""COLMAP's sparse model beside pictures and depth maps: images/, depth/, sparse/0/ (https://colmap.github.io/format.html).

Poses are world-to-camera with y down and z ahead; the first pixel's centre is at (0.5, 0.5). A model has no metres: its
scale is taken from the depth maps at the points that the views show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from tasks.capture.folder_tree import FileIndex, Folder
from tasks.capture.given_cameras import MILLIMETRE, Frame, GivenCameras, Intrinsics
from tasks.capture.images import DecodeError, decode_depth
from tasks.capture.layout import Reader, ViewFiles
from tasks.capture.layouts.colmap_model import MODEL_FILES, ColmapCamera, ColmapModel, read_model
from tasks.capture.layouts.layout_reader import Layout, LayoutReader
from tasks.capture.layouts.pairing import by_name, grouped_by, without_kind
from tasks.capture.layouts.parsing import BadFile, intrinsics
from tasks.capture.layouts.poses import CameraList, from_opencv, inverse, rigid
from tasks.capture.transforms import check_intrinsics
from tasks.errors import Problem
from tasks.settings import settings

_MODELS = ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", "dense/sparse")
_PICTURES = ("images", "image", "rgb", "color", "views")
_DEPTHS = ("depth", "depths", "depth_maps")
_MASKS = ("masks", "mask")
# The scale is the median over points in so many views at most, and so many points at least
_SCALE_VIEWS, _FEWEST_POINTS = 12, 30
# Half of the points have to agree on the scale within this share
_SCALE_SPREAD = 0.05
# Parameters of the camera models by their names in nerfstudio, in COLMAP's order
_PARAMETERS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fl_x fl_y cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2",
    "FULL_OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
    "OPENCV_FISHEYE": "fl_x fl_y cx cy k1 k2 k3 k4",
}


class ColmapLayout(LayoutReader):
    """images/, depth/, sparse/0/."""

    name = "colmap"
    title = "COLMAP: images/, depth/, sparse/0/"

    def recognises(self, folder: Folder) -> bool:
        return _model(folder) is not None and bool(_pictures(folder))

    def pictures(self, folder: Folder) -> Sequence[str]:
        return _pictures(folder)

    def content(self, folder: Folder) -> Iterable[str]:
        model = _model(folder)
        if model is not None:
            yield from (model.files[name] for name in MODEL_FILES if name in model.files)
        yield from _pictures(folder)
        yield from _below(folder, _DEPTHS, Folder.depth_maps)
        yield from _below(folder, _MASKS, Folder.pictures)

    def read(self, folder: Folder, read: Reader, part: str) -> Layout:
        model_folder = _model(folder)
        assert model_folder is not None
        pictures = _pictures(folder)
        names = {group[0]: name for name, group in by_name(pictures).items()}
        depths = grouped_by(without_kind, _below(folder, _DEPTHS, Folder.depth_maps))
        masks = grouped_by(without_kind, _below(folder, _MASKS, Folder.pictures))
        views = {}
        for picture, name in names.items():
            depth, mask = depths.get(without_kind(picture), []), masks.get(without_kind(picture), [])
            views[picture] = ViewFiles(
                name, picture, depth[0] if len(depth) == 1 else None, mask[0] if len(mask) == 1 else None
            )
        found = CameraList(model_folder.path)
        posed = dict[str, ViewFiles]()
        index = FileIndex(pictures)
        try:
            model = read_model(model_folder, read)
            for image in model.images:
                path = index.find(image.name)
                if path is None or path not in views:
                    continue
                lens, wrong = _lens(model.cameras[image.camera], f"{model_folder.path} camera {image.camera}")
                found.problems += [problem for problem in wrong if problem not in found.problems]
                pose = from_opencv(inverse(rigid(image.rotation, image.translation)))
                posed[image.name] = views[path]
                found.add(views[path].name, lens, pose, f"{model_folder.path} ({image.name})")
        except BadFile as error:
            ordered = tuple(sorted(views.values(), key=_name))
            return Layout(self.name, ordered, camera_problems=(error.problem,))
        left_out = [path for path, view in views.items() if view not in posed.values()] if posed else []
        cameras, problems, warnings = _scaled(found.cameras(MILLIMETRE), model, posed, read)
        warnings += [Problem(where=path, what="is not in COLMAP's model", todo="it is left out") for path in left_out]
        ordered = tuple(sorted(posed.values() if posed else views.values(), key=_name))
        return Layout(self.name, ordered, cameras, (*found.problems, *problems), warnings=tuple(warnings))


def _name(view: ViewFiles) -> str:
    return view.name


def _model(folder: Folder) -> Folder | None:
    """The folder of the sparse model."""
    for model in (folder, *map(folder.at, _MODELS)):
        if any({f"cameras.{kind}", f"images.{kind}"} <= model.files.keys() for kind in ("bin", "txt")):
            return model
    return None


def _pictures(folder: Folder) -> list[str]:
    return _below(folder, _PICTURES, Folder.pictures)


def _below(folder: Folder, names: Sequence[str], files: Callable[[Folder], list[str]]) -> list[str]:
    """Files in the first of some folders that is there, at any depth: COLMAP keeps a folder for each camera."""
    first = next((folder.folders[name] for name in names if name in folder.folders), None)
    return [] if first is None else _all(first, files)


def _all(folder: Folder, files: Callable[[Folder], list[str]]) -> list[str]:
    return [*files(folder), *(path for below in folder.folders.values() for path in _all(below, files))]


def _lens(camera: ColmapCamera, where: str) -> tuple[Intrinsics | None, list[Problem]]:
    names = _PARAMETERS.get(camera.model, "").split()
    if len(names) != len(camera.parameters):
        what = f"has the camera model {camera.model}, which is not supported"
        return None, [Problem(where=where, what=what, todo="run `colmap image_undistorter`")]
    values = dict(zip(names, camera.parameters, strict=True))
    if "f" in values:
        values["fl_x"] = values["fl_y"] = values.pop("f")
    lens = intrinsics(where, w=camera.width, h=camera.height, camera_model=camera.model, **values)
    return lens, check_intrinsics(where, lens)


def _scaled(
    cameras: GivenCameras, model: ColmapModel, posed: dict[str, ViewFiles], read: Reader
) -> tuple[GivenCameras, list[Problem], list[Problem]]:
    """The cameras in metres, problems and warnings.

    The scale is the median of depth readings at COLMAP's points over the points' depth in its model.
    """
    with_depth = [image for image in model.images if image.name in posed and posed[image.name].depth is not None]
    ratios = []
    for image in with_depth[:: max(1, len(with_depth) // _SCALE_VIEWS)]:
        path = posed[image.name].depth
        known = [(pixel, model.points[number]) for number, pixel in image.points if number in model.points]
        if path is None or not known:
            continue
        try:
            decoded = decode_depth(path, read(path), cameras.depth_unit, None, settings().max_pixels)
        except DecodeError:
            continue  # it is told with the other problems of the files
        if decoded.metres is None:
            continue
        camera = model.cameras[image.camera]
        size = np.array(decoded.metres.shape[::-1]) / [camera.width, camera.height]
        with np.errstate(invalid="ignore"):  # of numbers that are not finite
            pixels = (np.array([pixel for pixel, _ in known]) * size).astype(int)
        inside = ((pixels >= 0) & (pixels < decoded.metres.shape[::-1])).all(axis=1)
        points = np.array([point for _, point in known])
        depth = (points @ image.rotation.T + image.translation)[:, 2]
        readings = np.zeros(len(pixels))
        readings[inside] = decoded.metres[pixels[inside, 1], pixels[inside, 0]]
        good = (readings > 0) & (depth > 0)
        ratios.append(readings[good] / depth[good])
    every = np.concatenate(ratios) if ratios else np.empty(0)
    if len(every) < _FEWEST_POINTS:
        what = f"has {len(every)} points at which depth can tell its scale"
        return cameras, [], [Problem(where=cameras.source, what=what, todo="its unit is taken for metres")]
    scale = float(np.median(every))
    spread = float(np.median(np.abs(every / scale - 1)))
    if spread > _SCALE_SPREAD:
        what = f"has points that do not lie where the depth maps say (by {spread:.0%}, at their best common scale)"
        todo = "check that depth maps and pictures belong together, and the depth's unit"
        return cameras, [Problem(where=cameras.source, what=what, todo=todo)], []
    frames = {}
    for name, frame in cameras.frames.items():
        pose = frame.camera_to_world.copy()
        pose[:3, 3] *= scale
        frames[name] = Frame(frame.intrinsics, pose)
    return replace(cameras, frames=frames), [], []
