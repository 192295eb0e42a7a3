"""The command line: `python -m flows`. Heavy packages are imported by the commands that need them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from flows.cli import store_commands, weights_commands

if TYPE_CHECKING:
    from tasks.dataset.plan import Plan
    from tasks.mesh.publish import Published
    from tasks.settings import EngineName, Parameters

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
PLAIN_WIDTH = 140

# Prefect's own console log would tell everything twice; a server that is configured gets the log all the same
PREFECT_DEFAULTS = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
}

app = typer.Typer(
    name="flows",
    help="Multi-view RGB + depth captures in, textured and validated meshes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(weights_commands.app, name="weights")
app.add_typer(store_commands.app, name="store")


@app.command()
def reconstruct(
    capture: Annotated[str, typer.Argument(help="Folder or URL of the capture.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which the asset is published.")],
    engine: Annotated[Literal["auto", "fusion", "trellis"], typer.Option(help="What makes the geometry.")] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, e.g. export.texture_px=2048.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report and nothing else on stdout.")] = False,
) -> None:
    """Reconstruct one capture."""
    from tasks.errors import MeshRejected

    status = EXIT_DONE
    with _run() as parameters_of:
        from flows.reconstruct import reconstruct

        try:
            outcome: object = reconstruct(capture, output, engine, parameters_of(set_ or []))
        except MeshRejected as error:
            print(f"error: {error}", file=sys.stderr)
            outcome, status = error.published, EXIT_FAILED
    published = cast("Published", outcome)
    if json_:
        print(published.report.model_dump_json(indent=1))
    else:
        _tell(published)
    raise typer.Exit(status)


@app.command()
def dataset(
    dataset: Annotated[str, typer.Argument(help="Folder or URL above the captures, or a list: .txt, .csv, .jsonl.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which assets and report are published.")],
    engine: Annotated[Literal["auto", "fusion", "trellis"], typer.Option(help="What makes the geometry.")] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter, e.g. export.texture_px=2048.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what has failed before.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print plan or outcome as JSON, nothing else.")] = False,
) -> None:
    """Reconstruct every capture of a dataset that is not published yet."""
    if dry_run:
        with _errors_told():
            planned = _plan(dataset, output, engine, set_ or [], retry)
        print(_plan_json(planned) if json_ else _plan_text(planned))
        raise typer.Exit(EXIT_DONE)
    with _run() as parameters_of:
        from flows.dataset import reconstruct_dataset

        report = reconstruct_dataset(dataset, output, engine, parameters_of(set_ or []), retry)
    if json_:
        print(report.model_dump_json(indent=1))
    else:
        for state, count in report.counts.items():
            print(f"{state:10} {count}")
        print(f"report     {report.url}/index.html")
    raise typer.Exit(EXIT_DONE if report.whole else EXIT_FAILED)


@app.command()
def sweep(
    watched: Annotated[str, typer.Argument(help="Folder or URL that captures are uploaded to.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which the assets are published.")],
) -> None:
    """Submit what has been uploaded and is not published yet to the server of PREFECT_API_URL."""
    _prefect_defaults()
    with _errors_told():
        from flows.sweep import sweep
        from flows.uploads.submit import require_server

        require_server()
        counts = sweep(watched, output)
    for state, count in sorted(counts.items()):
        print(f"{state:12}{count}")


@app.command()
def receive() -> None:
    """Receive a storage's notifications over HTTP and submit what is uploaded (CAPTURE2MESH_RECEIVE_* set how)."""
    with _serving():
        from flows.uploads.receive import serve
        from flows.uploads.submit import submitter
        from tasks.settings import settings

        serve(submitter().submit, settings())


@app.command("poll-sqs")
def poll_sqs() -> None:
    """Take the notifications of AWS S3 from CAPTURE2MESH_SQS_QUEUE_URL and submit what is uploaded."""
    with _serving():
        from flows.uploads.poll_sqs import poll
        from flows.uploads.submit import submitter
        from tasks.settings import settings

        poll(submitter().submit, settings())


@app.command()
def rig(
    folder: Annotated[Path, typer.Argument(help="Folder of the capture.")],
    kind: Annotated[Literal["axes6", "turntable"], typer.Option(help="How the cameras stand.")],
    distance: Annotated[float, typer.Option(help="Metres from the camera to the origin.")],
    fov: Annotated[float, typer.Option(help="Horizontal field of view, degrees.")],
    elevation: Annotated[float, typer.Option(help="turntable: degrees of the camera above the horizon.")] = 0.0,
    clockwise: Annotated[bool, typer.Option(help="turntable: the views go clockwise, seen from above.")] = False,
) -> None:
    """Write the transforms.json of a known rig."""
    from tasks.capture.rig import rig
    from tasks.errors import InputError

    try:
        written = rig(folder, kind, distance_m=distance, fov_deg=fov, elevation_deg=elevation, clockwise=clockwise)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    print(written)


@app.command()
def doctor(
    engine: Annotated[
        Literal["auto", "fusion", "trellis"], typer.Option(help="Exit 0 where this engine can run.")
    ] = "auto",
) -> None:
    """Show what this machine can run, and what is missing for the rest."""
    from rich.console import Console

    from tasks.doctor import can_run, findings, table, weights_here
    from tasks.inference.trellis.model_process import runtime_with
    from tasks.store.results import store

    found = findings(runtime_with({}), weights_here, store().root)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table(found))
    runs = can_run(engine, found)
    print(f"engine {engine}: {'can run' if runs else 'cannot run'} on this machine")
    raise typer.Exit(EXIT_DONE if runs else EXIT_FAILED)


def _prefect_defaults() -> None:
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def _serving() -> Iterator[None]:
    """For commands that run until they are stopped: their log goes to stderr."""
    _prefect_defaults()
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")  # who sends a notification waits for the answer
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _errors_told():
        yield


@contextmanager
def _errors_told() -> Iterator[None]:
    """Our errors become a line on stderr and an exit status."""
    from tasks.errors import Capture2MeshError, InputError

    try:
        yield
    except Capture2MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED) from None


@contextmanager
def _run() -> Iterator[Callable[[list[str]], Parameters]]:
    """Within the block flows can be called: against the server that is configured, or one of their own."""
    _prefect_defaults()
    with _errors_told(), ExitStack() as stack:
        from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.cli.terminal import Terminal
        from tasks.progress import observed_by

        terminal = Terminal()

        def ready(assignments: list[str]) -> Parameters:
            parameters = _parameters(assignments)
            stack.enter_context(terminal)
            if not PREFECT_API_URL.value():
                from flows.cli.own_server import start_server

                terminal.console.print("starting Prefect's own server for this run (PREFECT_API_URL names another)")
                start_server()
                # heartbeats tell a server of lost runs and cost a second; this server ends with the run
                stack.enter_context(temporary_settings(updates={PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
            stack.enter_context(observed_by(terminal))
            return parameters

        yield ready


def _plan(dataset: str, output: str, engine: EngineName, assignments: list[str], retry: bool) -> Plan:
    from flows.infer import deployed_engine
    from tasks.dataset.plan import plan
    from tasks.inference.registry import resolve_engine
    from tasks.settings import settings

    deployment = settings().batch_deployment
    choice = deployed_engine(deployment, engine) if deployment else resolve_engine(engine)
    return plan(dataset, output, choice, _parameters(assignments), retry=retry)


def _plan_json(planned: Plan) -> str:
    lines = [each.model_dump(exclude={"listing"}) for each in planned.captures]
    return json.dumps({"dataset": planned.dataset, "counts": planned.counts(), "captures": lines}, indent=1)


def _plan_text(planned: Plan) -> str:
    """One line a capture that is not published, and the counts."""
    width = max(len(each.id) for each in planned.captures)
    rows = [
        f"{each.state:9} {each.id:{width}} {each.reason.partition(chr(10))[0]}".rstrip()
        for each in planned.captures
        if each.state != "published"
    ]
    counts = ", ".join(f"{count} {state}" for state, count in planned.counts().items())
    return "\n".join([*rows, f"{len(planned.captures)} captures: {counts}"])


def _parameters(assignments: list[str]) -> Parameters:
    """`export.faces=5000` and the like; raises InputError with every value that does not fit."""
    from pydantic import ValidationError

    from tasks.errors import InputError
    from tasks.settings import Parameters

    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: write NAME=VALUE, for example export.texture_px=2048")
        *groups, leaf = name.split(".")
        group = values
        for part in groups:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise InputError(f"--set {assignment}: {part} is a value already")
        group[leaf] = _value(text)
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        reasons = "\n".join(f"  - {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"--set does not fit:\n{reasons}") from error


def _value(text: str) -> Any:
    """JSON where it is, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _tell(published: Published) -> None:
    """Where everything is."""
    report = published.report
    failed = [check for check in report.checks if not check.passed]
    print(f"{report.capture.id}: {report.status}")
    for check in failed:
        print(f"  {check.name}: {check.value} (limit {check.limit})")
    for entry in report.outputs:
        print(f"  {published.url}/{entry.path}")
    print(f"  {published.url}/report.json")


if __name__ == "__main__":
    app()
