"""`capture2mesh weights`: the weights of the TRELLIS engine, pinned, downloaded and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from flows.cli.conventions import EXIT_FAILED, errors_told, print_table, tell_error

app = typer.Typer(name="weights", help="The weights of the TRELLIS engine.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Show the files' repositories: what is pinned, what is on this machine, and the licences."""
    from rich.table import Table

    from tasks.settings import settings
    from tasks.weights.local import blobs_present, find
    from tasks.weights.pins import bundle

    with errors_told():
        wanted = bundle()
        table = Table("repository", "revision", "files", "size", "pinned", "present", "licence")
        for source in wanted.sources:
            revision = source.revision[:12] if source.revision else "" if source.has_revisions else "(none)"
            present = blobs_present(source)
            table.add_row(
                source.repository,
                revision,
                str(len(source.files)),
                f"{source.total_bytes / 1e6:,.1f} MB" if source.pinned else "?",
                "yes" if source.pinned else "NO",
                "yes" if present == len(source.files) else f"{present} of {len(source.files)}",
                source.licence,
            )
        print_table(table)
        state = "not pinned: `weights fetch` does it" if wanted.unpinned else "whole" if find(wanted) else "not fetched"
        typer.echo(f"bundle: {state}")
        typer.echo(f"folder: {settings().weights}")


@app.command()
def fetch(
    repair: Annotated[bool, typer.Option("--repair", help="Hash the files and download wrong ones again.")] = False,
    frozen: Annotated[bool, typer.Option("--frozen", help="Refuse files that no lock file pins.")] = False,
    write_lock: Annotated[
        bool, typer.Option("--write-lock", help="Also write the lock file at CAPTURE2MESH_WEIGHTS_LOCK.")
    ] = False,
) -> None:
    """Download what is missing; continues downloads that were interrupted.

    The first fetch also writes a lock file with the revision and digest of every file, which all later ones follow.
    """
    from tasks.settings import settings
    from tasks.store.local_files import write_atomically
    from tasks.weights.local import fetch
    from tasks.weights.pins import bundle, local_lock, lock_text

    with errors_told():
        with _bar("weights") as progress:
            folder = fetch(bundle(), progress, repair, frozen)
        pinned = bundle()
        for source in pinned.sources:
            size = f"{len(source.files)} file(s), {source.total_bytes / 1e6:,.1f} MB"
            typer.echo(f"{source.repository} at {source.revision or 'its URL'}: {size}", err=True)
        if write_lock:
            write_atomically(settings().weights_lock, lock_text(pinned).encode())
        lock = settings().weights_lock if settings().weights_lock.exists() else local_lock()
        typer.echo(f"lock file: {lock}", err=True)
    typer.echo(folder)


@app.command()
def verify() -> None:
    """Hash every file again; exit 1 if one is not as it is pinned."""
    from tasks.weights.local import verify
    from tasks.weights.pins import bundle

    with errors_told(), _bar("verify") as progress:
        wanted = bundle()
        faults = verify(wanted, progress)
    for fault in faults:
        tell_error(fault)
    if faults:
        typer.echo("run `capture2mesh weights fetch --repair`", err=True)
        raise typer.Exit(EXIT_FAILED)
    typer.echo(f"bundle {wanted.digest[:12]}: every file is as it is pinned")


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr, if that is a terminal; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        row = bars.add_task(name, total=1.0)
        yield lambda fraction: bars.update(row, completed=fraction)
