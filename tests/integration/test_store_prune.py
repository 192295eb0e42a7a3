"""`store stats` and `store prune` against real runs, a real Prefect server and a real S3 server."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import tasks.store.results
from flows.cli.store_commands import _oldest_running, _size
from tasks.errors import StorageUnavailable
from tasks.store.location import Location
from tasks.store.results import Store, StoredResult, cache_key
from tasks.store.retention import abandoned_before, chosen, inventory, protected_from, remove
from tests.support.running import STAGES, CommandLine, kill_group, post, snapshot
from tests.support.running_s3 import S3

KEY = "0f" * 32
LOST = "ba9876543210"
PRUNE_SECONDS = 0.1
READERS, ROUNDS, RACE_KEYS = 3, 40, 4
SETTLED = timedelta(seconds=0.1)
"""The clock of local files ticks every few milliseconds; who uses an entry within a tick of its listing goes unseen."""
EVER = datetime(9999, 1, 1, tzinfo=UTC)


class Number(StoredResult):
    """A result with a value of its own."""

    value: int


@pytest.fixture(scope="module")
def ball(capture: Callable[[str], Path]) -> Path:
    return capture("ball")


def make_old(store: Path, hours: float) -> None:
    """As if nobody had used anything of the store for so long."""
    then = time.time() - hours * 3600
    for path in (store, *store.rglob("*")):
        os.utime(path, (then, then))


def entries(store: Path) -> list[str]:
    return sorted(path.parent.parent.name for path in store.glob("*/*/manifest.json"))


def expected_rows(stats: dict[str, Any]) -> list[str]:
    """The table of prune where all goes, spaces apart: stages, counts and sizes."""
    rows = [(row["stage"], row["entries"], row["bytes"]) for row in stats["stages"]]
    rows += [("leftovers", 0, 0), ("total", len(STAGES), stats["bytes"])]
    return ["│" + "│".join((stage, str(count), _size(size).replace(" ", ""))) + "│" for stage, count, size in rows]


def test_a_published_asset_needs_nothing_of_the_store(ball: Path, command_line: CommandLine) -> None:
    first = command_line.reconstruct(ball)
    assert first.code == 0, first.stderr
    store = command_line.store
    (asset,) = [marker.parent for marker in command_line.output.glob("ball/*/_SUCCESS")]
    published = snapshot(asset)

    fresh = command_line.run("store", "prune", "--older-than", "0m", "--max-size", "0B")
    assert fresh.code == 0, fresh.stderr
    assert "above 0B: the rest is in use" in fresh.stdout
    assert entries(store) == sorted(STAGES)

    make_old(store, hours=40 * 24)
    stats = json.loads(command_line.run("store", "stats", "--json").stdout)
    files = [path for path in store.rglob("*") if path.is_file()]
    assert [(row["stage"], row["entries"]) for row in stats["stages"]] == [(stage, 1) for stage in sorted(STAGES)]
    assert stats["bytes"] == sum(row["bytes"] for row in stats["stages"]) == sum(path.stat().st_size for path in files)
    assert stats["leftovers"] == {"entries": 0, "bytes": 0}
    (age,) = {datetime.now(UTC) - datetime.fromisoformat(row["oldest"]) for row in stats["stages"][:1]}
    assert timedelta(days=40) < age < timedelta(days=40, minutes=10)

    before = snapshot(store)
    shown = command_line.run("store", "prune", "--dry-run", "--older-than", "30d")
    assert shown.code == 0, shown.stderr
    assert snapshot(store) == before
    pruned = command_line.run("store", "prune", "--older-than", "30d")
    assert pruned.code == 0, pruned.stderr
    rows = [[line for line in text.splitlines() if line.startswith("│")] for text in (shown.stdout, pruned.stdout)]
    assert [[line.replace(" ", "") for line in table] for table in rows] == [expected_rows(stats)] * 2
    assert [path for path in store.rglob("*") if path.is_file()] == []
    assert snapshot(asset) == published

    again = command_line.reconstruct(ball)
    assert again.code == 0, again.stderr
    assert again.ran == list(STAGES)
    assert again.report.outputs == first.report.outputs
    assert snapshot(asset) == published


def begin(server: str, flow: str, name: str) -> str:
    """A run that the server takes for running; gives its id."""
    flow_id = post(server, "/flows/", name=flow)["id"]
    run = post(server, "/flow_runs/", name=name, flow_id=flow_id, state={"type": "PENDING"})["id"]
    post(server, f"/flow_runs/{run}/set_state", state={"type": "RUNNING"}, force=True)
    return run


def end(server: str, *runs: str) -> None:
    for run in runs:
        post(server, f"/flow_runs/{run}/set_state", state={"type": "COMPLETED"}, force=True)


def test_the_oldest_running_run_is_asked_for(command_line: CommandLine, prefect_server: str) -> None:
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PAUSED", "CANCELLING"]}}}}
    end(prefect_server, *(run["id"] for run in post(prefect_server, "/flow_runs/filter", **running)))
    runs = [begin(prefect_server, "another-flow", "not-ours")]
    told: list[str | None] = []

    def ask() -> None:
        with temporary_settings(updates={PREFECT_API_URL: prefect_server}):
            run = _oldest_running()
        told.append(run and run.name)

    try:
        for name in ("first", "second"):
            ask()
            runs.append(begin(prefect_server, "reconstruct", name))
        ask()
        end(prefect_server, runs[1])
        ask()
        shown = command_line.run("store", "prune")
    finally:
        end(prefect_server, *runs)
    assert told == [None, "first", "first", "second"]
    assert "since the start of run second, which still runs" in shown.stdout, shown.stderr


def test_without_the_server_nothing_goes(tmp_path: Path) -> None:
    line = CommandLine(tmp_path, "http://127.0.0.1:9/api")
    finished = line.run("store", "prune", "--older-than", "1h")
    assert finished.code == 1
    assert "http://127.0.0.1:9/api" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--older-than", "soon"), ("--max-size", "50"), ("now",)],
)
def test_nonsense_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    finished = CommandLine(tmp_path).run("store", "prune", *arguments)
    assert finished.code == 2
    assert arguments[-1] in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.faults
def test_a_run_ends_well_while_prune_is_at_work(ball: Path, command_line: CommandLine) -> None:
    first = command_line.reconstruct(ball)
    assert first.code == 0, first.stderr
    make_old(command_line.store, hours=2)
    second = command_line.start(*command_line.reconstruct_arguments(ball, export__texture_px="512"))
    root, gone = Location.of(command_line.store), []
    try:
        while second.poll() is None:
            now = datetime.now(UTC)
            found = inventory(root, abandoned_before(now, None)).entries
            gone += remove(root, chosen(found, now, protected_from(now, None), None, 0))
            time.sleep(PRUNE_SECONDS)
        stdout, stderr = second.communicate()
    finally:
        kill_group(second)
    assert second.returncode == 0, stderr
    assert len(gone) >= len(STAGES) // 2
    assert json.loads(stdout)["status"] == "normal"
    # what the run made is there, and of the rest nothing
    assert entries(command_line.store) == sorted(STAGES)


@pytest.fixture
def keys_of_worker(worker_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has the worker's keys, and each use of an entry is written."""
    monkeypatch.setattr(tasks.store.results, "TOUCH_AFTER", timedelta(0))


def made(store: Store, key: str, value: int = 1) -> Number:
    with store.working_folder("infer", key) as folder:
        (folder / "number.txt").write_text(str(value))
        return store.commit("infer", key, folder, Number(value=value))


def test_on_s3_only_what_is_not_used_goes(s3: S3, keys_of_worker: None) -> None:
    prefix = "store/prune"
    store = Store(Location.of(f"s3://{prefix}"))
    used, unused = made(store, KEY), made(store, "1e" * 32)
    s3.admin.pipe_file(f"{prefix}/_records/{unused.key}", b"{}")
    theirs = {
        "assets/mug/latest.json": b"{}",
        f"captures/{KEY}/manifest.json": b'{"files": []}',
        "_ledger/claims/mug": b"",
    }
    for path, data in theirs.items():
        s3.admin.pipe_file(f"{prefix}/{path}", data)
    found = inventory(store.root, EVER)
    assert [item.path for item in found.leftovers] == [f"_records/{unused.key}"]
    assert remove(store.root, list(found.leftovers)) == list(found.leftovers)
    assert store.load("infer", KEY, Number) == used
    assert [item.path for item in remove(store.root, list(found.entries))] == [f"infer/{unused.key}"]
    assert store.load("infer", unused.key, Number) is None
    assert store.read(used, "number.txt") == b"1"
    left = [f"infer/{KEY}/{used.attempt}/number.txt", f"infer/{KEY}/manifest.json"]
    assert sorted(s3.keys(prefix)) == sorted([*left, *theirs])
    assert remove(store.root, list(found.entries)) == []
    assert made(store, unused.key, 2).value == 2


def test_on_s3_leftovers_go_once_they_are_old(s3: S3, keys_of_worker: None) -> None:
    prefix = "store/leftovers"
    store = Store(Location.of(f"s3://{prefix}"))
    whole = made(store, KEY)
    killed, other = "1e" * 32, "2d" * 32
    for path in (f"infer/{KEY}/{LOST}/a", f"infer/{other}/{LOST}/a", f"infer/{killed}/{LOST}/a", f"_records/{other}"):
        s3.admin.pipe_file(f"{prefix}/{path}", b"lost")
    s3.admin.pipe_file(f"{prefix}/infer/{killed}/manifest.json", b"")  # a prune was killed
    assert store.load("infer", killed, Number) is None
    new = inventory(store.root, datetime.now(UTC) - timedelta(days=1)).leftovers
    assert [item.path for item in new] == [f"_records/{other}"]
    found = inventory(store.root, EVER)
    assert sum(item.bytes for item in found.leftovers) == 4 * len(b"lost")
    assert remove(store.root, list(found.leftovers)) == list(found.leftovers)
    assert sorted(s3.keys(prefix)) == [f"infer/{KEY}/{whole.attempt}/number.txt", f"infer/{KEY}/manifest.json"]
    assert store.load("infer", KEY, Number) == whole


@pytest.mark.parametrize("where", ["local", "s3"])
def test_using_and_removing_exclude_each_other(where: str, s3: S3, keys_of_worker: None, tmp_path: Path) -> None:
    """Prune removes what nobody uses at the moment, again and again: no run may miss a file of what it has."""
    store = Store(Location.of(tmp_path / "race" if where == "local" else "s3://store/race-of-prune"))
    keys = [cache_key("infer", "1", number) for number in range(RACE_KEYS)]
    in_use, lock, ended = Counter[str](), threading.Lock(), threading.Event()

    @contextmanager
    def using(key: str) -> Iterator[None]:
        with lock:
            in_use[key] += 1
        try:
            yield
        finally:
            with lock:
                in_use[key] -= 1

    def loaded(key: str) -> Number | None:
        while True:
            try:
                return store.load("infer", key, Number)
            except StorageUnavailable as error:
                if "keep changing it" not in str(error):  # other uses, which here are never spared
                    raise

    def run(seed: int) -> Counter[str]:
        chance, told = random.Random(seed), Counter[str]()
        for _ in range(ROUNDS):
            key = chance.choice(keys)
            with using(key):
                found = loaded(key)
                told["hits" if found else "misses"] += 1
                result = found or made(store, key, seed)
                time.sleep(chance.uniform(0, 0.02))
                assert store.read(result, "number.txt") == str(result.value).encode()
            time.sleep(chance.uniform(0, 0.1))
        return told

    def prune() -> int:
        gone, chance = 0, random.Random(READERS)
        while not ended.is_set():
            settled = datetime.now(UTC) - SETTLED
            found = inventory(store.root, settled - timedelta(days=1)).entries
            with lock:
                idle = [item for item in found if not in_use[item.path.rpartition("/")[2]] and item.used < settled]
            time.sleep(chance.uniform(0, 0.1))  # others use what was listed
            gone += len(remove(store.root, chance.sample(idle, min(len(idle), 1))))
        return gone

    with ThreadPoolExecutor(READERS + 1) as pool:
        runs, pruning = [pool.submit(run, seed) for seed in range(READERS)], pool.submit(prune)
        try:
            told = sum((each.result() for each in runs), Counter[str]())
        finally:
            ended.set()
        assert pruning.result() > 0
    assert told["hits"] > 0 and told["misses"] > RACE_KEYS
    for item in inventory(store.root, EVER).entries:
        assert store.load("infer", item.path.rpartition("/")[2], Number) is not None
