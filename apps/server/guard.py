"""Who may ask, and how much: middleware in front of every route.

With a key everything but the page's files and /health needs it. Without one the server listens on this machine
only, and two doors are still shut: a web page elsewhere could have its own name point to this machine (DNS
rebinding), so the Host must be this machine's; and it could post to this machine, so a browser's Origin must be
the same. Bodies are bounded, whatever their Content-Length says.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_hiermem.apps.server.address import is_loopback
from mlx_hiermem.apps.server.refusal import ApiError

SAFE = {  # added to every answer
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
DISCARDED, DISCARDING = 16 << 20, 2.0  # bytes and seconds, at most, of a body that is too large


class Guard:
    """`timeout` bounds the seconds that a body may take to arrive."""

    def __init__(self, app: ASGIApp, api_key: str, max_request_bytes: int, timeout: float) -> None:
        self.app, self.api_key, self.max_request_bytes, self.timeout = app, api_key, max_request_bytes, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            if error.status == 413 and "expect" not in Headers(scope=scope):  # else the client waits with its body
                await _discard(receive)
            return await refused(error)(scope, receive, safely)
        await self.app(scope, self._bounded(receive), safely)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not to be answered."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_request_bytes:
            raise self._too_large()
        if self.api_key:
            if not _is_open(scope["path"]):
                self._check_key(headers.get("authorization", ""))
            return
        host = headers.get("host", "")
        if not is_loopback(_name(f"//{host}")):
            raise ApiError(403, f"this server answers to localhost, not to '{host}', without an API key")
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host:
            raise ApiError(403, "web pages from elsewhere may not use this server")

    def _check_key(self, authorization: str) -> None:
        kind, _, key = authorization.partition(" ")
        # Header bytes arrive as Latin-1; comparing takes as long for a wrong key as for the right one.
        right = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    def _bounded(self, receive: Receive) -> Receive:
        """The body's bytes are counted, and its arrival is timed; afterwards only the client's leaving is heard."""
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.timeout

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request's body did not arrive in time") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.max_request_bytes:
                error = self._too_large()
                if not complete:
                    await _discard(receive)
                raise HTTPException(error.status) from error  # no other exception passes through FastAPI unchanged
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self.max_request_bytes} bytes", code="request_too_large")


async def _discard(receive: Receive) -> None:
    """Reads some more of a body that is too large: a connection that is closed with bytes unread is reset, and the
    client would not see the answer."""
    left = DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDING):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def refused(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


def _name(url: str) -> str:
    """The host of a URL, without port and brackets."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _netloc(url: str) -> str | None:
    """Host and port of a URL; None where it is none."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _is_open(path: str) -> bool:
    return path in ("/", "/health") or path.startswith("/page/")
