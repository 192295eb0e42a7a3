"""`capture2mesh sweep`, `receive` and `poll-sqs`: uploads are submitted as runs to the server of PREFECT_API_URL."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from flows.cli.conventions import errors_told, use_prefect_defaults


def sweep(
    watched: Annotated[str, typer.Argument(help="Folder or URL that captures are uploaded to.")],
    output: Annotated[str, typer.Argument(help="Folder or URL below which the assets are published.")],
) -> None:
    """Submit what has been uploaded and is not published yet to the server of PREFECT_API_URL."""
    use_prefect_defaults()
    with errors_told():
        from flows.sweep import sweep
        from flows.uploads.submit import require_server

        require_server()
        counts = sweep(watched, output)
    for state, count in sorted(counts.items()):
        typer.echo(f"{state:12}{count}")


def receive() -> None:
    """Receive a storage's notifications over HTTP and submit what is uploaded (settings: CAPTURE2MESH_RECEIVE_*)."""
    with _serving():
        from flows.uploads.receive import serve
        from flows.uploads.submit import submitter
        from tasks.settings import settings

        serve(submitter().submit, settings())


def poll_sqs() -> None:
    """Take the notifications of AWS S3 from CAPTURE2MESH_SQS_QUEUE_URL and submit what is uploaded."""
    with _serving():
        from flows.uploads.poll_sqs import poll
        from flows.uploads.submit import submitter
        from tasks.settings import settings

        poll(submitter().submit, settings())


@contextmanager
def _serving() -> Iterator[None]:
    """For commands that run until they are stopped: their log goes to stderr."""
    use_prefect_defaults()
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "2")  # the sender of a notification waits for the answer
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with errors_told():
        yield
