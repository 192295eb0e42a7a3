"""The plan of a dataset: which captures there are, and what is still to be done for each."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tasks.capture.layout import is_id, pair
from tasks.capture.listing import Listing, list_capture, list_captures, upload_key
from tasks.capture.stage_capture import stage_capture
from tasks.capture.validate_capture import validate_capture
from tasks.errors import InputError
from tasks.inference.reconstruction import infer
from tasks.inference.registry import ENGINES, EngineChoice, weights_for
from tasks.mesh.publish import published_folder
from tasks.settings import Parameters
from tasks.store.claims import failure_of
from tasks.store.location import Location

LIST_SUFFIXES = (".txt", ".csv", ".jsonl")
_PARALLEL_READS = 32

State = Literal["published", "cached", "new", "failed", "invalid"]


class Planned(BaseModel):
    """What a dataset run makes of one capture.

    published: the newest result of its output is of this content, engine and parameters. cached: its inference is in
    the store. invalid: it cannot be reconstructed as it is. failed: not tried again until its content changes.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    uri: str
    state: State
    upload_key: str = ""
    reason: str = ""
    folder: str = ""  # of the published asset, below the output
    attempts: int = 0  # that failed before
    listing: Listing | None = None  # None where nothing is

    @property
    def pending(self) -> bool:
        return self.state in ("new", "cached")


class Plan(BaseModel):
    """All captures of a dataset, sorted by id."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    captures: tuple[Planned, ...]

    @property
    def pending(self) -> tuple[Planned, ...]:
        return tuple(each for each in self.captures if each.pending)

    def counts(self) -> dict[str, int]:
        """How many captures are in which state, none left out."""
        return dict(Counter(each.state for each in self.captures))


class _Line(BaseModel):
    """One line of a dataset's list; without an id it is the last part of the capture's path."""

    capture: str
    id: str = ""

    @field_validator("capture")
    @classmethod
    def _is_path(cls, path: str) -> str:
        if not path or "\0" in path:
            raise ValueError("is no path")
        return path

    @field_validator("id")
    @classmethod
    def _names_asset(cls, name: str) -> str:
        if name and not is_id(name):
            raise ValueError("can name no folder below the output")
        return name


def plan(dataset: str, output: str, engine: EngineChoice, parameters: Parameters, *, retry: bool = False) -> Plan:
    """Plan a folder or prefix of captures, or a list file (text, CSV, JSON lines); reads no image.

    retry: what has failed is to be done again. Raises InputError where no capture is.
    """
    found = _listed(dataset) if dataset.endswith(LIST_SUFFIXES) else list_captures(dataset)
    if not found:
        raise InputError(f"{dataset}: no capture below it; a capture is a folder with views/, depth/, transforms.json")

    def planned(capture: Listing | Planned) -> Planned:
        if isinstance(capture, Planned):
            return capture
        key = upload_key(capture, engine.name, parameters)
        known = Planned(id=capture.id, uri=capture.uri, state="new", upload_key=key, listing=capture)
        return known.model_copy(update=_state(known, output, engine, parameters, retry))

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return Plan(dataset=dataset, captures=tuple(pool.map(planned, found)))


def _state(capture: Planned, output: str, engine: EngineChoice, parameters: Parameters, retry: bool) -> dict[str, Any]:
    """The state of a capture that is there, with its reason, or where it is published."""
    assert capture.listing is not None
    if not is_id(capture.id):
        return {"state": "invalid", "reason": "its path can name no asset; rename the folder"}
    if (folder := published_folder(output, capture.id, capture.upload_key)) is not None:
        return {"state": "published", "folder": folder}
    if not pair(file.path for file in capture.listing.files).views:
        return {"state": "invalid", "reason": "has no views"}
    failure = failure_of(output, capture.upload_key)
    if failure is not None and failure.final and not retry:
        return {"state": "invalid" if failure.kind == "refused" else "failed", "reason": failure.reason}
    state = "cached" if _inferred(capture.listing, engine, parameters) else "new"
    return {"state": state, "attempts": failure.attempts if failure else 0}


def _inferred(listing: Listing, engine: EngineChoice, parameters: Parameters) -> bool:
    """Whether the store has the inference; it is known by content, so only of a capture that was read once."""
    staged = stage_capture.stored(listing)
    if staged is None:
        return False
    examined = validate_capture.stored(staged, ENGINES[engine.name].needs)
    if examined is None:
        return False
    return infer.stored(staged, engine, parameters.infer, weights_for(engine, examined)) is not None


def _listed(dataset: str) -> list[Listing | Planned]:
    """The captures that a list file names, sorted by id; raises InputError where it is none."""
    lines = list(_lines(Location.of(dataset)))

    def listed(line: _Line) -> Listing | Planned:
        try:
            listing = list_capture(line.capture)
        except InputError as error:
            name = line.id or line.capture.rstrip("/").rpartition("/")[2]
            return Planned(id=name, uri=line.capture, state="invalid", reason=str(error))
        return listing.model_copy(update={"id": line.id or listing.id})

    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = sorted(pool.map(listed, lines), key=lambda capture: capture.id)
    twice = [name for name, count in Counter(capture.id for capture in found).items() if count > 1]
    if twice:
        raise InputError(f"{dataset}: {twice[0]} is the id of several captures; give each one of its own (column `id`)")
    return found


def _lines(location: Location) -> Iterator[_Line]:
    """The lines of a list; paths are relative to its folder."""
    try:
        text = location.read().decode("utf-8-sig")  # as spreadsheets save it
    except FileNotFoundError as error:
        raise InputError(f"{location.url}: no such list") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{location.url}: is no text; a list is .txt, .csv or .jsonl") from error
    for number, row in enumerate(_rows(location.url, text), 1):
        try:
            line = _Line.model_validate(row)
        except ValidationError as error:
            reasons = ", ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise InputError(f"{location.url}, entry {number}: {reasons}; give `capture` (path) and `id`") from error
        if "://" not in line.capture and not Path(line.capture).is_absolute():
            folder = location.url.rpartition("/")[0]
            line = line.model_copy(update={"capture": f"{folder}/{line.capture}"})
        yield line


def _rows(url: str, text: str) -> Iterator[object]:
    if url.endswith(".csv"):
        try:
            yield from csv.DictReader(StringIO(text, newline=None), restval="")
        except csv.Error as error:
            raise InputError(f"{url}: is no CSV ({error})") from error
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
            raise InputError(f"{url}, line {number}: is no JSON ({error.msg})") from error
