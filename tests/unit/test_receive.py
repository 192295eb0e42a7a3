"""The receiver: who is heard, what is answered, and that hints are neither lost nor doubled."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from flows.uploads.receive import Rate, Submissions, service
from tasks.errors import InputError, ServerUnavailable, StorageError
from tasks.settings import Settings
from tests.support.notices import DIALECTS, aws

TOKEN, SECRET = "token-0123456789", "secret-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
BODY = json.dumps(aws("captures", "mug/views/view_000.png")).encode()
MUG = ["s3://captures/mug"]
MAX_BYTES = 10_000


class Calls:
    """A `submit` that remembers its calls, and fails while it is told to."""

    def __init__(self) -> None:
        self.captures: list[str] = []
        self.error: Exception | None = None

    def __call__(self, capture: str) -> None:
        if self.error is not None:
            raise self.error
        self.captures.append(capture)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def client(calls: Calls) -> Iterator[TestClient]:
    with receiver(calls) as client:
        yield client


def receiver(submit: Callable[[str], object], **settings: object) -> TestClient:
    known = {"watched": "s3://captures", "receive_token": TOKEN, "receive_hmac_secret": SECRET}
    return TestClient(service(submit, Settings(**known | {"receive_max_bytes": MAX_BYTES} | settings)))


def signature(body: bytes, secret: str = SECRET) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        (BEARER, ""),
        ({"Authorization": f"bearer {TOKEN}"}, ""),
        ({"Authorization": basic(TOKEN)}, ""),
        ({}, f"?token={TOKEN}"),
        ({"X-Signature": signature(BODY)}, ""),
        ({"X-Signature": f"sha256={signature(BODY)}"}, ""),
        ({"X-Signature": signature(BODY).upper()}, ""),
    ],
)
def test_signed_call_is_heard(client: TestClient, calls: Calls, headers: dict[str, str], query: str) -> None:
    answer = client.post(f"/notify{query}", content=BODY, headers=headers)
    assert (answer.status_code, calls.captures) == (200, MUG)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, ""),
        ({"Authorization": "Bearer wrong"}, ""),
        ({"Authorization": f"Bearer {TOKEN}x"}, ""),
        ({"Authorization": "Bearer "}, ""),
        ({"Authorization": f"Bearer {SECRET}"}, ""),
        ({"Authorization": "Bearer t\u00f6ken".encode()}, ""),
        ({"Authorization": basic("wrong")}, ""),
        ({"Authorization": "Basic !"}, ""),
        ({}, "?token=wrong"),
        ({}, "?token="),
        ({"X-Signature": signature(BODY + b" ")}, ""),
        ({"X-Signature": signature(BODY, "wrong")}, ""),
        ({"X-Signature": ""}, ""),
        ({"X-Signature": "sha256="}, ""),
    ],
)
def test_forged_call_changes_nothing(client: TestClient, calls: Calls, headers: dict[str, str], query: str) -> None:
    answer = client.post(f"/notify{query}", content=BODY, headers=headers)
    assert (answer.status_code, calls.captures) == (401, [])
    assert "www-authenticate" in answer.headers


@pytest.mark.parametrize("other", ["receive_token", "receive_hmac_secret"])
def test_what_is_not_set_signs_nothing(calls: Calls, other: str) -> None:
    client = receiver(calls, **{other: None})
    empty = {"X-Signature": signature(BODY, "")} if other == "receive_hmac_secret" else {"Authorization": "Bearer "}
    for headers in empty, {"Authorization": "Bearer None"}:
        assert client.post("/notify", content=BODY, headers=headers).status_code == 401
    assert calls.captures == []


def test_receiver_without_a_secret_does_not_start(calls: Calls) -> None:
    with pytest.raises(InputError, match="CAPTURE2MESH_RECEIVE_TOKEN"):
        receiver(calls, receive_token=None, receive_hmac_secret=None)
    with pytest.raises(InputError, match="CAPTURE2MESH_WATCHED"):
        receiver(calls, watched="")


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_is_heard(client: TestClient, calls: Calls, dialect: Callable[..., object]) -> None:
    body = json.dumps(dialect("captures", "day 1/müg+%41/views/x.png"))
    assert client.post("/notify", content=body, headers=BEARER).status_code == 200
    assert calls.captures == ["s3://captures/day 1/müg+%41"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 400),
        (b"", 400),
        (b" " * MAX_BYTES, 400),
        (b" " * (MAX_BYTES + 1), 413),
        (json.dumps(aws("other", "mug/views/x.png")).encode(), 200),
        (json.dumps(aws("captures", "../../etc/views/x.png")).encode(), 200),
    ],
)
def test_body_that_names_nothing(client: TestClient, calls: Calls, body: bytes, status: int) -> None:
    assert client.post("/notify", content=body, headers=BEARER).status_code == status
    assert calls.captures == []


def test_body_without_a_length_is_cut_off(client: TestClient, calls: Calls) -> None:
    parts = (b" " * MAX_BYTES for _ in range(10))
    assert client.post("/notify", content=parts, headers=BEARER).status_code == 413
    assert calls.captures == []


@pytest.mark.parametrize("error", [ServerUnavailable("Prefect is down"), StorageError("denied"), InputError("no such")])
def test_sender_is_told_to_try_again(client: TestClient, calls: Calls, error: Exception) -> None:
    calls.error = error
    answer = client.post("/notify", content=BODY, headers=BEARER)
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert str(error) not in answer.text  # it is nobody's business outside
    calls.error = None
    assert client.post("/notify", content=BODY, headers=BEARER).status_code == 200
    assert calls.captures == MUG


def test_flood_of_forged_calls_keeps_nobody_out(calls: Calls) -> None:
    client = receiver(calls, receive_per_minute=5)
    answers = [client.post("/notify", content=BODY).status_code for _ in range(20)]
    assert answers == [401] * 5 + [429] * 15
    answers = [client.post("/notify", content=BODY, headers=BEARER).status_code for _ in range(20)]
    assert answers == [200] * 5 + [429] * 15
    assert calls.captures == MUG * 5


def test_rate_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("flows.uploads.receive.time.monotonic", lambda: now)
    rate = Rate(60)
    assert [rate.take() for _ in range(61)] == [True] * 60 + [False]
    now = 2.0
    assert [rate.take() for _ in range(3)] == [True, True, False]
    now = 1000.0
    assert sum(rate.take() for _ in range(100)) == 60


def test_only_what_is_meant_is_served(client: TestClient) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/notify").status_code == 405
    assert client.get("/docs").status_code == 404


def test_hint_during_a_submission_causes_another_and_waiting_ones_are_one() -> None:
    begun, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def submit(capture: str) -> None:
        seen.append(capture)
        begun.set()
        assert go_on.wait(5)

    async def hints() -> None:
        submissions = Submissions(submit)
        first = [asyncio.create_task(submissions.submitted("a"))]
        while not begun.is_set():
            await asyncio.sleep(0.01)
        # what was uploaded since may not have been listed by the one that runs
        others = [asyncio.create_task(submissions.submitted(f"{name}")) for name in "bcdefghijk"]
        await asyncio.sleep(0.1)
        later = [asyncio.create_task(submissions.submitted("k")) for _ in range(16)]
        again = [asyncio.create_task(submissions.submitted("a")) for _ in range(16)]
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.gather(*first, *others, *later, *again)
        assert not submissions._waiting

    asyncio.run(hints())
    assert sorted(seen) == sorted(["a", *"bcdefghijk", "a"])
