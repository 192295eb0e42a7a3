"""The start of Prefect's server on SQLite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# what happens in the server: a cursor in a cycle, of a connection that waits for the lock that this thread holds
TRANSACTION = """
import contextlib, sqlite3, sys, threading, time
from infra.prefect_server import collect_elsewhere

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
