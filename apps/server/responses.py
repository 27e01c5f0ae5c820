"""/v1/responses, OpenAI's later form of a chat: items in, items out, and a response can go on from an earlier one.

A request is turned into one of `/v1/chat/completions` and answered as that is.
"""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mlx_hiermem.apps.server.answers import sources_json
from mlx_hiermem.apps.server.follow import Usage, follow, until_first_piece
from mlx_hiermem.apps.server.generate import Events, Service
from mlx_hiermem.apps.server.items import ResponsesRequest, to_turns
from mlx_hiermem.apps.server.job import Started
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.schema import ChatRequest
from mlx_hiermem.apps.server.text import Call

KEPT = 256  # responses that can be gone on from
KEPT_CHARACTERS = 16_000_000  # of all of them together


class Stored:
    """What was said up to each response, the oldest forgotten first. Nothing of it is written to disk."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[list[dict[str, Any]], dict[str, Any], int]] = OrderedDict()
        self._size = 0

    def put(self, turns: list[dict[str, Any]], response: dict[str, Any]) -> None:
        size = len(json.dumps(turns)) + len(json.dumps(response))
        self._kept[response["id"]] = (turns, response, size)
        self._size += size
        while self._kept and (len(self._kept) > KEPT or self._size > KEPT_CHARACTERS):
            self._size -= self._kept.popitem(last=False)[1][2]

    def get(self, name: str, param: str | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """(turns with the reply, the response). Raises ApiError where it is not there any more."""
        if name not in self._kept:
            message = f"there is no response '{name}' here; the newest {KEPT} are kept while the server runs"
            raise ApiError(404, message, param, "response_not_found")
        turns, response, _ = self._kept[name]
        return turns, response

    def drop(self, name: str) -> None:
        self.get(name)
        self._size -= self._kept.pop(name)[2]


@dataclass
class Growing:
    """One response while it is written: its items so far, and the event of each change."""

    head: dict[str, Any]
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pending: list[Call] = field(default_factory=list)  # calls that come after the message
    output: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""  # its id
    number: int = 0

    def event(self, kind: str, **more: Any) -> str:
        data = {"type": kind, "sequence_number": self.number, **more}
        self.number += 1
        return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def opening(self) -> Iterator[str]:
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=self.head | {"status": "in_progress", "output": []})

    def add_text(self, text: str) -> Iterator[str]:
        """A piece of the message, which begins with its first."""
        if not self.text:
            self.message = f"msg_{uuid.uuid4().hex}"
            item = _message(self.message, "", "in_progress") | {"content": []}
            yield self.event("response.output_item.added", output_index=len(self.output), item=item)
            yield self.event("response.content_part.added", **self._place(), part=_part(""))
        self.text += text
        yield self.event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def end_text(self, status: str = "completed") -> Iterator[str]:
        if not self.text:
            return
        item = _message(self.message, self.text, status)
        yield self.event("response.output_text.done", **self._place(), text=self.text, logprobs=[])
        yield self.event("response.content_part.done", **self._place(), part=_part(self.text))
        yield self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)

    def add_call(self, call: Call) -> Iterator[str]:
        item = _call(call)
        place = {"item_id": item["id"], "output_index": len(self.output)}
        begun = item | {"arguments": "", "status": "in_progress"}
        yield self.event("response.output_item.added", output_index=len(self.output), item=begun)
        yield self.event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self.event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        yield self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.calls.append(call)
        self.output.append(item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.message, "output_index": len(self.output), "content_index": 0}

    @property
    def turn(self) -> dict[str, Any]:
        """The reply as a turn of a chat."""
        calls = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in self.calls
        ]
        return {"role": "assistant", "content": self.text, "tool_calls": calls}


class Responses:
    def __init__(self, service: Service) -> None:
        self.service, self.stored = service, Stored()

    async def answer(self, asked: ResponsesRequest, request: Request) -> Response:
        service, before = self.service, list[dict[str, Any]]()
        if asked.previous_response_id:
            before, _ = self.stored.get(asked.previous_response_id, "previous_response_id")
        turns = [*before, *to_turns(asked.input)]
        chat = service.filled(_chat(asked, turns))
        named = service.catalogue.find(asked.model)
        jobs = await service.chat_jobs(named, chat)
        head = asked.echo() | {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "model": named.name}
        growing = Growing(head | {"created_at": int(time.time()), "usage": None, "error": None})
        usage = Usage()
        events = follow(request, service.engine, service.metrics, jobs, service.timeout, usage)
        writing = self._write(events, growing, usage, turns, asked.store)
        if not asked.stream:
            async with aclosing(writing):
                async for _ in writing:
                    pass
            return JSONResponse(growing.head)
        try:
            seen = await until_first_piece(events)
        except BaseException:
            await events.aclose()
            raise
        writing = self._write(_again(seen, events), growing, usage, turns, asked.store)
        return StreamingResponse(
            _stream(writing, growing), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    async def _write(
        self, events: Events, growing: Growing, usage: Usage, turns: Sequence[dict[str, Any]], store: bool
    ) -> AsyncGenerator[str]:
        """The events of a response; at the end its head is the whole response, and is kept."""
        for event in growing.opening():
            yield event
        memory, reason, found = dict[str, Any](), None, None
        async with aclosing(events):
            async for _, piece in events:
                if isinstance(piece, Started):
                    memory = piece.memory
                    continue
                if piece.text:
                    for event in growing.add_text(piece.text):
                        yield event
                reason, found = piece.finish_reason, piece.sources
                growing.pending += piece.calls
        status = "incomplete" if reason == "length" else "completed"
        for event in growing.end_text(status):
            yield event
        for call in growing.pending:
            for event in growing.add_call(call):
                yield event
        growing.head |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": growing.output,
            "usage": _usage(usage),
            "memory": memory,
            "sources": sources_json(found),
        }
        if store:
            self.stored.put([*turns, growing.turn], growing.head)
        yield growing.event(f"response.{status}", response=growing.head)


def _chat(asked: ResponsesRequest, turns: list[dict[str, Any]]) -> ChatRequest:
    """The same as a chat. What is wrong with it is told by the names that a response has."""
    told = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    try:
        return ChatRequest.model_validate({"messages": [*told, *turns], **asked.chat_fields()})
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        names = {"max_completion_tokens": "max_output_tokens", "messages": "input", "response_format": "text"}
        field, *rest = first["loc"] or ("",)
        raise RequestValidationError([first | {"loc": ("body", names.get(field, field), *rest)}]) from error


async def _again(seen: Sequence[Any], events: Events) -> Any:
    async with aclosing(events):
        for each in seen:
            yield each
        async for each in events:
            yield each


async def _stream(writing: AsyncIterator[str], growing: Growing) -> AsyncIterator[str]:
    """An error ends the stream, as an event of its own."""
    try:
        async for event in writing:
            yield event
    except ApiError as error:
        body = error.body["error"]
        yield growing.event("error", code=body["code"], message=body["message"], param=body["param"])


def _message(name: str, text: str, status: str) -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: Call) -> dict[str, Any]:
    row = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "completed"} | row


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.generated,
    }
