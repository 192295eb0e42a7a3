"""Notifications that storages send when an object has been written: their dialects, and the objects that they name.

The receiver and the poller read them. A notification is only a hint that saves time: it may come twice, late, in
another order, or never.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import unquote_plus

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from tasks.capture.layout import capture_of, is_id
from tasks.errors import InputError

_FILER_BUCKETS = "/buckets/"
_MULTIPART_PARTS = ".uploads"
_VERSIONS = ".versions/v_"  # follows an object's key in a bucket with versions

log = logging.getLogger(__name__)


class CreatedObject(NamedTuple):
    """An object that has been written completely."""

    bucket: str
    """Name of its bucket."""
    key: str
    """Its key in the bucket."""


Created = tuple[CreatedObject, ...]


def created_objects(body: bytes | str) -> Created:
    """The objects that a notification says have been written; raises InputError if its dialect is not known."""
    try:
        notification = _DIALECTS.validate_json(body)
    except ValidationError as error:
        raise InputError(
            f"a notification of {len(body)} bytes is not of AWS S3 (SQS, SNS), EventBridge, MinIO, GCS Pub/Sub or"
            " SeaweedFS; check what the storage is configured to send"
        ) from error
    return notification.created()


def captures_of(objects: Iterable[CreatedObject], watched: str) -> list[str]:
    """URLs of the captures below `watched` that objects belong to, each once."""
    protocol, _, root = watched.rstrip("/").partition("://")
    found = set()
    for bucket, key in objects:
        path = f"{bucket}/{key}"
        below = path.removeprefix(f"{root}/")
        if below == path or not is_id(below):
            continue
        if (capture_path := capture_of(below)) is not None:
            found.add(f"{protocol}://{root}/{capture_path}".rstrip("/"))
    return sorted(found)


class _Name(BaseModel):
    name: str


class _Key(BaseModel):
    key: str


class _BucketAndObject(BaseModel):
    bucket: _Name
    object: _Key


class _Record(BaseModel):
    event: str = Field(alias="eventName")
    s3: _BucketAndObject


class _S3(BaseModel):
    """AWS S3, and MinIO, which puts `s3:` before the event's name; keys are encoded as in an HTML form."""

    records: tuple[_Record, ...] = Field(alias="Records")

    def created(self) -> Created:
        return tuple(
            CreatedObject(record.s3.bucket.name, unquote_plus(record.s3.object.key))
            for record in self.records
            if record.event.removeprefix("s3:").startswith("ObjectCreated:")
        )


class _S3Test(BaseModel):
    """Sent once by AWS, when notifications are set up."""

    event: Literal["s3:TestEvent"] = Field(alias="Event")

    def created(self) -> Created:
        return ()


class _Sns(BaseModel):
    """A notification of AWS S3 as the text of a message of SNS."""

    type: Literal["Notification"] = Field(alias="Type")
    message: str = Field(alias="Message")

    def created(self) -> Created:
        return created_objects(self.message)


class _SnsSubscription(BaseModel):
    """SNS asks for a confirmation before it sends. A person answers: a call to this receiver could name any topic."""

    type: Literal["SubscriptionConfirmation", "UnsubscribeConfirmation"] = Field(alias="Type")
    topic: str = Field(alias="TopicArn")
    url: str = Field(alias="SubscribeURL")

    def created(self) -> Created:
        log.warning("SNS topic %r wants to send here; if it is yours, confirm it by opening %r", self.topic, self.url)
        return ()


class _EventBridge(BaseModel):
    source: Literal["aws.s3"]
    kind: str = Field(alias="detail-type")
    detail: _BucketAndObject

    def created(self) -> Created:
        if self.kind != "Object Created":
            return ()
        return (CreatedObject(self.detail.bucket.name, self.detail.object.key),)


class _GcsAttributes(BaseModel):
    bucket: str = Field(alias="bucketId")
    key: str = Field(alias="objectId")
    event: str = Field(alias="eventType")


class _GcsMessage(BaseModel):
    attributes: _GcsAttributes


class _Gcs(BaseModel):
    """Pub/Sub push."""

    message: _GcsMessage

    def created(self) -> Created:
        found = self.message.attributes
        return (CreatedObject(found.bucket, found.key),) if found.event == "OBJECT_FINALIZE" else ()


class _Entry(BaseModel):
    name: str
    is_directory: bool = False


class _SeaweedMessage(BaseModel):
    new: _Entry | None = Field(None, alias="new_entry")
    folder: str = Field("", alias="new_parent_path")


class _Seaweed(BaseModel):
    """SeaweedFS's webhook: changes of its filer. `key` is a path, in a rename the old one."""

    event: str = Field(alias="event_type")
    key: str
    message: _SeaweedMessage

    def created(self) -> Created:
        entry = self.message.new
        if self.event not in ("create", "update", "rename") or entry is None or entry.is_directory:
            return ()
        path = f"{self.message.folder}/{entry.name}" if self.event == "rename" else self.key
        bucket, _, key = path.removeprefix(_FILER_BUCKETS).partition("/")
        if not path.startswith(_FILER_BUCKETS) or not key or key.startswith(f"{_MULTIPART_PARTS}/"):
            return ()
        return (CreatedObject(bucket, key.partition(_VERSIONS)[0]),)


_DIALECTS: TypeAdapter[_S3 | _S3Test | _Sns | _SnsSubscription | _EventBridge | _Gcs | _Seaweed] = TypeAdapter(
    _S3 | _S3Test | _Sns | _SnsSubscription | _EventBridge | _Gcs | _Seaweed
)
