"""validate_mesh: measure the GLB as a reader would load it, compare with the limits, and take its picture."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from tasks.capture.stage_capture import Capture
from tasks.capture.views import View
from tasks.geometry.render import preview
from tasks.mesh.convert import load_glb
from tasks.mesh.export import CAPTURE_TO_GLTF, Mesh
from tasks.report import Check, MeshSummary
from tasks.settings import Limits
from tasks.stage import stage
from tasks.store.results import StoredResult

# azimuth and elevation in degrees: all around, then from above and from below
PREVIEWS = ((30, 20), (120, 20), (210, 20), (300, 20), (30, 70), (30, -50))
PREVIEW_SHEET = "previews.jpg"
PREVIEW_PX = 400
SHEET_PX = 300
SHEET_JPEG_QUALITY = 85
# a box has no more than these
PLACEHOLDER_VERTICES, PLACEHOLDER_FACES = 8, 12
_POINTS_PER_VIEW = 1000
_THREADS = 2
_SURFACE_SAMPLES = 100_000


class MeshReport(StoredResult):
    """What the mesh is, every check with its limit, and `previews/*.png` with `previews.jpg`, all of them on a page."""

    mesh: MeshSummary
    checks: tuple[Check, ...]


def measure(glb: bytes, mesh: Mesh) -> tuple[trimesh.Trimesh, MeshSummary]:
    """Load a GLB and measure it; topology on the vertices welded by position (texture seams split them)."""
    loaded = load_glb(glb)
    welded = weld(loaded)
    return loaded, MeshSummary(
        vertices=len(loaded.vertices),
        faces=len(loaded.faces),
        glb_bytes=len(glb),
        watertight=bool(welded.is_watertight),
        components=int(welded.body_count),
        degenerate_faces=int((~welded.nondegenerate_faces()).sum()),
        exporter=mesh.exporter,
        decimated_by=mesh.decimated_by,
        texture_px=mesh.texture_px,
        texture_coverage=mesh.texture_coverage,
        extent_m=tuple(np.nan_to_num(np.abs(CAPTURE_TO_GLTF.T @ loaded.extents)).round(6).tolist()),
        metric=mesh.metric,
        export_error=mesh.export_error,
    )


def weld(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The same surface with one vertex a position."""
    welded = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    return welded


def captured_share(mesh: trimesh.Trimesh, points: NDArray[np.float32], distance: float) -> float:
    """Share of captured points (n, 3), in the GLB's frame, within `distance` of the surface."""
    surface, _ = trimesh.sample.sample_surface(mesh, _SURFACE_SAMPLES, seed=0)
    nearest, _ = cKDTree(surface).query(points, distance_upper_bound=distance)
    return float(np.isfinite(nearest).mean())


def captured_points(views: list[View]) -> NDArray[np.float32]:
    """Foreground depth readings as points (n, 3), evenly thinned, in the GLB's frame."""
    points = [np.empty((0, 3), np.float32)]
    for view in views:
        if view.depth is None or view.camera is None:
            continue
        rows, columns = np.nonzero(view.depth)
        every = max(1, len(rows) // _POINTS_PER_VIEW)
        height, width = view.depth.shape
        camera = view.camera.resized(width, height)
        rows, columns = rows[::every], columns[::every]
        rays = camera.directions(np.column_stack([columns, rows]) + 0.5)
        points.append((camera.centre + view.depth[rows, columns, None] * rays).astype(np.float32))
    return np.concatenate(points) @ CAPTURE_TO_GLTF.T


def checks_of(
    loaded: trimesh.Trimesh, summary: MeshSummary, points: NDArray[np.float32], limits: Limits
) -> tuple[Check, ...]:
    """Every check; those of the floor first."""

    def at_least(name: str, value: float, limit: float, floor: bool = False) -> Check:
        return Check(name=name, passed=value >= limit, value=value, limit=limit, floor=floor)

    def holds(name: str, value: bool, floor: bool = False) -> Check:
        return Check(name=name, passed=value, value=value, limit=True, floor=floor)

    def at_most(name: str, value: float, limit: float) -> Check:
        return Check(name=name, passed=value <= limit, value=value, limit=limit)

    finite = bool(np.isfinite(loaded.vertices).all())
    diagonal = float(np.linalg.norm(loaded.extents)) if finite else 0.0
    welded = weld(loaded)
    solid = len(welded.vertices) > PLACEHOLDER_VERTICES and len(welded.faces) > PLACEHOLDER_FACES
    checks = [
        at_least("glb_bytes", summary.glb_bytes, limits.min_glb_bytes, floor=True),
        at_least("vertices", summary.vertices, limits.min_vertices, floor=True),
        holds("finite", finite, floor=True),
        holds("extent", diagonal > 0, floor=True),
        holds("appearance", has_appearance(loaded), floor=True),
        holds("not_a_placeholder", solid, floor=True),
    ]
    if len(points) and diagonal > 0:
        share = captured_share(loaded, points, limits.captured_distance * diagonal)
        checks.append(at_least("captured_share", round(share, 4), limits.captured_share, floor=True))
    checks += [
        holds("watertight", summary.watertight),
        at_most("components", summary.components, limits.max_components),
        at_most("degenerate_faces", summary.degenerate_faces, limits.max_degenerate_faces),
    ]
    if summary.texture_coverage is not None:
        checks.append(at_least("texture_coverage", summary.texture_coverage, limits.min_texture_coverage))
    return tuple(checks)


def simplification_checks(mesh: Mesh, summary: MeshSummary) -> tuple[Check, ...]:
    """True to the dense surface within the sensor's noise, and with no more faces than were asked for."""
    if mesh.export_error is None or mesh.export_limit_m is None or mesh.face_budget is None:
        return ()
    error, limit, budget = mesh.export_error.p999_m, mesh.export_limit_m, mesh.face_budget
    return (
        Check(name="export_error", passed=error <= limit, value=round(error, 6), limit=round(limit, 6)),
        Check(name="faces", passed=summary.faces <= budget, value=summary.faces, limit=budget),
    )


def has_appearance(mesh: trimesh.Trimesh) -> bool:
    """Whether it has a texture with coordinates, or colours of its own."""
    if mesh.visual.kind == "texture":
        return mesh.visual.uv is not None and getattr(mesh.visual.material, "baseColorTexture", None) is not None
    return mesh.visual.kind in ("vertex", "face")


def _mesh_key(mesh: Mesh, capture: Capture, limits: Limits) -> Any:
    return [mesh.outputs, mesh.texture_coverage, mesh.metric, capture.digest, limits]


@stage(key=_mesh_key, version="1")
def validate_mesh(folder: Path, mesh: Mesh, capture: Capture, limits: Limits) -> MeshReport:
    """Measure, check and picture the mesh; a mesh below the floor is a result, not an error."""
    loaded, summary = measure(mesh.glb(), mesh)
    points = captured_points(capture.views()) if mesh.metric else np.empty((0, 3), np.float32)
    checks = checks_of(loaded, summary, points, limits) + simplification_checks(mesh, summary)
    (folder / "previews").mkdir()
    pictures: list[Image.Image] = []
    if np.isfinite(loaded.vertices).all():
        with ThreadPoolExecutor(_THREADS) as pool:
            pictures = list(pool.map(lambda side: picture_of(loaded, *side), PREVIEWS))
    for index, picture in enumerate(pictures):
        picture.save(folder / "previews" / f"preview_{index:03d}.png")
    (folder / PREVIEW_SHEET).write_bytes(sheet_of(pictures))
    return MeshReport(mesh=summary, checks=checks)


def picture_of(mesh: trimesh.Trimesh, azimuth_deg: float, elevation_deg: float) -> Image.Image:
    """One preview of the mesh."""
    return Image.fromarray(preview(mesh, azimuth_deg=azimuth_deg, elevation_deg=elevation_deg, size=PREVIEW_PX))


def sheet_of(pictures: list[Image.Image]) -> bytes:
    """The previews side by side, as a JPEG small enough for an artifact."""
    columns = max(1, (len(pictures) + 1) // 2)
    sheet = Image.new("RGB", (columns * SHEET_PX, 2 * SHEET_PX))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture.resize((SHEET_PX, SHEET_PX)), (column * SHEET_PX, row * SHEET_PX))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=SHEET_JPEG_QUALITY)
    return buffer.getvalue()
