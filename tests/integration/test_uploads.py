"""From an upload to its run: a storage that notifies, the receiver, the sweep, and a Prefect server that may be down.

No worker runs here: the tests say themselves how runs end.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from prefect.client.schemas.objects import State, StateType

from flows.reconstruct import reconstruct
from flows.sweep import submit_all
from flows.uploads.submit import Submission, Submitter
from tasks.capture.completeness import StorageState
from tasks.capture.listing import list_captures
from tasks.settings import Parameters
from tasks.store.claims import RETRY_LIMIT
from tasks.store.location import Location
from tests.support.notices import DIALECTS, aws
from tests.support.running import ask, post, wait_for
from tests.support.upload_house import FILES, QUIET_SECONDS, WHOLE, House, at_home, manifest

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with at_home(tmp_path_factory.mktemp("uploads")) as house:
        yield house


@pytest.fixture
def submitter(house: House) -> Submitter:
    return Submitter("s3://captures", "s3://assets")


def swept(submitter: Submitter, capture: str) -> Submission:
    """What a sweep makes of a capture."""
    state = StorageState.of(Location.of("s3://captures"))
    submissions = {each.id: each for each in submit_all(submitter, list_captures("s3://captures"), state)}
    return submissions[capture]


@pytest.mark.parametrize("name", ["mug", "day 1/mug+1", "100%/%41", "grün/☃ 日本", "a&b=c#d/'x'"])
def test_upload_becomes_one_run(house: House, name: str) -> None:
    house.put(name, FILES)
    time.sleep(0.3)
    assert house.runs(name) == []  # nothing says that it is complete
    begun = time.monotonic()
    house.put(name, manifest(FILES))
    run = house.run(name)
    print(f"run {time.monotonic() - begun:.2f} s after the last file")
    assert run["state_type"] == "SCHEDULED" and run["work_queue_name"] == "default"
    assert run["idempotency_key"].endswith("/1")
    asked = run["parameters"]
    assert (asked["root"], asked["output"], asked["engine"]) == ("s3://captures", "s3://assets", "fusion")


def test_upload_is_told_as_an_event(house: House) -> None:
    house.put("told", WHOLE)
    house.run("told")

    def captures() -> bool:
        found = post(house.server, "/events/filter", filter={"event": {"name": ["capture.uploaded"]}})["events"]
        return "s3://captures/told" in [event["payload"].get("capture") for event in found]

    wait_for("the event", captures)


def test_manifest_may_come_first_and_events_in_any_order(house: House) -> None:
    paths = sorted(FILES, key=lambda path: hashlib.sha256(path.encode()).digest())
    house.put("shuffled", manifest(FILES))
    for path in paths[:-1]:
        house.put("shuffled", {path: WHOLE[path]})
        house.notify(f"shuffled/{paths[-1]}")  # of what is not there yet
        assert house.runs("shuffled") == []
    house.put("shuffled", {paths[-1]: WHOLE[paths[-1]]})
    for path in reversed(paths):
        assert house.notify(f"shuffled/{path}") == 200
    house.run("shuffled")


def test_duplicates_at_once_are_one_run(house: House, submitter: Submitter) -> None:
    house.put("twice", FILES)
    house.put("twice", {"_COMPLETE": b""})
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(house.notify, ["twice/_COMPLETE", "twice/transforms.json"] * 16)
        sweeps = [pool.submit(submitter.submit, "s3://captures/twice") for _ in range(4)]
        assert set(answers) == {200}
        assert {sweep.result().state for sweep in sweeps} == {"submitted"}
    house.run("twice")


def test_receiver_that_was_down_is_made_up_for_by_the_sweep(house: House, submitter: Submitter) -> None:
    house.stop("receiver")
    house.put("unheard", WHOLE)
    assert house.runs("unheard") == []
    assert swept(submitter, "unheard").state == "submitted"
    run = house.run("unheard")
    house.start_receiver()
    assert house.notify("unheard/manifest.json") == 200
    assert swept(submitter, "unheard").state == "submitted"
    assert house.run("unheard")["id"] == run["id"]
    house.end(run, "COMPLETED")
    assert swept(submitter, "unheard").state == "published"


@pytest.mark.faults
def test_server_that_was_down_is_told_again(house: House) -> None:
    house.put("patient", FILES)
    house.stop("server")
    house.put("patient", {"_COMPLETE": b""})
    assert house.notify("patient/_COMPLETE") == 503
    house.start_server()
    assert house.notify("patient/_COMPLETE") == 200
    house.run("patient")


def test_aborted_upload_is_no_capture(house: House, submitter: Submitter) -> None:
    half = dict(list(FILES.items())[:4])
    house.put("aborted", half | manifest(FILES))
    upload = house.s3.admin.call_s3("create_multipart_upload", Bucket="captures", Key="broken/views/view_009.png")
    house.put("broken", FILES)
    time.sleep(QUIET_SECONDS + 1)
    for name, reason in ("aborted", "what manifest.json lists"), ("broken", "upload of views/view_009.png"):
        found = swept(submitter, name)
        assert found.state == "incomplete" and reason in found.reason
        assert house.runs(name) == []
    house.s3.admin.call_s3(
        "abort_multipart_upload", Bucket="captures", Key="broken/views/view_009.png", UploadId=upload["UploadId"]
    )
    assert swept(submitter, "broken").state == "submitted"
    house.run("broken")


def test_quiet_period_is_by_the_clock_of_the_storage(
    house: House, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Wrong:
            return cls(2040, 1, 1, tzinfo=tz)

    for module in "tasks.store.location", "tasks.store.claims", "flows.uploads.submit":
        monkeypatch.setattr(f"{module}.datetime", Wrong)
    house.put("quiet", FILES)
    assert swept(submitter, "quiet").state == "incomplete"
    time.sleep(QUIET_SECONDS + 1)
    assert swept(submitter, "quiet").state == "submitted"


def test_other_content_is_new_work_and_the_same_is_not(house: House, submitter: Submitter) -> None:
    house.put("changed", WHOLE)
    first = house.run("changed")
    house.end(first, "COMPLETED")
    house.put("changed", WHOLE)
    assert swept(submitter, "changed").state == "published"
    other = FILES | {"transforms.json": b"{ }"}
    house.put("changed", other)
    assert swept(submitter, "changed").state == "incomplete"  # the manifest is of what was there before
    house.put("changed", manifest(other))
    wait_for("the second run", lambda: len(house.runs("changed")) == 2)
    third = FILES | {"transforms.json": b"{   }"}
    house.put("changed", third | manifest(third))  # while the second one is at work
    wait_for("the third run", lambda: len(house.runs("changed")) == 3)
    house.stop("receiver")
    house.put("changed", WHOLE)  # and back to what is published: that both of them are of no use any more
    assert swept(submitter, "changed").state == "published"
    fourth = FILES | {"transforms.json": b"{    }"}
    house.put("changed", fourth | manifest(fourth))
    found = swept(submitter, "changed")
    assert (found.state, found.changed) == ("submitted", True)
    house.start_receiver()


def test_run_of_an_upload_that_was_replaced_leaves_it_to_the_next(house: House) -> None:
    house.put("overtaken", WHOLE)
    run = house.run("overtaken")
    other = FILES | {"transforms.json": b"{   }"}
    house.put("overtaken", other)  # the manifest of it is still to come
    # the function alone: a flow run in this process would bind Prefect's workers to this house's server
    asked = run["parameters"] | {"parameters": Parameters.model_validate(run["parameters"]["parameters"])}
    state = reconstruct.fn(**asked)
    assert isinstance(state, State)
    assert (state.type, state.name) == (StateType.COMPLETED, "Replaced")
    assert house.s3.keys("assets/overtaken") == {}
    house.end(run, "COMPLETED", publish=False)
    house.put("overtaken", manifest(other))
    wait_for("the run of the next one", lambda: len(house.runs("overtaken")) == 2)


def test_content_that_comes_back_is_published_again(house: House, submitter: Submitter) -> None:
    other = FILES | {"transforms.json": b"{  }"}
    for number, files in enumerate([FILES, other, FILES, other, FILES], 1):
        house.put("back", files | manifest(files))
        wait_for(f"run {number}", lambda number=number: len(house.runs("back")) == number)
        unended = [run for run in house.runs("back") if run["state_type"] == "SCHEDULED"]
        assert len(unended) == 1
        house.end(unended[0], "COMPLETED")
    assert swept(submitter, "back").state == "published"


@pytest.mark.faults
@pytest.mark.parametrize(("state", "final"), [("CRASHED", True), ("FAILED", False)])
def test_run_that_could_not_say_why_it_failed(
    house: House, submitter: Submitter, monkeypatch: pytest.MonkeyPatch, state: str, final: bool
) -> None:
    """A crash counts against its capture; a run that never began with it does not."""
    monkeypatch.setattr("tasks.store.claims.RETRY_BASE", timedelta(0))
    name = state.lower()
    house.put(name, WHOLE)
    house.run(name)
    for attempt in 1, 2, 3:
        run = next(run for run in house.runs(name) if run["state_type"] == "SCHEDULED")
        assert run["idempotency_key"].endswith(f"/{attempt}")
        house.end(run, state)
        with ThreadPoolExecutor(8) as pool:
            found = {each.state for each in pool.map(submitter.submit, [f"s3://captures/{name}"] * 8)}
        assert len(house.runs(name)) == attempt + (attempt < 3 or not final), found
    found = swept(submitter, name)
    assert found.state == ("quarantined" if final else "submitted")
    if final:
        assert "so it was" in found.reason
        house.put(name, manifest(FILES | {"transforms.json": b"{}\n"}) | {"transforms.json": b"{}\n"})
        wait_for("a run of the new content", lambda: len(house.runs(name)) == 4)


def test_failed_upload_waits_before_it_is_tried_again(
    house: House, submitter: Submitter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.store.claims.RETRY_BASE", RETRY_LIMIT)  # a minute may be over on a busy machine
    house.put("later", WHOLE)
    house.end(house.run("later"), "CRASHED")
    for _ in range(3):
        assert swept(submitter, "later").state == "waiting"
    assert len(house.runs("later")) == 1


def test_every_dialect_reaches_the_server(house: House) -> None:
    house.stop("receiver")
    for dialect in DIALECTS:
        house.put(f"by {dialect}", WHOLE)
    house.start_receiver()
    for dialect, body_of in DIALECTS.items():
        body = body_of("captures", f"by {dialect}/manifest.json")
        assert httpx.post(f"{house.receiver}/notify", json=body, timeout=60).status_code == 401
        assert house.runs(f"by {dialect}") == []
        assert httpx.post(f"{house.receiver}/notify", json=body, headers=house.bearer, timeout=60).status_code == 200
        house.run(f"by {dialect}")


def test_flood_takes_no_memory(house: House) -> None:
    """Of calls that are not signed, too large, or name nothing; half of them at once."""
    calls: list[dict[str, Any]] = [
        {"json": aws("captures", "flood/_COMPLETE")},
        {"content": b" " * 2**21, "headers": house.bearer},
        {"content": b" " * 2**19, "headers": house.bearer},
        {"json": aws("other", "x" * 1000), "headers": house.bearer},
        {"content": b" " * 2**19, "headers": {"X-Signature": "forged"}},
    ]

    def flood(count: int) -> Counter[int]:
        with httpx.Client(timeout=60) as client, ThreadPoolExecutor(16) as pool:
            answers = pool.map(
                lambda n: _status(client, f"{house.receiver}/notify", calls[n % len(calls)]), range(count)
            )
            return Counter(answers)

    flood(100)
    before = house.receiver_memory()
    answers = flood(1500)
    assert {401, 413, 400, 200} <= answers.keys(), answers
    assert house.receiver_memory() < before + 32 * 2**20
    assert house.runs("flood") == []
    assert house.notify("nothing/_COMPLETE") in (200, 429)


def _status(client: httpx.Client, url: str, call: dict[str, Any]) -> int:
    """0 where the receiver hung up on what is too large."""
    try:
        return client.post(url, **call).status_code
    except httpx.TransportError:
        return 0


def test_event_from_elsewhere_starts_a_sweep_of_its_prefix(house: House) -> None:
    event = {
        "id": "0b0a4f5e-8a8e-4a53-9b42-5b3a8e5f0001",
        "occurred": datetime.now(UTC).isoformat(),
        "event": "capture.uploaded",
        "resource": {"prefect.resource.id": "s3://captures/day 1"},
    }
    httpx.post(f"{house.server}/events", json=[event]).raise_for_status()

    def sweeps() -> list[dict[str, Any]]:
        found = post(house.server, "/flow_runs/filter", flows={"name": {"any_": ["sweep"]}})
        return [run for run in found if not run["auto_scheduled"]]

    (run,) = wait_for("the sweep", sweeps)
    assert run["parameters"] == {"watched": "s3://captures/day 1"}
    assert ask(house.server, "/deployments/name/sweep/default")["schedules"][0]["active"]
