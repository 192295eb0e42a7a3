"""A real S3 server for the tests: the stack's own (infra/s3.py), with one more identity that may do everything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

from infra.s3 import REGION, S3Server, free_ports, new_identities, write_private
from tests.support.running import clean_environment, running, wait_for, wait_until_served

ADMIN = {
    "name": "admin",
    "credentials": [{"accessKey": "admin-key-id", "secretKey": "admin-secret-0123456789"}],
    "actions": ["Admin", "Read", "Write", "List"],
}


@dataclass(frozen=True)
class S3:
    """A running S3 server with the buckets `captures` (its worker may only read it), `assets` and `store`."""

    server: S3Server
    env: Mapping[str, str]
    """The worker's variables, for subprocesses."""
    admin: s3fs.S3FileSystem
    """The test's client, which may do everything."""

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return self.server.url

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload a folder; gives its URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.admin.pipe_file(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{prefix}"

    def keys(self, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by relative key."""
        return {path.removeprefix(f"{prefix}/"): self.admin.cat_file(path) for path in self.admin.find(prefix)}


@contextmanager
def seaweedfs(folder: Path, receiver: str | None = None) -> Iterator[S3]:
    """SeaweedFS in a folder that exists; with `receiver`, a URL, it sends notifications there."""
    server = S3Server(folder, free_ports(1)[0])
    identities = new_identities()
    write_private(server.keys, json.dumps({"identities": [*identities["identities"], ADMIN]}))
    server.prepare()
    log = folder / "weed.log"
    env = clean_environment() | server.env(receiver or "")
    with running(server.command(notifies=receiver is not None), env, log, cwd=folder) as process:
        wait_until_served(f"{server.url}/healthz", process, log)
        wait_for("the buckets", server.has_buckets)
        key, secret = server.key_of("worker")
        yield S3(
            server,
            env={
                "AWS_ENDPOINT_URL": server.url,
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_REGION": REGION,
                "AWS_DEFAULT_REGION": REGION,
            },
            admin=server.client("admin"),
        )
