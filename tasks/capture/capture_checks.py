"""Checks that a capture can be reconstructed: its problems, and warnings about its views; validate_capture calls it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import BaseModel, ValidationError
from scipy.spatial import cKDTree

from tasks.capture.contact_sheet import Thumbnail
from tasks.capture.layout import (
    DEPTH,
    MANIFEST,
    TRANSFORMS,
    VIEWS,
    Layout,
    Reader,
    belongs,
    declared_files,
    leaves_folder,
    pair,
)
from tasks.capture.transforms import Cameras, load_cameras
from tasks.capture.view_checks import Facts, ViewReport, inspect
from tasks.capture.views import depth_file
from tasks.errors import CaptureRefused, Problem
from tasks.store.location import FileEntry
from tasks.store.results import StoredResult

RULES_VERSION = "3"

_THREADS = 2
# Below this share of the capture's median sharpness a view looks blurred: on photographs a Gaussian blur of 1 pixel
# (of 512) leaves a twelfth.
_BLURRED_SHARE = 0.15
# Photographs have 400 to 1600 grey levels squared, and 2 to 5 after a blur of 3 pixels; so have plain surfaces.
_SHARPNESS_FLOOR = 4.0
# Two cameras are the same if all elements of their matrices (metres and cosines) differ by less than this.
_SAME_CAMERA = 1e-6


class Needs(BaseModel, frozen=True):
    """An engine's needs: a capture that lacks one of them is refused."""

    cameras: bool
    """True if every view needs a camera"""
    metric_depth: bool
    """True if every view needs a depth map in metres"""
    min_views: int
    """Least number of views"""


class CaptureReport(StoredResult):
    """An accepted capture."""

    views: tuple[ViewReport, ...]
    """Every view, sorted by name"""
    warnings: tuple[Problem, ...]
    """Findings that do not stop a reconstruction"""
    has_cameras: bool
    """True if every view has a camera"""

    @property
    def lacks_masks(self) -> bool:
        """True if a view has nothing that tells the object from its background."""
        return any(view.coverage == 1 for view in self.views)


def examine(
    capture: str,
    files: Sequence[FileEntry],
    read: Reader,
    needs: Needs,
    manifest: str | None = None,
    others: Sequence[str] = (),
    found: Sequence[Problem] = (),
) -> tuple[CaptureReport, list[Thumbnail]]:
    """Check a capture against an engine's needs: the report, and a thumbnail of each view.

    manifest: the text of its manifest.json. others: names beside the capture's files. found: problems that are known
    already. Every file is read and decoded once; two decoded views at most are in memory. Raises CaptureRefused with
    all problems.
    """
    problems, warnings = list(found), list[Problem]()
    names = [*(file.path for file in files), *others]
    problems += [_leaving(name) for name in names if leaves_folder(name)]
    if manifest is not None:
        problems += check_manifest(manifest, files)
    empty = {file.path for file in files if file.bytes == 0 and belongs(file.path)} - {TRANSFORMS}
    problems += [Problem(where=path, what="is empty (0 bytes)", todo="upload it again") for path in sorted(empty)]
    layout = pair(names)
    cameras, wrong = load_cameras(layout, read)
    (problems if needs.cameras else warnings).extend(wrong)
    problems += _check_names(layout, needs)
    warnings += [_ignored(path) for path in layout.ignored]
    if needs.cameras and (cameras.named or not wrong):
        problems += _check_cameras_are_there(layout, cameras)
    (problems if needs.metric_depth else warnings).extend(_check_depth_is_there(layout, cameras, needs))

    with ThreadPoolExecutor(_THREADS) as pool:
        readable = [view for view in layout.views if not empty & {view.image, depth_file(view, cameras)}]
        inspected = list(pool.map(lambda view: inspect(view, cameras, read), readable))
    for view in inspected:
        problems += view.problems
        warnings += view.warnings
        (problems if needs.cameras else warnings).extend(view.camera_problems)
        (problems if needs.metric_depth else warnings).extend(view.depth_problems)
    facts = [view.facts for view in inspected if view.facts is not None]
    problems += [_relative(view) for view in facts if needs.metric_depth and view.relative_depth]
    problems += _check_enough_show_the_object(facts, needs)
    copies, alike = _check_copies(facts)
    problems += copies
    warnings += alike + _check_blur(facts) + _check_same_camera(facts)
    if problems:
        raise CaptureRefused(capture, problems)
    report = CaptureReport(
        views=tuple(_with_verdict(view, warnings) for view in facts),
        warnings=tuple(warnings),
        has_cameras=all(view.camera is not None for view in facts),
    )
    return report, [view.thumbnail for view in facts]


def check_manifest(manifest: str, files: Sequence[FileEntry]) -> list[Problem]:
    """Contradictions between a manifest.json and the capture's content."""
    try:
        declared = declared_files(manifest)
    except ValidationError as error:
        what = f"is not a valid manifest ({error.errors(include_url=False)[0]['msg']})"
        return [Problem(where=MANIFEST, what=what, todo="write it again, or remove it")]
    there = {file.path: file for file in files}
    problems = []
    for entry in declared:
        path = entry.path
        if leaves_folder(path):
            problems.append(_leaving(path, MANIFEST))
        elif not belongs(path):
            continue
        elif path not in there:
            problems.append(Problem(where=path, what=f"is missing; {MANIFEST} lists it", todo="upload it"))
        elif entry.bytes not in (None, there[path].bytes):
            what = f"has {there[path].bytes} bytes; {MANIFEST} says {entry.bytes}"
            problems.append(Problem(where=path, what=what, todo="upload it again"))
        elif entry.sha256 not in (None, there[path].sha256):
            problems.append(
                Problem(where=path, what=f"has other content than {MANIFEST} lists (sha256)", todo="upload it again")
            )
    return problems


def _check_names(layout: Layout, needs: Needs) -> list[Problem]:
    problems = [
        Problem(where=group[0], what=f"shares its name with {', '.join(group[1:])}", todo="keep one of them")
        for group in layout.duplicates
    ]
    if len(layout.views) < needs.min_views:
        what = f"holds {len(layout.views)} view(s), the engine needs {needs.min_views}"
        problems.append(Problem(where=f"{VIEWS}/", what=what, todo="add PNG or JPEG views of the object"))
    return problems


def _check_enough_show_the_object(facts: Sequence[Facts], needs: Needs) -> list[Problem]:
    """Views that do not show the object are left out, as long as enough others are there."""
    showing = sum(view.shows_object for view in facts)
    if showing == len(facts) or showing >= needs.min_views:
        return []
    what = f"holds {showing} view(s) that show the object, of {len(facts)}; the engine needs {needs.min_views}"
    return [Problem(where=f"{VIEWS}/", what=what, todo="check the masks, the depth maps and the bounds")]


def _ignored(path: str) -> Problem:
    return Problem(
        where=path, what="is ignored: views are PNG or JPEG, depth maps PNG, TIFF, EXR or NPY", todo="remove it"
    )


def _check_cameras_are_there(layout: Layout, cameras: Cameras) -> list[Problem]:
    """Views that were forgotten in transforms.json; without one, the cameras are found."""
    if not layout.has_transforms:
        return []
    return [
        Problem(where=view.image, what=f"has no camera in {TRANSFORMS}", todo="add its frame, or remove the view")
        for view in layout.views
        if view.name not in cameras.named
    ]


def _check_depth_is_there(layout: Layout, cameras: Cameras, needs: Needs) -> list[Problem]:
    used = {depth_file(view, cameras) for view in layout.views}
    problems = [
        Problem(where=view.image, what="has no depth map", todo=f"add {DEPTH}/{view.name}.png")
        for view in layout.views
        if depth_file(view, cameras) is None and (needs.metric_depth or len(used) > 1)
    ]
    everything = {view.depth for view in layout.views if view.depth is not None} | {*layout.unmatched_depth}
    problems += [
        Problem(where=path, what="is a depth map without a view", todo=f"add its view to {VIEWS}/, or remove it")
        for path in sorted(everything - used)
    ]
    return problems


def _check_copies(facts: Sequence[Facts]) -> tuple[list[Problem], list[Problem]]:
    """Views with the same pixels: copies are problems. Pictures without texture may be equal (a plain, round body)."""
    problems, warnings = list[Problem](), list[Problem]()
    first: dict[str, Facts] = {}
    for view in facts:
        original = first.setdefault(view.fingerprint, view)
        if original is view:
            continue
        problem = Problem(where=view.path, what=f"has the same pixels as {original.path}", todo="remove the copy")
        (warnings if view.report.sharpness < _SHARPNESS_FLOOR else problems).append(problem)
    return problems, warnings


def _check_blur(facts: Sequence[Facts]) -> list[Problem]:
    """Views that are far less sharp than the others, or not sharp at all. An empty mask has no sharpness."""
    masked = [view for view in facts if view.report.coverage > 0]
    if not masked:
        return []
    median = float(np.median([view.report.sharpness for view in masked]))
    todo = "take it again if it is blurred"
    warnings = []
    for view in masked:
        sharpness = view.report.sharpness
        if sharpness < _BLURRED_SHARE * median:
            what = f"looks blurred (sharpness {sharpness:.1f}, the capture's median is {median:.1f})"
            warnings.append(Problem(where=view.path, what=what, todo=todo))
        elif sharpness < _SHARPNESS_FLOOR:
            what = f"looks blurred or has no texture (sharpness {sharpness:.1f})"
            warnings.append(Problem(where=view.path, what=what, todo=todo))
    return warnings


def _check_same_camera(facts: Sequence[Facts]) -> list[Problem]:
    """Different pictures by one camera: a rig that did not move, or matrices that were copied."""
    placed = [(view, view.camera.camera_to_world.ravel()) for view in facts if view.camera is not None]
    if not placed:
        return []
    pairs = cKDTree([matrix for _, matrix in placed]).query_pairs(_SAME_CAMERA, p=np.inf)
    earlier: dict[int, Facts] = {}
    for first, second in sorted(pairs):
        if placed[first][0].fingerprint != placed[second][0].fingerprint:
            earlier.setdefault(second, placed[first][0])
    return [
        Problem(
            where=placed[index][0].path,
            what=f"has the same camera as {other.path} and another picture",
            todo="check its transform_matrix",
        )
        for index, other in sorted(earlier.items())
    ]


def _relative(view: Facts) -> Problem:
    todo = f"give depth_near and depth_far in {TRANSFORMS}, or save it with 16 bits"
    return Problem(where=view.depth_path or view.path, what="is 8-bit grey, which gives no distance", todo=todo)


def _with_verdict(view: Facts, warnings: Sequence[Problem]) -> ViewReport:
    texts = [warning.what for warning in warnings if warning.where in (view.path, view.depth_path)]
    return view.report.model_copy(update={"verdict": "; ".join(texts) or "ok"})


def _leaving(path: str, listed_in: str = "the capture") -> Problem:
    what = f"leaves the capture folder (a name in {listed_in})"
    return Problem(where=path, what=what, todo="rename it: views/<name>.png, depth/<name>.png")
