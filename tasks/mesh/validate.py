"""The stage `validate_mesh`: measures the GLB as readers load it, checks it, renders previews. The flows run it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.stage_capture import Capture
from tasks.capture.views import View
from tasks.geometry.render import preview
from tasks.inference.engine import SurfaceFacts
from tasks.mesh.convert import load_glb
from tasks.mesh.export import CAPTURE_TO_GLTF, Mesh
from tasks.report import Check, MeshSummary
from tasks.settings import Limits
from tasks.stage import stage
from tasks.store.results import StoredResult

# Azimuth and elevation in degrees: all around, then from above and from below
PREVIEWS = ((30, 20), (120, 20), (210, 20), (300, 20), (30, 70), (30, -50))
PREVIEW_SHEET = "previews.jpg"
PREVIEW_PX = 400
SHEET_PX = 300
SHEET_JPEG_QUALITY = 85
# A box has no more than these
PLACEHOLDER_VERTICES, PLACEHOLDER_FACES = 8, 12
# A captured point is near the mesh within so many standard deviations of its noise, and so many voxels
NEAR_SIGMAS, NEAR_VOXELS = 3.0, 2.0
# But within this share of the diagonal at most: readings that contradict each other must not pass as noise. It is also
# the distance if the engine measures no noise
MOST_NEAR = 0.05
_POINTS_PER_VIEW = 1000
_THREADS = 2
_SURFACE_SAMPLES = 100_000


class MeshReport(StoredResult):
    """The measured mesh. Its files: `previews/*.png`, and `previews.jpg` with all of them side by side."""

    mesh: MeshSummary
    """The measurements."""
    checks: tuple[Check, ...]
    """Every check with its limit; those of the floor come first."""


def measure(glb: bytes, mesh: Mesh) -> tuple[trimesh.Trimesh, MeshSummary]:
    """Load a GLB and measure it; topology after welding by position, because texture seams split vertices."""
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
        invented_share=None if mesh.surface is None else round(mesh.surface.invented_share, 4),
        export_error=mesh.export_error,
    )


def weld(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return the same surface with one vertex for each position."""
    welded = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    return welded


def captured_share(mesh: trimesh.Trimesh, points: NDArray[np.float32], distance: float) -> float:
    """Return the share of captured points (n, 3), in the GLB's frame, that are within `distance` of the surface."""
    surface, _ = trimesh.sample.sample_surface(mesh, _SURFACE_SAMPLES, seed=0)
    nearest, _ = cKDTree(surface).query(points, distance_upper_bound=distance)
    return float(np.isfinite(nearest).mean())


def captured_points(views: Iterable[View]) -> NDArray[np.float32]:
    """Return the views' foreground depth readings as points (n, 3), evenly thinned, in the GLB's frame, metres."""
    points = [np.empty((0, 3), np.float32)]
    for view in views:
        if view.depth is None or view.camera is None:
            continue
        rows, columns = np.nonzero(view.depth)
        every = max(1, len(rows) // _POINTS_PER_VIEW)
        height, width = view.depth.shape
        camera = view.camera.resized(width, height)
        rows, columns = rows[::every], columns[::every]
        points.append(camera.points(rows, columns, view.depth[rows, columns]).astype(np.float32))
    return np.concatenate(points) @ CAPTURE_TO_GLTF.T


def checks_of(
    loaded: trimesh.Trimesh,
    summary: MeshSummary,
    points: NDArray[np.float32],
    limits: Limits,
    surface: SurfaceFacts | None = None,
) -> tuple[Check, ...]:
    """Make every check; those of the floor come first. points: as from `captured_points`; may be empty."""

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
        share = captured_share(loaded, points, near_distance(surface, diagonal, limits))
        checks.append(at_least("captured_share", round(share, 4), limits.captured_share, floor=True))
    if summary.texture_coverage is not None:
        seen = summary.texture_coverage
        checks.append(at_least("texture_floor", seen, limits.texture_coverage_floor, floor=True))
        checks.append(at_least("texture_coverage", seen, limits.min_texture_coverage))
    if surface is None or surface.subject.kind == "object":
        checks.append(holds("watertight", summary.watertight))
        checks.append(at_most("components", summary.components, limits.max_components))
    checks.append(at_most("degenerate_faces", summary.degenerate_faces, limits.max_degenerate_faces))
    if summary.invented_share is not None:
        checks.append(at_most("invented_share", summary.invented_share, limits.max_invented_share))
    return tuple(checks)


def near_distance(surface: SurfaceFacts | None, diagonal: float, limits: Limits) -> float:
    """Distance in metres at which a captured point is near the mesh: by the sensor's noise and the voxels.

    It is at most a share of the diagonal; and that share if nothing was measured, or the one that `limits` gives.
    """
    most = (limits.captured_distance or MOST_NEAR) * diagonal
    if surface is None or limits.captured_distance is not None:
        return most
    noise = float(np.hypot(surface.noise_m, surface.spread_m))
    return min(NEAR_SIGMAS * noise + NEAR_VOXELS * surface.voxel_m, most)


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
    """True if the mesh has a texture with coordinates, or colours of its own."""
    if mesh.visual.kind == "texture":
        return mesh.visual.uv is not None and getattr(mesh.visual.material, "baseColorTexture", None) is not None
    return mesh.visual.kind in ("vertex", "face")


def _mesh_key(mesh: Mesh, capture: Capture, cameras: CaptureCameras, limits: Limits) -> Any:
    facts = [mesh.outputs, mesh.texture_coverage, mesh.metric, mesh.surface, mesh.export_error]
    return [*facts, capture.digest, cameras.key, limits]


@stage(key=_mesh_key, version="2")
def validate_mesh(folder: Path, mesh: Mesh, capture: Capture, cameras: CaptureCameras, limits: Limits) -> MeshReport:
    """Measure, check and render the mesh; a mesh below the floor is a result, not an error."""
    loaded, summary = measure(mesh.glb(), mesh)
    subject = None if mesh.surface is None else mesh.surface.subject
    seen = cameras.views_of(capture) if mesh.metric else ()
    points = captured_points(view.of(subject) for view in seen)
    checks = checks_of(loaded, summary, points, limits, mesh.surface) + simplification_checks(mesh, summary)
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
    """Render one preview of the mesh."""
    return Image.fromarray(preview(mesh, azimuth_deg=azimuth_deg, elevation_deg=elevation_deg, size=PREVIEW_PX))


def sheet_of(pictures: list[Image.Image]) -> bytes:
    """Put the previews side by side, as a JPEG small enough for an artifact."""
    columns = max(1, (len(pictures) + 1) // 2)
    sheet = Image.new("RGB", (columns * SHEET_PX, 2 * SHEET_PX))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture.resize((SHEET_PX, SHEET_PX)), (column * SHEET_PX, row * SHEET_PX))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=SHEET_JPEG_QUALITY)
    return buffer.getvalue()
