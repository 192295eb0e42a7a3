"""The command line, `capture2mesh` or `python -m flows`: it assembles the commands of `flows/cli`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli import look_command, machine_commands, run_commands, store_commands, upload_commands, weights_commands

NAME = "capture2mesh"

app = typer.Typer(
    name=NAME,
    help="Multi-view RGB + depth captures in, textured and validated meshes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run_commands.reconstruct)
app.command()(run_commands.dataset)
app.command()(look_command.look)
app.command()(upload_commands.sweep)
app.command()(upload_commands.receive)
app.command("poll-sqs")(upload_commands.poll_sqs)
app.command()(machine_commands.rig)
app.command()(machine_commands.doctor)
app.add_typer(weights_commands.app, name="weights")
app.add_typer(store_commands.app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"{NAME} {version(NAME)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command line itself."""


def main() -> None:
    """Run the command line: the console script `capture2mesh`."""
    app(prog_name=NAME)


if __name__ == "__main__":
    main()
