"""The store: a result counts only while its files are there, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.store.location import Location
from tasks.store.results import Store, StoredResult, cache_key

STAGE, KEY = "export_glb", "0f" * 32
THREADS = 8


class Number(StoredResult):
    """A result with a value of its own."""

    value: int


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Location.of(tmp_path / "store"))


@pytest.fixture
def entry(store: Store) -> Path:
    """The folder of the one entry that these tests make."""
    return Path(store.root.path) / STAGE / KEY


def put(store: Store, value: int = 1, text: str = "one", reusable: bool = True) -> Number:
    """Commit a result with two files."""
    with store.working_folder(STAGE, KEY) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "text.txt").write_text(text)
        (folder / "empty").touch()
        return store.commit(STAGE, KEY, folder, Number(value=value, reusable=reusable))


def loaded(store: Store) -> Number | None:
    return store.load(STAGE, KEY, Number)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_was_committed_is_loaded(store: Store, entry: Path) -> None:
    assert loaded(store) is None
    committed = put(store)
    assert (committed.stage, committed.key, committed.value) == (STAGE, KEY, 1)
    assert [(file.path, file.bytes) for file in committed.outputs] == [("deep/text.txt", 3), ("empty", 0)]
    assert loaded(store) == committed
    assert store.read(committed, "deep/text.txt") == b"one"
    assert names(entry.parent) == [f"{KEY}/{name}" for name in ("deep/text.txt", "empty", "manifest.json")]
    manifest = json.loads((entry / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert [sorted(file) for file in manifest["files"]] == [["bytes", "path", "sha256"]] * 2


def _remove_file(entry: Path) -> None:
    (entry / "deep" / "text.txt").unlink()


def _shorten_file(entry: Path) -> None:
    (entry / "deep" / "text.txt").write_text("on")


def _remove_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def _cut_manifest(entry: Path) -> None:
    data = (entry / "manifest.json").read_bytes()
    (entry / "manifest.json").write_bytes(data[: len(data) // 2])


def _foreign_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('["something else"]')


def _other_result(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    del manifest["result"]["value"]
    (entry / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage", [_remove_file, _shorten_file, _remove_manifest, _cut_manifest, _foreign_manifest, _other_result]
)
def test_broken_entry_is_a_miss_and_is_replaced(damage: Callable[[Path], None], store: Store, entry: Path) -> None:
    put(store)
    damage(entry)
    assert loaded(store) is None
    replaced = put(store, value=2, text="two")
    assert replaced.value == 2
    assert loaded(store) == replaced
    assert store.read(replaced, "deep/text.txt") == b"two"
    assert [path.name for path in entry.parent.iterdir()] == [KEY]


def test_second_commit_adopts_the_first(store: Store, entry: Path) -> None:
    first = put(store)
    second = put(store, value=2, text="two")
    assert second == first
    assert store.read(second, "deep/text.txt") == b"one"
    assert [path.name for path in entry.parent.iterdir()] == [KEY]


def test_racing_commits_agree(store: Store, entry: Path) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda value: put(store, value, str(value)), range(THREADS)))
    (winner,) = set(results)
    assert loaded(store) == winner
    assert store.read(winner, "deep/text.txt") == str(winner.value).encode()
    assert [path.name for path in entry.parent.iterdir()] == [KEY]


def test_failed_work_leaves_nothing(store: Store, entry: Path) -> None:
    def fail() -> None:
        with store.working_folder(STAGE, KEY) as folder:
            (folder / "half").write_text("ha")
            raise RuntimeError("the stage failed")

    with pytest.raises(RuntimeError):
        fail()
    assert list(entry.parent.iterdir()) == []


def working_folder_of(entry: Path, pid: int, host: str) -> Path:
    folder = entry.parent / f".{entry.name}.{host}.{pid}.0123abcd.tmp"
    folder.mkdir(parents=True)
    (folder / "half").write_text("ha")
    return folder


def test_only_what_dead_processes_left_is_removed(store: Store, entry: Path) -> None:
    host = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned = working_folder_of(entry, ended.pid, host)
    alive = working_folder_of(entry, os.getpid(), host)
    elsewhere = working_folder_of(entry, ended.pid, "another-host.example.org")
    other = working_folder_of(entry.with_name("1e" * 32), ended.pid, host)
    put(store)
    assert not abandoned.exists()
    assert alive.exists() and elsewhere.exists() and other.exists()


def test_altered_file_is_not_read(store: Store, entry: Path) -> None:
    """Of the same size: only the digest tells."""
    committed = put(store)
    (entry / "deep" / "text.txt").write_text("eno")
    assert loaded(store) == committed
    with pytest.raises(InputError, match=r"deep/text\.txt"):
        store.read(committed, "deep/text.txt")


def test_result_that_is_not_reusable_is_no_hit(store: Store) -> None:
    made = put(store, reusable=False)
    assert store.read(made, "deep/text.txt") == b"one"
    assert loaded(store) is None
    better = put(store, value=2, text="two")
    assert loaded(store) == better


def test_key_is_made_of_stage_version_and_content() -> None:
    key = cache_key(STAGE, "1", {"a": 1, "b": [Number(value=1)]})
    assert key == cache_key(STAGE, "1", {"b": [Number(value=1)], "a": 1})
    others = [
        cache_key("infer", "1", {"a": 1, "b": [Number(value=1)]}),
        cache_key(STAGE, "2", {"a": 1, "b": [Number(value=1)]}),
        cache_key(STAGE, "1", {"a": 1, "b": [Number(value=2)]}),
        cache_key(STAGE, "1", {"a": "1", "b": [Number(value=1)]}),
    ]
    assert len({key, *others}) == 1 + len(others)
    assert len(key) == 64


def test_a_race_for_the_place_of_a_broken_entry_has_one_winner(store: Store, entry: Path) -> None:
    for _ in range(10):
        put(store)
        (entry / "deep" / "text.txt").unlink()
        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(lambda value: put(store, value), range(THREADS)))
        assert len({result.value for result in results}) == 1
        assert [path.name for path in entry.parent.iterdir()] == [KEY]
        (entry / "manifest.json").unlink()
