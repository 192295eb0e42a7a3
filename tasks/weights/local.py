"""The bundles of weights on this machine: download, verify, find.

`<weights>/blobs/<sha256>` are the files by content, `<sha256>.partial` is the part of a file that has arrived.
`<weights>/<bundle digest>/` has hard links to them at the paths where the libraries look (`hf/` for HF_HOME, `torch/`
for TORCH_HOME) and `manifest.json`; it appears whole, by one rename. So bundles share files, and a download that was
killed is continued. `<weights>/weights.lock.json` holds the pins of the first fetch. Called by fetch_weights, the
engines, the doctor and the command line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock

from tasks.errors import StorageError, WeightsCorrupt, WeightsMissing, storage_errors
from tasks.settings import settings
from tasks.store.local_files import locked, take_place, working_folder, write_atomically
from tasks.store.location import Manifest, file_sha256, parsed_or_none, sha256_of
from tasks.weights.first_pins import published_pins
from tasks.weights.origins import Origin, origin, persistent
from tasks.weights.pins import Bundle, Source, WeightFile, bundle, local_lock, lock_text

TOLD_SECONDS = 0.25
"""Time between two calls of a download's `progress`."""


def folder_of(bundle: Bundle) -> Path:
    """The local folder of a bundle, whether it is there or not."""
    return settings().weights / bundle.digest


def find(bundle: Bundle) -> Path | None:
    """Find the local folder; None if it is not whole, by its manifest and the sizes. Uses no network."""
    folder = folder_of(bundle)
    try:
        manifest = parsed_or_none(Manifest, (folder / "manifest.json").read_bytes())
    except OSError:
        return None
    whole = manifest is not None and all(_size(folder / entry.path) == entry.bytes for entry in manifest.files)
    return folder if whole else None


def require(bundle: Bundle) -> Path:
    """Find the local folder; raises WeightsMissing if it is not whole."""
    if (folder := find(bundle)) is None:
        raise WeightsMissing(
            f"weights: bundle {bundle.digest[:12]} is not whole in {settings().weights}; run"
            " `capture2mesh weights fetch` here, or mount a folder that has it and set CAPTURE2MESH_WEIGHTS"
        )
    return folder


def blobs_present(source: Source) -> int:
    """Count the files of a source that are on this machine, by their sizes."""
    blobs = settings().weights / "blobs"
    return sum(_is_there(blobs, file) for file in source.files)


def verify(bundle: Bundle, progress: Callable[[float], None] = lambda fraction: None) -> list[str]:
    """Hash every file; gives one line for each that is missing or wrong."""
    faults = []
    entries = bundle.entries()
    total = sum(entry.bytes for entry in entries)
    done = 0
    for entry in entries:
        path = folder_of(bundle) / entry.path
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif file_sha256(path) != entry.sha256:
            faults.append(f"{path}: its content is not the pinned one (sha256 {entry.sha256[:12]}...)")
        done += entry.bytes
        progress(done / total)
    return faults


def environment(folder: Path) -> dict[str, str]:
    """Environment variables with which the libraries of the inference process load only from the bundle."""
    return {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_CACHE": str(folder / "hf" / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TORCH_HOME": str(folder / "torch"),
    }


def fetch(
    wanted: Bundle,
    progress: Callable[[float], None] = lambda fraction: None,
    repair: bool = False,
    frozen: bool = False,
) -> Path:
    """Download what is missing and give the folder; does nothing if it is whole.

    What is not pinned is pinned first, as it is published, and written to the lock file beside the weights.
    repair: also verify what is there, and download wrong files again. frozen: raise InputError if something is not
    pinned.
    """
    if not repair and not wanted.unpinned and (folder := find(wanted)) is not None:
        return folder
    if frozen:
        wanted.refuse_unpinned()
    root = settings().weights
    with storage_errors(str(root)):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".lock", create=True):  # one process downloads, others wait and then find the bundle whole
            if is_first := bool(wanted.unpinned):
                wanted = bundle()  # the process that had the lock before may have pinned it
            if wanted.unpinned:
                wanted = published_pins(wanted)
            elif repair:
                _discard_wrong(wanted, root)
            if not wanted.unpinned and (folder := find(wanted)) is not None:
                return folder
            wanted = _download(wanted, root / "blobs", origin(), progress)
            if is_first:
                write_atomically(local_lock(), lock_text(wanted).encode())
            return _assemble(wanted, root)


def _assemble(bundle: Bundle, root: Path) -> Path:
    final = folder_of(bundle)
    with working_folder(root, final.name) as folder:
        for source in bundle.sources:
            for file in source.files:
                _link(_blob(root / "blobs", file), folder / source.path_in_bundle(file.path))
        for path, data in bundle.references.items():
            write_atomically(folder / path, data)
        manifest = Manifest(schema=1, files=bundle.entries())
        write_atomically(folder / "manifest.json", manifest.model_dump_json(by_alias=True, indent=1).encode())
        take_place(folder, final, lambda: find(bundle))
    return final


def _download(bundle: Bundle, blobs: Path, origin: Origin, progress: Callable[[float], None]) -> Bundle:
    """Download all missing blobs, several at once; if one fails, all are stopped. Gives the bundle, wholly pinned."""
    blobs.mkdir(parents=True, exist_ok=True)
    # by content: some files, such as empty ones, occur more than once
    wanted = {_part_name(source, file): (source, file) for source in bundle.sources for file in source.files}
    missing = {name: pair for name, pair in wanted.items() if not _is_there(blobs, pair[1])}
    counter = _Counter(
        total=sum(file.bytes or 0 for _, file in missing.values()),
        done=sum(_size(blobs / f"{name}.partial") or 0 for name, (_, file) in missing.items() if file.bytes),
    )
    _check_space(blobs, counter.total - counter.done)
    stop = Event()
    arrived: dict[str, WeightFile] = {}
    with ThreadPoolExecutor(settings().weights_parallel) as pool:
        running = {
            pool.submit(_obtain, origin, source, file, blobs, counter.add, stop): name
            for name, (source, file) in missing.items()
        }
        pending = set(running)
        try:
            while pending:
                finished, pending = wait(pending, TOLD_SECONDS, FIRST_EXCEPTION)
                progress(counter.fraction)
                for future in finished:
                    arrived[running[future]] = future.result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()

    def pinned(source: Source, file: WeightFile) -> WeightFile:
        found = arrived.get(_part_name(source, file), file)
        return file.model_copy(update={"bytes": found.bytes, "sha256": found.sha256})

    return Bundle(
        sources=tuple(
            source.model_copy(update={"files": tuple(pinned(source, file) for file in source.files)})
            for source in bundle.sources
        )
    )


def _obtain(
    origin: Origin, source: Source, file: WeightFile, blobs: Path, count: Callable[[int], None], stop: Event
) -> WeightFile:
    """Download one blob, after the part that has arrived; if the whole is wrong, it is downloaded again, once.

    A file that is not pinned is pinned by what arrives. Gives the file with its size and digest.
    """
    partial = blobs / f"{_part_name(source, file)}.partial"
    while not stop.is_set():
        start = _size(partial) or 0
        with partial.open("ab") as stream:
            if file.bytes is None or start < file.bytes:
                for chunk in persistent(origin, source, file, start):
                    stream.write(chunk)
                    if file.bytes is not None:
                        count(len(chunk))
                    if stop.is_set():
                        return file
                    if file.bytes is not None and stream.tell() > file.bytes:
                        break
            stream.flush()
            os.fsync(stream.fileno())
        found = WeightFile(path=file.path, bytes=partial.stat().st_size, sha256=file_sha256(partial))
        if file.sha256 in (None, found.sha256):
            os.replace(partial, _blob(blobs, found))
            return found
        count(-(found.bytes or 0))
        partial.unlink()
        if not start:
            raise WeightsCorrupt(
                f"{source.repository}/{file.path}: what is served is not what is pinned (sha256"
                f" {str(found.sha256)[:12]}..., pinned {str(file.sha256)[:12]}...); nothing of it is kept. Try again"
                " later. If the change is meant, remove the file's entry from the lock file"
            )
    return file


def _discard_wrong(bundle: Bundle, root: Path) -> None:
    """Remove blobs whose content is wrong; if the bundle has a wrong file, remove its manifest too."""
    for file in (file for source in bundle.sources for file in source.files):
        blob = _blob(root / "blobs", file)
        if blob.is_file() and file_sha256(blob) != file.sha256:
            blob.unlink()
    if verify(bundle):
        (folder_of(bundle) / "manifest.json").unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: {needed / 1e9:.1f} GB are missing and {free / 1e9:.1f} GB are free; make room, or set"
            " CAPTURE2MESH_WEIGHTS to a larger disk"
        )


def _link(blob: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.link(blob, target)
        return
    shutil.copyfile(blob, target)  # on a file system without hard links


def _blob(blobs: Path, file: WeightFile) -> Path:
    return blobs / str(file.sha256)


def _part_name(source: Source, file: WeightFile) -> str:
    """The name of a blob that is arriving: its digest or, if that is not known yet, a digest of its place."""
    return file.sha256 or sha256_of(source.path_in_mirror(file.path).encode())


def _is_there(blobs: Path, file: WeightFile) -> bool:
    return file.sha256 is not None and _size(_blob(blobs, file)) == file.bytes


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


class _Counter:
    """Counts the bytes that the threads have received, of `total`."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._lock = Lock()

    def add(self, count: int) -> None:
        """Add bytes; a negative count takes back what was discarded."""
        with self._lock:
            self.done += count

    @property
    def fraction(self) -> float:
        """Share of the total, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0
