"""What the server answers when it cannot do what was asked: a status, and a body in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mlx_hiermem.errors import HierMemError

GONE = 499  # the client went away: nobody reads this answer, but the metrics count it
RETRY_AFTER = 2  # seconds

log = logging.getLogger(__name__)


class ApiError(HierMemError):
    """`param` names the request's field that is wrong; `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.param, self.code = status, param, code
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        # A name that came with the request may hold what is not Unicode text, and could not be sent back.
        message, param = (
            text and text.encode("utf-8", "replace").decode("utf-8") for text in (str(self), self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        match self.status:
            case 401:
                return {"WWW-Authenticate": "Bearer"}
            case 413:
                return {"Connection": "close"}  # the rest of the body is not read
            case 503:
                return {"Retry-After": str(RETRY_AFTER)}
        return {}


def late(seconds: float) -> ApiError:
    """What the client is told whose request took longer than it may."""
    return ApiError(503, f"the request took longer than {seconds:g} s", code="timeout")


@asynccontextmanager
async def in_time(seconds: float) -> AsyncIterator[None]:
    """Raises ApiError where what is done within takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise late(seconds) from None


def unexpected(error: Exception) -> ApiError:
    """What the client is told of an error that nobody foresaw; the log has the rest."""
    log.error("unexpected error", exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}; the server's log has more", code="internal_error")
