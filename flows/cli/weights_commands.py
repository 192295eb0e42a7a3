"""`python -m flows weights`: what the TRELLIS engine loads, pinned, downloaded and verified."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
PLAIN_WIDTH = 140

app = typer.Typer(name="weights", help="The weights of the TRELLIS engine.", no_args_is_help=True)

Masks = Annotated[bool, typer.Option("--masks", help="With BiRefNet, for views that have neither alpha nor depth.")]


@app.command("list")
def list_() -> None:
    """Show the declared list: what is pinned, and what is here."""
    from rich.console import Console
    from rich.table import Table

    from tasks.settings import settings
    from tasks.weights.local import blobs_present, find
    from tasks.weights.pins import bundle, declared

    with _errors_told():
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
        Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)
        for masks in (False, True):
            wanted = bundle(masks)
            state = "not pinned" if wanted.unpinned else "whole" if find(wanted) else "not fetched"
            typer.echo(f"bundle {wanted.digest[:12]} {'with' if masks else 'without'} masks: {state}")
        typer.echo(f"folder {settings().weights}")


@app.command()
def fetch(
    masks: Masks = False,
    repair: Annotated[bool, typer.Option("--repair", help="Hash what is here and fetch anew what is wrong.")] = False,
) -> None:
    """Download what is missing; continues where a download broke."""
    from tasks.weights.local import fetch
    from tasks.weights.pins import bundle

    with _errors_told(), _bar("weights") as progress:
        folder = fetch(bundle(masks), progress, repair)
    typer.echo(folder)


@app.command()
def verify(masks: Masks = False) -> None:
    """Hash every file again; exit 1 where one is not what is pinned."""
    from tasks.weights.local import verify
    from tasks.weights.pins import bundle

    with _errors_told(), _bar("verify") as progress:
        wanted = bundle(masks)
        faults = verify(wanted, progress)
    for fault in faults:
        typer.echo(f"error: {fault}", err=True)
    if faults:
        typer.echo("run `python -m flows weights fetch --repair`", err=True)
        raise typer.Exit(EXIT_FAILED)
    typer.echo(f"bundle {wanted.digest[:12]}: every file is what is pinned")


@app.command()
def pin(
    update: Annotated[bool, typer.Option("--update", help="Move what lies on the hub to its newest revision.")] = False,
) -> None:
    """Record revisions, sizes and digests in the declared list, from where the files are published."""
    from tasks.settings import settings
    from tasks.weights.pinning import pin

    with _errors_told():
        pin(settings().weights_list, update, lambda line: typer.echo(line, err=True))
    typer.echo(settings().weights_list)


@contextmanager
def _errors_told() -> Iterator[None]:
    from tasks.errors import Capture2MeshError, InputError

    try:
        yield
    except Capture2MeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED) from None


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        row = bars.add_task(name, total=1.0)
        yield lambda fraction: bars.update(row, completed=fraction)


if __name__ == "__main__":
    app()
