"""Files and folders of this machine: written whole or not at all, and locked.

Used by the store, by `publish` and for the weights.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tasks.errors import StorageError, storage_errors

_RENAME_TRIES = 3

T = TypeVar("T")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside the target first, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def working_folder(parent: Path, name: str) -> Iterator[Path]:
    """Make an empty folder for the content of `parent/name`; it is removed at the end of the block.

    The working folders that killed processes of this machine left are removed at the start.
    """
    with storage_errors(str(parent)):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, name)
        folder = parent / f".{name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_place(folder: Path, final: Path, adopted: Callable[[], T | None]) -> T | None:
    """Rename `folder` to `final`, or adopt what is there already.

    adopted: gives the result that is there if it is whole; if it gives None, the broken folder is replaced. Gives that
    result, or None after a rename. Raises StorageError if other processes keep putting broken folders there.
    """
    for _ in range(_RENAME_TRIES):
        try:
            os.rename(folder, final)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with locked(final.parent):
            if not final.exists():
                continue
            if (found := adopted()) is not None:
                return found
            # broken folders are removed under the lock only, so this one is broken too
            aside = final.with_name(f".{final.name}.broken-{uuid.uuid4().hex[:8]}")
            os.rename(final, aside)
        shutil.rmtree(aside, ignore_errors=True)
    raise StorageError(f"{final}: another process keeps putting a broken folder there; stop it and run again")


@contextmanager
def locked(path: Path, *, create: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock on a file or folder for the block; it ends with the process, however that ends.

    create: make the file if it is missing. Gives True if the lock is held. Gives False without `wait` if another holder
    has it, and if the path was removed or replaced meanwhile.
    """
    with storage_errors(str(path)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        yield _taken(descriptor, wait) and _names(path, descriptor)
    finally:
        os.close(descriptor)


def _taken(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _names(path: Path, descriptor: int) -> bool:
    """True if the path still leads to the opened file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_abandoned(parent: Path, name: str) -> None:
    host = socket.gethostname()
    for folder in parent.glob(f".{name}.*.tmp"):
        prefix, pid, _, _ = folder.name.rsplit(".", 3)
        if prefix == f".{name}.{host}" and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
