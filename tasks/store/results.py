"""The store of stage results: `<store>/<stage>/<key>/`, whole or not at all, with `manifest.json` last.

A result counts only while its files are there with the sizes in its manifest. Local entries appear by one rename.
Object storage has no rename: there the files lie under `<key>/<attempt>/`, and a conditional write of the manifest
names the attempt that won.

A manifest's time is the time of the entry's last use: to load an entry also touches it, and it cannot be removed at the
same time (see tasks/store/retention.py). So an entry that a run has loaded is kept for a while. Called by
tasks/stage.py, and by everything that reads the files of a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.errors import InputError, StorageUnavailable, storage_errors
from tasks.settings import settings
from tasks.store.local_files import locked, take_place, working_folder, write_atomically
from tasks.store.location import FileEntry, Location, entries_of, read_verified


class StoredResult(BaseModel):
    """The typed result of a stage. Its files, if it has any, lie in the store's entry `stage/key`."""

    model_config = ConfigDict(frozen=True)

    stage: str = ""
    """Name of the stage; set when it is stored, like the next three."""
    key: str = ""
    """Key of the entry, 64 hex digits."""
    attempt: str = ""
    """Folder of the files in the entry on object storage; empty in a local store."""
    outputs: tuple[FileEntry, ...] = ()
    """The files."""
    reusable: bool = True
    """False if something failed that may work next time: the result serves this run and is not a cache hit."""


T = TypeVar("T", bound=StoredResult)

_COMMIT_TRIES = 3
TOUCH_AFTER = timedelta(minutes=30)  # on object storage a touch is a write: not one for each hit


def cache_key(stage: str, version: str, content: Any) -> str:
    """Make the key of a result: sha256 over the canonical JSON of everything that determines it."""

    def jsonable(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)

    text = json.dumps([stage, version, content], sort_keys=True, separators=(",", ":"), default=jsonable)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """Results of stages on any fsspec location."""

    root: Location
    """Folder of the store."""

    def load(self, stage: str, key: str, kind: type[T], *, reusable: bool = True) -> T | None:
        """Load a result, which marks it as used now; None if it is not whole.

        A result that is not reusable is loaded only with `reusable=False`.
        """
        touched = self._touch_local(stage, key) if self.root.local else self._touch_remote(stage, key)
        return self._whole(stage, key, kind, reusable) if touched else None

    def _whole(self, stage: str, key: str, kind: type[T], reusable: bool = True) -> T | None:
        entry = self.root / stage / key
        data = (entry / "manifest.json").read_or_none()
        if data is None:
            return None
        try:
            result = kind.model_validate(json.loads(data)["result"])
        except (ValueError, KeyError, TypeError, ValidationError):
            return None
        folder = entry / result.attempt if result.attempt else entry
        if (reusable and not result.reusable) or any(
            (folder / file.path).size() != file.bytes for file in result.outputs
        ):
            return None
        return result

    def working_folder(self, stage: str, key: str) -> AbstractContextManager[Path]:
        """Make an empty local folder for the files of an entry; on the disk of the store if that is local."""
        parent = Path(self.root.path) if self.root.local else settings().scratch / "work"
        return working_folder(parent / stage, key)

    def commit(self, stage: str, key: str, folder: Path, result: T) -> T:
        """Store the files in `folder` and the result as an entry; if there is a whole one already, give its result."""
        attempt = "" if self.root.local else uuid.uuid4().hex[:12]
        outputs = entries_of(folder)
        result = result.model_copy(update={"stage": stage, "key": key, "attempt": attempt, "outputs": outputs})
        manifest = {
            "schema": 1,
            "files": [entry.model_dump() for entry in outputs],
            "attempt": attempt,
            "result": result.model_dump(mode="json"),
        }
        data = json.dumps(manifest, indent=1).encode()
        publish = self._commit_local if self.root.local else self._commit_remote
        return publish(stage, key, folder, data, result)

    def read(self, result: StoredResult, name: str) -> bytes:
        """Read one of a result's files, verified. Raises StorageUnavailable if it was removed from the store."""
        entry = next(entry for entry in result.outputs if entry.path == name)
        folder = self.root / result.stage / result.key
        location = (folder / result.attempt if result.attempt else folder) / name
        try:
            return read_verified(location, entry)
        except (InputError, StorageUnavailable) as error:
            if location.size() is not None:
                raise
            # the input is not at fault: the next run finds no entry and makes it again
            raise StorageUnavailable(
                f"{location.url}: it was removed from the store during the run; run again"
            ) from error

    def _touch_local(self, stage: str, key: str) -> bool:
        """Mark the entry as used now; gives False if there is none."""
        folder = Path(self.root.path) / stage
        try:
            with storage_errors(str(folder / key)), locked(folder):
                os.utime(folder / key / "manifest.json")
        except FileNotFoundError:
            return False
        return True

    def _touch_remote(self, stage: str, key: str) -> bool:
        """The same by a conditional write; it fails if the entry is removed, replaced or touched meanwhile."""
        manifest = self.root / stage / key / "manifest.json"
        for _ in range(_COMMIT_TRIES):
            try:
                info = manifest.info()
                if "ETag" not in info or datetime.now(UTC) - info["LastModified"] < TOUCH_AFTER:
                    return True  # just used; or a storage without conditional writes, which is never pruned
                content = json.loads(manifest.read()) | {"used_at": datetime.now(UTC).isoformat()}
            except FileNotFoundError:
                return False
            except (ValueError, TypeError):
                return False  # not a manifest of the store: broken, and the next commit replaces it
            if manifest.write_if(info["ETag"], json.dumps(content, indent=1).encode()):
                return True
        raise StorageUnavailable(f"{manifest.url}: other runs keep changing it")

    def _commit_local(self, stage: str, key: str, folder: Path, manifest: bytes, result: T) -> T:
        final = Path(self.root.path) / stage / key
        with storage_errors(str(final)):
            write_atomically(folder / "manifest.json", manifest)
            return take_place(folder, final, lambda: self._adopted_local(stage, key, type(result))) or result

    def _adopted_local(self, stage: str, key: str, kind: type[T]) -> T | None:
        """The whole entry that `take_place` found, marked as used now; the stage's folder is locked already."""
        found = self._whole(stage, key, kind)
        if found is not None:
            os.utime(Path(self.root.path) / stage / key / "manifest.json")
        return found

    def _commit_remote(self, stage: str, key: str, folder: Path, manifest: bytes, result: T) -> T:
        entry = self.root / stage / key
        for file in result.outputs:
            (entry / result.attempt / file.path).upload(folder / file.path)
        winner, etag = entry / "manifest.json", None
        for _ in range(_COMMIT_TRIES):
            if winner.write_if(etag, manifest):
                return result
            # read before the entry, so that only a broken entry is replaced
            etag = winner.etag()
            adopted = self.load(stage, key, type(result))
            if adopted is not None:
                if adopted.attempt != result.attempt:  # if equal, our own write won, and only its answer was lost
                    for file in result.outputs:
                        (entry / result.attempt / file.path).delete()
                return adopted
        raise StorageUnavailable(f"{entry.url}: another process keeps putting a broken entry there")


@lru_cache
def store() -> Store:
    """The store at `CAPTURE2MESH_STORE`."""
    return Store(Location.of(settings().store))
