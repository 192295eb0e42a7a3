"""Notifications as the storages send them (recorded, shortened), for a bucket and a key of the test's choice."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote_plus

Body = dict[str, Any]


def aws(bucket: str, key: str, event: str = "ObjectCreated:Put") -> Body:
    """S3 to SQS: form-encoded, with `+` for a space and the slashes left."""
    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": "eu-central-1",
                "eventTime": "2026-11-22T10:11:12.345Z",
                "eventName": event,
                "userIdentity": {"principalId": "AWS:AIDAEXAMPLE"},
                "requestParameters": {"sourceIPAddress": "127.0.0.1"},
                "s3": {
                    "s3SchemaVersion": "1.0",
                    "configurationId": "uploads",
                    "bucket": {
                        "name": bucket,
                        "ownerIdentity": {"principalId": "EXAMPLE"},
                        "arn": f"arn:aws:s3:::{bucket}",
                    },
                    "object": {
                        "key": quote_plus(key, safe="/"),
                        "size": 1024,
                        "eTag": "d41d8cd98f00b204e9800998ecf8427e",
                        "sequencer": "0055AED6DCD90281E5",
                    },
                },
            }
        ]
    }


AWS_TEST: Body = {
    "Service": "Amazon S3",
    "Event": "s3:TestEvent",
    "Time": "2026-11-22T10:00:00.000Z",
    "Bucket": "captures",
    "RequestId": "5582815E1AEA5ADF",
    "HostId": "8cLeGAmw098X5cv4Zkwcmo8vvZa3eH3eKxsPzbB9wrR+YstdA6Knx4Ip8EXAMPLE",
}


def sns(bucket: str, key: str, event: str = "ObjectCreated:Put") -> Body:
    return {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": "arn:aws:sns:eu-central-1:123456789012:uploads",
        "Subject": "Amazon S3 Notification",
        "Message": json.dumps(aws(bucket, key, event)),
        "Timestamp": "2026-11-22T10:11:12.400Z",
        "SignatureVersion": "1",
        "Signature": "EXAMPLE",
        "SigningCertURL": "https://sns.eu-central-1.amazonaws.com/SimpleNotificationService.pem",
        "UnsubscribeURL": "https://sns.eu-central-1.amazonaws.com/?Action=Unsubscribe",
    }


SNS_SUBSCRIPTION: Body = {
    "Type": "SubscriptionConfirmation",
    "MessageId": "165545c9-2a5c-472c-8df2-7ff2be2b3b1b",
    "Token": "2336412f37",
    "TopicArn": "arn:aws:sns:eu-central-1:123456789012:uploads",
    "Message": "You have chosen to subscribe to the topic.",
    "SubscribeURL": "https://sns.eu-central-1.amazonaws.com/?Action=ConfirmSubscription&Token=2336412f37",
    "Timestamp": "2026-11-22T10:00:00.000Z",
}


def eventbridge(bucket: str, key: str, event: str = "Object Created") -> Body:
    return {
        "version": "0",
        "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": event,
        "source": "aws.s3",
        "account": "123456789012",
        "time": "2026-11-22T10:11:12Z",
        "region": "eu-central-1",
        "resources": [f"arn:aws:s3:::{bucket}"],
        "detail": {
            "version": "0",
            "bucket": {"name": bucket},
            "object": {"key": key, "size": 5, "etag": "b1946ac92492d2347c6235b4d2611184"},
            "request-id": "N4N7GDK58NMKJ12R",
            "requester": "123456789012",
            "reason": "PutObject",
        },
    }


def minio(bucket: str, key: str, event: str = "s3:ObjectCreated:Put") -> Body:
    record = aws(bucket, key, event)["Records"][0] | {"eventSource": "minio:s3", "awsRegion": ""}
    return {"EventName": event, "Key": f"{bucket}/{key}", "Records": [record]}


def gcs(bucket: str, key: str, event: str = "OBJECT_FINALIZE") -> Body:
    return {
        "message": {
            "attributes": {
                "bucketId": bucket,
                "eventTime": "2026-11-22T10:11:12.345678Z",
                "eventType": event,
                "notificationConfig": "projects/_/buckets/captures/notificationConfigs/1",
                "objectGeneration": "1795385291093950",
                "objectId": key,
                "payloadFormat": "JSON_API_V1",
            },
            "data": "e30=",
            "messageId": "2070443601311540",
            "publishTime": "2026-11-22T10:11:12.4Z",
        },
        "subscription": "projects/example/subscriptions/uploads",
    }


def seaweedfs(bucket: str, key: str, event: str = "create", *, is_directory: bool = False) -> Body:
    folder, _, name = f"/buckets/{bucket}/{key}".rpartition("/")
    entry: Body = {
        "name": name,
        "chunks": [{"size": 1, "modified_ts_ns": 1795385291093950973, "e_tag": "ndTkYSaMgDT1yFZOFVxnpg=="}],
        "attributes": {"file_size": 1, "mtime": 1795385291, "file_mode": 432, "mime": "image/png"},
        "extended": {"Seaweed-X-Amz-ETag": "OWRkNGU0NjEyNjhjODAzNGY1Yzg1NjRlMTU1YzY3YTY="},
    }
    if is_directory:
        entry |= {"is_directory": True}
    message = {"new_entry": entry, "delete_chunks": True, "new_parent_path": folder, "signatures": [-636479669]}
    if event == "delete":
        message = {"old_entry": entry, "delete_chunks": True, "signatures": [-870469924]}
    return {"event_type": event, "key": f"{folder}/{name}", "message": message}


DIALECTS = {
    "aws": aws,
    "sns": sns,
    "eventbridge": eventbridge,
    "minio": minio,
    "gcs": gcs,
    "seaweedfs": seaweedfs,
}
