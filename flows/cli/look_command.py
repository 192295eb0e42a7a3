"""`capture2mesh look`: what a folder holds and what a run would do with it, without running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.conventions import EXIT_BAD_INPUT, EXIT_DONE, EngineOption, errors_told

if TYPE_CHECKING:
    from tasks.capture.capture_checks import CaptureReport
    from tasks.capture.layout import Reader
    from tasks.capture.layouts.layout_reader import Layout
    from tasks.capture.listing import ListedFile, Listing
    from tasks.capture.views import View
    from tasks.errors import Problem

# Views that noise is measured on and cameras are checked with, at most: more would not change it
_SOME = 12
_LABEL = 11


def look(
    capture: Annotated[str, typer.Argument(help="Folder or URL of the capture.")],
    engine: EngineOption = "auto",
) -> None:
    """Show what a folder holds: its layout, cameras, depth, sharpness; and what a run would do."""
    with errors_told():
        from tasks.capture.capture_checks import examine
        from tasks.capture.layouts import read_layout
        from tasks.capture.listing import list_capture
        from tasks.errors import CaptureRefused, grouped
        from tasks.inference.registry import ENGINES, resolve_engine
        from tasks.store.location import FileEntry, Location, sha256_of

        listing = list_capture(capture)
        folder = Location.of(listing.folder)

        def read(path: str) -> bytes:
            return (folder / path).read()

        def entry(file: ListedFile) -> FileEntry:
            # only a manifest is compared with digests
            digest = "" if listing.manifest is None else sha256_of(read(file.path))
            return FileEntry(path=file.path, bytes=file.bytes, sha256=digest)

        layout = read_layout([file.path for file in listing.files], read, listing.part)
        choice = resolve_engine(engine)
        report, reasons = None, tuple[str, ...]()
        try:
            report, _ = examine(
                listing.uri,
                [entry(file) for file in listing.files],
                read,
                ENGINES[choice.name].needs,
                listing.manifest,
                listing.others,
                (),
                listing.part,
            )
        except CaptureRefused as error:
            reasons = grouped(error.problems)
        views = _some_views(layout, read)
        if report is not None and ENGINES[choice.name].needs.cameras and (mistake := _mistake(layout, views)):
            report, reasons = None, grouped([mistake])
        for label, text in _lines(listing, layout, report, views):
            typer.echo(f"{label:{_LABEL}}{text}")
    for warning in () if report is None else grouped(report.warnings):
        typer.echo(f"{'warning':{_LABEL}}{warning}")
    if report is not None:
        typer.echo(f"{'would run':{_LABEL}}{choice.name} ({choice.reason})")
        raise typer.Exit(EXIT_DONE)
    typer.echo(f"{'refused':{_LABEL}}{choice.name} would not run:")
    for reason in reasons:
        typer.echo(f"  - {reason}")
    raise typer.Exit(EXIT_BAD_INPUT)


def _mistake(layout: Layout, views: Sequence[View]) -> Problem | None:
    """A mistake for which the cameras and the depth contradict each other, as the stage `find_cameras` finds it."""
    from tasks.cameras.find_cameras import depth_format
    from tasks.cameras.mistakes import find_mistake
    from tasks.errors import Problem

    posed = [view for view in views if view.camera is not None]
    told = find_mistake(posed, depth_format(layout)) if len(posed) > 1 else None
    return None if told is None else Problem(where=layout.cameras.source, what=told[0], todo=told[1])


def _lines(
    listing: Listing, layout: Layout, report: CaptureReport | None, views: Sequence[View]
) -> Iterator[tuple[str, str]]:
    """Each fact with its label."""
    object_named = f", {listing.part}" if listing.part else ""
    yield "layout", f"{layout.name} ({listing.layout.title}){object_named}"
    with_depth = sum(view.depth is not None for view in layout.views)
    masks = sum(view.mask is not None for view in layout.views)
    yield "views", f"{len(layout.views)}, {with_depth} with depth" + (f", {masks} with a mask" if masks else "")
    yield "cameras", _cameras(layout)
    if views:
        yield from _measured(views)
    if layout.cameras.frames:
        yield "around", _directions(layout)
    if report is not None and report.views:
        sharpness = sorted((view.sharpness, view.name) for view in report.views)
        median = sharpness[len(sharpness) // 2][0]
        yield "sharpness", f"median {median:.0f}, least {sharpness[0][0]:.0f} ({sharpness[0][1]})"
        covered = sum(view.coverage for view in report.views) / len(report.views)
        yield "object", "not cut out: it is searched for" if covered == 1 else f"{covered:.0%} of the pictures"


def _cameras(layout: Layout) -> str:
    cameras = layout.cameras
    lenses = list(cameras.lenses.values())
    focal = ""
    if lenses:
        lens = lenses[0]
        focal = f"focal length {lens.fl_x:.1f} px" if lens.fl_x else f"{lens.camera_angle_x:.3f} radians wide"
        focal += " (fisheye)" if lens.fisheye else ""
    if not cameras.frames:
        return f"none given; {focal}" if focal else "none given"
    return f"{len(cameras.frames)} of {len(layout.views)} by {cameras.source}, {focal}"


def _some_views(layout: Layout, read: Reader) -> list[View]:
    """A few views with depth in metres, spread over the capture; those that cannot be decoded are told elsewhere."""
    from tasks.capture.images import DecodeError
    from tasks.capture.views import decode_view

    chosen = [view for view in layout.views if view.depth is not None]
    found = []
    for files in chosen[:: max(1, len(chosen) // _SOME)][:_SOME]:
        try:
            view = decode_view(files, layout.cameras, read).view
        except DecodeError:
            continue
        if view.depth is not None and view.depth.any():
            found.append(view)
    return found


def _measured(views: Sequence[View]) -> Iterator[tuple[str, str]]:
    import numpy as np

    from tasks.geometry.depth_noise import measured_noise

    depths = [view.depth for view in views if view.depth is not None]
    readings = np.concatenate([depth[depth > 0] for depth in depths])
    low, middle, high = np.percentile(readings, [1, 50, 99])
    rows, columns = depths[0].shape
    height, width = views[0].image.shape[:2]
    noise = measured_noise(depths)
    yield "pictures", f"{width} x {height} px"
    yield (
        "depth",
        f"{columns} x {rows} px, {low:.3g} to {high:.3g} m, steps of {1000 * float(noise.step_at(middle)):.2g} mm "
        f"and noise of {1000 * float(noise.at(middle)):.2g} mm at {middle:.3g} m",
    )


def _directions(layout: Layout) -> str:
    """How the cameras stand around the point that they look at."""
    import numpy as np

    poses = np.array([frame.camera_to_world for frame in layout.cameras.frames.values()])
    centres, ahead = poses[:, :3, 3], -poses[:, :3, 2]
    # the point nearest to all lines of sight
    across = np.eye(3) - ahead[:, :, None] * ahead[:, None, :]
    middle = np.linalg.lstsq(across.sum(axis=0), (across @ centres[:, :, None]).sum(axis=0)[:, 0], rcond=None)[0]
    away = centres - middle
    distance = np.linalg.norm(away, axis=1)
    turns = np.sort(np.degrees(np.arctan2(away[:, 1], away[:, 0])))
    gap = float(np.diff([*turns, turns[0] + 360]).max())
    rise = np.degrees(np.arcsin(np.clip(away[:, 2] / np.maximum(distance, np.finfo(float).tiny), -1, 1)))
    return (
        f"{rise.min():.0f} to {rise.max():.0f} degrees high, largest gap around {gap:.0f} degrees, "
        f"{distance.min():.3g} to {distance.max():.3g} m away"
    )
