"""Search for the cameras of views with depth, where none are known. The stage `find_cameras` calls it.

Features propose motions between two views, all their depth, colours and silhouettes verify them; views are added one
by one where none contradicts, and refined together. A shape that repeats itself, slides or turns freely is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tasks.cameras.assembly import LEAST_SUPPORT, SETTLED_SLACK, Assembly, pair_quality
from tasks.cameras.conflict import GL_TO_PINHOLE, inverse
from tasks.cameras.features import Features, features, matches
from tasks.cameras.focal import found_zoom
from tasks.cameras.pairs import LARGEST_LIMIT, Hypothesis, Pair, conflict_limit, pair_hypotheses, turned
from tasks.cameras.second_solutions import ENOUGH_VIEWS, second_solution, slides, turned_poses
from tasks.cameras.still_background import without_still_background
from tasks.cameras.surface_views import SurfaceView, intrinsics, object_size, surface_views
from tasks.cameras.world_frame import box_around, world_of
from tasks.capture.camera import Camera
from tasks.capture.subject import Box
from tasks.capture.views import View
from tasks.geometry.depth_noise import DepthNoise, measured_noise

Floats = NDArray[np.float64]
Progress = Callable[[float, str], None]

LEAST_VIEWS = 3  # two views agree on much that is wrong
LEAST_SHARE = 0.5  # of the views that are posed, or nothing is
SEEDS = 4  # starts, of which the largest result counts
CHECKS = 3  # rounds of refinement, purge and rescue
POSED_FACTOR = 2.5  # the limit of conflicts, in medians of the posed views: what a sensor's right cameras spread
CHECK_ITERATIONS, CHECK_READINGS, CHECK_GATES = 8, 400, (0.02, 0.006)
LAST_ITERATIONS, LAST_READINGS, LAST_GATES = 14, 1000, (0.012, 0.006)
SEED_QUALITY = 0.08  # of the pairs that a start counts
PROPOSALS = 40  # of a view in a check
RESCUED = 6  # candidates that are refined in a check
# Colours of a view that differ from others by more than this factor and step of the median are those of another place
SUSPECT_FACTOR, SUSPECT_STEP = 1.6, 0.02
WRONG_FACTOR, WRONG_STEP = 2.0, 0.03
OTHER_PLACE = 0.6  # of a view's texture that others do not see: views of one place differ by half at most
ALL_PAIRS = 40  # views, of which all pairs are matched; of more, similar ones and neighbours
SIMILAR, FOLLOWING = 12, 3
STILL_TURN, STILL_SHIFT = np.radians(1.0), 0.01  # cameras that move by less, and by less of their distance, stand still
AMBIGUOUS_MARGIN = 0.1  # of the support, that a second solution loses at least where the first one is certain
MOST_DOUBTED = 8  # views, evenly chosen, whose second solutions are tried
ONE_SIDED = 0.55  # length of the mean direction to the cameras: 0 all around, 0.64 for half of the way, 1 for one place
AMBIGUOUS_SHARE = 0.15  # of the views without such a margin, or that slide, from which a capture is ambiguous


@dataclass(frozen=True, eq=False)
class FoundCameras:
    """The cameras that a search found, one a view or left out, and how sure they are."""

    cameras: Mapping[str, Camera]
    """By the view's name, of the image's size, in a world with z up and the origin under the object, metres"""
    left_out: Mapping[str, str]
    """Views without a camera, with the reason"""
    refusal: str | None
    """The reason why no cameras are given; None if there are some"""
    ambiguous: str | None
    """The reason to doubt the cameras; None if there is none"""
    focal_px: float
    """Focal length across, pixels of the image"""
    focal_found: bool
    """True if the focal length was solved for as well"""
    residual_m: float
    """Median distance of a reading from another view's surface, metres"""
    agreement: float
    """Share of a view's readings that others measured too, its median over views"""
    conflict: float
    """Largest share of a view's readings that others contradict, its median over views"""
    margin: float
    """Support that the second, different solution loses, as a share, its median over views"""
    unconstrained: tuple[str, ...]
    """Views, of those that were tried, that can be moved without any loss: on planes, on bodies of revolution"""
    object_moves: bool | None
    """True if the object turned before a still background, False if the cameras moved; None: no background is seen"""
    box: Box | None = None
    """Around the object, if it turned before a still background: all else does not fit the cameras"""


def find(
    views: Sequence[View],
    sensor: DepthNoise | None = None,
    progress: Progress | None = None,
    object_moves: bool | None = None,
) -> FoundCameras:
    """Find the camera of every view that has depth.

    views: with a camera if its intrinsics are known (its pose is not used); the focal length is solved for if any
    view has none. sensor: noise of the depth, measured here if not given. progress: called with the share done and
    what is being done. object_moves: True if the object turned before a still background, False if the cameras moved;
    None: found out.
    """
    tell = progress or (lambda share, what: None)
    left_out = {view.name: "it has no depth of the object" for view in views if not _usable(view)}
    views = [view for view in views if _usable(view)]
    known = all(view.camera is not None for view in views)
    if len(views) < LEAST_VIEWS:
        return _refused(left_out, f"{len(views)} views have depth, {LEAST_VIEWS} are needed", known)
    if not known:
        views = [replace(view, camera=None) for view in views]
    sensor = sensor or measured_noise([view.depth for view in views if view.depth is not None])
    masked = any(view.has_mask for view in views)
    turning = None if object_moves is False else without_still_background(views, sensor, sure=bool(object_moves))
    if object_moves and turning is None and not masked:
        return _refused(
            left_out, "nothing is seen to move before a still background: cut the object out (alpha)", known
        )
    views = turning or views
    rng = np.random.default_rng(0)
    tell(0.0, "features")
    surfaces = surface_views(views, sensor)
    found = [features(view, surface) for view, surface in zip(views, surfaces, strict=True)]
    tell(0.2, "matches")
    matched = {pair: matches(found[pair[0]], found[pair[1]]) for pair in candidate_pairs(found)}
    zoom = 1.0 if known else found_zoom(surfaces, found, matched, rng)
    tell(0.3, "pairs of views")
    hypotheses = pair_hypotheses(surfaces, found, matched, zoom, rng)
    limit = conflict_limit(hypotheses, len(views))
    tell(0.6, "all views")
    assembly = _largest(surfaces, hypotheses, zoom, limit, free_focal=not known)
    if len(assembly.posed) >= LEAST_VIEWS:
        _check(assembly, hypotheses)
    names = [view.name for view in views]
    for k, name in enumerate(names):
        if k not in assembly.posed:
            left_out[name] = _reason(k, hypotheses, limit)
    share = len(assembly.posed) / len(views)
    if len(assembly.posed) < LEAST_VIEWS or share < LEAST_SHARE:
        why = f"{len(assembly.posed)} of {len(views)} views could be linked: {next(iter(left_out.values()))}"
        return _refused(left_out, why, known)
    tell(0.8, "refinement")
    refined = assembly.refine(LAST_ITERATIONS, LAST_READINGS, LAST_GATES, SETTLED_SLACK)
    if _still(assembly):
        why = "no camera moves: if the object turned before a still background, cut it out (alpha)"
        return _refused(left_out, why, known)
    tell(0.9, "second solutions")
    moves = True if turning is not None else None if masked else False
    return _told(assembly, views, left_out, refined.residual_m, known, moves)


def candidate_pairs(found: Sequence[Features]) -> list[Pair]:
    """The pairs of views (larger index first) whose features are matched: all, or of many views similar ones."""
    count = len(found)
    if count <= ALL_PAIRS:
        return [(one, other) for one in range(count) for other in range(one)]
    words = _words(found)
    alike = words @ words.T
    np.fill_diagonal(alike, -1)
    pairs = {(max(one, int(other)), min(one, int(other))) for one in range(count) for other in _best(alike[one])}
    pairs |= {(one, one - back) for one in range(count) for back in range(1, FOLLOWING + 1) if one >= back}
    return sorted(pairs)


def _best(alike: Floats) -> NDArray[np.intp]:
    return np.argsort(-alike, kind="stable")[:SIMILAR]


def _words(found: Sequence[Features], vocabulary: int = 512) -> Floats:
    """Histograms (n, words) of each view's descriptors, weighed by their rarity (Sivic and Zisserman, ICCV 2003)."""
    rng = np.random.default_rng(0)
    everything = np.concatenate([each.descriptors for each in found])
    words = everything[rng.choice(len(everything), min(vocabulary, len(everything)), replace=False)]
    nearest = [(each.descriptors @ words.T).argmax(axis=1) for each in found]
    counts = np.stack([np.bincount(each, minlength=len(words)) for each in nearest])
    rarity = np.log(len(found) / np.maximum((counts > 0).sum(axis=0), 1))
    weighed = np.sqrt(counts) * rarity
    return weighed / np.maximum(np.linalg.norm(weighed, axis=1, keepdims=True), 1e-9)


def _usable(view: View) -> bool:
    return view.depth is not None and bool(view.depth.any())


def _refused(left_out: Mapping[str, str], why: str, known: bool) -> FoundCameras:
    nothing = float("nan")
    return FoundCameras({}, left_out, why, None, nothing, not known, nothing, 0.0, 0.0, 0.0, (), None)


def _largest(
    surfaces: Sequence[SurfaceView], hypotheses: Sequence[Hypothesis], zoom: float, limit: float, *, free_focal: bool
) -> Assembly:
    """The largest of some assemblies, each grown from a view that the ones before did not reach."""
    weights = np.zeros(len(surfaces))
    for each in hypotheses:
        quality = pair_quality(each, limit)
        if quality > SEED_QUALITY:
            weights[[each.one, each.other]] += quality
    best, reached = Assembly(surfaces, zoom, limit, free_focal=free_focal), set[int]()
    for _ in range(SEEDS):
        left = [view for view in range(len(surfaces)) if view not in reached]
        if len(left) < LEAST_VIEWS or len(best.posed) >= len(surfaces) - 1:
            break
        assembly = Assembly(surfaces, zoom, limit, free_focal=free_focal)
        assembly.grow(hypotheses, max(left, key=lambda view: weights[view]))
        reached |= set(assembly.posed)
        if len(assembly.posed) > len(best.posed):
            best = assembly
    return best


def _check(assembly: Assembly, hypotheses: Sequence[Hypothesis]) -> None:
    """Refine all cameras, take out what is contradicted, and rescue what is missing, until nothing changes."""
    for turn in range(CHECKS):
        assembly.refine(CHECK_ITERATIONS, CHECK_READINGS, CHECK_GATES, SETTLED_SLACK)
        conflicts = [assembly.judge(view, pose[None]).conflict[0] for view, pose in assembly.posed.items()]
        assembly.limit = max(assembly.limit, min(POSED_FACTOR * float(np.median(conflicts)), LARGEST_LIMIT))
        gone = assembly.purge()
        missing = [view for view in range(len(assembly.surfaces)) if view not in assembly.posed]
        added = [view for view in missing if len(assembly.posed) >= 2 and _rescued(assembly, hypotheses, view)]
        moved = [] if turn else _turned_right(assembly)
        if not (gone or added or moved):
            break
    verdicts = {view: assembly.judge(view, pose[None]) for view, pose in assembly.posed.items()}
    usual = float(np.median([verdict.colour[0] for verdict in verdicts.values()]))
    for view, verdict in verdicts.items():
        if verdict.colour[0] > WRONG_FACTOR * usual + WRONG_STEP or verdict.other_texture[0] > OTHER_PLACE:
            del assembly.posed[view]


def _rescued(assembly: Assembly, hypotheses: Sequence[Hypothesis], view: int) -> bool:
    """Pose a missing view by all of its pairs, or by what they become when they are turned about the object."""
    posed = assembly.posed
    proposals = []
    for each in sorted(hypotheses, key=lambda each: -pair_quality(each, assembly.limit)):
        if each.one == view and each.other in posed:
            proposals.append(posed[each.other] @ each.motion)
        elif each.other == view and each.one in posed:
            proposals.append(posed[each.one] @ inverse(each.motion))
    if not proposals:
        return False
    candidates = np.stack(proposals[:PROPOSALS])
    if assembly.add(view, candidates, RESCUED):
        return True
    if len(posed) < ENOUGH_VIEWS:
        return False
    best = int(assembly.judge(view, candidates).agree.argmax())
    return assembly.add(view, turned_poses(assembly, assembly.settle(view, candidates[best])), RESCUED)


def _turned_right(assembly: Assembly) -> list[int]:
    """Views whose colours are those of another place of a shape that repeats itself, turned to where they belong."""
    if len(assembly.posed) < ENOUGH_VIEWS:
        return []
    colours = {view: assembly.colour(view) for view in assembly.posed}
    usual, moved = float(np.median(list(colours.values()))), []
    for view, colour in colours.items():
        if colour > SUSPECT_FACTOR * usual + SUSPECT_STEP:
            old = assembly.posed[view]
            assembly.add(view, np.concatenate([old[None], turned_poses(assembly, old)]), RESCUED)
            if turned(assembly.posed[view][:3, :3], old[:3, :3]) > STILL_TURN:
                moved.append(view)
    return moved


def _still(assembly: Assembly) -> bool:
    """True if no camera moves."""
    poses = np.stack(list(assembly.posed.values()))
    size = object_size(assembly.surfaces, assembly.zoom)
    turns = [turned(pose[:3, :3], poses[0][:3, :3]) for pose in poses]
    shifts = np.linalg.norm(poses[:, :3, 3] - poses[0][:3, 3], axis=1)
    return float(np.median(turns)) < STILL_TURN and float(np.median(shifts)) < STILL_SHIFT * size


def _reason(view: int, hypotheses: Sequence[Hypothesis], limit: float) -> str:
    mine = [each for each in hypotheses if view in (each.one, each.other)]
    if not mine:
        return "nothing in it was recognised in another view"
    if min(each.conflict for each in mine) > limit:
        return "its depth contradicts that of other views wherever it was placed"
    if max(each.support for each in mine) < LEAST_SUPPORT:
        return "too little of it is seen in other views"
    return "no place was found where all other views agree"


def _told(
    assembly: Assembly,
    views: Sequence[View],
    left_out: Mapping[str, str],
    residual: float,
    known: bool,
    moves: bool | None,
) -> FoundCameras:
    """The cameras in their world, with the evidence for and against them."""
    posed = list(assembly.posed)
    poses = np.stack([assembly.posed[view] for view in posed])
    verdicts = [assembly.judge(view, assembly.posed[view][None]) for view in posed]
    doubted = posed[:: -(-len(posed) // MOST_DOUBTED)]
    seconds = [second_solution(assembly, view) for view in doubted]
    free = tuple(views[view].name for view in doubted if slides(assembly, view))
    doubtful = [second for second in seconds if second.margin < AMBIGUOUS_MARGIN]
    ambiguous = None
    if len(free) > AMBIGUOUS_SHARE * len(doubted):
        ambiguous = f"{len(free)} of {len(doubted)} views can be moved along the surface and fit as well as before"
    elif len(doubtful) > AMBIGUOUS_SHARE * len(doubted):
        angle = float(np.median([second.turn_deg for second in doubtful]))
        ambiguous = (
            f"{len(doubtful)} of {len(doubted)} views fit about as well when they are turned by {angle:.0f} degrees"
        )
    surfaces = [assembly.surfaces[view] for view in posed]
    poses = world_of(surfaces, poses, assembly.zoom) @ poses
    cameras = {}
    for view, pose in zip(posed, poses, strict=True):
        camera = intrinsics(views[view])
        cameras[views[view].name] = replace(
            camera,
            fl_x=camera.fl_x * assembly.zoom,
            fl_y=camera.fl_y * assembly.zoom,
            camera_to_world=pose @ GL_TO_PINHOLE,
        )
    if ambiguous is None and moves is not False and _one_sided(cameras.values()):
        ambiguous = "all views would be of one side of the object: if they are not, its sides look alike"
    return FoundCameras(
        cameras,
        dict(left_out),
        None,
        ambiguous,
        next(iter(cameras.values())).fl_x,
        not known,
        residual,
        float(np.median([verdict.agree[0] for verdict in verdicts])),
        float(np.median([verdict.conflict[0] for verdict in verdicts])),
        float(np.median([second.margin for second in seconds])),
        free,
        moves,
        box_around(surfaces, poses, assembly.zoom) if moves else None,
    )


def _one_sided(cameras: Iterable[Camera]) -> bool:
    """True if the cameras stand on one side of the object, seen from above; one after another around it, they do not.

    A shape that repeats itself explains its views from there too. Cameras high above it count little.
    """
    centres = np.stack([camera.centre for camera in cameras])
    sideways = centres[:, :2] / np.linalg.norm(centres, axis=1, keepdims=True)
    return float(np.linalg.norm(sideways.mean(axis=0)) / np.linalg.norm(sideways, axis=1).mean()) > ONE_SIDED
