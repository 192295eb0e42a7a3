"""The poller: takes notifications of AWS S3 from an SQS queue. `capture2mesh poll-sqs` runs it.

A message is deleted when its captures have been submitted.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from flows.uploads.notifications import captures_of, created_objects
from tasks.errors import Capture2MeshError, InputError, ServerUnavailable, StorageUnavailable
from tasks.settings import Settings

LONG_POLL_SECONDS = 20
MESSAGES_AT_ONCE = 10  # the limit of SQS
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
PASSING = (ServerUnavailable, StorageUnavailable, BotoCoreError, ClientError)

Submit = Callable[[str], object]
T = TypeVar("T")

log = logging.getLogger(__name__)


def poll(submit: Submit, settings: Settings) -> None:
    """Take notifications without end; raises InputError if a setting is missing or wrong."""
    if not (settings.watched and settings.sqs_queue_url):
        raise InputError("set CAPTURE2MESH_WATCHED (what is uploaded to) and CAPTURE2MESH_SQS_QUEUE_URL")
    queue = Queue(settings.sqs_queue_url)
    while True:
        take(queue, submit, settings.watched)


def take(queue: Queue, submit: Submit, watched: str) -> None:
    """Take the next messages and submit their captures; returns after some seconds if there are none."""
    for message in patiently(queue.receive):
        try:
            for capture_url in captures_of(created_objects(message["Body"]), watched):
                # while Prefect or the storage is down the message is kept here: SQS puts aside what it gets back often
                patiently(partial(submit, capture_url))
        except Capture2MeshError as error:
            log.error(
                "message %s stays in the queue until the queue's redrive policy puts it aside: %s",
                message["MessageId"],
                error,
            )
        else:
            queue.delete(message)


def patiently(call: Callable[[], T]) -> T:
    """Call until storage and servers answer; gives the result of the call."""
    wait = FIRST_WAIT_SECONDS
    while True:
        try:
            return call()
        except PASSING as error:
            log.warning("%s; tried again in %.0f s", error, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


class Queue:
    """A queue of SQS. A message that is not deleted within its visibility timeout is given out again."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        if not parts.hostname:
            raise InputError(f"CAPTURE2MESH_SQS_QUEUE_URL {url}: is not a URL; AWS shows it with the queue")
        region = re.match(r"sqs\.([a-z0-9-]+)\.amazonaws\.com", parts.hostname)
        self._client = get_session().create_client(
            "sqs",
            region_name=region.group(1) if region else None,
            # AWS_ENDPOINT_URL may be of another server, the one with the buckets
            endpoint_url=f"{parts.scheme}://{parts.netloc}",
        )

    def receive(self) -> list[dict[str, Any]]:
        """The next messages; an empty list if none comes within some seconds."""
        answer = self._client.receive_message(
            QueueUrl=self.url, MaxNumberOfMessages=MESSAGES_AT_ONCE, WaitTimeSeconds=LONG_POLL_SECONDS
        )
        messages: list[dict[str, Any]] = answer.get("Messages", [])
        return messages

    def delete(self, message: dict[str, Any]) -> None:
        """Delete a message. If that fails, it comes again, which does no harm."""
        try:
            self._client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])
        except (BotoCoreError, ClientError) as error:
            log.warning("queue %s: message %s could not be deleted: %s", self.url, message["MessageId"], error)
