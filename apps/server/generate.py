"""Chat and completions: a request becomes jobs for the engine, and their events an answer or a stream."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mlx_hiermem.apps.server.answers import Answer, ChatAnswer, CompletionAnswer, usage_json
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.follow import Usage, follow, until_first_piece
from mlx_hiermem.apps.server.job import Job, Started
from mlx_hiermem.apps.server.metrics import Metrics
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.schema import (
    COMPLETION,
    REPLY,
    ChatRequest,
    CompletionRequest,
    Generation,
    Wish,
    paths,
)
from mlx_hiermem.apps.server.text import Piece, ReplyText
from mlx_hiermem.config import MemoryChoice, Path
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling


@dataclass(frozen=True)
class Service:
    """What the routes share. `model` is the name that the server gives to its model."""

    engine: Engine
    metrics: Metrics
    model: str
    timeout: float  # seconds

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        self._check_model(asked)
        tokens = await run_in_threadpool(self._chat_tokens, asked)
        top = asked.top_logprobs if asked.logprobs else None
        job = self._job(asked, tokens, asked.questions, self._reply_length(asked, tokens), top, asyncio.Queue())
        answer = ChatAnswer(self.model, self.engine.model.tokenizer, top)
        return await self._answer(asked, request, answer, [job])

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        self._check_model(asked)
        prompts = await run_in_threadpool(lambda: [self._prompt(prompt) for prompt in asked.prompt])
        length, events = asked.max_tokens or COMPLETION, asyncio.Queue[Any]()
        jobs = [self._job(asked, tokens, [text], length, asked.logprobs, events) for tokens, text in prompts]
        answer = CompletionAnswer(self.model, self.engine.model.tokenizer, asked.logprobs)
        return await self._answer(asked, request, answer, jobs)

    def _check_model(self, asked: Generation) -> None:
        if asked.model and asked.model != self.model:
            raise unknown_model(asked.model, self.model)

    def _chat_tokens(self, asked: ChatRequest) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self.engine.model.chat_tokens([message.to_template() for message in asked.messages])
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses the messages: {error}", "messages") from error
        except AnchorError as error:
            raise ApiError(400, f"{error.what}; use /v1/completions", "messages") from error

    def _prompt(self, prompt: str | list[int]) -> tuple[list[int], str]:
        """Token ids and text of a plain prompt."""
        model = self.engine.model
        if isinstance(prompt, str):
            return model.tokens(prompt), prompt
        if max(prompt) >= vocabulary(model):
            raise ApiError(400, f"there is no token {max(prompt)}; they end at {vocabulary(model) - 1}", "prompt")
        return prompt, model.tokenizer.decode(prompt)

    def _reply_length(self, asked: ChatRequest, tokens: list[int]) -> int:
        """As many tokens as were asked for; else what the context leaves, within bounds."""
        context = self.engine.model.context
        room = max(context - len(tokens), 1) if context else REPLY
        return asked.wanted_tokens or min(REPLY, room)

    def _job(
        self, asked: Generation, tokens: list[int], texts: list[str], length: int, top: int | None, events: Any
    ) -> Job:
        context, model = self.engine.model.context, self.engine.model
        if context and len(tokens) + length > context:
            raise ApiError(
                400,
                f"the prompt's {len(tokens)} tokens and a reply of {length} are more than the model's {context}",
                "prompt" if isinstance(asked, CompletionRequest) else "messages",
                "context_length_exceeded",
            )
        memory, blocked = self._memory(asked.memory)
        if memory == MemoryChoice.FETCHED and not texts:
            raise ApiError(400, "memory fetched is routed by the user's messages, and there are none", "memory")
        sampling = Sampling(
            max_tokens=length,
            temperature=asked.temperature if asked.top_p else 0.0,  # no mass but the likeliest token's
            top_p=asked.top_p or 1.0,
            seed=None if asked.seed is None else asked.seed % 2**64,
            logprobs=top is not None,
            top_logprobs=top or 0,
        )
        reply = ReplyText(model.tokenizer, tokens, asked.stop)
        return Job(tokens, memory, texts, blocked, sampling, reply, events)

    def _memory(self, wish: Wish) -> tuple[MemoryChoice, frozenset[Path]]:
        """The memory that is wanted, and the blocked nodes, which the tree has."""
        bank = self.engine.model.bank
        memory, blocked = wish.memory(bank is not None), paths(wish.blocked)
        if memory == MemoryChoice.GENERIC and (bank is None or bank.manifest.generic is None):
            raise ApiError(400, "this model has no generic memory", "memory")
        for node in blocked:
            if bank is None or not bank.tree.has(node):
                raise ApiError(400, f"the memory has no node {node}", "memory")
        return memory, blocked

    async def _answer(self, asked: Generation, request: Request, answer: Answer, jobs: Sequence[Job]) -> Response:
        usage = Usage()
        events = follow(request, self.engine, self.metrics, jobs, self.timeout, usage)
        if not asked.stream:
            async with aclosing(events):
                return JSONResponse(await _whole(events, answer, jobs, usage))
        try:
            seen = await until_first_piece(events)
        except BaseException:
            await events.aclose()
            raise
        stream = _stream(seen, events, answer, jobs, usage, asked.stream_options.include_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


Events = AsyncGenerator[tuple[Job, Started | Piece]]


async def _whole(events: Events, answer: Answer, jobs: Sequence[Job], usage: Usage) -> dict[str, Any]:
    pieces: dict[Job, list[Piece]] = defaultdict(list)
    memories: dict[Job, dict[str, Any]] = {}
    async for job, event in events:
        if isinstance(event, Started):
            memories[job] = event.memory
        else:
            pieces[job].append(event)
    return answer.whole([pieces[job] for job in jobs], [memories[job] for job in jobs], usage)


async def _stream(
    seen: Sequence[tuple[Job, Started | Piece]],
    events: Events,
    answer: Answer,
    jobs: Sequence[Job],
    usage: Usage,
    include_usage: bool,
) -> AsyncIterator[str]:
    """A choice's first and last chunk carry its memory. An error ends the stream, as an event of its own."""
    indices = {job: index for index, job in enumerate(jobs)}
    memories: dict[Job, dict[str, Any]] = {}
    none = {"usage": None} if include_usage else {}

    def chunk(job: Job, event: Started | Piece) -> str:
        if isinstance(event, Started):
            memories[job] = event.memory
            return answer.chunk([answer.opening(indices[job])], **none, memory=event.memory)
        last = {"memory": memories[job]} if event.finish_reason else {}
        return answer.chunk([answer.delta(indices[job], event)], **none, **last)

    async with aclosing(events):
        for job, event in seen:
            yield chunk(job, event)
        try:
            async for job, event in events:
                yield chunk(job, event)
        except ApiError as error:
            yield f"event: error\ndata: {json.dumps(error.body)}\n\n"
            return
    if include_usage:
        yield answer.chunk([], usage=usage_json(usage))
    yield "data: [DONE]\n\n"


def vocabulary(model: MemoryModel) -> int:
    """Token ids that the anchor has rows for, without those that only pad."""
    config = {**model.config.get("text_config", {}), **model.config}
    return int(config.get("effective_vocab_size") or config.get("vocab_size") or len(model.tokenizer))


def unknown_model(name: str, ours: str) -> ApiError:
    return ApiError(404, f"there is no model '{name}' here; the model is '{ours}'", "model", "model_not_found")
