"""Who may ask at all: looked at before a byte of a body is read."""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers

from flows.serving.errors import ApiError, too_many
from flows.serving.keys import key_number
from flows.serving.limits import RateLimiter
from tasks.loopback import is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_S = 30.0
"""How long a body may take to come."""

OPEN_PATHS = frozenset({"/health"})


class Gate:
    """ASGI application that passes a request on when key, rate, Host and type of the body are right.

    Without a key the server is on loopback, and everybody there may ask; a page from elsewhere may not, though it runs
    in a browser there: its requests name another Host, or, being JSON, are asked leave for first, which nobody gives.

    Args:
        app: what lies behind.
        keys: one of them must be given, where there are any.
        limiter: by key, or by address where there is no right key.
        body_bytes: the longest body.
    """

    def __init__(self, app: App, keys: Sequence[str], limiter: RateLimiter, body_bytes: int) -> None:
        self._app, self._keys, self._limiter, self._body_bytes = app, keys, limiter, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self._admit(scope, Headers(scope=scope))
        except ApiError as error:
            return await error.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        number = self._check_key(headers) if self._keys else None
        caller = f"key {number}" if number is not None else f"address {(scope.get('client') or ('?',))[0]}"
        wait_s = self._limiter.wait_s(caller)
        if wait_s:
            raise too_many(f"Rate limit reached: {self._limiter.per_minute} requests a minute", wait_s)
        if self._keys and number is None:
            raise _no_key(headers)
        if not self._keys and not is_loopback(f"http://{headers.get('host', '')}"):
            raise ApiError(403, "This server has no key and answers its own address only.", code="wrong_host")
        if scope["method"] == "POST":
            self._check_body(headers)

    def _check_key(self, headers: Headers) -> int | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return key_number(given.strip(), self._keys) if scheme.lower() == "bearer" else None

    def _check_body(self, headers: Headers) -> None:
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The body must be JSON. Fix: -H 'Content-Type: application/json'", code="not_json")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            raise too_large(self._body_bytes)


async def body_within(pieces: AsyncIterable[bytes], most: int) -> bytes:
    """A body, read piece by piece.

    Raises:
        ApiError: it is longer than `most`, and the rest is not read; or it does not come.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in pieces:
                body += piece
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_S:.0f} s.", code="timeout") from None
    return bytes(body)


def too_large(most: int) -> ApiError:
    """413."""
    return ApiError(413, f"The body is longer than {most:,} bytes.", code="request_too_large")


def _no_key(headers: Headers) -> ApiError:
    given = "authorization" in headers
    message = (
        "Incorrect API key provided." if given else "You didn't provide an API key. Fix: Authorization: Bearer KEY"
    )
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
