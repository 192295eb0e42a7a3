"""The flow `reconstruct`: one capture in, one validated textured mesh out.

Workers and `capture2mesh reconstruct` run the flow; the processes of a batch call its parts, `prepare` and `finish`.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import BaseModel, ConfigDict

from flows.events import emit_published, failure_emitted
from flows.infer import chosen_engine, infer_here, infer_there
from tasks.artifacts import public_url, show_cameras, show_capture, show_report
from tasks.cameras.find_cameras import CaptureCameras, find_cameras
from tasks.capture.capture_checks import CaptureReport
from tasks.capture.listing import Listing, list_capture
from tasks.capture.stage_capture import Capture, stage_capture
from tasks.capture.validate_capture import validate_capture
from tasks.dataset.upload import Upload
from tasks.errors import CaptureRefused, MeshRejected
from tasks.inference.reconstruction import Reconstruction
from tasks.inference.registry import ENGINES, EngineChoice, weights_for
from tasks.mesh.convert import convert_formats
from tasks.mesh.export import export_glb
from tasks.mesh.publish import Published, Results, publish, run_key
from tasks.mesh.validate import PREVIEW_SHEET, validate_mesh
from tasks.progress import Timings, in_flow, observed_by
from tasks.settings import EngineName, Parameters, settings
from tasks.store.location import Location
from tasks.store.results import store
from tasks.weights.pins import Weights


def _run_name() -> str:
    return Location.of(runtime.flow_run.parameters["capture"]).name


class Prepared(BaseModel):
    """A capture that its engine can reconstruct."""

    model_config = ConfigDict(frozen=True)

    capture: Capture
    """The staged capture."""
    examined: CaptureReport
    """The result of its checks."""
    cameras: CaptureCameras
    """The cameras of its views."""
    engine: EngineChoice
    """The engine to run."""
    weights: Weights | None
    """The weights that the engine loads for it; None if the engine has none."""
    upload: Upload
    """The upload that it was made from, and where its asset goes."""


@flow(name="reconstruct", flow_run_name=_run_name)
def reconstruct(
    capture: str,
    output: str,
    engine: EngineName = "auto",
    parameters: Parameters = Parameters(),
    root: str = "",
    upload: str = "",
) -> Published | State[Any]:
    """Reconstruct one capture and publish the mesh with its report.

    Args:
        capture: Folder or URL of the capture, for example s3://captures/mug
        output: Folder or URL below which the asset is published, for example s3://assets
        engine: auto takes the best one that can run; fusion needs depth maps and cameras, trellis a GPU
        parameters: Parameters of the result; the defaults suit most captures
        root: Folder or URL above the capture; the asset is published at the capture's path below it. Empty: its parent
        upload: Key of the upload that the run is for; if another one has replaced it, that one has a run of its own
    """
    deployment = settings().infer_deployment
    choice = chosen_engine(engine, deployment)
    timings = Timings()
    listing = list_capture(capture, root)
    current = Upload.of(listing, output, choice.name, parameters)
    if upload not in ("", current.key):
        return Completed(name="Replaced", message=f"{listing.uri} has been uploaded anew since this run was asked for")
    with observed_by(timings), failure_emitted(current), current.recorded():
        prepared = prepare(listing, choice, parameters, current)
        with prepared.capture.in_scratch():
            show_capture(listing.id, prepared.examined)
            show_cameras(listing.id, prepared.cameras)
            if deployment:
                reconstruction = infer_there(
                    deployment,
                    prepared.capture,
                    prepared.cameras,
                    choice,
                    parameters.infer,
                    prepared.weights,
                    parameters.export,
                )
            else:
                reconstruction = infer_here(
                    prepared.capture, prepared.cameras, choice, parameters.infer, prepared.weights
                )
            published = finish(prepared, reconstruction, parameters, timings)
    emit_published(current, published)
    return published


def prepare(listing: Listing, engine: EngineChoice, parameters: Parameters, upload: Upload) -> Prepared:
    """Stage and validate a capture and find its cameras; raises CaptureRefused if it lacks what the engine needs."""
    staged = stage_capture(listing)
    needs = ENGINES[engine.name].needs
    try:
        examined = validate_capture(staged, needs)
        cameras = find_cameras(staged, parameters.cameras, needs)
    except CaptureRefused:
        staged.leave_scratch()
        raise
    weights = weights_for(engine, examined)
    return Prepared(capture=staged, examined=examined, cameras=cameras, engine=engine, weights=weights, upload=upload)


def finish(prepared: Prepared, reconstruction: Reconstruction, parameters: Parameters, timings: Timings) -> Published:
    """Export, convert, validate and publish; raises MeshRejected, once it is published, for a mesh below the floor."""
    capture, cameras, upload = prepared.capture, prepared.cameras, prepared.upload
    mesh = export_glb(reconstruction, capture, cameras, parameters.export)
    formats = convert_formats(mesh, reconstruction, parameters.formats)
    checked = validate_mesh(mesh, capture, cameras, parameters.limits)
    results = Results(
        capture=capture,
        capture_report=prepared.examined,
        cameras=cameras,
        engine=prepared.engine,
        reconstruction=reconstruction,
        mesh=mesh,
        formats=formats,
        mesh_report=checked,
    )
    report = results.report(parameters, tuple(timings.stages))
    folder = publish(results, report, upload.output, run_key(reconstruction, capture, parameters), upload.key)
    published = Published(url=folder, report=report.model_copy(update={"stages": tuple(timings.stages)}))
    if in_flow():
        show_report(published.report, folder, public_url(folder, upload.output), store().read(checked, PREVIEW_SHEET))
    if report.status == "failure":
        raise MeshRejected(f"{capture.id}: the mesh is below the floor, see {folder}/report.json", published)
    return published
