"""The flow `reconstruct-dataset`: find the captures of a dataset, plan, reconstruct what is missing, report.

Workers and `capture2mesh dataset` run it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import cast

from prefect import flow, runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.states import Cancelling

from flows.batch import PROGRESS, work_through
from flows.infer import chosen_engine, require_shared_store
from tasks.artifacts import show_plan
from tasks.dataset.dataset_report import DatasetReport, publish_dataset_report
from tasks.dataset.plan import Plan, Planned, plan
from tasks.errors import InferenceInterrupted
from tasks.inference.registry import EngineChoice
from tasks.progress import progress_artifact, timed
from tasks.settings import EngineName, Parameters, settings
from tasks.store.location import Location
from tasks.store.results import store

POLL_SECONDS = 3
CRASHES = 3  # after so many crashed batches, something is wrong with the machines that they ran on


def _run_name() -> str:
    return Location.of(runtime.flow_run.parameters["dataset"]).name


@flow(name="reconstruct-dataset", flow_run_name=_run_name)
def reconstruct_dataset(
    dataset: str,
    output: str,
    engine: EngineName = "auto",
    parameters: Parameters = Parameters(),
    retry: bool = False,
) -> DatasetReport:
    """Reconstruct every capture of a dataset that is not published yet; a capture that fails stops no other.

    Args:
        dataset: Folder or URL above the captures, or a list of captures (.txt, .csv, .jsonl)
        output: Folder or URL below which the assets and the dataset's report are published
        engine: auto takes the best engine that can run; fusion needs depth maps and cameras
        parameters: Parameters of the results; the defaults suit most captures
        retry: Try again what has failed before; otherwise it waits until its content changes
    """
    deployment, begun = settings().batch_deployment, time.monotonic()
    choice = chosen_engine(engine, deployment)
    before = plan(dataset, output, choice, parameters, retry=retry)
    _show(before)
    for each in before.pending:
        if retry and each.attempts:
            each.upload.forget()
    if before.pending and deployment:
        _hand_over(deployment, before.pending, output, choice, parameters)
    elif before.pending:
        work_through(before.pending, choice, parameters)
    after = plan(dataset, output, choice, parameters) if before.pending else before
    return publish_dataset_report(before, after, output, time.monotonic() - begun)


def _show(before: Plan) -> None:
    """The plan as a table in the UI: what is to be done, and what cannot be done."""
    rows = [
        {"id": each.id, "state": each.state, "reason": each.reason, "attempts": each.attempts}
        for each in before.captures
        if each.state != "published"
    ]
    show_plan(before.dataset, before.counts(), rows)


def _hand_over(
    deployment: str, captures: Sequence[Planned], output: str, engine: EngineChoice, parameters: Parameters
) -> None:
    """Hand captures to the workers of a deployment: one batch for each worker, all over the same list.

    The batches share the list by claiming one capture after another. A worker that starts later gets a batch as well;
    a batch that crashes is replaced.
    """
    require_shared_store(deployment)
    lines = [json.dumps({"capture": each.upload.uri, "id": each.id}) for each in captures]
    listed = store().root / "_plans" / f"{uuid.uuid4().hex}.jsonl"
    listed.write("\n".join(lines).encode())
    asked = {"dataset": listed.url, "output": output, "engine": engine.name, "parameters": parameters}
    with get_client(sync_client=True) as client, timed(PROGRESS), progress_artifact(PROGRESS) as show:
        runs: list[FlowRun] = []
        pool = client.read_deployment_by_name(deployment).work_pool_name or ""
        try:
            while True:
                runs = [client.read_flow_run(run.id) for run in runs]
                ended = [run.state for run in runs if run.state is not None and run.state.is_final()]
                if any(state.is_completed() for state in ended):
                    if len(ended) == len(runs):  # nothing is left in the list
                        return
                elif (len(ended) == len(runs) >= CRASHES) or any(state.is_cancelled() for state in ended):
                    raise InferenceInterrupted(f"{deployment}: no batch came to its end: {ended[-1].message}")
                elif len(ended) < CRASHES and len(runs) - len(ended) < max(1, _online(client, pool)):
                    runs.append(cast(FlowRun, run_deployment(deployment, parameters=asked, timeout=0)))
                show(_gone_through(client, runs))
                time.sleep(POLL_SECONDS)
        except BaseException:  # nothing waits for the results of these batches any more
            for run in runs:
                if run.state is None or not run.state.is_final():
                    client.set_flow_run_state(run.id, Cancelling())
            raise
        finally:
            listed.delete()


def _online(client: SyncPrefectClient, pool: str) -> int:
    """The number of workers that serve a pool."""
    return sum(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool))


def _gone_through(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> float:
    """The part of their common list that the batches are done with, 0 to 1: each has a progress artifact."""
    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[run.id for run in runs]), key=ArtifactFilterKey(any_=[PROGRESS])
    )
    artifacts = client.read_artifacts(artifact_filter=wanted)
    return max((float(str(artifact.data)) / 100 for artifact in artifacts), default=0.0)
