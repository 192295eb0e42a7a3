"""Messages for a folder or file that is not a capture: what it looks like, and what would make it one.

The listing calls it before it refuses.
"""

from __future__ import annotations

from tasks.capture.folder_tree import Folder, suffix
from tasks.capture.layout import DEPTH
from tasks.capture.layouts import LAYOUTS, captures_below

_NAMED_AT_MOST = 3
_OPEN3D_SAVE = "python -c \"import open3d; open3d.t.io.RGBDVideoReader.create('{name}').save_frames('capture')\""
_FRAMES = "ffmpeg -i {name} views/%05d.png"
# What turns a recording into pictures and depth maps, by suffix: its name, and one command
_RECORDINGS = {
    ".bag": ("a recording of a RealSense camera", f"{_OPEN3D_SAVE} writes its frames"),
    ".mkv": (
        "a recording of an Azure Kinect",
        "Open3D's azure_kinect_mkv_reader.py --input {name} --output capture writes its frames",
    ),
    ".sens": (
        "a recording of ScanNet",
        "ScanNet's SensReader/python/reader.py --filename {name} --output_path capture --export_depth_images "
        "--export_color_images --export_poses --export_intrinsics writes its frames",
    ),
    ".r3d": ("a recording of Record3D", "export it from the app as `EXR + JPG`, and unpack that"),
    ".svo": ("a recording of a ZED camera", "ZED_SVO_Export {name} capture 4 writes its frames"),
    ".svo2": ("a recording of a ZED camera", "ZED_SVO_Export {name} capture 4 writes its frames"),
    ".oni": ("a recording of OpenNI", "OpenNI2's NiViewer, or `oni_to_png {name}`, writes its frames"),
    **dict.fromkeys(
        (".mp4", ".mov", ".avi", ".webm", ".m4v"),
        ("a video, which has no depth that can be measured", f"{_FRAMES} writes its frames; add their depth maps"),
    ),
    **dict.fromkeys((".zip", ".7z", ".rar"), ("an archive", "unpack it: unzip {name} -d capture")),
    **dict.fromkeys((".tar", ".gz", ".tgz", ".bz2", ".xz"), ("an archive", "unpack it: tar xf {name}")),
    **dict.fromkeys(
        (".ply", ".obj", ".glb", ".gltf", ".stl", ".usdz", ".pcd"),
        ("a finished model, not a capture", "give its pictures"),
    ),
}
_A_CAPTURE = (
    "a capture is a folder with views/, depth/ and transforms.json, or one of the layouts that the README lists"
)


def told_of_file(name: str) -> str:
    """What a file with this name is, and what to do with it."""
    kind, todo = _RECORDINGS.get(suffix(name), ("a file", _A_CAPTURE))
    return f"is {kind}, not a folder: {todo.format(name=name)}"


def told_of_folder(folder: Folder) -> str:
    """Why a folder is not a capture, in one line."""
    below = [each.path for each in captures_below(folder)]
    if below:
        return f"no capture there, but below: {_some(below)}; name one of them, or run `dataset` for all"
    if {"odometry.csv", "camera_matrix.csv"} & folder.files.keys():
        return (
            "no capture there; it looks like Stray Scanner: ffmpeg -i rgb.mp4 -start_number 0 rgb/%06d.png writes the "
            "frames that are missing (make the folder rgb/ first)"
        )
    if folder.at("rgbd").matching(r".*\.depth"):
        return "no capture there; it looks like an unpacked .r3d of Record3D: export it from the app as `EXR + JPG`"
    if "data.jsonl" in folder.files:
        return "no capture there; it looks like a recording of Spectacular AI: convert it with `sai-cli process`"
    everything = sorted(folder.all_files())
    recordings = [path for path in everything if suffix(path) in _RECORDINGS]
    pictures = [each for each in _folders(folder) if each.pictures()]
    if recordings and len(recordings) >= sum(len(each.pictures()) for each in pictures):
        name = recordings[0]
        kind, todo = _RECORDINGS[suffix(name)]
        return f"no capture there; {name} is {kind}: {todo.format(name=name)}"
    if any(each.matching(r"(?:.*_)?scene_gt\.json|scene_camera\.json") for each in _folders(folder)):
        return f"no capture there; it looks like {_title('bop')}, without its pictures"
    if DEPTH in folder.folders:
        return "no capture there; it has depth maps in depth/, but no pictures in views/"
    if pictures:
        where = ", ".join(sorted({each.path or "the folder itself" for each in pictures})[:_NAMED_AT_MOST])
        return (
            f"no capture there; it has pictures in {where}, but no depth maps or cameras that belong to them; "
            f"put pictures into views/ and depth maps of the same names into depth/"
        )
    return f"no capture there; {_A_CAPTURE}"


def _title(name: str) -> str:
    return next(reader.title for reader in LAYOUTS if reader.name == name)


def _folders(folder: Folder) -> list[Folder]:
    return [folder, *(each for below in folder.folders.values() for each in _folders(below))]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
