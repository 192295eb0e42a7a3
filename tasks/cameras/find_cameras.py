"""The stage `find_cameras`, run after `validate_capture`: one camera a view for all later stages, and its source.

Given cameras are checked against the depth: contradictions by a usual mistake are refused by name, smaller ones are
refined, and what remains is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from tasks.cameras.camera_picture import camera_picture
from tasks.cameras.conflict import GL_TO_PINHOLE, Witness, pinhole_poses
from tasks.cameras.explanations import DepthFormat
from tasks.cameras.finding import find
from tasks.cameras.mistakes import find_mistake
from tasks.cameras.refinement import Agreement, agreement, refined, turned_and_shifted
from tasks.capture.camera import Camera
from tasks.capture.capture_checks import Needs
from tasks.capture.given_cameras import Frame, Intrinsics
from tasks.capture.layout import TRANSFORMS
from tasks.capture.layouts.layout_reader import Layout
from tasks.capture.stage_capture import Capture
from tasks.capture.views import View
from tasks.errors import CaptureRefused, Problem
from tasks.geometry.depth_noise import DepthNoise, measured_noise
from tasks.progress import progress_artifact
from tasks.settings import CameraParameters
from tasks.stage import stage
from tasks.store.results import StoredResult

CAMERAS_VERSION = "2"
PICTURE = "cameras.jpg"
CHECKED = 60  # views at most that are compared, evenly spread over the capture
MOST_MOVED = 200  # views at most that cameras are found or refined for: all are in memory, and time grows with them
# Conflict, as a share of all that agrees or conflicts: with more, given cameras are refined; with more, it is told
REFINED_FROM = 0.02
LEAST_READINGS = 500  # of a view that is compared
TOLD_FROM = 0.25

Source = Literal["given", "refined", "found", "rig", "none"]
Matrix = tuple[tuple[float, float, float, float], ...]


class PlacedView(BaseModel):
    """The camera of one view, of its image's size."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The view's name."""
    source: Source
    """given: as the capture has it. refined: moved until it agrees with the depth. found: from views and depth."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fl_x: float
    """Focal length, pixels."""
    fl_y: float
    """Focal length, pixels."""
    cx: float
    """Principal point, pixels from the left border."""
    cy: float
    """Principal point, pixels from the upper border."""
    distortion: tuple[float, ...]
    """As `Camera.distortion`."""
    camera_to_world: Matrix
    """4x4, OpenGL axes, metres, world z-up."""

    @staticmethod
    def of(name: str, camera: Camera, source: Source) -> PlacedView:
        """The camera of a view."""
        return PlacedView(
            name=name,
            source=source,
            width=camera.width,
            height=camera.height,
            fl_x=camera.fl_x,
            fl_y=camera.fl_y,
            cx=camera.cx,
            cy=camera.cy,
            distortion=camera.distortion,
            camera_to_world=tuple(map(tuple, camera.camera_to_world.tolist())),
        )

    def camera(self) -> Camera:
        """The camera as views have it."""
        intrinsics = self.model_dump(exclude={"name", "source", "camera_to_world"})
        return Camera(camera_to_world=np.array(self.camera_to_world), **intrinsics)


class LeftOut(BaseModel):
    """A view without a camera."""

    model_config = ConfigDict(frozen=True)

    name: str
    """The view's name."""
    reason: str
    """Why it has none."""


class CaptureCameras(StoredResult):
    """The cameras that all stages after `find_cameras` use. Its file: `cameras.jpg`, a picture of them."""

    source: Source
    """The source of most of them; none: the capture has no cameras, and the engine needs none."""
    views: tuple[PlacedView, ...]
    """The cameras, by view name."""
    left_out: tuple[LeftOut, ...] = ()
    """Views that no camera was found for."""
    agreement: float | None = None
    """Share of the readings that a neighbouring view confirms, 0 to 1; None without depth to compare."""
    conflict: float | None = None
    """Share of the readings that a neighbour contradicts, in all that it confirms or contradicts, 0 to 1."""
    residual_m: float | None = None
    """Median distance of a reading from what a neighbouring view measured there, metres."""
    correction_deg: float = 0.0
    """Largest turn of a given camera, degrees."""
    correction_m: float = 0.0
    """Largest shift of a given camera, metres."""
    warnings: tuple[Problem, ...] = ()
    """Doubts about them."""

    def by_view(self) -> dict[str, Camera]:
        """The cameras by view name."""
        return {view.name: view.camera() for view in self.views}

    @property
    def focal_px(self) -> float | None:
        """Median focal length, pixels; None without cameras."""
        return float(np.median([view.fl_x for view in self.views])) if self.views else None


def _cameras_key(capture: Capture, parameters: CameraParameters, needs: Needs) -> Any:
    return [capture.digest, parameters, needs.cameras]


@stage(key=_cameras_key, version=CAMERAS_VERSION)
def find_cameras(folder: Path, capture: Capture, parameters: CameraParameters, needs: Needs) -> CaptureCameras:
    """Give every view its camera. Raises CaptureRefused if cameras and depth contradict each other by a mistake.

    For an engine that needs no cameras, such a mistake is a warning, and the cameras are not used.
    """
    given = capture.layout.cameras
    if parameters.mode == "find" or (parameters.mode == "auto" and not given.frames and needs.cameras):
        result, views = _searched(capture, needs)
        if result.views:
            (folder / PICTURE).write_bytes(camera_picture(views, result.by_view()))
        return result
    if needs.cameras and not given.frames:
        raise CaptureRefused(capture.uri, [_missing("the engine needs cameras")])
    source: Source = "rig" if given.rig else "given" if given.frames else "none"
    names = [name for name in capture.view_names if name in given.frames]
    compared = set(spread(names, CHECKED))
    placed, seen = list[PlacedView](), list[View]()
    for view in capture.views(names):
        if view.camera is not None:
            placed.append(PlacedView.of(view.name, view.camera, source))
        if view.name in compared and _has_readings(view):
            seen.append(view)
    result = CaptureCameras(source=source, views=tuple(placed))
    if len(seen) > 1:
        result = _checked(capture, result, seen, parameters, needs)
    if result.views:
        (folder / PICTURE).write_bytes(camera_picture(seen, result.by_view()))
    return result


def _searched(capture: Capture, needs: Needs) -> tuple[CaptureCameras, list[View]]:
    """Cameras found from views and depth, and the views. Raises CaptureRefused if an engine needs them, without any."""
    names = spread(capture.view_names, MOST_MOVED)
    views = [_with_intrinsics(view, capture.layout.cameras.lenses) for view in capture.views(names)]
    with progress_artifact("find_cameras") as progress:
        found = find(views, progress=progress)
    unsought = dict.fromkeys(capture.view_names, f"cameras are found for {MOST_MOVED} views at most")
    reasons = {name: reason for name, reason in unsought.items() if name not in names} | dict(found.left_out)
    left_out = tuple(LeftOut(name=name, reason=reason) for name, reason in sorted(reasons.items()))
    refusal = found.refusal
    if refusal is None and len(found.cameras) < needs.min_views:
        examples = "; ".join(f"{view.name}: {view.reason}" for view in left_out[:2])
        refusal = f"{len(found.cameras)} of {len(views)} views could be posed ({examples})"
    if refusal is not None:
        problem = _missing(f"cameras could not be found from views and depth: {refusal}")
        if needs.cameras:
            raise CaptureRefused(capture.uri, [problem])
        return CaptureCameras(source="none", views=(), left_out=left_out, warnings=(problem,)), views
    warnings = [Problem(where=view.name, what=view.reason, todo="it is left out") for view in left_out]
    if found.ambiguous is not None:
        todo = "compare the mesh with the object, or give cameras"
        warnings.append(Problem(where="cameras", what=f"may be wrong: {found.ambiguous}", todo=todo))
    placed = {name: found.cameras[name] for name in capture.view_names if name in found.cameras}
    cameras = CaptureCameras(
        source="found",
        views=tuple(PlacedView.of(name, camera, "found") for name, camera in placed.items()),
        left_out=left_out,
        agreement=round(found.agreement, 4),
        conflict=round(found.conflict, 4),
        residual_m=round(found.residual_m, 6),
        warnings=tuple(warnings),
    )
    return cameras, views


def _with_intrinsics(view: View, lenses: Mapping[str, Intrinsics]) -> View:
    """The view with a camera of its known intrinsics, at any place, if it has no camera."""
    if view.camera is not None or view.name not in lenses:
        return view
    height, width = view.mask.shape
    return replace(view, camera=Frame(lenses[view.name], np.eye(4)).camera(width, height))


def _missing(why: str) -> Problem:
    todo = "add it (nerfstudio's convention), or write it for a known rig with `capture2mesh rig`"
    return Problem(where=TRANSFORMS, what=f"is missing, and {why}", todo=todo)


def _checked(
    capture: Capture,
    given: CaptureCameras,
    seen: Sequence[View],
    parameters: CameraParameters,
    needs: Needs,
) -> CaptureCameras:
    """The given cameras after their comparison with the depth. seen: the views with depth that are compared."""
    sensor = measured_noise([view.depth for view in seen if view.depth is not None])
    witnesses = [witness for view in seen if len((witness := Witness.of(view, sensor)).depth)]
    if len(witnesses) < 2:
        return given
    if needs.cameras and not all(np.isfinite(witness.points).all() for witness in witnesses):
        what, todo = "the lens distortion has no inverse inside the image", "correct k1, k2, p1, p2"
        raise CaptureRefused(
            capture.uri, [Problem(where=TRANSFORMS, what=what, todo=f"{todo}, or undistort the images")]
        )
    before = agreement(witnesses, pinhole_poses(witnesses))
    judged = given.model_copy(update=_figures(before))
    if before.contradicted <= REFINED_FROM and before.agree.mean() > REFINED_FROM and parameters.mode != "refine":
        return judged
    if (told := find_mistake(seen, depth_format(capture.layout))) is not None:
        problem = Problem(where=capture.layout.cameras.source, what=told[0], todo=told[1])
        if needs.cameras:
            raise CaptureRefused(capture.uri, [problem])
        unused = [LeftOut(name=view.name, reason=told[0]) for view in given.views]
        return CaptureCameras(source="none", views=(), left_out=tuple(unused), warnings=(problem,))
    moves = parameters.mode != "given" and given.source != "rig" and len(given.views) <= MOST_MOVED
    if moves and before.contradicted > REFINED_FROM:
        views = capture.views([view.name for view in given.views])
        judged = _refined(judged, [view for view in views if _has_readings(view)], sensor)
    if judged.conflict is not None and judged.conflict > TOLD_FROM:
        what = f"cameras and depth contradict each other in {judged.conflict:.0%} of the compared readings"
        todo = "check the cameras' poses, the intrinsics and the depth's unit"
        problem = Problem(where="cameras", what=what, todo=todo)
        judged = judged.model_copy(update={"warnings": (*judged.warnings, problem)})
    return judged


def _refined(given: CaptureCameras, seen: Sequence[View], sensor: DepthNoise) -> CaptureCameras:
    """The cameras refined, where that is certain to be better."""
    witnesses = [Witness.of(view, sensor) for view in seen]
    found = refined(seen, witnesses, sensor)
    if found is None:
        return given
    turned, shifted = turned_and_shifted(found.poses, pinhole_poses(witnesses))
    moved = {
        view.name: PlacedView.of(view.name, replace(view.camera, camera_to_world=pose @ GL_TO_PINHOLE), "refined")
        for view, pose, does in zip(seen, found.poses, found.moved, strict=True)
        if does and view.camera is not None
    }
    what, todo = "its camera contradicts the other views even after a refinement", "correct it, or remove the view"
    names = [view.name for view, astray in zip(seen, found.astray, strict=True) if astray]
    return given.model_copy(
        update={
            "source": "refined",
            "warnings": tuple(Problem(where=name, what=what, todo=todo) for name in names),
            "views": tuple(moved.get(view.name, view) for view in given.views),
            "correction_deg": round(float(np.degrees(turned.max())), 4),
            "correction_m": round(float(shifted.max()), 6),
            **_figures(found.after),
        }
    )


def _figures(found: Agreement) -> dict[str, float]:
    return {
        "agreement": round(float(found.agree.mean()), 4),
        "conflict": round(found.contradicted, 4),
        "residual_m": round(found.residual_m, 6),
    }


def depth_format(layout: Layout) -> DepthFormat:
    """How the capture's depth maps are stored."""
    integer = any((view.depth or "").lower().endswith(".png") for view in layout.views)
    return DepthFormat(unit=layout.cameras.depth_unit, integer=integer, limits=layout.cameras.depth_range)


def spread(names: Sequence[str], most: int) -> tuple[str, ...]:
    """At most so many of the names, evenly spread."""
    return tuple(names[index] for index in np.unique(np.linspace(0, len(names) - 1, min(len(names), most)).astype(int)))


def _has_readings(view: View) -> bool:
    return view.depth is not None and int((view.depth > 0).sum()) >= LEAST_READINGS
