"""The process of Prefect's own server: its garbage collector, and its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.support.running import clean_environment, wait_for

ROOT = Path(__file__).resolve().parents[2]

# what happens in the server: a cursor in a cycle, of a connection that waits for the lock that this thread holds
TRANSACTION = """
import contextlib, sqlite3, sys, threading, time
from flows.cli.server_process import collect_elsewhere

if sys.argv[2] == "elsewhere":
    collect_elsewhere(pause=0.05)
holder, waiter = (
    sqlite3.connect(sys.argv[1], timeout=4, isolation_level=None, check_same_thread=False) for _ in range(2)
)
holder.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY)")
holder.execute("INSERT INTO numbers VALUES (1)")
failed = waiter.cursor()
with contextlib.suppress(sqlite3.IntegrityError):
    failed.execute("INSERT INTO numbers VALUES (1)")
cycle = [failed]
cycle.append(cycle)
holder.execute("BEGIN IMMEDIATE")
begun = time.monotonic()
waiting = threading.Thread(target=waiter.execute, args=["INSERT INTO numbers VALUES (2)"])
waiting.start()
time.sleep(0.5)
del cycle, failed
kept = [[] for _ in range(100_000)]
time.sleep(0.5)
holder.execute("COMMIT")
print(time.monotonic() - begun)
"""


@pytest.mark.parametrize(("collects", "stands_still"), [("elsewhere", False), ("itself", True)])
def test_a_transaction_ends_though_a_cursor_of_a_waiting_connection_is_garbage(
    tmp_path: Path, collects: str, stands_still: bool
) -> None:
    command = [sys.executable, "-c", TRANSACTION, str(tmp_path / "db"), collects]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.stdout, ran.stderr
    assert (float(ran.stdout) > 3) == stands_still


def test_the_server_of_a_command_ends_with_it_even_if_that_is_killed(tmp_path: Path) -> None:
    code = "from flows.cli.own_server import OwnServer; print(OwnServer().process.pid, flush=True); input()"
    env = clean_environment() | {"PREFECT_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdin=PIPE, stdout=PIPE) as command:
        assert command.stdout is not None
        server = Path("/proc") / command.stdout.readline().decode().strip()
        wait_for("the server", lambda: b"server_process" in (server / "cmdline").read_bytes())
        command.kill()
    wait_for("the end of the server", lambda: not server.exists() or ") Z " in (server / "stat").read_text())
