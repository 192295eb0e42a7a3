"""The inference of one capture: in this process, or as a flow of its own on the machine with the GPU.

`reconstruct` calls it; everything that hands work to a deployment asks it which engine `auto` means there.
"""

from __future__ import annotations

import time
from typing import Any, cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows.gpu import gpu_slots
from tasks.cameras.find_cameras import CaptureCameras
from tasks.capture.stage_capture import Capture
from tasks.errors import EngineUnavailable, InferenceFailed, InputError, StorageError
from tasks.inference.reconstruction import Reconstruction, infer
from tasks.inference.registry import ENGINES, EngineChoice, require_engine, resolve_engine
from tasks.mesh.export import export_glb, exports_in_process
from tasks.progress import timed
from tasks.settings import EngineName, ExportParameters, InferParameters, settings
from tasks.store.results import store
from tasks.weights.fetch_weights import fetch_weights
from tasks.weights.pins import Weights

POLL_SECONDS = 1
RUNS_AT_MOST = 3  # of one inference, when its worker, machine or process dies


@flow(name="infer", flow_run_name="{capture.id}")
def infer_capture(
    capture: Capture,
    cameras: CaptureCameras,
    engine: EngineName = "auto",
    parameters: InferParameters = InferParameters(),
    export: ExportParameters = ExportParameters(),
    weights: Weights | None = None,
) -> None:
    """Run the inference of a staged capture, and the export if that needs the GPU; the results lie in the store.

    Args:
        capture: The staged capture, as reconstruct hands it over
        cameras: The cameras of its views, as reconstruct hands them over
        engine: The engine to run; this deployment's default is the engine that auto means to the flows that start it
        parameters: Parameters of the inference
        export: Parameters of the export
        weights: The weights that the capture's inference loads, as reconstruct hands them over
    """
    reconstruction = infer_here(capture, cameras, resolve_engine(engine), parameters, weights)
    if exports_in_process(reconstruction.engine, export):
        export_glb(reconstruction, capture, cameras, export)


def infer_here(
    capture: Capture,
    cameras: CaptureCameras,
    engine: EngineChoice,
    parameters: InferParameters,
    weights: Weights | None,
) -> Reconstruction:
    """Run the inference in this process; the weights are fetched first, unless the store has the result."""
    if infer.stored(capture, cameras, engine, parameters, weights) is not None:
        return infer(capture, cameras, engine, parameters, weights)
    require_engine(engine)
    if weights is not None:
        fetch_weights(weights)
    with gpu_slots(engine):
        return infer(capture, cameras, engine, parameters, weights)


def chosen_engine(asked: EngineName, deployment: str) -> EngineChoice:
    """The engine of a run: the one asked for; for `auto` the best of this machine, or the setting of a deployment.

    deployment: the one that inference is handed to; empty: none. Raises InputError if it is not on the server.
    """
    if not deployment:
        return resolve_engine(asked)
    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(deployment)
        except ObjectNotFound as error:
            raise InputError(
                f"deployment {deployment}: not on this server; deploy it, or unset the variable that names it"
                " (CAPTURE2MESH_INFER_DEPLOYMENT, CAPTURE2MESH_BATCH_DEPLOYMENT)"
            ) from error
    return engine_set_in(deployment, found) if asked == "auto" else resolve_engine(asked)


def engine_set_in(name: str, deployment: DeploymentResponse) -> EngineChoice:
    """The engine that a deployment runs for `auto`: its parameter `engine`. Raises EngineUnavailable if it is none."""
    engine = deployment.parameters.get("engine", "auto")
    if engine not in ENGINES:
        raise EngineUnavailable(f"engine {engine}: set one of {', '.join(ENGINES)} in deployment {name}")
    return EngineChoice(name=engine, version=ENGINES[engine].version, reason=f"the setting of deployment {name}")


def require_shared_store(deployment: str) -> None:
    """Raise InputError if the machines of a deployment cannot see this process's store."""
    if store().root.local and not settings().store_shared:
        raise InputError(
            f"store {store().root.url}: a folder of this machine; set CAPTURE2MESH_STORE to one that the machines of"
            f" {deployment} see as well (s3://...), or CAPTURE2MESH_STORE_SHARED=1 if they see this folder"
        )


def infer_there(
    deployment: str,
    capture: Capture,
    cameras: CaptureCameras,
    engine: EngineChoice,
    parameters: InferParameters,
    weights: Weights | None,
    export: ExportParameters,
) -> Reconstruction:
    """Run the inference, and the export if that needs the GPU, through a deployment, unless the store has them."""
    found = infer.stored(capture, cameras, engine, parameters, weights)
    if found is not None and (
        not exports_in_process(engine, export) or export_glb.stored(found, capture, cameras, export)
    ):
        return infer(capture, cameras, engine, parameters, weights)
    require_shared_store(deployment)
    with timed("infer"):
        asked = {"capture": capture, "cameras": cameras, "engine": engine.name, "parameters": parameters}
        asked |= {"weights": weights, "export": export}
        run = run_elsewhere(deployment, asked)
        if run.state is None or not run.state.is_completed():
            reason = run.state.message if run.state else "no state"
            raise InferenceFailed(f"{deployment}: run {run.name} ended {run.state_name}: {reason}")
        result = infer.made(capture, cameras, engine, parameters, weights)
    if result is None:
        raise StorageError(
            f"{deployment}: its result is not in {store().root.url}; set the same CAPTURE2MESH_STORE there, and"
            " CAPTURE2MESH_TRELLIS_ROOT on both machines or on none"
        )
    return result


def run_elsewhere(deployment: str, asked: dict[str, Any]) -> FlowRun:
    """Run a deployment to its end, and again if it crashed. The run goes to the queue that has the name of our own."""
    context = FlowRunContext.get()
    # queues order the runs of a pool: a run that is ahead in one pool is so ahead in the other
    queue = context.flow_run.work_queue_name if context and context.flow_run else None
    for _ in range(RUNS_AT_MOST):
        run = cast(FlowRun, run_deployment(deployment, parameters=asked, timeout=0, work_queue_name=queue))
        run = ended(run)
        if run.state is None or not run.state.is_crashed():
            break
    return run


def ended(run: FlowRun) -> FlowRun:
    """Wait for the end of a run. If this process ends first, the run is cancelled: nothing waits for its result."""
    with get_client(sync_client=True) as client:
        try:
            while run.state is None or not run.state.is_final():
                time.sleep(POLL_SECONDS)
                run = client.read_flow_run(run.id)
        except BaseException:
            client.set_flow_run_state(run.id, Cancelling())
            raise
    return run
