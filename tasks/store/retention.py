"""Inventory of the store, and the choice of entries that may be removed.

A published asset needs nothing of the store: its files are copies. To remove an entry costs only the time to make it
again, if it is asked for again. A running flow needs the entries that it has made or found. Therefore no entry is
removed that was used within `IN_USE`, or after the oldest run began that still runs. An entry is not used and removed
at once (locally by the lock on the stage's folder, on S3 by conditional writes of the manifest): a run that asks for it
finds it whole and keeps it, or makes it again.

Only what is plainly the store's is touched: `<stage>/<key>` whose manifest says so, and `_records/<key>`, which earlier
versions wrote. The store may share its folder or prefix with captures and assets. Called by `store stats` and
`store prune` of the command line.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tasks.errors import InputError, StorageError, storage_errors
from tasks.store.local_files import locked
from tasks.store.location import Location

IN_USE = timedelta(hours=1)
"""A run may read an entry for this long after its last use: far longer than a run waits between two stages."""
ABANDONED_AFTER = timedelta(days=1)
"""Files that no manifest names may belong to a stage at work until they have not changed for this long."""

MANIFEST = "manifest.json"
RECORDS = "_records"
"""Folder of Prefect's records of results, which earlier versions kept: nobody reads them any more."""
_KEY = re.compile(r"[0-9a-f]{64}")
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_WORKING = re.compile(rf"\.{_KEY.pattern}\..+\.tmp")
_ASIDE = re.compile(rf"\.{_KEY.pattern}\.(broken|pruned)-[0-9a-f]+")
_AGE = re.compile(r"(\d{1,5})([mhd])", re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)(?:([kKMGT])(i?))?B", re.ASCII)
_PARALLEL_REMOVALS = 8


@dataclass(frozen=True)
class StoredFile:
    """A file of the store, or a local folder."""

    path: str
    """Relative to the store's root."""
    bytes: int
    """Size; 0 for a folder."""
    written: datetime
    """Time of the last change, UTC."""
    version: str
    """Changes when the file is written or touched; empty for a storage without versions."""


@dataclass(frozen=True)
class Item:
    """Files that are removed together: an entry, or a leftover."""

    stage: str
    """Name of the stage, or `_records`."""
    path: str
    """Of the entry's folder or the leftover, relative to the store's root."""
    used: datetime
    """An entry's last use, a leftover's last change, UTC."""
    bytes: int
    """Size of all files."""
    files: tuple[str, ...]
    """Paths of the files, relative to the store's root; a manifest is the last."""
    version: str | None = None
    """Version of an entry's manifest; None for a leftover."""


@dataclass(frozen=True)
class Inventory:
    """Entries of the store."""

    entries: tuple[Item, ...]
    """Results that runs may use."""
    leftovers: tuple[Item, ...]
    """Files that no run uses: left by killed runs, and records of earlier versions."""


def age(text: str) -> timedelta:
    """`90m`, `12h` or `30d`; raises InputError for anything else."""
    if (found := _AGE.fullmatch(text)) is None:
        raise InputError(f"{text}: not an age; write it like 90m, 12h or 30d")
    return int(found[1]) * {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[found[2]]


def size(text: str) -> int:
    """`500MB` or `50GiB` in bytes; raises InputError for anything else."""
    if (found := _SIZE.fullmatch(text)) is None:
        raise InputError(f"{text}: not a size; write it like 500MB or 50GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))


def protected_from(now: datetime, running_since: datetime | None) -> datetime:
    """Entries used at or after this time are kept. running_since: begin of the oldest run that still runs."""
    return min(now, running_since or now) - IN_USE


def abandoned_before(now: datetime, running_since: datetime | None) -> datetime:
    """Files that no manifest names are abandoned if they were last changed before this time."""
    return min(protected_from(now, running_since), now - ABANDONED_AFTER)


def inventory(root: Location, abandoned_before: datetime) -> Inventory:
    """List what the store holds.

    Files that no manifest names and that were changed since `abandoned_before` are left out: a stage may be writing
    them.
    """
    if root.local:
        return sorted_out(_local_files(root), abandoned_before, None)
    return sorted_out(_remote_files(root), abandoned_before, lambda entry: _named_attempt(root / entry))


def sorted_out(
    files: Iterable[StoredFile], abandoned_before: datetime, winner: Callable[[str], str | None] | None
) -> Inventory:
    """Sort the files into entries and leftovers. winner: on S3, gives the attempt that an entry's manifest names."""
    entries, leftovers = list[Item](), list[Item]()
    folders: dict[tuple[str, str], list[StoredFile]] = defaultdict(list)
    for file in files:
        stage, _, below = file.path.partition("/")
        if stage == RECORDS and _KEY.fullmatch(below):
            leftovers.append(_item(RECORDS, file.path, [file]))
        elif below and not stage.startswith(("_", ".")):
            folders[stage, below.partition("/")[0]].append(file)
    for (stage, name), content in folders.items():
        path = f"{stage}/{name}"
        if _WORKING.fullmatch(name) or _ASIDE.fullmatch(name):
            leftovers.append(_item(stage, path, content))
        elif _KEY.fullmatch(name):
            manifest = next((file for file in content if file.path == f"{path}/{MANIFEST}"), None)
            kept = content
            if winner is not None:
                kept, lost = _by_winner(path, content, manifest, winner)
                leftovers += [_item(stage, path, lost)] if lost else []
            if manifest is not None and manifest in kept:
                entries.append(_item(stage, path, kept, manifest))
    abandoned = (item for item in leftovers if item.used < abandoned_before or _is_given_up(item))
    return Inventory(tuple(entries), tuple(abandoned))


def chosen(
    entries: Iterable[Item], now: datetime, protected: datetime, older_than: timedelta | None, max_bytes: int | None
) -> list[Item]:
    """Choose the entries to remove.

    These are the entries last used longer ago than `older_than`, then those with the oldest use, until the rest has at
    most `max_bytes`. Entries used at or after `protected` are kept.
    """
    by_use = sorted(entries, key=lambda item: item.used)
    left = sum(item.bytes for item in by_use)
    chosen = []
    for item in by_use:
        too_old = older_than is not None and item.used < now - older_than
        too_much = max_bytes is not None and left > max_bytes
        if item.used >= protected or not (too_old or too_much):
            break  # the entries used later are kept for the same reason
        chosen.append(item)
        left -= item.bytes
    return chosen


def remove(root: Location, items: list[Item]) -> list[Item]:
    """Remove the items and give those that are gone; an entry that a run has used meanwhile is kept.

    Raises InputError for a storage that cannot write conditionally.
    """
    if any(item.version == "" for item in items):
        raise InputError(f"{root.url}: a storage without conditional writes cannot be pruned safely; use its own rules")
    removed = _remove_local if root.local else _remove_remote
    with ThreadPoolExecutor(_PARALLEL_REMOVALS) as pool:
        gone = pool.map(lambda item: removed(root, item), items)
        return [item for item, is_gone in zip(items, gone, strict=True) if is_gone]


def _item(stage: str, path: str, files: list[StoredFile], manifest: StoredFile | None = None) -> Item:
    used = manifest.written if manifest else max(file.written for file in files)
    # the manifest goes last: without it nothing would show that the other files belong to an entry
    paths = sorted((file.path for file in files), key=lambda path: path.endswith(f"/{MANIFEST}"))
    total = sum(file.bytes for file in files)
    return Item(stage, path, used, total, tuple(paths), manifest.version if manifest else None)


def _is_given_up(item: Item) -> bool:
    """True if no stage can be at work on it, however new it is."""
    return item.stage == RECORDS or _ASIDE.fullmatch(item.path.rpartition("/")[2]) is not None


def _by_winner(
    path: str, content: list[StoredFile], manifest: StoredFile | None, winner: Callable[[str], str | None]
) -> tuple[list[StoredFile], list[StoredFile]]:
    """An entry's files on S3, and the files of attempts that no manifest names.

    An empty manifest means that a removal was interrupted: all files are left over.
    """
    attempts: dict[str, list[StoredFile]] = defaultdict(list)
    for file in content:
        attempt, slash, _ = file.path.removeprefix(f"{path}/").partition("/")
        if slash and _ATTEMPT.fullmatch(attempt):
            attempts[attempt].append(file)
    if manifest is None or not manifest.bytes:
        return [], [file for files in attempts.values() for file in files] + ([manifest] if manifest else [])
    named = winner(path) if len(attempts) > 1 else next(iter(attempts), None)
    if named is None:
        return content, []
    kept = attempts.pop(named, [])
    return [*kept, manifest], [file for files in attempts.values() for file in files]


def _local_files(root: Location) -> Iterator[StoredFile]:
    """Files and folders below, depth first, without those that are removed meanwhile."""
    with storage_errors(root.path):
        yield from _walk(Path(root.path), "")


def _walk(folder: Path, prefix: str) -> Iterator[StoredFile]:
    try:
        found = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in found:
        try:
            stat = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        path, is_folder = prefix + entry.name, entry.is_dir(follow_symlinks=False)
        written = datetime.fromtimestamp(stat.st_mtime, UTC)
        yield StoredFile(path, 0 if is_folder else stat.st_size, written, str(stat.st_mtime_ns))
        if is_folder:
            yield from _walk(Path(entry.path), f"{path}/")


def _remote_files(root: Location) -> Iterator[StoredFile]:
    for path, info in root.listing().items():
        written = info.get("LastModified") or datetime.now(UTC)
        yield StoredFile(path, int(info["size"] or 0), written, str(info.get("ETag", "")))


def _manifest(entry: Location) -> dict[str, object]:
    """The manifest of `<stage>/<key>`; empty if that is not an entry of the store."""
    stage, key = entry.path.rsplit("/", 2)[1:]
    try:
        content = json.loads((entry / MANIFEST).read_or_none() or b"{}")
        result = content["result"]
        return content if (result["stage"], result["key"]) == (stage, key) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _named_attempt(entry: Location) -> str | None:
    return str(_manifest(entry).get("attempt", "")) or None


def _remove_local(root: Location, item: Item) -> bool:
    """Rename aside, then remove: if it is killed, the entry is whole, or the next prune recognizes what is left."""
    folder = Path(root.path) / item.path
    if item.stage == RECORDS:
        (root / item.path).delete()
        with suppress(OSError):  # not empty yet, or gone already
            folder.parent.rmdir()
        return True
    with storage_errors(str(folder)):
        if item.version is not None:
            aside = folder.with_name(f".{folder.name}.pruned-{uuid.uuid4().hex[:8]}")
            if not _manifest(root / item.path) or not _moved_aside(folder, aside, item.version):
                return False
            folder = aside
        shutil.rmtree(folder, ignore_errors=True)  # another prune may remove it at the same time
        if folder.exists():
            raise StorageError(f"{folder}: cannot be removed; check its permissions")
    return True


def _moved_aside(folder: Path, aside: Path, version: str) -> bool:
    """Rename an entry unless it was used or replaced since it was listed."""
    try:
        with locked(folder.parent):
            if str((folder / MANIFEST).stat().st_mtime_ns) != version:
                return False
            os.rename(folder, aside)
    except FileNotFoundError:
        return False
    return True


def _remove_remote(root: Location, item: Item) -> bool:
    """Empty the manifest, which fails if it was used or replaced since it was listed, then delete the files."""
    if item.version is not None:
        manifest = root / item.path / MANIFEST
        if not _manifest(root / item.path) or not manifest.write_if(item.version, b""):
            return False
    for path in item.files:
        (root / path).delete()
    return True
