"""transforms.json for rigs of known geometry; the command `capture2mesh rig` calls it."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.capture.layout import TRANSFORMS, VIEWS, ViewFiles, pair
from tasks.errors import InputError

# Direction from the object to the camera, and the image's up. Right, back and left are the front camera walking around
# the object counter-clockwise seen from above; top and bottom are it tilting over and under the object.
_AXES = {
    "front": ((0, -1, 0), (0, 0, 1)),
    "right": ((1, 0, 0), (0, 0, 1)),
    "back": ((0, 1, 0), (0, 0, 1)),
    "left": ((-1, 0, 0), (0, 0, 1)),
    "top": ((0, 0, 1), (0, 1, 0)),
    "bottom": ((0, 0, -1), (0, -1, 0)),
}


def rig(
    folder: Path,
    kind: Literal["axes6", "turntable"],
    *,
    distance_m: float,
    fov_deg: float,
    elevation_deg: float = 0.0,
    clockwise: bool = False,
) -> Path:
    """Write `folder`/transforms.json for the views in `folder`/views and give its path.

    All cameras look at the world's origin from `distance_m`, with z up and the horizontal field of view `fov_deg`.

    - axes6: views named front (camera at -y), right (+x), back (+y), left (-x), top (+z; the image's up is +y) and
      bottom (-z; up is -y).
    - turntable: the views in the order of their names, evenly over one turn. The first camera is at -y, the next ones
      come counter-clockwise seen from above (by +x; `clockwise`: by -x), all at `elevation_deg` above the xy plane.

    Raises InputError if the views do not fit the rig, a number is impossible, or there is a transforms.json already.
    """
    _check_numbers(distance_m, fov_deg, elevation_deg)
    target = folder / TRANSFORMS
    if target.exists():
        raise InputError(f"{target}: exists already; remove it to write another one")
    files = [path for path in folder.glob(f"{VIEWS}/*") if path.is_file()]
    views = pair(path.relative_to(folder).as_posix() for path in files).views
    if not views:
        raise InputError(f"{folder / VIEWS}: has no PNG or JPEG view")
    if kind == "axes6":
        poses = _axes6(views, distance_m)
    else:
        poses = _turntable(views, distance_m, math.radians(elevation_deg), -1 if clockwise else 1)
    frames = [
        {"file_path": view.image, "transform_matrix": pose.tolist()} for view, pose in zip(views, poses, strict=True)
    ]
    _write(target, {"rig": kind, "camera_angle_x": math.radians(fov_deg), "frames": frames})
    return target


def _check_numbers(distance_m: float, fov_deg: float, elevation_deg: float) -> None:
    if not (math.isfinite(distance_m) and distance_m > 0):
        raise InputError(f"distance {distance_m} m: give the cameras' distance from the object's centre in metres")
    if not 0 < fov_deg < 180:
        raise InputError(f"field of view {fov_deg} degrees: give the horizontal one, between 0 and 180")
    if not -90 < elevation_deg < 90:
        raise InputError(f"elevation {elevation_deg} degrees: give one between -90 and 90")


def _axes6(views: tuple[ViewFiles, ...], distance: float) -> list[NDArray[np.float64]]:
    names = {view.name for view in views}
    if names != set(_AXES):
        missing, strange = (", ".join(sorted(group)) or "none" for group in (set(_AXES) - names, names - set(_AXES)))
        raise InputError(f"axes6 needs the views {', '.join(_AXES)}; missing: {missing}; not of the rig: {strange}")
    return [_looking_at_origin(np.array(_AXES[view.name][0]) * distance, _AXES[view.name][1]) for view in views]


def _turntable(
    views: tuple[ViewFiles, ...], distance: float, elevation: float, sense: int
) -> list[NDArray[np.float64]]:
    turn = sense * 2 * np.pi * np.arange(len(views)) / len(views)
    level = np.column_stack([np.sin(turn), -np.cos(turn)]) * math.cos(elevation)
    eyes = distance * np.column_stack([level, np.full(len(views), math.sin(elevation))])
    return [_looking_at_origin(eye, (0, 0, 1)) for eye in eyes]


def _looking_at_origin(eye: NDArray[np.float64], up: tuple[int, int, int]) -> NDArray[np.float64]:
    """Camera-to-world 4x4 in OpenGL axes (x right, y up, z backwards) of a camera at `eye`."""
    backwards = eye / np.linalg.norm(eye)
    right = np.cross(np.array(up, np.float64), backwards)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.column_stack([right, np.cross(backwards, right), backwards, eye])
    return pose


def _write(target: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}-", delete=False) as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
    written = Path(stream.name)
    written.chmod(0o644)  # a temporary file is readable by its owner only
    written.replace(target)
