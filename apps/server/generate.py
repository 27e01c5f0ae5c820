"""Chat and completions: a request becomes jobs for the engine, and their events an answer or a stream."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mlx_hiermem.apps.server.answers import Answer, ChatAnswer, CompletionAnswer, sources_json, usage_json
from mlx_hiermem.apps.server.calls import CallingReply
from mlx_hiermem.apps.server.catalogue import Catalogue, Named, has
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.follow import Usage, follow, until_first_piece
from mlx_hiermem.apps.server.job import Job, Length, Started
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
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, ArgumentError, ChatTemplateError
from mlx_hiermem.grammar import Grammar
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.prompt import begin
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection
from mlx_hiermem.source_search import messages_with, text_with
from mlx_hiermem.tokenizer import spells_control

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


class _Prompt(NamedTuple):
    """A prompt's tokens, the user's texts in it, and what makes its tokens once its memory is chosen."""

    tokens: list[int]
    texts: list[str]
    encode: Callable[[Selection], list[int]]


@dataclass(frozen=True)
class Service:
    """What the routes share. Clients that name a model they cannot choose get the first, with `any_model`."""

    engine: Engine
    metrics: Metrics
    any_model: bool
    timeout: float  # seconds
    defaults: Mapping[str, Any]  # of requests' fields, where a request does not say

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(self.engine.models, self.any_model)

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        named, asked = self.catalogue.find(asked.model), self.filled(asked)
        jobs = await self.chat_jobs(named, asked)
        answer = ChatAnswer(named.name, named.model.tokenizer, asked.top)
        return await self._answer(asked, request, answer, jobs)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        named, asked = self.catalogue.find(asked.model), self.filled(asked)
        self._check_replies(asked.n * len(asked.prompt))
        prompts = await run_in_threadpool(lambda: [_prompt(named.model, prompt) for prompt in asked.prompt])
        longest = asked.max_tokens or self.defaults.get("max_tokens", COMPLETION)
        length = Length(longest, asked.max_tokens is not None, "prompt")
        jobs = _jobs(named, asked, prompts, length, asked.logprobs)
        answer = CompletionAnswer(named.name, named.model.tokenizer, asked.logprobs)
        return await self._answer(asked, request, answer, jobs)

    async def chat_jobs(self, named: Named, asked: ChatRequest) -> list[Job]:
        """The sequences of a request. Raises ApiError."""
        self._check_replies(asked.n)
        return await run_in_threadpool(chat_jobs, named, asked, self.defaults.get("max_tokens", REPLY))

    def _check_replies(self, count: int) -> None:
        """Raises ApiError for more than there is ever room for, before so many are prepared."""
        if count > self.engine.most:
            message = f"{count} replies are more than the server gives at once ({self.engine.most})"
            raise ApiError(400, message, "n")

    def filled(self, asked: Asked) -> Asked:
        """The request with the server's defaults where it does not say; but for the reply's length, which the
        context may shorten where the client did not ask for it."""
        given = {*asked.model_fields_set, "max_tokens"}
        known = type(asked).model_fields
        more = {name: value for name, value in self.defaults.items() if name in known and name not in given}
        return asked.model_copy(update=more)

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


def chat_jobs(named: Named, asked: ChatRequest, longest: int = REPLY) -> list[Job]:
    """The sequences of a request, with replies of at most `longest` tokens where it does not say.

    Raises ApiError. Takes a moment, so not for the event loop.
    """
    _check_calls(named.model, asked)
    messages = [message.to_template() for message in asked.messages]
    tokens = _chat_tokens(named.model, asked, messages)
    prompt = _Prompt(tokens, asked.questions, partial(_chosen_tokens, named.model, asked, messages, tokens))
    length = Length(asked.wanted_tokens or longest, asked.wanted_tokens is not None, "messages")
    grammar = _grammar(named.model, asked)
    return _jobs(named, asked, [prompt], length, asked.top, grammar)


def _check_calls(model: MemoryModel, asked: ChatRequest) -> None:
    """Raises ApiError where a request has tools, or calls of before, and the model cannot have any."""
    if not asked.has_calls:
        return
    param = "tools" if asked.offered else "messages"
    if not model.tokenizer.has_tool_calling:
        raise ApiError(400, "this model's chat template has no tools", param, "unsupported_parameter")
    written = [asked.offered, *(call.to_template() for message in asked.messages for call in message.tool_calls)]
    if spells_control(model.tokenizer, json.dumps(written, ensure_ascii=False)):
        raise ApiError(400, "tools and calls may not spell a control token of the model", param)


def _reply(model: MemoryModel, asked: Generation, tokens: list[int]) -> ReplyText | CallingReply:
    """What makes text of a sequence's tokens, and calls where it may call."""
    if isinstance(asked, ChatRequest) and asked.offered:
        return CallingReply(model.tokenizer, tokens, asked.stop, asked.offered, asked.parallel_tool_calls)
    return ReplyText(model.tokenizer, tokens, asked.stop)


def _chosen_tokens(
    model: MemoryModel, asked: ChatRequest, messages: list[dict[str, Any]], tokens: list[int], chosen: Selection
) -> list[int]:
    """The prompt with a passage in it, or without what was said before; else the tokens that it has."""
    first = begin(messages, chosen, asked.memory.history)
    if not first and not chosen.passage:
        return tokens
    if first:
        asks = next(number for number, message in enumerate(messages) if message["role"] == "user")
        messages = [*messages[:asks], *messages[first:]]
    return _chat_tokens(model, asked, messages_with(messages, chosen.passage))


def _chat_tokens(model: MemoryModel, asked: ChatRequest, messages: list[dict[str, Any]]) -> list[int]:
    try:
        tools = {"tools": asked.offered} if asked.offered else {}
        return model.chat_tokens(messages, **asked.chat_template_kwargs, **tools)
    except ChatTemplateError as error:
        reason = error.__cause__ or error
        raise ApiError(400, f"the model's chat template refuses the messages: {reason}", "messages") from error
    except AnchorError as error:
        raise ApiError(400, f"{error.what}; use /v1/completions", "messages") from error


def _prompt(model: MemoryModel, prompt: str | list[int]) -> _Prompt:
    """A plain prompt, given as its text or as its token ids."""
    if isinstance(prompt, str):
        tokens = model.tokens(prompt)
        return _Prompt(tokens, [prompt], partial(_plain_tokens, model, prompt, tokens))
    if max(prompt) >= model.vocabulary:
        raise ApiError(400, f"there is no token {max(prompt)}; they end at {model.vocabulary - 1}", "prompt")
    text = model.tokenizer.decode(prompt)
    return _Prompt(prompt, [text], partial(_plain_tokens, model, text, prompt))


def _plain_tokens(model: MemoryModel, text: str, tokens: list[int], chosen: Selection) -> list[int]:
    return model.tokens(text_with(text, chosen.passage)) if chosen.passage else tokens


def _grammar(model: MemoryModel, asked: ChatRequest) -> Grammar | None:
    """Takes a moment for a large schema."""
    wanted = asked.response_format
    schema = wanted.schema_wanted if wanted else None
    if schema is None:
        return None
    if asked.offered:
        message = "a reply that is held to JSON cannot call tools; give one of them, or tool_choice none"
        raise ApiError(400, message, "response_format")
    try:
        return model.grammars.json(schema)
    except ArgumentError as error:
        raise ApiError(400, str(error), "response_format") from error


def _jobs(
    named: Named,
    asked: Generation,
    prompts: Sequence[_Prompt],
    length: Length,
    top: int | None,
    grammar: Grammar | None = None,
) -> list[Job]:
    """`n` for each prompt, which share a queue. With a seed each reply has a seed of its own, or all were equal."""
    events, jobs = asyncio.Queue[Any](), list[Job]()
    for prompt in prompts:
        job = _job(named, asked, prompt, length, top, events)
        for number in range(asked.n):
            seed = None if asked.seed is None else (asked.seed + number) % 2**64
            reply = _reply(named.model, asked, prompt.tokens)
            sampling = replace(job.sampling, seed=seed, grammar=grammar)
            jobs.append(replace(job, reply=reply, sampling=sampling, counted=number == 0))
    return jobs


def _job(named: Named, asked: Generation, prompt: _Prompt, length: Length, top: int | None, events: Any) -> Job:
    model, tokens = named.model, prompt.tokens
    if asked.memory.history == "all":  # or the prompt may become shorter
        length.after(len(tokens), model.context)
    memory, blocked = _memory(named, asked.memory)
    if memory.is_routed and not prompt.texts:
        raise ApiError(400, f"memory {memory} is routed by the user's messages, and there are none", "memory")
    sampling = Sampling(
        max_tokens=length.tokens,
        temperature=asked.temperature if asked.top_p else 0.0,  # no mass but the likeliest token's
        top_p=asked.top_p or 1.0,
        top_k=max(asked.top_k, 0),
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias={int(token): bias for token, bias in asked.logit_bias.items()},
        logprobs=top is not None,
        top_logprobs=top or 0,
    )
    try:
        sampling.check_tokens(model.vocabulary)
    except ArgumentError as error:
        raise ApiError(400, str(error), "logit_bias") from error
    reply = _reply(model, asked, tokens)
    return Job(model, tokens, memory, prompt.texts, blocked, sampling, length, reply, events, prompt.encode)


def _memory(named: Named, wish: Wish) -> tuple[MemoryChoice, frozenset[Path]]:
    """The memory that is wanted, by the model's name or the field, and the blocked nodes, which the tree has."""
    bank = named.model.bank
    memory, blocked = wish.memory(bank is not None), paths(wish.blocked)
    if named.memory is not None:
        if "use" in wish.model_fields_set and memory != named.memory:
            message = f"the model's name asks for memory {named.memory}, the field memory for {memory}; take one"
            raise ApiError(400, message, "memory")
        memory = named.memory
    if memory == MemoryChoice.GENERIC and not has(named.model, memory):
        raise ApiError(400, "this model has no generic memory", "memory")
    if memory.has_passage and not has(named.model, memory):
        raise ApiError(400, "this model's bank keeps no sources", "memory")
    for node in blocked:
        if bank is None or not bank.tree.has(node):
            raise ApiError(400, f"the memory has no node {node}", "memory")
    return memory, blocked


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
    """A choice's first and last chunk carry its memory, the last one its sources too.

    An error ends the stream, as an event of its own.
    """
    indices = {job: index for index, job in enumerate(jobs)}
    memories: dict[Job, dict[str, Any]] = {}
    none = {"usage": None} if include_usage else {}

    def chunk(job: Job, event: Started | Piece) -> str:
        if isinstance(event, Started):
            memories[job] = event.memory
            return answer.chunk([answer.opening(indices[job])], **none, memory=event.memory)
        last: dict[str, Any] = {}
        if event.finish_reason:
            last = {"memory": memories[job], "sources": sources_json(event.sources)}
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
