"""The plan of a dataset: its captures, and what is still to be done for each.

The flows `batch` and `reconstruct-dataset` follow it, `capture2mesh dataset --dry-run` shows it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tasks.cameras.find_cameras import find_cameras
from tasks.capture.layout import is_id, pair
from tasks.capture.listing import Listing, list_capture, list_captures
from tasks.capture.stage_capture import stage_capture
from tasks.capture.validate_capture import validate_capture
from tasks.dataset.upload import Upload
from tasks.errors import InputError
from tasks.inference.reconstruction import infer
from tasks.inference.registry import ENGINES, EngineChoice, weights_for
from tasks.settings import Parameters
from tasks.store.location import Location

LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
_PARALLEL_READS = 32

PlanState = Literal["published", "cached", "new", "failed", "invalid"]
"""Work that a dataset run has for a capture.

published: nothing, the newest asset is of this upload. cached: the store has its inference. new: everything. failed:
nothing until its content changes or a person asks. invalid: nothing, it cannot be reconstructed as it is.
"""


class Planned(BaseModel):
    """A capture of a dataset, and what is to be done for it."""

    model_config = ConfigDict(frozen=True)

    upload: Upload
    """The capture as it is now; without a key if there is none."""
    state: PlanState
    reason: str = ""
    """Why it is failed or invalid."""
    folder: str = ""
    """The folder of the published asset, below the output; empty if there is none."""
    attempts: int = 0
    """How often it has failed before."""
    listing: Listing | None = None
    """The capture's files; None if there is no capture."""

    @property
    def id(self) -> str:
        """The capture's id."""
        return self.upload.id

    @property
    def pending(self) -> bool:
        """True if there is something to do; it has a listing then."""
        return self.state in ("new", "cached")


class Plan(BaseModel):
    """All captures of a dataset, sorted by id."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    """Folder or URL above the captures, or of their list."""
    captures: tuple[Planned, ...]

    @property
    def pending(self) -> tuple[Planned, ...]:
        """The captures with something to do."""
        return tuple(planned for planned in self.captures if planned.pending)

    def counts(self) -> dict[str, int]:
        """The number of captures in each state."""
        return dict(Counter(planned.state for planned in self.captures))


class _Line(BaseModel):
    """One line of a dataset's list; without an id, the id is the last part of the capture's path."""

    capture: str
    id: str = ""

    @field_validator("capture")
    @classmethod
    def _is_path(cls, path: str) -> str:
        if not path or "\0" in path:
            raise ValueError("is not a path")
        return path

    @field_validator("id")
    @classmethod
    def _names_asset(cls, name: str) -> str:
        if name and not is_id(name):
            raise ValueError("cannot be the name of a folder below the output")
        return name


def plan(dataset: str, output: str, engine: EngineChoice, parameters: Parameters, *, retry: bool = False) -> Plan:
    """Plan a folder or prefix of captures, or a list file (text, CSV, JSON lines); reads no image.

    retry: what has failed is to be done again. Raises InputError if there is no capture.
    """
    listings, absent = _listed(dataset, output) if dataset.endswith(LIST_SUFFIXES) else (list_captures(dataset), [])
    if not (listings or absent):
        raise InputError(f"{dataset}: no capture below it; a capture is a folder with views/, depth/, transforms.json")
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        planned = pool.map(lambda listing: _planned(listing, output, engine, parameters, retry), listings)
        return Plan(dataset=dataset, captures=tuple(sorted((*planned, *absent), key=lambda each: each.id)))


def _planned(listing: Listing, output: str, engine: EngineChoice, parameters: Parameters, retry: bool) -> Planned:
    """The plan for one capture."""
    upload = Upload.of(listing, output, engine.name, parameters)
    planned = partial(Planned, upload=upload, listing=listing)
    if not is_id(listing.id):
        return planned(state="invalid", reason="its path cannot be the name of an asset; rename the folder")
    if (folder := upload.published()) is not None:
        return planned(state="published", folder=folder)
    if not pair(file.path for file in listing.files).views:
        return planned(state="invalid", reason="has no views")
    failure = upload.failure()
    if failure is not None and failure.final and not retry:
        return planned(state="invalid" if failure.kind == "refused" else "failed", reason=failure.reason)
    state: PlanState = "cached" if _inferred(listing, engine, parameters) else "new"
    return planned(state=state, attempts=failure.attempts if failure else 0)


def _inferred(listing: Listing, engine: EngineChoice, parameters: Parameters) -> bool:
    """True if the store has the inference; its key is of content, so this is known only of a capture that was read."""
    staged = stage_capture.stored(listing)
    if staged is None:
        return False
    needs = ENGINES[engine.name].needs
    examined = validate_capture.stored(staged, needs)
    cameras = find_cameras.stored(staged, parameters.cameras, needs)
    if examined is None or cameras is None:
        return False
    return infer.stored(staged, cameras, engine, parameters.infer, weights_for(engine, examined)) is not None


def _listed(dataset: str, output: str) -> tuple[list[Listing], list[Planned]]:
    """The captures that a list file names: those that are there, and those that are not, as invalid."""
    lines = list(_lines(Location.of(dataset)))

    def listed(line: _Line) -> Listing | Planned:
        try:
            listing = list_capture(line.capture)
        except InputError as error:
            name = line.id or line.capture.rstrip("/").rpartition("/")[2]
            absent = Upload(output=output, key="", id=name, uri=line.capture)
            return Planned(upload=absent, state="invalid", reason=str(error))
        return listing.model_copy(update={"id": line.id or listing.id})

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = list(pool.map(listed, lines))
    twice = sorted(name for name, count in Counter(each.id for each in found).items() if count > 1)
    if twice:
        raise InputError(f"{dataset}: {twice[0]} is the id of several captures; give each its own id (column `id`)")
    listings = [each for each in found if isinstance(each, Listing)]
    return listings, [each for each in found if isinstance(each, Planned)]


def _lines(location: Location) -> Iterator[_Line]:
    """The lines of a list; paths are relative to its folder."""
    try:
        text = location.read().decode("utf-8-sig")  # as spreadsheets save it
    except FileNotFoundError as error:
        raise InputError(f"{location.url}: no such list") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{location.url}: is not a text file; a list is .txt, .csv or .jsonl") from error
    for number, entry in enumerate(_entries(location.url, text), 1):
        try:
            line = _Line.model_validate(entry)
        except ValidationError as error:
            reasons = ", ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise InputError(f"{location.url}, entry {number}: {reasons}; give `capture` (path) and `id`") from error
        if "://" not in line.capture and not Path(line.capture).is_absolute():
            folder = location.url.rpartition("/")[0]
            line = line.model_copy(update={"capture": f"{folder}/{line.capture}"})
        yield line


def _entries(url: str, text: str) -> Iterator[object]:
    """The entries of a list, not validated yet."""
    if url.endswith(".csv"):
        try:
            yield from csv.DictReader(StringIO(text, newline=None), restval="")
        except csv.Error as error:
            raise InputError(f"{url}: is not a CSV file ({error})") from error
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if url.endswith(".txt"):
            yield {"capture": line.strip()}
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{url}, line {number}: is not JSON ({error.msg})") from error
