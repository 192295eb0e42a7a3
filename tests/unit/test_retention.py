"""What of the store may go: by age, by size, never what is in use, and never what is not the store's."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import InputError, StorageUnavailable
from tasks.store.location import Location
from tasks.store.results import Store, StoredResult, cache_key
from tasks.store.retention import (
    IN_USE,
    Inventory,
    Item,
    StoredFile,
    abandoned_before,
    age,
    chosen,
    inventory,
    protected_from,
    remove,
    size,
    sorted_out,
)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
OLD = NOW - 40 * DAY
KEY, OTHER = "0f" * 32, "1e" * 32
WINNER, LOSER = "0123456789ab", "ba9876543210"


class Number(StoredResult):
    """A result with a value of its own."""

    value: int


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Location.of(tmp_path / "store"))


def put(store: Store, key: str = KEY) -> Number:
    with store.working_folder("infer", key) as folder:
        (folder / "number.txt").write_text("1")
        return store.commit("infer", key, folder, Number(value=1))


def make_old(folder: Path, by: timedelta = 40 * DAY) -> None:
    """As if nobody had touched anything below for so long."""
    then = (datetime.now(UTC) - by).timestamp()
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (then, then))


def held(store: Store) -> Inventory:
    return inventory(store.root, abandoned_before(datetime.now(UTC), None))


@pytest.mark.parametrize(("text", "expected"), [("90m", 1.5 * HOUR), ("12h", 12 * HOUR), ("30d", 30 * DAY)])
def test_age(text: str, expected: timedelta) -> None:
    assert age(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0B", 0), ("500MB", 500_000_000), ("1.5kB", 1500), ("50GiB", 50 * 2**30), ("2TB", 2 * 10**12)],
)
def test_size(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5h", "30 d", "30days", "1e3d", "999999d", "३d", "30d\n"])
def test_nonsense_age_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="30d"):
        age(text)


@pytest.mark.parametrize("text", ["", "50", "GiB", "-1GB", "50 GB", "50gib", "5iB", "lots", "1.GB", "5GB\n"])
def test_nonsense_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="50GiB"):
        size(text)


def item(number: int, used: datetime, size: int = 10) -> Item:
    return Item("infer", f"infer/{number}", used, size, (), "1")


def numbers(items: list[Item]) -> list[int]:
    return [int(each.path.rpartition("/")[2]) for each in items]


ENTRIES = [item(1, NOW - 3 * DAY), item(2, NOW - 9 * DAY), item(3, NOW - HOUR / 2), item(4, NOW - 5 * DAY)]


@pytest.mark.parametrize(
    ("older_than", "max_bytes", "expected"),
    [
        (None, None, []),
        (4 * DAY, None, [2, 4]),
        (30 * DAY, None, []),
        (None, 40, []),
        (None, 39, [2]),
        (None, 20, [2, 4]),
        (None, 0, [2, 4, 1]),  # the other one is in use
        (timedelta(0), None, [2, 4, 1]),
        (8 * DAY, 20, [2, 4]),
        (4 * DAY, 35, [2, 4]),
    ],
)
def test_old_ones_go_and_then_the_oldest_use(
    older_than: timedelta | None, max_bytes: int | None, expected: list[int]
) -> None:
    assert numbers(chosen(ENTRIES, NOW, protected_from(NOW, None), older_than, max_bytes)) == expected


def test_what_a_running_run_may_have_used_stays() -> None:
    for begun, expected in ((NOW - 10 * DAY, []), (NOW - 4 * DAY, [2, 4]), (NOW + DAY, [2, 4, 1])):
        assert numbers(chosen(ENTRIES, NOW, protected_from(NOW, begun), timedelta(0), 0)) == expected


@given(
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9)), max_size=30),
    st.none() | st.integers(0, 500),
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 500),
)
def test_no_more_goes_than_was_asked_for(
    uses: list[tuple[int, int]], hours: int | None, max_bytes: int | None, running: int | None
) -> None:
    entries = [item(number, NOW - ago * HOUR, size) for number, (ago, size) in enumerate(uses)]
    begun = None if running is None else NOW - running * HOUR
    protected = protected_from(NOW, begun)
    older_than = None if hours is None else hours * HOUR
    gone = chosen(entries, NOW, protected, older_than, max_bytes)
    stay = [each for each in entries if each not in gone]
    assert all(each.used < NOW - IN_USE and (begun is None or each.used < begun) for each in gone)
    assert all(first.used <= second.used for first in gone for second in stay)
    for each in stay:
        assert each.used >= protected or older_than is None or each.used >= NOW - older_than
    if max_bytes is not None and any(each.used < protected for each in stay):
        assert sum(each.bytes for each in stay) <= max_bytes
    last = gone[-1] if gone else None
    if last is not None and (older_than is None or last.used >= NOW - older_than):
        assert max_bytes is not None and sum(each.bytes for each in stay) + last.bytes > max_bytes


def file(path: str, written: datetime = OLD, size: int = 5) -> StoredFile:
    return StoredFile(path, size, written, f"version of {path}")


def on_s3(*files: StoredFile) -> Inventory:
    return sorted_out(files, NOW - DAY, lambda entry: WINNER)


def test_an_entry_has_its_files() -> None:
    found = on_s3(
        file(f"infer/{KEY}/{WINNER}/a/b.txt", NOW),
        file(f"infer/{KEY}/manifest.json", OLD),
    )
    (entry,) = found.entries
    assert (entry.stage, entry.used, entry.bytes) == ("infer", OLD, 10)
    assert entry.version == f"version of infer/{KEY}/manifest.json"
    # the manifest last, since it tells whose the rest is
    assert entry.files == (f"infer/{KEY}/{WINNER}/a/b.txt", f"infer/{KEY}/manifest.json")
    assert found.leftovers == ()


def test_records_of_earlier_versions_are_leftovers_however_new() -> None:
    found = on_s3(
        file(f"_records/{KEY}", NOW),
        file(f"_records/{OTHER}", OLD),
        file(f"infer/{KEY}/{WINNER}/a/b.txt", NOW),
        file(f"infer/{KEY}/manifest.json", NOW),
    )
    assert [each.files for each in found.leftovers] == [(f"_records/{KEY}",), (f"_records/{OTHER}",)]
    assert [entry.path for entry in found.entries] == [f"infer/{KEY}"]


def test_attempts_that_no_manifest_names_are_leftovers() -> None:
    found = on_s3(
        file(f"infer/{KEY}/{LOSER}/mesh.glb"),
        file(f"infer/{KEY}/{WINNER}/mesh.glb"),
        file(f"infer/{KEY}/manifest.json"),
        file(f"infer/{OTHER}/{LOSER}/mesh.glb"),
        file(f"export_glb/{KEY}/{LOSER}/mesh.glb", NOW),  # being uploaded
        file(f"validate_mesh/{KEY}/{LOSER}/mesh.glb"),
        file(f"validate_mesh/{KEY}/manifest.json", OLD, size=0),  # prune was killed
    )
    assert [entry.files for entry in found.entries] == [
        (f"infer/{KEY}/{WINNER}/mesh.glb", f"infer/{KEY}/manifest.json")
    ]
    assert [each.files for each in found.leftovers] == [
        (f"infer/{KEY}/{LOSER}/mesh.glb",),
        (f"infer/{OTHER}/{LOSER}/mesh.glb",),
        (f"validate_mesh/{KEY}/{LOSER}/mesh.glb", f"validate_mesh/{KEY}/manifest.json"),
    ]


def test_attempts_below_a_manifest_that_cannot_be_read_stay() -> None:
    files = [file(f"infer/{KEY}/{each}/mesh.glb") for each in (WINNER, LOSER)]
    found = sorted_out([*files, file(f"infer/{KEY}/manifest.json")], NOW, lambda entry: None)
    assert found.leftovers == ()


def test_what_is_not_the_stores_is_not_seen() -> None:
    """Assets, captures, the ledger; even where a capture's name looks like a key."""
    found = on_s3(
        file("assets/mug/latest.json"),
        file("assets/mug/0123456789abcdef/manifest.json"),
        file(f"assets/{KEY}/latest.json"),
        file(f"assets/{KEY}/0123456789abcdef/manifest.json"),
        file(f"_ledger/claims/{KEY}"),
        file(f"_ledger/{KEY}"),
        file("_records/0a1b"),
        file(f".hidden/{KEY}/manifest.json"),
        file("README.md"),
        file(KEY),
    )
    assert found == Inventory((), ())


def test_leftovers_of_killed_runs_are_found(store: Store) -> None:
    root = Path(store.root.path)
    put(store)
    left = [f".{KEY}.host.1.0123abcd.tmp", f".{OTHER}.host.1.0123abcd.tmp"]
    for name in left:
        (root / "infer" / name / "deep").mkdir(parents=True)
    assert held(store).leftovers == ()  # somebody may be at work
    make_old(root)
    aside = [f".{KEY}.broken-0123abcd", f".{KEY}.pruned-0123abcd"]
    for name in aside:
        (root / "infer" / name).mkdir()  # was given up already: no need to wait
        (root / "infer" / name / "mesh.glb").write_text("mesh")
    found = held(store)
    expected = sorted(f"infer/{name}" for name in (*left, *aside))
    assert sorted(each.path for each in found.leftovers) == expected
    assert [entry.path for entry in found.entries] == [f"infer/{KEY}"]
    remove(store.root, list(found.leftovers))
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == sorted(
        ["infer", *(f"infer/{KEY}{name}" for name in ("", "/manifest.json", "/number.txt"))]
    )


def test_an_entry_goes_alone(store: Store) -> None:
    put(store)
    put(store, OTHER)
    (entry,) = [each for each in held(store).entries if each.path == f"infer/{KEY}"]
    assert remove(store.root, [entry]) == [entry]
    assert store.load("infer", KEY, Number) is None
    assert store.load("infer", OTHER, Number) is not None
    assert [path.name for path in (Path(store.root.path) / "infer").iterdir()] == [OTHER]
    assert remove(store.root, [entry]) == []


def test_records_go_with_their_folder_and_leave_the_entries(store: Store) -> None:
    made = put(store)
    records = Path(store.root.path) / "_records"
    records.mkdir()
    for name in (KEY, OTHER, "of somebody else"):
        (records / name).write_text("{}")
    leftovers = list(held(store).leftovers)
    assert sorted(each.path for each in leftovers) == [f"_records/{KEY}", f"_records/{OTHER}"]
    assert remove(store.root, leftovers) == leftovers
    assert [path.name for path in records.iterdir()] == ["of somebody else"]
    (records / "of somebody else").rename(records / KEY)
    remove(store.root, list(held(store).leftovers))
    assert not records.exists()
    assert store.load("infer", KEY, Number) == made


def test_an_entry_used_since_it_was_listed_stays(store: Store) -> None:
    made = put(store)
    make_old(Path(store.root.path))
    (entry,) = held(store).entries
    assert store.load("infer", KEY, Number) == made
    assert remove(store.root, [entry]) == []
    assert store.read(made, "number.txt") == b"1"
    (entry,) = held(store).entries
    assert datetime.now(UTC) - entry.used < timedelta(minutes=1)


def test_an_adopted_entry_counts_as_used(store: Store) -> None:
    with store.working_folder("infer", KEY) as folder:
        first = put(store)
        make_old(Path(store.root.path) / "infer" / KEY)
        assert store.commit("infer", KEY, folder, Number(value=2)) == first
    (entry,) = held(store).entries
    assert datetime.now(UTC) - entry.used < timedelta(minutes=1)


@pytest.mark.parametrize("content", ['{"files": []}', "{", "[]", '{"result": {"stage": "infer", "key": "other"}}'])
def test_a_manifest_of_somebody_else_stays(content: str, store: Store) -> None:
    capture = Path(store.root.path) / "captures" / KEY
    (capture / "views").mkdir(parents=True)
    (capture / "manifest.json").write_text(content)
    make_old(Path(store.root.path))
    assert remove(store.root, list(held(store).entries)) == []
    assert (capture / "manifest.json").read_text() == content


def test_an_empty_or_missing_store(store: Store) -> None:
    assert held(store) == Inventory((), ())


def test_a_file_that_prune_took_is_worth_another_try(store: Store) -> None:
    """And not the fault of who asked: the next run makes it again."""
    made = put(store)
    remove(store.root, list(held(store).entries))
    with pytest.raises(StorageUnavailable, match=r"number\.txt: .*run again"):
        store.read(made, "number.txt")
    assert put(store) == made


def test_prunes_in_parallel_remove_everything_once(store: Store) -> None:
    keys = [cache_key("infer", "1", number) for number in range(40)]
    for key in keys:
        put(store, key)
    entries = list(held(store).entries)
    with ThreadPoolExecutor(4) as pool:
        gone = [each for found in pool.map(lambda _: remove(store.root, entries), range(4)) for each in found]
    assert sorted(each.path for each in gone) == sorted(f"infer/{key}" for key in keys)
    assert list((Path(store.root.path) / "infer").iterdir()) == []


def test_manifest_says_what_it_is_of(store: Store) -> None:
    """What retention relies on before it removes an entry."""
    put(store)
    manifest = json.loads((Path(store.root.path) / "infer" / KEY / "manifest.json").read_text())
    assert (manifest["result"]["stage"], manifest["result"]["key"]) == ("infer", KEY)
