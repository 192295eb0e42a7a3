"""Uploads, hints, sweeps, crashes and outages in any order: in the end every capture is published, once, as it is now.

The outside is a model: a clock, uploaders, workers, and what Prefect keeps of runs. `submit`, the sweep, the ledger,
the listing and the pointer to the newest asset are the real ones, over a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, Scheduled

from flows.sweep import submit_all
from flows.uploads.submit import Submitter
from tasks.capture.completeness import StorageState
from tasks.capture.layout import declared_files
from tasks.capture.listing import Listing, list_capture, list_captures, upload_key
from tasks.errors import CaptureRefused, InferenceFailed, InputError, ServerUnavailable, StorageUnavailable
from tasks.mesh.publish import Latest, _move_latest
from tasks.settings import Parameters
from tasks.store.claims import failures_recorded
from tasks.store.location import Location
from tests.support.own_settings import forget

CAPTURES = ("mug", "day 1/müg+%41")
STYLES = ("manifest first", "manifest last", "marker", "quiet")
QUIET_SECONDS = 60
VIEWS = 4
FILES = [*(f"{kind}/{number}.png" for kind in ("views", "depth") for number in range(VIEWS)), "transforms.json"]
ALL = 100  # more files than an upload has
MOST_FAULTS = 2  # of one upload: a third one would be its last


@dataclass
class World:
    """A folder that captures are uploaded to, its clock, and what works on it."""

    root: Path
    now: datetime = datetime(2026, 11, 22, tzinfo=UTC)
    uploads: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    contents: dict[str, list[str]] = field(default_factory=dict)
    up: bool = True
    answers_lost: int = 0
    runs: dict[str, FlowRun] = field(default_factory=dict)
    at_work: dict[str, tuple[Listing, str]] = field(default_factory=dict)
    """What a run has listed and read, by its idempotency key."""
    faults: Counter[str] = field(default_factory=Counter)
    published: list[tuple[str, str]] = field(default_factory=list)

    @property
    def watched(self) -> str:
        return str(self.root / "captures")

    @property
    def output(self) -> str:
        return str(self.root / "assets")

    # what uploaders do

    def begin(self, capture: str, version: int, style: str) -> None:
        """Begin an upload; one that is under way is broken off."""
        # what was said before of another upload is taken back, but for a marker where a new one comes
        folder = Path(self.watched) / capture
        said = {"quiet": ("manifest.json", "_COMPLETE"), "marker": ("manifest.json",)}.get(style, ())
        for name in filter(lambda name: (folder / name).exists(), said):
            (folder / name).unlink()
            # until a new file comes, what lies there is an upload anew that has been quiet for long
            there = digest_of({path: (folder / path).read_bytes() for path in FILES if (folder / path).exists()})
            if there in self.contents.get(capture, ()):
                self.contents[capture].append(there)
        numbers = range(VIEWS)
        files = {
            f"{kind}/{number}.png": f"{kind}{version}".encode() for kind in ("views", "depth") for number in numbers
        }
        files["transforms.json"] = f"{version}".encode()
        entries = [
            {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        ]
        manifest = ("manifest.json", json.dumps({"schema": 1, "files": entries}).encode())
        steps = list(files.items())
        if style == "manifest first":
            steps.insert(0, manifest)
        elif style != "quiet":
            steps.append(manifest if style == "manifest last" else ("_COMPLETE", b""))
        self.uploads[capture] = steps
        self.contents.setdefault(capture, []).append(digest_of(files))

    def step(self, capture: str, count: int) -> None:
        """The next files of an upload, one a second."""
        for _ in range(count):
            if self.uploads.get(capture):
                path, data = self.uploads[capture].pop(0)
                target = Path(self.watched) / capture / path
                self.now += timedelta(seconds=1)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                os.utime(target, (self.now.timestamp(), self.now.timestamp()))

    # what Prefect's API does

    def reached(self) -> None:
        if not self.up:
            raise httpx.ConnectError("down")

    def read_deployment_by_name(self, name: str) -> Any:
        self.reached()
        return SimpleNamespace(id=uuid4(), parameters={"engine": "fusion"})

    def create_flow_run_from_deployment(
        self, deployment: Any, *, parameters: dict[str, Any], idempotency_key: str, work_queue_name: str
    ) -> FlowRun:
        self.reached()
        made = FlowRun(flow_id=uuid4(), state=Scheduled(), parameters=parameters, idempotency_key=idempotency_key)
        run = self.runs.setdefault(idempotency_key, made)
        if self.answers_lost:
            self.answers_lost -= 1
            raise httpx.ReadError("lost")
        return run

    def read_flow_runs(self, *, flow_run_filter: Any, deployment_filter: Any = None, **_: Any) -> list[FlowRun]:
        self.reached()
        keys = flow_run_filter.idempotency_key and flow_run_filter.idempotency_key.any_
        types = flow_run_filter.state and flow_run_filter.state.type.any_
        return [
            run
            for key, run in self.runs.items()
            if (keys is None or key in keys) and (types is None or run.state.type in types)
        ]

    # what workers do

    def work(self, number: int, outcome: str) -> None:
        """A run begins, or the one that is at work ends."""
        unended = [key for key, run in self.runs.items() if not run.state.is_final()]
        if not unended:
            return
        key = unended[number % len(unended)]
        run = self.runs[key]
        run.state = self.ended(run, key, outcome) if key in self.at_work else self.begun(run, key)

    def begun(self, run: FlowRun, key: str) -> Any:
        """A run lists its capture and reads it."""
        upload = key.split("/")[0]
        try:
            listing = list_capture(run.parameters["capture"], run.parameters["root"])
        except InputError:
            return Failed(message="there is no capture any more")
        if upload_key(listing, "fusion", Parameters()) != upload:
            return Completed(message="its content has been replaced")
        files = {file.path: (Path(listing.uri) / file.path).read_bytes() for file in listing.files}
        for declared in declared_files(listing.manifest) if listing.manifest else ():
            if hashlib.sha256(files[declared.path]).hexdigest() != declared.sha256:
                with suppress(CaptureRefused), failures_recorded(self.output, upload, listing.uri):
                    raise CaptureRefused(listing.uri, [])
                return Failed(message="it is not what its manifest declares")
        self.at_work[key] = listing, digest_of(files)
        return Running()

    def ended(self, run: FlowRun, name: str, outcome: str) -> Any:
        """A run publishes what it has read, or fails."""
        listing, content = self.at_work[name]
        key = name.split("/")[0]
        if outcome != "completes" and self.faults[key] < MOST_FAULTS:
            self.faults[key] += 1
            if outcome in ("crashes", "cancelled"):
                return {"crashes": Crashed, "cancelled": Cancelled}[outcome](message=outcome)
            with suppress(InferenceFailed, StorageUnavailable), failures_recorded(self.output, key, listing.uri):
                raise {"fails": InferenceFailed, "storage down": StorageUnavailable}[outcome](outcome)
            return Failed(message=outcome)
        with failures_recorded(self.output, key, listing.uri):
            (Location.of(self.output) / listing.id / content / "_SUCCESS").write(b"")
            latest = Latest(run_key=content, upload_key=key, uploaded_at=listing.uploaded_at, report="")
            _move_latest(Location.of(self.output) / listing.id / "latest.json", latest)
        self.published.append((listing.id, content))
        return Completed()


def digest_of(files: dict[str, bytes]) -> str:
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
    forget()


def connected(patch: pytest.MonkeyPatch, world: World) -> Submitter:
    """The real code, in this world."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return world.now

    patch.setenv("CAPTURE2MESH_STORE", str(world.root / "store"))
    patch.setenv("CAPTURE2MESH_QUIET_SECONDS", str(QUIET_SECONDS))
    forget()
    for module in "tasks.store.location", "tasks.store.claims", "flows.uploads.submit":
        patch.setattr(f"{module}.datetime", Clock)
    patch.setattr("flows.uploads.submit.require_server", lambda: None)
    patch.setattr("flows.uploads.submit.get_client", lambda **_: world)
    patch.setattr("flows.uploads.submit.emit_event", lambda *_, **__: None)
    Path(world.watched).mkdir()
    return Submitter(world.watched, world.output)


OUTCOMES = ["completes", "crashes", "cancelled", "fails", "storage down"]
captures, versions = st.sampled_from(CAPTURES), st.integers(0, 1)
actions = st.one_of(
    st.tuples(st.just("begin"), captures, versions, st.sampled_from(STYLES)),
    st.tuples(st.just("upload"), captures, versions, st.sampled_from(STYLES)),
    st.tuples(st.just("step"), captures, st.sampled_from([1, 3, 20])),
    st.tuples(st.just("step"), captures, st.sampled_from([1, 3, 20])),
    st.tuples(st.just("hint"), captures, st.integers(1, 3)),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("rush"), captures),
    st.tuples(
        st.just("work"),
        st.integers(0, 5),
        st.sampled_from(OUTCOMES),
    ),
    st.tuples(st.just("work"), st.integers(0, 5), st.just("completes")),
    st.tuples(st.just("wait"), st.sampled_from([1, QUIET_SECONDS, 7200])),
    st.tuples(st.just("outage")),
    st.tuples(st.just("lost answer")),
)


QUIET_BY_TAKING_BACK: list[tuple[Any, ...]] = [
    ("upload", "mug", 0, "manifest first"),
    ("rush", "mug"),
    ("wait", QUIET_SECONDS),
    ("begin", "mug", 0, "marker"),
    ("sweep",),
    ("rush", "mug"),
]


def happens(world: World, submitter: Submitter, action: tuple[Any, ...]) -> None:
    match action:
        case "begin", capture, version, style:
            world.begin(capture, version, style)
        case "upload", capture, version, style:
            world.begin(capture, version, style)
            world.step(capture, ALL)
        case "step", capture, count:
            world.step(capture, count)
        case "hint", capture, count:
            for _ in range(count):
                with suppress(ServerUnavailable):
                    submitter.submit(f"{world.watched}/{capture}")
        case "rush", capture:  # worked on at once, whatever is there
            happens(world, submitter, ("hint", capture, 1))
            for _ in range(2 * len(world.runs)):
                world.work(0, "completes")
        case ("sweep",):
            with suppress(ServerUnavailable):
                sweep(world, submitter)
        case "work", number, outcome:
            world.work(number, outcome)
        case "wait", seconds:
            # nothing can tell an uploader that says nothing and stalls from one that is done
            stalls = any(world.uploads.values())
            world.now += timedelta(seconds=1 if stalls else seconds)
        case ("outage",):
            world.up = not world.up
        case ("lost answer",):
            world.answers_lost += 1


def sweep(world: World, submitter: Submitter) -> list[str]:
    state = StorageState.of(Location.of(world.watched))
    return [each.state for each in submit_all(submitter, list_captures(world.watched), state)]


def settle(world: World, submitter: Submitter) -> None:
    """Uploads end, the server is up, sweeps go on, workers work."""
    world.up, world.answers_lost = True, 0
    for capture in CAPTURES:
        world.step(capture, ALL)
    for _ in range(40):
        world.now += timedelta(hours=2)
        states = sweep(world, submitter)
        for _ in range(2 * len(world.runs)):
            world.work(0, "completes")
        if set(states) <= {"published"}:
            return
    pytest.fail(f"never settles: {states}")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(actions, min_size=20, max_size=60))
@example(QUIET_BY_TAKING_BACK)
def test_whatever_happens_every_capture_is_published_once_as_it_is_now(
    patch: pytest.MonkeyPatch, history: list[tuple[Any, ...]]
) -> None:
    with ExitStack() as stack:
        world = World(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        submitter = connected(patch, world)
        for action in history:
            happens(world, submitter, action)
        settle(world, submitter)
        for capture, contents in world.contents.items():
            latest = Latest.model_validate_json((Path(world.output) / capture / "latest.json").read_bytes())
            listing = list_capture(f"{world.watched}/{capture}", world.watched)
            assert latest.upload_key == upload_key(listing, "fusion", Parameters())
            assert latest.run_key == contents[-1]
            made = [content for name, content in world.published if name == capture]
            assert set(made) <= set(contents)  # nothing half uploaded
            # a run for each time that it was uploaded; the same again may have been no work at all
            assert all(count <= contents.count(content) for content, count in Counter(made).items())
        assert not any(run.state.is_scheduled() for run in world.runs.values())
