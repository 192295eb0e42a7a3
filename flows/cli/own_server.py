"""Prefect's own server for one command. It ends with the command, even if that is killed."""

from __future__ import annotations

import subprocess
import sys

from prefect.server.api.server import SubprocessASGIServer

# ends the server when the pipe from its user closes: a killed process runs no code of its own
_WATCH = """
import contextlib, os, signal, sys
sys.stdin.read()
with contextlib.suppress(ProcessLookupError):
    os.kill(int(sys.argv[1]), signal.SIGTERM)
"""

# a pipe that is garbage-collected is closed
_watches: list[subprocess.Popen[bytes]] = []


def start_server() -> None:
    """Start the server that flows of this process use without PREFECT_API_URL; it ends with this process."""
    server = SubprocessASGIServer()
    server.start()
    assert server.server_process is not None
    command = [sys.executable, "-I", "-S", "-c", _WATCH, str(server.server_process.pid)]
    _watches.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
