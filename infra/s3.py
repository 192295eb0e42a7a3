"""The stack's S3 server: SeaweedFS with its buckets, one key for each purpose, and notifications of new objects.

Used by infra/stack.py and by the tests.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

ROOT = Path(__file__).parents[1]
HOST, REGION = "127.0.0.1", "us-east-1"
BUCKETS = ("captures", "assets", "store")
GRANTS = {
    "uploader": ["Write:captures"],
    "worker": ["Read:captures", "List:captures"]
    + [f"{action}:{bucket}" for bucket in ("assets", "store") for action in ("Read", "Write", "List")],
}
PORT_OPTIONS = [
    "s3.port.grpc",
    *(f"{p}.port{g}" for p in ("master", "volume", "filer", "admin") for g in ("", ".grpc")),
]


class S3Server:
    """How the server is started and used. Its folder holds data and keys, and survives a restart."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.url, self.keys = f"http://{HOST}:{port}", folder / "keys.json"

    def prepare(self) -> None:
        """Make the folder and the keys if they do not exist."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        if not self.keys.exists():
            write_private(self.keys, json.dumps(new_identities(), indent=1))

    def command(self, notifies: bool) -> list[str]:
        """The command that starts it. Every port is explicit, because a default that is taken changes silently."""
        options = {
            "dir": "data",
            "ip": HOST,
            "ip.bind": HOST,
            "bucket": ",".join(BUCKETS),
            "s3.config": self.keys,
            "s3.port": self.port,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
            **dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True)),
        }
        weed = str(Path(sys.executable).with_name("weed"))
        config = [f"-config_dir={ROOT / 'infra' / 'seaweedfs'}"] if notifies else []
        return [weed, *config, "mini", *(f"-{name}={value}" for name, value in options.items())]

    def env(self, receiver: str) -> dict[str, str]:
        """Environment of its process; `receiver` is the URL that it notifies."""
        webhook = {"ENDPOINT": f"{receiver}/notify", "BEARER_TOKEN": self.token}
        return {"GOMEMLIMIT": "300MiB"} | {f"WEED_NOTIFICATION_WEBHOOK_{name}": text for name, text in webhook.items()}

    def has_buckets(self) -> bool:
        """True if all buckets exist; the server reports that it is healthy before that."""
        client = self.client("worker")
        return all(client.exists(bucket) for bucket in BUCKETS)

    def upload_once(self, folder: Path, capture: str) -> None:
        """Upload a capture at the first start only: it does not come back after someone has removed it."""
        uploaded = self.folder / "sample-uploaded"
        if uploaded.exists():
            return
        self.upload(folder, capture)
        uploaded.touch()

    def upload(self, folder: Path, capture: str) -> None:
        """Upload a capture, its files sorted by name."""
        uploader = self.client("uploader")
        for path in sorted(filter(Path.is_file, folder.rglob("*"))):
            uploader.pipe_file(f"captures/{capture}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    @cached_property
    def token(self) -> str:
        """The secret that notifications carry; made at the first start."""
        path = self.folder / "receive-token"
        if not path.exists():
            write_private(path, secrets.token_urlsafe(32))
        return path.read_text()

    def key_of(self, identity: str) -> tuple[str, str]:
        """Access key and secret of an identity."""
        identities = {each["name"]: each for each in json.loads(self.keys.read_text())["identities"]}
        (key,) = identities[identity]["credentials"]
        return key["accessKey"], key["secretKey"]

    def client(self, identity: str) -> fsspec.AbstractFileSystem:
        """A file system with the keys of an identity."""
        key, secret = self.key_of(identity)
        client = {"endpoint_url": self.url, "region_name": REGION}
        return fsspec.filesystem("s3", key=key, secret=secret, client_kwargs=client, use_listings_cache=False)


def new_identities() -> dict[str, Any]:
    """The server's identities with new keys; a client without a key may read the published assets."""
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": f"{name}-{secrets.token_hex(4)}", "secretKey": secrets.token_urlsafe(32)}],
            "actions": actions,
        }
        for name, actions in GRANTS.items()
    ]
    return {"identities": [*identities, {"name": "anonymous", "actions": ["Read:assets"]}]}


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, completely or not at all."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(text)
    temporary.replace(path)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that no program uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
