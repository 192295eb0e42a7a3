"""Every dialect of notifications, with keys as people make them and bodies as nobody should."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.uploads.notifications import captures_of, created_objects
from tasks.errors import InputError
from tests.support import notices
from tests.support.notices import AWS_TEST, DIALECTS, SNS_SUBSCRIPTION, Body

ODD_KEYS = [
    "mug/views/view_000.png",
    "a b/views/x y.png",
    "a+b/views/x+y.png",
    "100%/views/%41.png",
    "tasse-grün/views/☃ 日本.png",
    "a/../b/views/x.png",
    "a&b=c?d#e/views/'\"<x>.png",
]

Dialect = Callable[..., Body]


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_created_object_is_read(dialect: Dialect, key: str) -> None:
    assert created_objects(json.dumps(dialect("captures", key))) == (("captures", key),)


@pytest.mark.parametrize(
    "body",
    [
        AWS_TEST,
        notices.aws("captures", "a/views/x.png", "ObjectRemoved:Delete"),
        notices.sns("captures", "a/views/x.png", "ObjectRestore:Completed"),
        notices.eventbridge("captures", "a/views/x.png", "Object Deleted"),
        notices.minio("captures", "a/views/x.png", "s3:ObjectAccessed:Get"),
        notices.gcs("captures", "a/views/x.png", "OBJECT_DELETE"),
        notices.seaweedfs("captures", "a/views/x.png", "delete"),
        notices.seaweedfs("captures", "a/views", is_directory=True),
        notices.seaweedfs("captures", ".uploads/4c0a_d657/0001_5480.part"),
        notices.seaweedfs("captures", "x") | {"key": "/etc/iam/identity.json"},
    ],
)
def test_what_creates_no_object_gives_none(body: Body) -> None:
    assert created_objects(json.dumps(body)) == ()


def test_several_records_are_read() -> None:
    body = notices.aws("captures", "a/views/x.png")
    body["Records"] += notices.aws("captures", "b/views/y.png")["Records"]
    assert [key for _, key in created_objects(json.dumps(body))] == ["a/views/x.png", "b/views/y.png"]


def test_renamed_object_has_its_new_name() -> None:
    body = notices.seaweedfs("captures", "new/views/x.png", "rename") | {"key": "/buckets/captures/old/views/x.png"}
    assert created_objects(json.dumps(body)) == (("captures", "new/views/x.png"),)


def test_version_is_its_object() -> None:
    body = notices.seaweedfs("captures", "a/manifest.json.versions/v_0066d1a0")
    assert created_objects(json.dumps(body)) == (("captures", "a/manifest.json"),)


def test_subscription_is_told_and_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert created_objects(json.dumps(SNS_SUBSCRIPTION)) == ()
    assert SNS_SUBSCRIPTION["SubscribeURL"] in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"1e999",
        b'{"Records": {}}',
        b'{"Records": [{"eventName": "ObjectCreated:Put"}]}',
        b'{"Records": [{"eventName": 1, "s3": {"bucket": {"name": "b"}, "object": {"key": 3}}}]}',
        b'{"Type": "Notification", "Message": "Hello"}',
        b'{"message": {"attributes": null}}',
        b'{"event_type": "create", "key": "/buckets/captures/x", "message": 3}',
        b'{"source": "aws.ec2", "detail-type": "Object Created", "detail": {}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_foreign_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        created_objects(body)


WORDS = ["Records", "eventName", "s3", "bucket", "object", "name", "key", "Type", "Message", "message", "event_type"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary() | json_values.map(json.dumps))
def test_nothing_else_is_raised(body: bytes | str) -> None:
    with suppress(InputError):
        assert isinstance(created_objects(body), tuple)


@pytest.mark.parametrize(
    ("key", "captures"),
    [
        ("in/mug/views/view_000.png", ["s3://captures/in/mug"]),
        ("in/day 1/mug+%41/depth/x.png", ["s3://captures/in/day 1/mug+%41"]),
        ("in/mug/_COMPLETE", ["s3://captures/in/mug"]),
        ("in/mug/manifest.json", ["s3://captures/in/mug"]),
        ("in/views/x.png", ["s3://captures/in"]),
        ("in/mug/notes.txt", []),
        ("elsewhere/mug/views/x.png", []),
        ("inside/mug/views/x.png", []),
        ("in/../mug/views/x.png", []),
        ("in/a//views/x.png", []),
        ("in/a::http://127.0.0.1/views/x.png", []),
        ("in/a\nb/views/x.png", []),
    ],
)
def test_capture_of_an_object(key: str, captures: list[str]) -> None:
    for watched in "s3://captures/in", "s3://captures/in/":
        assert captures_of(created_objects(json.dumps(notices.aws("captures", key))), watched) == captures
    assert captures_of(created_objects(json.dumps(notices.aws("other", key))), "s3://captures/in") == []


def test_capture_is_named_once() -> None:
    objects = [("captures", f"mug/views/{number}.png") for number in range(3)]
    found = [each for bucket, key in objects for each in created_objects(json.dumps(notices.gcs(bucket, key)))]
    assert captures_of(found, "gs://captures") == ["gs://captures/mug"]
