"""What a run tells: report.json, and the artifacts in the Prefect UI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.geometry.surface_distance import SurfaceDistance
from tasks.inference.reconstruction import RegistrationSummary
from tasks.progress import StageTiming
from tasks.store.location import FileEntry
from tasks.weights.pins import Weights

Status = Literal["normal", "warning", "failure"]

# each update is a request to the server
PROGRESS_SECONDS = 0.5


class CaptureSummary(BaseModel):
    """The capture a report is about."""

    id: str
    uri: str
    digest: str
    views: int
    views_used: int
    has_cameras: bool


class EngineSummary(BaseModel):
    """The engine that made the geometry, why it was chosen, and every parameter of the run."""

    name: str
    version: str
    reason: str
    parameters: dict[str, Any]


class MeshSummary(BaseModel):
    """The published mesh, measured on the loaded GLB; topology after welding by position."""

    vertices: int
    faces: int
    glb_bytes: int
    watertight: bool
    components: int
    degenerate_faces: int
    exporter: str
    decimated_by: str
    texture_px: int
    texture_coverage: float | None
    extent_m: tuple[float, float, float]
    metric: bool
    export_error: SurfaceDistance | None = None


class Check(BaseModel):
    """One comparison of a value with its limit. One that is of the `floor` and fails makes the status `failure`."""

    model_config = ConfigDict(frozen=True)

    name: str
    passed: bool
    value: bool | int | float | str
    limit: bool | int | float | str
    floor: bool = False


class Report(BaseModel):
    """report.json: what was reconstructed, how, and whether it can be trusted."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[1] = Field(1, alias="schema")
    capture: CaptureSummary
    engine: EngineSummary
    weights: Weights | None = None
    mesh: MeshSummary
    registration: RegistrationSummary | None = None
    fidelity: dict[str, float] | None = None
    status: Status
    checks: tuple[Check, ...]
    stages: tuple[StageTiming, ...]
    outputs: tuple[FileEntry, ...]


def status_of(checks: tuple[Check, ...]) -> Status:
    """failure where a check of the floor failed, warning where any other did."""
    failed = [check for check in checks if not check.passed]
    if any(check.floor for check in failed):
        return "failure"
    return "warning" if failed else "normal"
