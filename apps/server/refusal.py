"""What the server answers when it cannot do what was asked: a status, and a body in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from mlx_hiermem.errors import HierMemError

GONE = 499  # the client went away: nobody reads this answer, but the metrics count it
RETRY_AFTER = 2  # seconds


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
