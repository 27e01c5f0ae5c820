"""What may be asked of the server: OpenAI's requests as pydantic models, with the field `memory` beside theirs.

A field that is known but not supported is refused unless it says what happens anyway (`n: 1`); an unknown one is
refused too. Nothing that would change the answer is passed over in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from mlx_hiermem.apps.server.messages import Message, Tool, ToolChoice
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.strict_model import IN_LIST, AnyObject, StrictModel
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.prompt import History

REPLY = 512  # tokens of a chat reply at most, where the request does not say; as for `hiermem chat`
COMPLETION = 16  # the same for a completion; OpenAI's own default
MOST_TEXTS = 2048  # of one request; OpenAI's own limit

# They change nothing about the answer.
HARMLESS = {
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
# What is not supported, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}


# What the server itself gives to a chat template, or to what renders it.
TEMPLATES_OWN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "self", "tokenizer", "reply"),
}
ABOUT = """OpenAI's API for a model with hierarchical memories, and the memory's own routes.

Beside what a schema can say there are rules: `tool_call_id` goes with role `tool` only, for example. Whoever breaks
one is answered 400, with a message that names the field. Fields of OpenAI's that change nothing are taken too."""


def _as_wish(value: Any) -> Any:
    if isinstance(value, str):
        return {"use": value}
    if isinstance(value, list):
        return {"blocked": value}
    if not isinstance(value, dict | None):
        raise ValueError(
            "it is fetched, none, generic, a path, a list of blocked nodes, or {use, blocked, history}"
        )
    return value


def paths(texts: list[str], param: str = "memory") -> frozenset[Path]:
    """Nodes as they are written in a request. Raises ApiError."""
    try:
        return frozenset(map(Path.parse, texts))
    except HierMemError as error:
        raise ApiError(400, str(error), param) from error


class Wish(StrictModel):
    """The field `memory`: a word of `MemoryChoice` or a path; nodes that are closed to this request.

    `history` says what a question that leads to a path of its own sees of what was said before; see `prompt.begin`.
    """

    use: str = "fetched"
    blocked: list[str] = []
    history: History = "all"

    def memory(self, has_bank: bool) -> MemoryChoice:
        """What is wanted; where the model has no bank, fetched is none."""
        try:
            wanted = MemoryChoice.parse(self.use)
        except HierMemError:
            words = ", ".join(MemoryChoice.WORDS)
            message = f"there is no memory '{self.use}'; take {words}, or a path such as 10.7"
            raise ApiError(400, message, "memory") from None
        return MemoryChoice.NONE if wanted == MemoryChoice.FETCHED and not has_bank else wanted


class StreamOptions(StrictModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # it would only pad the stream


class Generation(StrictModel):
    """What chat and plain completions have in common."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], IN_LIST, Field(max_length=4)] = []
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=128)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    top_k: int = Field(0, ge=-1)  # 0, or -1 as vLLM writes it: any token
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    memory: Annotated[Wish, BeforeValidator(_as_wish, json_schema_input_type=str | list[str] | Wish)] = Wish()

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for key, value in data.items():
            if key in cls.model_fields or (key not in NEUTRAL and key not in HARMLESS):
                kept[key] = value
            elif key in NEUTRAL and value is not None and value not in NEUTRAL[key]:
                raise ApiError(400, f"{key} is not supported; leave it out", key, "unsupported_parameter")
        return kept

    @field_validator("logit_bias")
    @classmethod
    def _of_ids(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(token.isdecimal() and token.isascii() for token in value):
            raise ValueError("its keys are token ids")
        return value

    @model_validator(mode="after")
    def _streamed(self) -> Generation:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self


class JsonSchema(StrictModel):
    """OpenAI's wrapping of a schema. Ours is always met, so `strict` changes nothing."""

    name: str = ""
    description: str = ""
    strict: bool = False
    json_schema: AnyObject = Field(alias="schema")


class ResponseFormat(StrictModel):
    """What a reply may be: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema to keep to; None where any text is right."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    tools: list[Tool] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: AnyObject = {}
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true only")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := value.keys() & TEMPLATES_OWN:
            raise ValueError(f"{min(taken)} is not for clients to set")
        return value

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them."""
        return [tool.to_template() for tool in self.tools] if self.tool_choice == "auto" else []

    @property
    def has_calls(self) -> bool:
        """Whether tools were called before, or may be now."""
        return bool(self.offered) or any(message.tool_calls or message.role == "tool" for message in self.messages)

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported; None: no logprobs at all."""
        return self.top_logprobs if self.logprobs else None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def questions(self) -> list[str]:
        """The user's turns, oldest first: what a conversation is routed by."""
        return [message.text for message in self.messages if message.role == "user"]


class CompletionRequest(Generation):
    """POST /v1/completions. `prompt` is one prompt or several, each a text or its token ids."""

    prompt: list[str | list[int]] = Field(min_length=1, max_length=MOST_TEXTS)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before", json_schema_input_type=str | list[int] | list[str | list[int]])
    @classmethod
    def _several(cls, value: Any) -> Any:
        prompts = value if isinstance(value, list) and not all(type(item) is int for item in value) else [value]
        for prompt in prompts:
            ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
            if not prompt or not (ids or isinstance(prompt, str)):
                raise ValueError("a prompt is a text or a list of token ids, and not empty")
        return prompts


class RouteRequest(StrictModel):
    """POST /v1/memory/route. A text, or the messages of a conversation."""

    model: str = ""
    text: str = ""
    messages: list[Message] = []
    blocked: list[str] = []

    @property
    def questions(self) -> list[str]:
        return [self.text] if self.text else [m.text for m in self.messages if m.role == "user"]


class LoadRequest(StrictModel):
    """POST /v1/banks/load: a model's or a bank's folder, or hub id, and the name that clients will use."""

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)


class UnloadRequest(StrictModel):
    """POST /v1/banks/unload"""

    name: str = Field(min_length=1)


class EmbeddingRequest(StrictModel):
    """POST /v1/embeddings. `input` is one text or several."""

    input: Annotated[list[Annotated[str, Field(min_length=1)]], IN_LIST, Field(min_length=1, max_length=MOST_TEXTS)]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str = ""


# What /openapi.json says beside the requests' fields: how answers look


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
