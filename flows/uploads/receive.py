"""The receiver: takes notifications of a storage over HTTP and submits the captures that they name, before any sweep.

`capture2mesh receive` runs it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from collections.abc import Callable

import uvicorn
from anyio import to_thread
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flows.uploads.notifications import captures_of, created_objects
from tasks.errors import Capture2MeshError, InputError
from tasks.settings import Settings

PARALLEL_SUBMISSIONS = 8
MAX_CONNECTIONS = 128  # uvicorn answers 503 to more: calls that wait take memory
BODY_SECONDS = 10.0
RETRY_AFTER_SECONDS = 10
MINUTE = 60.0

Submit = Callable[[str], object]

log = logging.getLogger(__name__)


def serve(submit: Submit, settings: Settings) -> None:
    """Run the receiver until a signal ends it; raises InputError if a setting is missing."""
    receiver = service(submit, settings)
    # no access log: a token may be part of the URL
    uvicorn.run(
        receiver,
        host=settings.receive_host,
        port=settings.receive_port,
        limit_concurrency=MAX_CONNECTIONS,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


def service(submit: Submit, settings: Settings) -> Starlette:
    """The receiver as an ASGI application; raises InputError if a setting is missing."""
    if not settings.watched:
        raise InputError("CAPTURE2MESH_WATCHED is not set: set it to the URL that captures are uploaded to")
    if not (settings.receive_token or settings.receive_hmac_secret):
        raise InputError(
            "the receiver takes signed calls only: set CAPTURE2MESH_RECEIVE_TOKEN or CAPTURE2MESH_RECEIVE_HMAC_SECRET"
        )
    receiver = Receiver(submit, settings)
    return Starlette(
        routes=[
            Route("/notify", receiver.notify, methods=["POST"]),
            Route("/health", _health, methods=["GET"]),
        ]
    )


class Receiver:
    """Answers to notifications: with 200 when every capture that a notification names has been submitted."""

    def __init__(self, submit: Submit, settings: Settings) -> None:
        self._settings = settings
        self._submissions = Submissions(submit)
        self._taken, self._refused = (Rate(settings.receive_per_minute) for _ in range(2))

    async def notify(self, request: Request) -> Response:
        """Answer a notification: 200 when there is nothing left to do, 503 if the sender should try again."""
        has_token = self._has_token(request)
        if not has_token and "x-signature" not in request.headers:
            return self._refuse()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except (TimeoutError, ClientDisconnect):
            return _answer(408, "the body did not arrive")
        if body is None:
            return _answer(413, f"the body is larger than {self._settings.receive_max_bytes} bytes")
        if not has_token and not self._is_signed(request, body):
            return self._refuse()
        if not self._taken.take():
            return _too_many()
        try:
            capture_urls = captures_of(created_objects(body), self._settings.watched)
        except InputError as error:
            return _answer(400, str(error))
        results = await asyncio.gather(*map(self._submissions.submitted, capture_urls), return_exceptions=True)
        return self._answer_for(capture_urls, results)

    def _answer_for(self, capture_urls: list[str], results: list[BaseException | None]) -> Response:
        again = False
        for capture_url, result in zip(capture_urls, results, strict=True):
            if isinstance(result, Capture2MeshError):
                log.error("%s could not be submitted: %s", capture_url, result)
                again = True
            elif result is not None:
                raise result
        if again:
            return _answer(503, "could not be submitted; send it again", {"retry-after": str(RETRY_AFTER_SECONDS)})
        return _answer(200, f"captures: {len(capture_urls)}")

    def _refuse(self) -> Response:
        """Refuse a call without a valid signature. These calls have their own rate: a flood of them stops no others."""
        if not self._refused.take():
            return _too_many()
        # SNS sends the password of its URL only after a server has asked for it
        return _answer(401, "send the token or a valid X-Signature", {"www-authenticate": 'Basic realm="capture2mesh"'})

    def _has_token(self, request: Request) -> bool:
        """True if a call has the token: as `Bearer`, as the password of `Basic` (SNS), or as `?token=` (Pub/Sub)."""
        if self._settings.receive_token is None:
            return False
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            given = _password(given)
        return _same(given or request.query_params.get("token", ""), self._settings.receive_token)

    def _is_signed(self, request: Request, body: bytes) -> bool:
        """True if X-Signature is the HMAC-SHA256 of the body in hexadecimal digits, with or without `sha256=`."""
        secret = self._settings.receive_hmac_secret
        if secret is None:
            return False
        expected = hmac.new(secret.get_secret_value().encode(), body, hashlib.sha256).hexdigest()
        return _same(request.headers["x-signature"].removeprefix("sha256=").lower(), SecretStr(expected))

    async def _body(self, request: Request) -> bytes | None:
        """The body of a call; None if it is too large. No more than the limit is ever held in memory."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._settings.receive_max_bytes:
                return None
        return bytes(body)


class Submissions:
    """Hands captures to `submit`, some at a time; a capture that comes again while it waits is submitted once."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._turn = asyncio.Semaphore(PARALLEL_SUBMISSIONS)
        self._waiting: dict[str, asyncio.Task[None]] = {}

    async def submitted(self, capture_url: str) -> None:
        """Return when the capture has been submitted after this call; raises what `submit` raised."""
        if capture_url not in self._waiting:
            self._waiting[capture_url] = asyncio.create_task(self._in_turn(capture_url))
        await asyncio.shield(self._waiting[capture_url])

    async def _in_turn(self, capture_url: str) -> None:
        async with self._turn:
            del self._waiting[capture_url]  # this submission may not see files that are written from now on
            await to_thread.run_sync(self._submit, capture_url)


class Rate:
    """A limit on calls, as a bucket of tokens: `per_minute` calls at once, refilled within a minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._tokens, self._at = float(per_minute), time.monotonic()

    def take(self) -> bool:
        """Return whether one more call is within the rate, and count it."""
        now = time.monotonic()
        earned = (now - self._at) * self._per_minute / MINUTE
        self._tokens, self._at = min(self._tokens + earned, self._per_minute), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


async def _health(request: Request) -> Response:
    return _answer(200, "ok")


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _same(given: str, secret: SecretStr) -> bool:
    return hmac.compare_digest(given.encode(), secret.get_secret_value().encode())


def _too_many() -> Response:
    return _answer(429, "too many calls", {"retry-after": str(RETRY_AFTER_SECONDS)})


def _answer(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"message": message}, status, headers)
