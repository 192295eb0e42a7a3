"""Claims are exclusive and end with their holder, failures are counted as whose fault they are, here and on S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import tasks.store.claims
from tasks.errors import (
    Capture2MeshError,
    CaptureRefused,
    DeviceLost,
    EmptyResult,
    EngineUnavailable,
    ExportFailed,
    InferenceTimeout,
    InputError,
    MeshRejected,
    OutOfMemory,
    Problem,
    ServerUnavailable,
    StorageError,
    StorageUnavailable,
    WeightsCorrupt,
    WeightsMissing,
)
from tasks.mesh.publish import Published
from tasks.report import Report
from tasks.store.claims import Claims, Failure, failure_of, failures_recorded, forget_failure, record_failure
from tasks.store.location import Location
from tasks.store.results import store
from tests.support.own_settings import forget
from tests.support.running import ROOT, kill_group
from tests.support.running_s3 import S3

OUTPUT, KEY, URI = "/out", "upload key", "/captures/mug"
ATTEMPTS = 3
LEASE_SECONDS, RENEW_SECONDS = 3.0, 0.5
EXPIRED_SECONDS = LEASE_SECONDS + 1.5  # the storage's clock has whole seconds
RACERS = 8

HOLDER = """
import sys, time
import tasks.store.claims
tasks.store.claims.LEASE_SECONDS, tasks.store.claims.RENEW_SECONDS = {lease}, {renew}
with tasks.store.claims.Claims() as claims, claims.claimed(sys.argv[1], sys.argv[2]) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["folder", "bucket"])
def where(request: pytest.FixtureRequest) -> str:
    """Runs a test with the store in a folder, and with it on S3."""
    return str(request.param)


@pytest.fixture(autouse=True)
def own_claims(
    own_store: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty store, in a folder or on S3, and leases that a test can wait for."""
    callspec = getattr(request.node, "callspec", None)
    if "s3" in request.fixturenames or (callspec and callspec.params.get("where") == "bucket"):
        request.getfixturevalue("worker_here")
        monkeypatch.setenv("CAPTURE2MESH_STORE", f"s3://store/{tmp_path.name}")
    monkeypatch.setenv("CAPTURE2MESH_ATTEMPTS", str(ATTEMPTS))
    monkeypatch.setattr(tasks.store.claims, "LEASE_SECONDS", LEASE_SECONDS)
    monkeypatch.setattr(tasks.store.claims, "RENEW_SECONDS", RENEW_SECONDS)
    forget()


@contextmanager
def held(claims: Claims, key: str = KEY, output: str = OUTPUT) -> Iterator[bool]:
    with claims.claimed(output, key) as mine:
        yield mine


@pytest.fixture
def claims() -> Iterator[Claims]:
    with Claims() as claims:
        yield claims


@contextmanager
def other_process(key: str = KEY) -> Iterator[subprocess.Popen[str]]:
    """Claims an upload until its input ends; the first line that it prints says whether it got it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(lease=LEASE_SECONDS, renew=RENEW_SECONDS), OUTPUT, key],
        cwd=ROOT,
        env=dict(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate()


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def claim_files() -> list[str]:
    return list((store().root / "_ledger" / "claims").listing())


def test_claim_is_of_one_process_at_a_time(where: str, claims: Claims) -> None:
    with other_process() as other:
        assert told(other) == "True"
        with held(claims) as mine:
            assert not mine
        with held(claims, "another upload") as mine:
            assert mine
        with held(claims, output="/another output") as mine:
            assert mine
        other.communicate("")
        with held(claims) as mine:
            assert mine
            with other_process() as late:
                assert told(late) == "False"
    assert claim_files() == []


def test_claim_is_of_one_thread_at_a_time(where: str, claims: Claims) -> None:
    with held(claims) as first, Claims() as others, held(claims) as second, held(others) as third:
        assert (first, second, third) == (True, False, False)
    with held(claims) as again:
        assert again


def test_claim_ends_with_an_error(where: str, claims: Claims) -> None:
    with pytest.raises(ValueError, match="on purpose"), held(claims):
        raise ValueError("on purpose")
    assert claim_files() == []
    with held(claims) as mine:
        assert mine


def test_one_of_many_gets_it(where: str) -> None:
    for _ in range(3):
        assert winners() == 1


def test_no_two_hold_it_whenever_they_come(where: str) -> None:
    """They come and go as they like: a claim that is given back is taken again, and is never two's."""
    inside, most, won = threading.Semaphore(1), [], []

    def come_and_go(number: int) -> None:
        with Claims() as claims:
            for turn in range(20 if where == "folder" else 4):
                with held(claims) as mine:
                    if mine:
                        most.append(inside.acquire(blocking=False))
                        time.sleep(0.002)
                        inside.release()
                        won.append((number, turn))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, range(4)))
    assert all(most) and len(won) > 1
    assert claim_files() == []


def test_claim_of_a_killed_process_is_free_at_once(tmp_path: Path, claims: Claims) -> None:
    with other_process() as other:
        assert told(other) == "True"
        other.send_signal(signal.SIGKILL)
        other.wait()
        with held(claims) as mine:
            assert mine
    assert claim_files() == []


def race(start: threading.Barrier, asked: threading.Barrier) -> bool:
    with Claims() as claims:
        start.wait()
        with held(claims) as mine:
            asked.wait()
            return mine


def winners() -> int:
    """How many of those who come at the same time, and stay until all have asked, get it."""
    start, asked = threading.Barrier(RACERS), threading.Barrier(RACERS)
    with ThreadPoolExecutor(RACERS) as pool:
        return sum(pool.map(lambda _: race(start, asked), range(RACERS)))


def test_lease_of_a_killed_process_is_taken_over_by_one_when_it_is_old(s3: S3, claims: Claims) -> None:
    with other_process() as other:
        assert told(other) == "True"
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert winners() == 0
    time.sleep(EXPIRED_SECONDS)
    assert winners() == 1


def test_lease_is_its_holders_while_it_lives_whatever_the_time_is_here(
    s3: S3, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age is by the storage's clock; this machine's is an hour ahead."""
    with other_process() as other:
        assert told(other) == "True"
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        end = time.monotonic() + 2 * LEASE_SECONDS
        while time.monotonic() < end:
            with held(claims) as mine:
                assert not mine
            time.sleep(RENEW_SECONDS)


def test_holder_that_was_thought_dead_notices_and_leaves_the_claim_alone(s3: S3, claims: Claims) -> None:
    with other_process() as other:
        assert told(other) == "True"
        other.send_signal(signal.SIGSTOP)
        time.sleep(EXPIRED_SECONDS)
        with held(claims) as mine:
            assert mine
            other.send_signal(signal.SIGCONT)
            time.sleep(3 * RENEW_SECONDS)
            _, logged = other.communicate("")  # it ends, and with it its claim, which is ours now
            assert "was taken over" in logged
            assert winners() == 0
    assert claim_files() == []


def test_lease_that_cannot_be_renewed_for_a_moment_is_kept(
    s3: S3, claims: Claims, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, faults = Location.write_if, [StorageUnavailable("no answer")]

    def flaky(location: Location, etag: str | None, data: bytes) -> bool:
        if threading.current_thread().name == "claims" and faults:
            raise faults.pop()
        return written(location, etag, data)

    monkeypatch.setattr(Location, "write_if", flaky)
    with held(claims) as mine:
        assert mine
        time.sleep(EXPIRED_SECONDS)
        assert winners() == 0
    assert faults == [] and "could not be renewed" in caplog.text


def test_lease_that_somebody_removes_costs_no_other(s3: S3, claims: Claims) -> None:
    with held(claims) as mine:
        assert mine
        (name,) = claim_files()
        (store().root / "_ledger" / "claims" / name).delete()
        with held(claims, "another upload"):
            time.sleep(EXPIRED_SECONDS)
            with Claims() as others, held(others, "another upload") as theirs:
                assert not theirs
    assert claim_files() == []


REFUSED = CaptureRefused("mug", [Problem(where="views/", what="has none", todo="add some")])
OWN = [
    EmptyResult("nothing"),
    OutOfMemory("no memory"),
    DeviceLost("gone"),
    InferenceTimeout("too long"),
    ExportFailed("no texture"),
    ValueError("a fault of ours"),
]
OF_THE_MACHINE = [
    StorageError("no disk"),
    StorageUnavailable("no network"),
    ServerUnavailable("no server"),
    EngineUnavailable("no GPU"),
    WeightsMissing("no weights"),
    WeightsCorrupt("other weights"),
]


def failed(error: BaseException, key: str = KEY) -> Failure:
    return record_failure(OUTPUT, key, URI, error)


def rejected() -> MeshRejected:
    return MeshRejected(
        "below the floor", Published.model_construct(url=f"{OUTPUT}/mug/0123", report=Report.model_construct())
    )


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_strikes_are_counted_and_the_last_is_final(where: str) -> None:
    assert failure_of(OUTPUT, KEY) is None
    for count in range(1, ATTEMPTS + 1):
        found = failed(EmptyResult("nothing came out"))
        assert found == failure_of(OUTPUT, KEY)
        assert (found.attempts, found.strikes, found.final) == (count, count, count == ATTEMPTS)
    assert (found.kind, found.reason, found.capture, found.folder) == ("failed", "nothing came out", URI, "")
    assert failure_of(OUTPUT, "of other content") is None
    assert failure_of("/another output", KEY) is None
    forget_failure(OUTPUT, KEY)
    assert failure_of(OUTPUT, KEY) is None
    forget_failure(OUTPUT, KEY)  # once more does no harm


def test_refused_is_final_at_once() -> None:
    found = failed(REFUSED)
    assert (found.final, found.kind, found.attempts) == (True, "refused", 1)
    assert "views/: has none; add some" in found.reason


def test_mesh_below_the_floor_is_final_and_says_where_it_is() -> None:
    found = failed(rejected())
    assert (found.final, found.kind, found.folder) == (True, "failed", "mug/0123")


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
def test_what_the_capture_may_be_the_cause_of_is_a_strike(error: Exception) -> None:
    assert failed(error).strikes == 1


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=lambda error: type(error).__name__)
def test_what_is_wrong_with_the_machine_is_never_final(error: Exception) -> None:
    for count in range(1, ATTEMPTS + 3):
        found = failed(error)
        assert (found.attempts, found.strikes, found.final) == (count, 0, False)
    assert not failed(EmptyResult("nothing")).final


def test_error_without_words_has_a_reason() -> None:
    assert failed(ValueError()).reason == "ValueError"


def test_it_is_tried_again_later_each_time() -> None:
    waits = []
    for _ in range(12):
        found = failed(StorageUnavailable("no network"))
        assert abs(found.at - datetime.now(UTC)) < timedelta(seconds=30)
        waits.append(found.retry_at - found.at)
    assert waits == sorted(waits)
    assert (waits[0], waits[1], waits[-1]) == (timedelta(minutes=1), timedelta(minutes=2), timedelta(hours=1))


def test_what_is_raised_is_recorded_and_success_forgets() -> None:
    for _ in range(2):
        with pytest.raises(EmptyResult), failures_recorded(OUTPUT, KEY, URI):
            raise EmptyResult("nothing")
    found = failure_of(OUTPUT, KEY)
    assert found is not None and found.strikes == 2
    with failures_recorded(OUTPUT, KEY, URI):
        pass
    assert failure_of(OUTPUT, KEY) is None


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_end_of_the_process_is_no_failure(end: type[BaseException]) -> None:
    with pytest.raises(end), failures_recorded(OUTPUT, KEY, URI):
        raise end
    assert failure_of(OUTPUT, KEY) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"capture": 1}'])
def test_broken_record_is_none(data: bytes) -> None:
    failed(EmptyResult("nothing"))
    (name,) = (store().root / "_ledger" / "failures").listing()
    (store().root / "_ledger" / "failures" / name).write(data)
    assert failure_of(OUTPUT, KEY) is None
    assert failed(Capture2MeshError("odd")).attempts == 1


def test_output_is_the_same_however_it_is_written() -> None:
    failed(InputError("wrong"))
    assert failure_of(f"{OUTPUT}/", KEY) == failure_of(f"file://{OUTPUT}", KEY) is not None
