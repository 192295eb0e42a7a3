"""The model of report.json, which is published with every mesh.

Made by tasks/mesh, read by the flows, the command line and the dataset's report.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.geometry.surface_distance import SurfaceDistance
from tasks.inference.reconstruction import RegistrationSummary
from tasks.progress import StageTiming
from tasks.store.location import FileEntry
from tasks.weights.pins import Weights

Status = Literal["normal", "warning", "failure"]


class CaptureSummary(BaseModel):
    """The capture that the mesh is made of."""

    id: str
    """Its path below the dataset or the watched folder; otherwise the last part of its path."""
    uri: str
    """Its folder or URL."""
    digest: str
    """sha256 over its files' paths, sizes and digests."""
    views: int
    """Number of its views."""
    views_used: int
    """Number of the views that the engine used."""
    has_cameras: bool
    """True if it has a transforms.json."""


class CamerasSummary(BaseModel):
    """The cameras of the views, and how well they agree with the depth."""

    source: str
    """`given`, `refined` (moved until they agree with the depth), `found`, `rig`, or `none`."""
    focal_px: float | None
    """Median focal length, pixels; None without cameras."""
    posed: int
    """Number of views that have a camera."""
    left_out: tuple[str, ...]
    """Names of the views without one."""
    residual_m: float | None
    """Median distance of a reading from what a neighbouring view measured there, metres; None without depth."""
    agreement: float | None
    """Share of the readings that a neighbouring view confirms, 0 to 1."""
    conflict: float | None
    """Share of the readings that a neighbour contradicts, in all that it confirms or contradicts, 0 to 1."""
    correction_deg: float
    """Largest turn of a given camera, degrees."""
    correction_m: float
    """Largest shift of a given camera, metres."""


class EngineSummary(BaseModel):
    """The engine that made the geometry."""

    name: str
    """`fusion` or `trellis`."""
    version: str
    """Changes when its results change."""
    reason: str
    """Why it was chosen."""
    parameters: dict[str, Any]
    """Every parameter of the run."""


class SensorSummary(BaseModel):
    """The depth sensor, as far as the depth maps tell. All in metres."""

    depth_step_m: float
    """Step between two depth values, at the object."""
    noise_m: float
    """Standard deviation of a reading, at the object."""
    noise_m_at_1m: float
    """Standard deviation of a reading at a distance of 1 m."""
    spread_m: float
    """Standard deviation of one view's surface from another's, after smoothing: sensor and cameras together."""


class MeshSummary(BaseModel):
    """The published mesh, measured on the loaded GLB. Welded: with vertices of the same position merged."""

    vertices: int
    """Number of vertices; those at the texture's seams count more than once."""
    faces: int
    """Number of triangles."""
    glb_bytes: int
    """Size of mesh.glb."""
    watertight: bool
    """True if the welded mesh is closed."""
    components: int
    """Number of separate pieces of the welded mesh."""
    degenerate_faces: int
    """Number of triangles of the welded mesh without an area."""
    exporter: str
    """`native` or `to_glb`."""
    decimated_by: str
    """The software that reduced the number of faces."""
    texture_px: int
    """Width and height of the texture, pixels."""
    texture_coverage: float | None
    """Share of the surface's texels that a view has seen, 0 to 1; None if the views did not paint the texture."""
    extent_m: tuple[float, float, float]
    """Size along x, y and z in the capture's frame (z is up), metres if `metric`."""
    metric: bool
    """False if the size of the object is not known."""
    export_error: SurfaceDistance | None = None
    """Distance of the mesh from the dense surface, both ways; None if an engine's own exporter removed the faces."""
    invented_share: float | None = None
    """Share of the closed surface that no view saw, 0 to 1; None if the engine does not say it."""


class Check(BaseModel):
    """One comparison of a value with its limit."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Name of the value."""
    passed: bool
    """True if the value is within its limit."""
    value: bool | int | float | str
    """The measured value, in the unit of the limit."""
    limit: bool | int | float | str
    """The least, the most or the expected value, by the check's kind."""
    floor: bool = False
    """True if the mesh is rejected when the check fails."""


class Report(BaseModel):
    """report.json: the capture, how it was reconstructed, and the checks of the result."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[1] = Field(1, alias="schema")
    """Version of this shape."""
    capture: CaptureSummary
    """The capture that the mesh is made of."""
    engine: EngineSummary
    """The engine that made the geometry."""
    weights: Weights | None = None
    """The weights that the engine loaded; None for an engine without weights."""
    cameras: CamerasSummary | None = None
    """The cameras; None in reports of earlier versions."""
    sensor: SensorSummary | None = None
    """The depth sensor; None if the engine does not use depth."""
    subject: str = ""
    """The object or surface that the mesh shows, and how it was found; empty if the engine does not say it."""
    mesh: MeshSummary
    """Measurements of the mesh."""
    registration: RegistrationSummary | None = None
    """How the mesh was placed in the capture's frame; None if it did not have to be placed, or could not be."""
    fidelity: dict[str, float] | None = None
    """How well the mesh reproduces the views; None if it was not measured."""
    status: Status
    """`normal`, `warning`, or `failure`: published for inspection only."""
    checks: tuple[Check, ...]
    """All checks of the run."""
    warnings: tuple[str, ...] = ()
    """Warnings about the capture, one line for each kind."""
    stages: tuple[StageTiming, ...]
    """The stages before `publish`, in the order in which they ended."""
    outputs: tuple[FileEntry, ...]
    """The published files, without the report, the manifest and the marker."""


def status_of(checks: tuple[Check, ...]) -> Status:
    """`failure` if a check of the floor failed, `warning` if any other did, else `normal`."""
    failed = [check for check in checks if not check.passed]
    if any(check.floor for check in failed):
        return "failure"
    return "warning" if failed else "normal"
