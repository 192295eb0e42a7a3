"""The poller against a real SQS (moto): what is deleted, what comes again, what is put aside."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from botocore.session import get_session

from flows.uploads.poll_sqs import Queue, take
from infra.s3 import free_ports
from tasks.errors import InputError, ServerUnavailable, StorageError
from tests.support.notices import AWS_TEST, Body, aws, eventbridge, sns
from tests.support.running import clean_environment, running, wait_for, wait_until_served

WATCHED = "s3://captures"
VISIBILITY_SECONDS = 1
RECEIVED_AT_MOST = 2


class Sqs:
    """A queue with a dead-letter queue, as infra/aws sets them up."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.client = get_session().create_client("sqs", region_name="us-east-1", endpoint_url=endpoint)
        self.dead = self.client.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
        arn = self.client.get_queue_attributes(QueueUrl=self.dead, AttributeNames=["QueueArn"])["Attributes"][
            "QueueArn"
        ]
        attributes = {
            "VisibilityTimeout": str(VISIBILITY_SECONDS),
            "RedrivePolicy": json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": RECEIVED_AT_MOST}),
        }
        self.url = self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]

    def send(self, body: Body | str) -> None:
        self.client.send_message(QueueUrl=self.url, MessageBody=body if isinstance(body, str) else json.dumps(body))

    def count(self, url: str = "") -> int:
        """Messages, hidden ones as well."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.client.get_queue_attributes(QueueUrl=url or self.url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("moto") / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, clean_environment(), log) as process:
        wait_until_served(f"{url}/moto-api/", process, log)
        yield url


@pytest.fixture
def sqs(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Sqs:
    for name in "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY":
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # of the buckets
    monkeypatch.setattr("flows.uploads.poll_sqs.LONG_POLL_SECONDS", 3 * VISIBILITY_SECONDS)
    monkeypatch.setattr("flows.uploads.poll_sqs.FIRST_WAIT_SECONDS", 0.1)
    return Sqs(endpoint, uuid4().hex)


def test_messages_are_done_with_once_submitted(sqs: Sqs) -> None:
    submitted: list[str] = []
    for body in (
        AWS_TEST,
        aws("captures", "a b/views/x+y.png"),
        sns("captures", "grün/manifest.json"),
        eventbridge("captures", "c/_COMPLETE"),
        aws("other", "d/_COMPLETE"),
        aws("captures", "a b/views/x+y.png", "ObjectRemoved:Delete"),
    ):
        sqs.send(body)
    while sqs.count():
        take(Queue(sqs.url), submitted.append, WATCHED)
    assert sorted(submitted) == ["s3://captures/a b", "s3://captures/c", "s3://captures/grün"]
    assert sqs.count(sqs.dead) == 0


@pytest.mark.parametrize("error", [InputError("no deployment"), StorageError("denied")])
def test_message_that_fails_comes_again_and_then_is_put_aside(sqs: Sqs, error: Exception) -> None:
    calls: list[str] = []

    def submit(capture: str) -> None:
        calls.append(capture)
        raise error

    sqs.send(aws("captures", "mug/_COMPLETE"))
    sqs.send("no notification")
    wait_for("dead letters", lambda: take(Queue(sqs.url), submit, WATCHED) or sqs.count(sqs.dead) == 2)
    assert calls == ["s3://captures/mug"] * RECEIVED_AT_MOST
    assert sqs.count() == 0


def test_redelivered_message_is_done_with_later(sqs: Sqs) -> None:
    calls: list[str] = []

    def submit(capture: str) -> None:
        calls.append(capture)
        if len(calls) == 1:
            raise StorageError("this time only")

    sqs.send(aws("captures", "mug/_COMPLETE"))
    wait_for("the end", lambda: take(Queue(sqs.url), submit, WATCHED) or not sqs.count())
    assert calls == ["s3://captures/mug"] * 2
    assert sqs.count(sqs.dead) == 0


def test_outage_puts_nothing_aside(sqs: Sqs) -> None:
    """While Prefect is down for longer than a message may be received, it is kept."""
    calls = 0

    def submit(capture: str) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2 * RECEIVED_AT_MOST:
            raise ServerUnavailable("down")

    sqs.send(aws("captures", "mug/_COMPLETE"))
    take(Queue(sqs.url), submit, WATCHED)
    assert (calls, sqs.count(), sqs.count(sqs.dead)) == (2 * RECEIVED_AT_MOST + 1, 0, 0)


def test_queue_that_is_down_is_waited_for(sqs: Sqs, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(sqs.url)
    receive, failed = queue.receive, []

    def failing() -> list[dict[str, Any]]:
        if not failed:
            failed.append(1)
            return Queue(sqs.url.replace(endpoint, "http://127.0.0.1:1")).receive()
        return receive()

    monkeypatch.setattr(queue, "receive", failing)
    sqs.send(aws("captures", "mug/_COMPLETE"))
    calls: list[str] = []
    take(queue, calls.append, WATCHED)
    assert calls == ["s3://captures/mug"]


@pytest.mark.parametrize("url", ["", "uploads"])
def test_what_is_no_queue_is_told(url: str) -> None:
    with pytest.raises(InputError, match="CAPTURE2MESH_SQS_QUEUE_URL"):
        Queue(url)
