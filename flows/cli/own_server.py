"""Prefect's own server for one command: it starts beside the command's imports, and ends with the command.

`run_commands` uses it where no server is configured.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys

import httpx

from flows.cli import server_process
from tasks.errors import ServerUnavailable

HOST = "127.0.0.1"
START_SECONDS = 120  # on a busy machine that makes the database first
STOP_SECONDS = 5

# this server lives for one command: it serves no page, and runs only the services that record the run
ONE_COMMAND = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
}


class OwnServer:
    """Prefect's server, started for this process; it may not answer yet."""

    def __init__(self) -> None:
        # requests wait in the socket's queue until the server takes them
        with socket.create_server((HOST, 0)) as listening:
            self.api = f"http://{HOST}:{listening.getsockname()[1]}/api"
            self.process = subprocess.Popen(
                [sys.executable, "-m", server_process.__name__, str(listening.fileno())],
                env=os.environ | ONE_COMMAND,
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                start_new_session=True,  # Ctrl-C ends the run; the server hears of that, and then ends as well
            )
        atexit.register(self._end)  # only when Prefect, which is imported later, has sent the run's last logs

    def wait(self) -> None:
        """Wait until it answers; raises ServerUnavailable if it does not start."""
        try:
            httpx.get(f"{self.api}/health", timeout=START_SECONDS, trust_env=False).raise_for_status()
        except httpx.HTTPError as error:
            raise ServerUnavailable(f"Prefect's own server did not start: {error}; see the lines above") from error

    def _end(self) -> None:
        """End it, by force if need be."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
