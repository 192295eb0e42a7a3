"""Runs the command line in forks of a process that has imported it: imports are most of the time of a small command.

`CommandLine.run` uses it. Tests that kill or measure a command, or let it start its own server, start a real one.
"""

from __future__ import annotations

import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

from flows.cli.conventions import use_prefect_defaults

ROOT = Path(__file__).parents[2]
LINE_BYTES = 2**20
PRELOADED = ("flows.__main__", "flows.reconstruct", "scipy.spatial", "skimage.measure", "trimesh")


@cache
def _address() -> str:
    """The socket of this process's server, which ends with this process: it reads from a pipe that closes then."""
    address = str(Path(tempfile.mkdtemp(prefix="preloaded-")) / "socket")
    command = [sys.executable, "-m", "tests.support.preloaded", address]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return address


def run(arguments: list[str], env: Mapping[str, str], seconds: float) -> tuple[int, str, str]:
    """Run `python -m flows` with these arguments; gives its exit status, or minus its signal, stdout and stderr.

    Raises TimeoutError, and ends the command with its children, when it takes longer than `seconds`.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        connection.settimeout(seconds)
        connection.connect(_address())
        request = {"arguments": arguments, "env": dict(env), "outputs": [str(path) for path in outputs]}
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as answers:
            leader = int(answers.readline())
            try:
                code = int(answers.readline())
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(leader, signal.SIGKILL)
        stdout, stderr = (path.read_text() for path in outputs)
        return code, stdout, stderr


def _command(arguments: list[str], env: Mapping[str, str], outputs: list[str]) -> None:
    """Become the command: its own session, environment and output."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    use_prefect_defaults()
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    sys.argv = ["flows", *arguments]
    from flows.__main__ import main

    main()


def _answer(connection: socket.socket) -> None:
    """Run one command and tell its process id, and then its exit status."""
    request = json.loads(connection.makefile().readline(LINE_BYTES))
    process = os.fork()
    if not process:
        connection.close()
        _command(**request)
        sys.exit()
    connection.sendall(f"{process}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(BrokenPipeError):  # it was given up
        connection.sendall(f"{code}\n".encode())


def _serve(address: str) -> None:
    """Import what a reconstruction needs, and answer each connection in a fork, until stdin closes."""
    use_prefect_defaults()  # as the commands do it, before they import Prefect: it sets up its logs then
    for each in PRELOADED:
        import_module(each)

    gc.freeze()  # no fork looks through what all of them share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that answer are not waited for
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in readable:
                shutil.rmtree(Path(address).parent)
                return
            connection, _ = server.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                with connection:
                    _answer(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
