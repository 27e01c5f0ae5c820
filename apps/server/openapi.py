"""What the server's OpenAPI document (`/openapi.json`) says beside the requests' fields: how answers look."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

ABOUT = """OpenAI's API for a model with hierarchical memories, and the memory's own routes.

Beside what a schema can say there are rules: `tool_call_id` goes with role `tool` only, for example. Whoever breaks
one is answered 400, with a message that names the field. Fields of OpenAI's that change nothing are taken too."""


class Refusal(BaseModel):
    """Of OpenAI's shape; `param` names the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    """What is answered where something cannot be done."""

    error: Refusal


REFUSED: dict[int | str, dict[str, Any]] = {"default": {"model": Refused, "description": "It cannot be done"}}
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole answer, or its events", "content": {"text/event-stream": {}}}
}
TEXT: dict[int | str, dict[str, Any]] = {200: {"description": "Figures", "content": {"text/plain": {}}}}
