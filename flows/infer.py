"""The inference of one capture as a flow of its own: what a machine without a GPU hands to the `cuda` pool."""

from __future__ import annotations

from typing import cast

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from tasks.capture.stages import Capture
from tasks.errors import EngineUnavailable, InferenceFailed, InputError, StorageError
from tasks.inference.infer import ENGINES, EngineChoice, Reconstruction, infer, resolve_engine
from tasks.settings import EngineName, InferParameters, settings
from tasks.stage import timed
from tasks.store import store

POLL_SECONDS = 1


@flow(name="infer", flow_run_name="{capture.id}")
def infer_capture(
    capture: Capture, engine: EngineName = "auto", parameters: InferParameters = InferParameters()
) -> None:
    """Run the inference of a staged capture; the result lies in the store.

    Args:
        capture: The staged capture, as reconstruct hands it over
        engine: The engine to run; this deployment's default is what auto means to those who hand over
        parameters: Parameters of the inference
    """
    infer(capture, resolve_engine(engine), parameters)


def deployed_engine(deployment: str, asked: EngineName) -> EngineChoice:
    """The engine of an inference that is handed over: the one asked for, or for `auto` the deployment's setting."""
    with get_client(sync_client=True) as client:
        try:
            setting = client.read_deployment_by_name(deployment).parameters.get("engine", "auto")
        except ObjectNotFound as error:
            raise InputError(
                f"deployment {deployment}: not on this server; deploy it, or unset CAPTURE2MESH_INFER_DEPLOYMENT"
            ) from error
    name = setting if asked == "auto" else asked
    if name not in ENGINES:
        raise EngineUnavailable(f"engine {name}: name one of {', '.join(ENGINES)} in deployment {deployment}")
    reason = "asked for" if asked != "auto" else f"the setting of deployment {deployment}"
    return EngineChoice(name=name, version=ENGINES[name].version, reason=reason)


def hand_over(deployment: str, capture: Capture, engine: EngineChoice, parameters: InferParameters) -> Reconstruction:
    """Run the inference through a deployment, on whichever machine serves its pool, and wait for the result."""
    if store().root.local and not settings().store_shared:
        raise InputError(
            f"store {store().root.url}: a folder of this machine; set CAPTURE2MESH_STORE to one that the machines of"
            f" {deployment} see as well (s3://...), or CAPTURE2MESH_STORE_SHARED=1 if they do see it"
        )
    with timed("infer"):
        asked = {"capture": capture, "engine": engine.name, "parameters": parameters}
        run = cast(FlowRun, run_deployment(deployment, parameters=asked, poll_interval=POLL_SECONDS))
        if run.state is None or not run.state.is_completed():
            reason = run.state.message if run.state else "no state"
            raise InferenceFailed(f"{deployment}: run {run.name} ended {run.state_name}: {reason}")
        result = infer.stored(capture, engine, parameters)
    if result is None:
        raise StorageError(
            f"{deployment}: its result is not in {store().root.url}; set the same CAPTURE2MESH_STORE there"
        )
    return result
