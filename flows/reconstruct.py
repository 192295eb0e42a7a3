"""One capture in, one validated textured mesh out."""

from __future__ import annotations

from prefect import flow, runtime

from flows.infer import deployed_engine, infer_here, infer_there
from tasks.capture.stages import list_capture, stage_capture, upload_key, validate_capture
from tasks.convert import convert_formats
from tasks.errors import MeshRejected
from tasks.export import export_glb
from tasks.inference.infer import ENGINES, resolve_engine, weights_for
from tasks.publish import Published, Results, publish, run_key
from tasks.report import public_url, show_capture, show_report
from tasks.settings import EngineName, Parameters, settings
from tasks.stage import Timings, observed_by, timed
from tasks.storage import Location
from tasks.store import store
from tasks.validate import PREVIEW_SHEET, validate_mesh


def _run_name() -> str:
    return Location.of(runtime.flow_run.parameters["capture"]).name


@flow(name="reconstruct", flow_run_name=_run_name)
def reconstruct(
    capture: str, output: str, engine: EngineName = "auto", parameters: Parameters = Parameters()
) -> Published:
    """Reconstruct one capture and publish the mesh with its report.

    Args:
        capture: Folder or URL of the capture, for example s3://captures/mug
        output: Folder or URL below which the asset is published, for example s3://assets
        engine: auto takes the best engine that can run; fusion needs depth maps and cameras
        parameters: What changes the result; the defaults are good
    """
    deployment = settings().infer_deployment
    choice = deployed_engine(deployment, engine) if deployment else resolve_engine(engine)
    timings = Timings()
    with observed_by(timings):
        listing = list_capture(capture)
        staged = stage_capture(listing)
        with staged.in_scratch():
            examined = validate_capture(staged, ENGINES[choice.name].needs)
            show_capture(staged.id, examined)
            weights = weights_for(choice, examined)
            if deployment:
                reconstruction = infer_there(deployment, staged, choice, parameters.infer, weights, parameters.export)
            else:
                reconstruction = infer_here(staged, choice, parameters.infer, weights)
            mesh = export_glb(reconstruction, staged, parameters.export)
            formats = convert_formats(mesh, reconstruction, parameters.formats)
            checked = validate_mesh(mesh, staged, parameters.limits)
        results = Results(
            capture=staged,
            capture_report=examined,
            engine=choice,
            reconstruction=reconstruction,
            mesh=mesh,
            formats=formats,
            mesh_report=checked,
        )
        key, upload = run_key(reconstruction, staged, parameters), upload_key(listing, choice.name, parameters)
        report = results.report(parameters, tuple(timings.stages))
        with timed("publish"):
            folder = publish(results, report, output, key, upload)
    published = Published(url=folder, report=report.model_copy(update={"stages": tuple(timings.stages)}))
    show_report(published.report, folder, public_url(folder, output), store().read(checked, PREVIEW_SHEET))
    if report.status == "failure":
        raise MeshRejected(f"{staged.id}: the mesh is below the floor, see {folder}/report.json", published)
    return published
