"""The bundles of weights on this machine: download, verify, find.

`<weights>/blobs/<sha256>` are the files by content, `<sha256>.partial` is the part of a file that has arrived.
`<weights>/<bundle digest>/` has hard links to them at the paths where the libraries look (`hf/` for HF_HOME, `torch/`
for TORCH_HOME) and `manifest.json`; it appears whole, by one rename. So bundles share files, and a download that was
killed is continued. Called by fetch_weights, the engines, the doctor and the command line.
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
from tasks.store.location import Manifest, file_sha256, parsed_or_none
from tasks.weights.origins import Origin, origin, persistent
from tasks.weights.pins import Bundle, Source, WeightFile

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
    return sum(file.sha256 is not None and _size(_blob(blobs, file)) == file.bytes for file in source.files)


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
        # transformers copies the code of BiRefNet before it runs it; the bundle may be mounted read-only
        "HF_MODULES_CACHE": str(settings().scratch / "hf-modules"),
        "TORCH_HOME": str(folder / "torch"),
    }


def fetch(bundle: Bundle, progress: Callable[[float], None] = lambda fraction: None, repair: bool = False) -> Path:
    """Download what is missing and give the folder; does nothing if it is whole.

    repair: also verify what is there, and download wrong files again.
    """
    if not repair and (folder := find(bundle)) is not None:
        return folder
    bundle.refuse_unpinned()
    root = settings().weights
    with storage_errors(str(root)):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".lock", create=True):  # one process downloads, others wait and then find the bundle whole
            if repair:
                _discard_wrong(bundle, root)
            if (folder := find(bundle)) is not None:
                return folder
            _download(bundle, root / "blobs", origin(), progress)
            return _assemble(bundle, root)


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


def _download(bundle: Bundle, blobs: Path, origin: Origin, progress: Callable[[float], None]) -> None:
    """Download all missing blobs, several at once; if one fails, all are stopped."""
    blobs.mkdir(parents=True, exist_ok=True)
    # by content: some files, such as empty ones, occur more than once
    wanted = {file.sha256: (source, file) for source in bundle.sources for file in source.files}
    missing = [pair for pair in wanted.values() if _size(_blob(blobs, pair[1])) != pair[1].bytes]
    counter = _Counter(
        total=sum(file.bytes or 0 for _, file in missing),
        done=sum(_size(_partial(_blob(blobs, file))) or 0 for _, file in missing),
    )
    _check_space(blobs, counter.total - counter.done)
    stop = Event()
    with ThreadPoolExecutor(settings().weights_parallel) as pool:
        pending = {pool.submit(_obtain, origin, source, file, blobs, counter.add, stop) for source, file in missing}
        try:
            while pending:
                finished, pending = wait(pending, TOLD_SECONDS, FIRST_EXCEPTION)
                progress(counter.fraction)
                for future in finished:
                    future.result()
        finally:
            stop.set()
            for future in pending:
                future.cancel()


def _obtain(
    origin: Origin, source: Source, file: WeightFile, blobs: Path, count: Callable[[int], None], stop: Event
) -> None:
    """Download one blob, after the part that has arrived; if the whole is wrong, it is downloaded again, once."""
    blob = _blob(blobs, file)
    partial = _partial(blob)
    size = file.bytes or 0
    while not stop.is_set():
        start = _size(partial) or 0
        with partial.open("ab") as stream:
            if start < size:
                for chunk in persistent(origin, source, file, start):
                    stream.write(chunk)
                    count(len(chunk))
                    if stop.is_set():
                        return
                    if stream.tell() > size:
                        break
            stream.flush()
            os.fsync(stream.fileno())
        found = file_sha256(partial)
        if found == file.sha256:
            os.replace(partial, blob)
            return
        count(-partial.stat().st_size)
        partial.unlink()
        if not start:
            raise WeightsCorrupt(
                f"{source.repository}/{file.path}: what is served is not what is pinned (sha256 {found[:12]}..., pinned"
                f" {str(file.sha256)[:12]}...); nothing of it is kept. Try again later, or, if the change is meant, pin"
                f" it anew in {settings().weights_list}"
            )


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


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.partial")


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
