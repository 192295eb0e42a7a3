"""What the store holds, and what of it may go.

A published asset needs nothing of the store: its files are copies. What is removed costs time, and only where it is
asked for again. A running flow needs the entries that it has made or found: none goes that was used within `IN_USE`, or
after a run began that still runs. Using and removing an entry exclude each other (locally by the lock on the stage's
folder, on S3 by conditional writes of the manifest): who asks for it finds it whole and keeps it, or makes it again.

Only what is plainly the store's is touched: `<stage>/<key>` whose manifest says so, and Prefect's record of it. It
may share its folder or prefix with captures and assets.
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
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tasks.errors import InputError, StorageError, storage_errors
from tasks.store.local_files import locked
from tasks.store.location import Location

IN_USE = timedelta(hours=1)
"""After its use an entry may still be read by the run: far longer than a run waits between two stages."""
ABANDONED_AFTER = timedelta(days=1)
"""What no manifest names may be a stage at work until it has not changed for so long."""

RECORDS, MANIFEST = "_records", "manifest.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_WORKING = re.compile(rf"\.{_KEY.pattern}\..+\.tmp")
_ASIDE = re.compile(rf"\.{_KEY.pattern}\.(broken|pruned)-[0-9a-f]+")
_AGE = re.compile(r"(\d{1,5})([mhd])", re.ASCII)
_SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)(?:([kKMGT])(i?))?B", re.ASCII)
_PARALLEL_REMOVALS = 8


@dataclass(frozen=True)
class StoredFile:
    """A file of the store, or a local folder (of no bytes). version: changes when it is written or touched."""

    path: str
    bytes: int
    written: datetime
    version: str


@dataclass(frozen=True)
class Item:
    """What goes as one: an entry (which has the version of its manifest) with its record, or a leftover.

    used: an entry's last use, a leftover's last change.
    """

    stage: str
    path: str
    used: datetime
    bytes: int
    files: tuple[str, ...]
    version: str | None = None


@dataclass(frozen=True)
class Inventory:
    """The entries, which runs may use, and the leftovers of killed runs, which none does."""

    entries: tuple[Item, ...]
    leftovers: tuple[Item, ...]


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
    """Entries used from this time on stay. running_since: when the oldest run began that still runs."""
    return min(now, running_since or now) - IN_USE


def abandoned_before(now: datetime, running_since: datetime | None) -> datetime:
    """What no manifest names was abandoned if it was last changed before this time."""
    return min(protected_from(now, running_since), now - ABANDONED_AFTER)


def inventory(root: Location, abandoned_before: datetime) -> Inventory:
    """What the store holds; what no manifest names and was changed since then is none of both: a stage's work."""
    if root.local:
        return sorted_out(_local_files(root), abandoned_before, None)
    return sorted_out(_remote_files(root), abandoned_before, lambda entry: _named_attempt(root / entry))


def sorted_out(
    files: Iterable[StoredFile], abandoned_before: datetime, winner: Callable[[str], str | None] | None
) -> Inventory:
    """Entries and leftovers among the files. winner: on S3, the attempt that an entry's manifest names."""
    records: dict[str, StoredFile] = {}
    folders: dict[tuple[str, str], list[StoredFile]] = defaultdict(list)
    for file in files:
        stage, _, below = file.path.partition("/")
        if stage == RECORDS and _KEY.fullmatch(below):
            records[below] = file
        elif below and not stage.startswith(("_", ".")):
            folders[stage, below.partition("/")[0]].append(file)
    entries, leftovers = [], []
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
                kept = [*kept, record] if (record := records.pop(name, None)) else kept
                entries.append(_item(stage, path, kept, manifest))
    leftovers += [_item(RECORDS, file.path, [file]) for file in records.values()]
    abandoned = (item for item in leftovers if item.used < abandoned_before or _is_aside(item))
    return Inventory(tuple(entries), tuple(abandoned))


def chosen(
    entries: Iterable[Item], now: datetime, protected: datetime, older_than: timedelta | None, max_bytes: int | None
) -> list[Item]:
    """The entries to remove: what was used longer ago than `older_than`, then the oldest use until the rest fits."""
    by_use = sorted(entries, key=lambda item: item.used)
    left = sum(item.bytes for item in by_use)
    chosen = []
    for item in by_use:
        too_old = older_than is not None and item.used < now - older_than
        too_much = max_bytes is not None and left > max_bytes
        if item.used >= protected or not (too_old or too_much):
            break  # so is what was used later
        chosen.append(item)
        left -= item.bytes
    return chosen


def remove(root: Location, items: list[Item]) -> list[Item]:
    """Remove them, and give those that are gone: what a run has used meanwhile stays."""
    if any(item.version == "" for item in items):
        raise InputError(f"{root.url}: a storage without conditional writes cannot be pruned safely; use its own rules")
    removed = _remove_local if root.local else _remove_remote
    with ThreadPoolExecutor(_PARALLEL_REMOVALS) as pool:
        gone = pool.map(lambda item: removed(root, item), items)
        return [item for item, is_gone in zip(items, gone, strict=True) if is_gone]


def _item(stage: str, path: str, files: list[StoredFile], manifest: StoredFile | None = None) -> Item:
    used = manifest.written if manifest else max(file.written for file in files)
    # a manifest goes last: without it nothing would tell that the rest belongs to nobody
    paths = sorted((file.path for file in files), key=lambda path: path.endswith(f"/{MANIFEST}"))
    total = sum(file.bytes for file in files)
    return Item(stage, path, used, total, tuple(paths), manifest.version if manifest else None)


def _is_aside(item: Item) -> bool:
    return _ASIDE.fullmatch(item.path.rpartition("/")[2]) is not None


def _by_winner(
    path: str, content: list[StoredFile], manifest: StoredFile | None, winner: Callable[[str], str | None]
) -> tuple[list[StoredFile], list[StoredFile]]:
    """An entry's files on S3, and those of attempts that no manifest names; a manifest without content is removed."""
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
    """Files and folders below, depth first; what goes away meanwhile is left out."""
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
    """The manifest of `<stage>/<key>`; empty where that is not an entry of the store."""
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
    """Rename aside, then remove: a kill leaves the entry, or what the next one recognizes."""
    if item.stage == RECORDS:
        (root / item.path).delete()
        return True
    folder = Path(root.path) / item.path
    with storage_errors(str(folder)):
        if item.version is not None:
            aside = folder.with_name(f".{folder.name}.pruned-{uuid.uuid4().hex[:8]}")
            if not _manifest(root / item.path) or not _moved_aside(folder, aside, item.version):
                return False
            folder = aside
        shutil.rmtree(folder, ignore_errors=True)  # another prune may be at it as well
        if folder.exists():
            raise StorageError(f"{folder}: cannot be removed; check its permissions")
    for record in (path for path in item.files if path.startswith(f"{RECORDS}/")):
        (root / record).delete()
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
    """Empty the manifest, which fails where it was used or replaced since it was listed, then delete the files."""
    if item.version is not None:
        manifest = root / item.path / MANIFEST
        if not _manifest(root / item.path) or not manifest.write_if(item.version, b""):
            return False
    for path in item.files:
        (root / path).delete()
    return True
