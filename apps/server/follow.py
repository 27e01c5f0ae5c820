"""One HTTP request's sequences, from submission to the last piece, a time limit, or the client's leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request

from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.job import Job, Started
from mlx_hiermem.apps.server.metrics import Metrics
from mlx_hiermem.apps.server.refusal import GONE, ApiError, late
from mlx_hiermem.apps.server.text import Piece


@dataclass
class Usage:
    """Tokens of a request, over all of its sequences."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


async def follow(
    request: Request,
    engine: Engine,
    metrics: Metrics,
    jobs: Sequence[Job],
    timeout: float,
    usage: Usage,
) -> AsyncGenerator[tuple[Job, Started | Piece]]:
    """Submits the jobs, which share one queue of events, and yields these events; fills in `usage`.

    Raises ApiError where one of them fails, when `timeout` seconds are over, or when the client goes away. Whatever
    the end, the sequences are out of the engine.
    """
    start, loop, events = time.perf_counter(), asyncio.get_running_loop(), jobs[0].events

    def end(error: ApiError) -> None:
        for job in jobs:
            engine.cancel(job)
        events.put_nowait((jobs[0], error))

    engine.submit(jobs)
    timer = loop.call_later(timeout, end, late(timeout))
    watch = loop.create_task(_watch(request, end))
    generated = dict.fromkeys(jobs, 0)
    left = set(jobs)
    try:
        while left:
            job, event = await events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Started):
                usage.prompt += len(job.tokens) * job.counted
                usage.cached += event.cached_tokens * job.counted
            else:
                if not any(generated.values()):
                    metrics.first_token.observe(time.perf_counter() - start)
                generated[job] = event.generated
                usage.generated = sum(generated.values())
            if isinstance(event, Piece) and event.finish_reason:
                left.discard(job)
            yield job, event
    finally:
        timer.cancel()
        watch.cancel()
        for job in jobs:
            engine.cancel(job)
        metrics.count_tokens(usage.prompt, usage.cached, usage.generated)


async def _watch(request: Request, end: Callable[[ApiError], None]) -> None:
    """Waits for the client to go away, which is heard of even where nothing is being sent."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    end(ApiError(GONE, "the client went away"))


async def until_first_piece(
    events: AsyncIterator[tuple[Job, Started | Piece]],
) -> list[tuple[Job, Started | Piece]]:
    """The events up to the first piece of text: until then a failure can still have a status of its own."""
    seen = []
    async for job, event in events:
        seen.append((job, event))
        if isinstance(event, Piece):
            break
    return seen
