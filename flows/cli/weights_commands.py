"""`capture2mesh weights`: the weights of the TRELLIS engine, pinned, downloaded and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from flows.cli.conventions import EXIT_FAILED, errors_told, print_table, tell_error

app = typer.Typer(name="weights", help="The weights of the TRELLIS engine.", no_args_is_help=True)

Masks = Annotated[bool, typer.Option("--masks", help="With BiRefNet, for views that have neither alpha nor depth.")]


@app.command("list")
def list_() -> None:
    """Show the declared list: what is pinned, and what is on this machine."""
    from rich.table import Table

    from tasks.settings import settings
    from tasks.weights.local import blobs_present, find
    from tasks.weights.pins import bundle, declared

    with errors_told():
        table = Table("repository", "part", "revision", "files", "size", "pinned", "present")
        for source in declared().sources:
            revision = source.revision[:12] if source.revision else "" if source.has_revisions else "(none)"
            size = sum(file.bytes or 0 for file in source.files)
            present = blobs_present(source)
            table.add_row(
                source.repository,
                source.part,
                revision,
                str(len(source.files)),
                f"{size / 1e6:,.1f} MB" if source.pinned else "?",
                "yes" if source.pinned else "NO",
                "yes" if present == len(source.files) else f"{present} of {len(source.files)}",
            )
        print_table(table)
        for masks in (False, True):
            wanted = bundle(masks)
            state = "not pinned" if wanted.unpinned else "whole" if find(wanted) else "not fetched"
            typer.echo(f"bundle {wanted.digest[:12]} {'with' if masks else 'without'} masks: {state}")
        typer.echo(f"folder {settings().weights}")


@app.command()
def fetch(
    masks: Masks = False,
    repair: Annotated[bool, typer.Option("--repair", help="Hash the files and download wrong ones again.")] = False,
) -> None:
    """Download what is missing; continues downloads that were interrupted."""
    from tasks.weights.local import fetch
    from tasks.weights.pins import bundle

    with errors_told(), _bar("weights") as progress:
        folder = fetch(bundle(masks), progress, repair)
    typer.echo(folder)


@app.command()
def verify(masks: Masks = False) -> None:
    """Hash every file again; exit 1 if one is not as it is pinned."""
    from tasks.weights.local import verify
    from tasks.weights.pins import bundle

    with errors_told(), _bar("verify") as progress:
        wanted = bundle(masks)
        faults = verify(wanted, progress)
    for fault in faults:
        tell_error(fault)
    if faults:
        typer.echo("run `capture2mesh weights fetch --repair`", err=True)
        raise typer.Exit(EXIT_FAILED)
    typer.echo(f"bundle {wanted.digest[:12]}: every file is as it is pinned")


@app.command()
def pin(
    update: Annotated[bool, typer.Option("--update", help="Take the newest revisions on the hub.")] = False,
) -> None:
    """Record revisions, sizes and digests in the declared list, from where the files are published."""
    from tasks.settings import settings
    from tasks.weights.pinning import pin

    with errors_told():
        pin(settings().weights_list, update, lambda line: typer.echo(line, err=True))
    typer.echo(settings().weights_list)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, if that is a terminal; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        row = bars.add_task(name, total=1.0)
        yield lambda fraction: bars.update(row, completed=fraction)
