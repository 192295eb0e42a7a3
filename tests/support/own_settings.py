"""State of this process between tests: settings, store and clients in caches; logs and events on their way."""

from __future__ import annotations

import s3fs
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker

from tasks.settings import settings
from tasks.store.results import store


def forget() -> None:
    """Clear these caches; the next use reads the environment again."""
    for function in (settings, store):
        function.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def send_the_rest() -> None:
    """Send the logs and events that wait for a Prefect server; call it before this server stops, or another is used.

    Else Prefect tries to send them for a minute when this process ends, and it sends later ones to the same server.
    """
    for worker in (APILogWorker, EventsWorker):
        worker.drain_all()
