"""What /v1/responses takes: items, which become the turns of a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.strict_model import AnyObject, StrictModel

# Fields that change nothing about the answer, and those that are refused but for these values.
HARMLESS = {"metadata", "user", "safety_identifier", "prompt_cache_key", "service_tier"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "include": ([],),
    "reasoning": (),
    "truncation": ("disabled",),
    "background": (False,),
    "top_logprobs": (0,),
    "max_tool_calls": (),
    "prompt": (),
    "conversation": (),
}
FORWARDED = (
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "memory",
    "parallel_tool_calls",
)


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class Format(StrictModel):
    """Of `text.format`: the schema lies beside the type here."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str = ""
    strict: bool = False
    json_schema: AnyObject | None = Field(None, alias="schema")


class Text(StrictModel):
    format: Format = Field(default_factory=lambda: Format.model_validate({}))
    verbosity: Literal["medium"] = "medium"


class FunctionTool(StrictModel):
    """A function, without the wrapping that a chat has."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str = ""
    parameters: AnyObject = {}
    strict: bool = False


class ResponsesRequest(StrictModel):
    """POST /v1/responses"""

    input: Annotated[
        list[AnyObject],
        BeforeValidator(_as_items, json_schema_input_type=str | list[AnyObject]),
        Field(min_length=1),
    ]
    model: str = ""
    instructions: str = ""
    previous_response_id: str = ""
    stream: bool = False
    store: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    text: Text = Text()
    tools: list[FunctionTool] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool | None = None
    memory: Any = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key, value in data.items():
            if key in NEUTRAL and value is not None and value not in NEUTRAL[key]:
                raise ApiError(400, f"{key} is not supported; leave it out", key, "unsupported_parameter")
        return {key: value for key, value in data.items() if key not in HARMLESS and key not in NEUTRAL}

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat that this is, without its messages; the chat's own checks apply to them."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in FORWARDED}
        fields["max_completion_tokens"], form = self.max_output_tokens, self.text.format
        fields["response_format"] = {"type": form.type}
        if form.json_schema is not None:
            fields["response_format"]["json_schema"] = {"name": form.name, "schema": form.json_schema}
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type", "strict"})} for tool in self.tools
        ]
        return {name: value for name, value in fields.items() if value is not None} | {
            "tool_choice": self.tool_choice
        }

    def echo(self) -> dict[str, Any]:
        """What a response repeats of its request."""
        form = self.text.format
        schema = {"name": form.name, "schema": form.json_schema, "strict": form.strict}
        return {
            "instructions": self.instructions or None,
            "previous_response_id": self.previous_response_id or None,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "text": {"format": {"type": form.type} | (schema if form.type == "json_schema" else {})},
            "tools": [tool.model_dump() for tool in self.tools],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "truncation": "disabled",
            "metadata": {},
        }


def to_turns(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat. Raises ApiError for an item that is none."""
    turns: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and "role" in item:
            turns.append({"role": item["role"], "content": _content(item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if turns and turns[-1]["role"] == "assistant":  # of one reply
                turns[-1] = turns[-1] | {"tool_calls": [*turns[-1].get("tool_calls", []), call]}
            else:
                turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            turns.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":  # of another model: the next turn does not see it
            raise ApiError(400, f"items of type {kind} are not supported", "input", "unsupported_parameter")
    return turns


def _content(content: Any) -> Any:
    """Text, or a chat's parts of text: here they are input_text or output_text."""
    if not isinstance(content, list):
        return content
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text"):
            raise ApiError(400, f"content of type {kind} is not supported", "input", "unsupported_parameter")
        found.append({"type": "text", "text": part.get("text")})
    return found
