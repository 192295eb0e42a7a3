"""`capture2mesh reconstruct` and `dataset`: flows that run in this process, shown in the terminal."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.cli.conventions import (
    EXIT_DONE,
    EXIT_FAILED,
    EngineOption,
    SetOption,
    errors_told,
    parameters_of,
    tell_error,
    use_prefect_defaults,
)

if TYPE_CHECKING:
    from tasks.dataset.plan import Plan
    from tasks.mesh.publish import Published
    from tasks.settings import EngineName


def reconstruct(
    capture: Annotated[str, typer.Argument(help="Folder or URL of the capture.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which the asset is published.")],
    engine: EngineOption = "auto",
    set_: SetOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report and nothing else on stdout.")] = False,
) -> None:
    """Reconstruct one capture."""
    from tasks.errors import MeshRejected

    status = EXIT_DONE
    with errors_told():
        from tasks.capture.listing import list_capture

        parameters = parameters_of(set_ or [])
        list_capture(capture)  # where there is no capture, nothing is started
        with _flow_context():
            from flows.reconstruct import reconstruct

            try:
                outcome: object = reconstruct(capture, output, engine, parameters)
            except MeshRejected as error:
                tell_error(error)
                outcome, status = error.published, EXIT_FAILED
    published = cast("Published", outcome)
    if json_:
        typer.echo(published.report.model_dump_json(indent=1))
    else:
        _tell(published)
    raise typer.Exit(status)


def dataset(
    dataset: Annotated[str, typer.Argument(help="Folder or URL above the captures, or a list: .txt, .csv, .jsonl.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which assets and report are published.")],
    engine: EngineOption = "auto",
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what has failed before.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print plan or outcome as JSON, nothing else.")] = False,
) -> None:
    """Reconstruct every capture of a dataset that is not published yet."""
    if dry_run:
        with errors_told():
            found = _plan(dataset, output, engine, set_ or [], retry)
        typer.echo(_plan_json(found) if json_ else _plan_text(found))
        raise typer.Exit(EXIT_DONE)
    with errors_told():
        parameters = parameters_of(set_ or [])
        with _flow_context():
            from flows.dataset import reconstruct_dataset

            report = reconstruct_dataset(dataset, output, engine, parameters, retry)
    if json_:
        typer.echo(report.model_dump_json(indent=1))
    else:
        for state, count in report.counts.items():
            typer.echo(f"{state:10} {count}")
        typer.echo(f"report     {report.url}/index.html")
    raise typer.Exit(EXIT_DONE if report.whole else EXIT_FAILED)


@contextmanager
def _flow_context() -> Iterator[None]:
    """Within the block flows can run, shown in the terminal: against the configured server, or Prefect's own.

    Prefect's own server starts beside the imports of the flows: each takes seconds.
    """
    use_prefect_defaults()
    gc.disable()  # what is imported stays: looking for garbage meanwhile takes 0.3 s
    with ExitStack() as stack:
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        if PREFECT_API_URL.value():
            server = None
        else:
            from flows.cli.own_server import OwnServer

            typer.echo("starting Prefect's own server for this run (PREFECT_API_URL names another)", err=True)
            server = OwnServer()
            # heartbeats tell a server of lost runs and cost a second; this server ends with the run
            updates = {PREFECT_API_URL: server.api, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
            stack.enter_context(temporary_settings(updates=updates))
        import flows.reconstruct  # noqa: F401
        from flows.cli.terminal import Terminal
        from tasks.progress import observed_by

        gc.freeze()
        gc.enable()
        terminal = stack.enter_context(Terminal())
        stack.enter_context(observed_by(terminal))
        if server is not None:
            server.wait()
        yield


def _plan(dataset: str, output: str, engine: EngineName, assignments: Sequence[str], retry: bool) -> Plan:
    from flows.infer import chosen_engine
    from tasks.dataset.plan import plan
    from tasks.settings import settings

    choice = chosen_engine(engine, settings().batch_deployment)
    return plan(dataset, output, choice, parameters_of(assignments), retry=retry)


def _plan_json(found: Plan) -> str:
    captures = [
        {
            "id": each.id,
            "uri": each.upload.uri,
            "state": each.state,
            "upload_key": each.upload.key,
            **each.model_dump(include={"reason", "folder", "attempts"}),
        }
        for each in found.captures
    ]
    return json.dumps({"dataset": found.dataset, "counts": found.counts(), "captures": captures}, indent=1)


def _plan_text(found: Plan) -> str:
    """A line for each capture that is not published, and the counts."""
    width = max(len(each.id) for each in found.captures)
    rows = [
        f"{each.state:9} {each.id:{width}} {each.reason.partition(chr(10))[0]}".rstrip()
        for each in found.captures
        if each.state != "published"
    ]
    counts = ", ".join(f"{count} {state}" for state, count in found.counts().items())
    return "\n".join([*rows, f"{len(found.captures)} captures: {counts}"])


def _tell(published: Published) -> None:
    """Print the status, the checks that failed, and the path of every published file."""
    report = published.report
    typer.echo(f"{report.capture.id}: {report.status}")
    for check in report.checks:
        if not check.passed:
            typer.echo(f"  {check.name}: {check.value} (limit {check.limit})")
    if report.subject:
        typer.echo(f"  subject: {report.subject}")
    for warning in report.warnings:
        typer.echo(f"  warning: {warning}")
    for entry in report.outputs:
        typer.echo(f"  {published.url}/{entry.path}")
    typer.echo(f"  {published.url}/report.json")
