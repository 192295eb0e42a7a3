"""`capture2mesh doctor` and `rig`: the state of this machine, and the cameras of a capture on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.conventions import EXIT_DONE, EXIT_FAILED, errors_told, print_table


def doctor(
    engine: Annotated[
        Literal["auto", "fusion", "trellis"], typer.Option(help="Exit 0 if this engine can run.")
    ] = "auto",
) -> None:
    """Show what this machine can run, and what is missing for the rest."""
    from tasks.doctor import can_run, findings, table, weights_here
    from tasks.inference.trellis.model_process import runtime_with
    from tasks.store.results import store

    found = findings(runtime_with({}), weights_here, store().root)
    print_table(table(found))
    runs = can_run(engine, found)
    typer.echo(f"engine {engine}: {'can run' if runs else 'cannot run'} on this machine")
    raise typer.Exit(EXIT_DONE if runs else EXIT_FAILED)


def rig(
    folder: Annotated[Path, typer.Argument(help="Folder of the capture.")],
    kind: Annotated[Literal["axes6", "turntable"], typer.Option(help="How the cameras stand.")],
    distance: Annotated[float, typer.Option(help="Metres from the camera to the origin.")],
    fov: Annotated[float, typer.Option(help="Horizontal field of view, degrees.")],
    elevation: Annotated[float, typer.Option(help="turntable: degrees of the camera above the horizon.")] = 0.0,
    clockwise: Annotated[bool, typer.Option(help="turntable: the views go clockwise, seen from above.")] = False,
) -> None:
    """Write the transforms.json of a known rig."""
    with errors_told():
        from tasks.capture.rig import rig

        written = rig(folder, kind, distance_m=distance, fov_deg=fov, elevation_deg=elevation, clockwise=clockwise)
    typer.echo(written)
