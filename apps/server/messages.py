"""The turns of a conversation, and the tools that it may call, as OpenAI's clients send them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.strict_model import AnyObject, StrictModel
from mlx_hiermem.files import parse_json

# What comes with a reply, and so is sent back with it, but that the next turn does not see.
REPLY_FIELDS = {"function_call", "audio", "refusal", "annotations", "reasoning_content", "memory", "sources"}


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Function(StrictModel):
    """What a tool is: a function with a JSON schema of its arguments."""

    name: str = Field(min_length=1)
    description: str = ""
    parameters: AnyObject = {}
    strict: bool = False


class Tool(StrictModel):
    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        function = self.function.model_dump(include={"name", "description", "parameters"})
        return {"type": "function", "function": function}


def _only_auto(value: Any) -> Any:
    if value not in ("none", "auto"):
        raise ApiError(400, "tool_choice is auto or none here; the model cannot be made to call", "tool_choice")
    return value


ToolChoice = Annotated[Literal["none", "auto"], BeforeValidator(_only_auto)]


class Called(StrictModel):
    """The function of a call, its arguments as JSON text."""

    name: str = Field(min_length=1)
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str) -> str:
        try:
            if isinstance(parse_json(value or "{}"), dict):
                return value or "{}"
        except ValueError:
            pass
        raise ValueError("it is not a JSON object, as text")


class ToolCall(StrictModel):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: Called

    def to_template(self) -> dict[str, Any]:
        """Templates write the arguments themselves, so they get an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Message(StrictModel):
    """A turn, as clients send it; also a reply as they send it back, with the fields that a reply comes with.

    `name` is taken and not used: chat templates know none.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]
    name: str = ""
    tool_calls: list[ToolCall] = []
    tool_call_id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _sent_back(cls, data: Any) -> Any:
        """A reply's `annotations` and so on say nothing; its content may be null."""
        if not isinstance(data, dict) or data.get("role") != "assistant":
            return data
        for key in ("function_call", "audio", "refusal"):
            if data.get(key):
                raise ApiError(400, f"messages with {key} are not supported; leave them out", "messages")
        data = {key: value for key, value in data.items() if key not in REPLY_FIELDS}
        return data | {"content": data.get("content") or ""}

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's")
        if bool(self.tool_call_id) != (self.role == "tool"):
            raise ValueError("role tool and the field tool_call_id go together")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    def to_template(self) -> dict[str, Any]:
        """As chat templates take it: developer is OpenAI's later word for system."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            turn["tool_calls"] = [call.to_template() for call in self.tool_calls]
        return turn | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})
