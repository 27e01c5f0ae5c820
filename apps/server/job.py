"""A sequence that the engine is asked for, and what it tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_hiermem.apps.server.calls import CallingReply
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.text import Piece, ReplyText
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection


@dataclass(frozen=True)
class Started:
    """A sequence has its memory (as JSON), and so many tokens of its prompt were known."""

    memory: dict[str, Any]
    cached_tokens: int


Event = Started | Piece | ApiError  # an ApiError, or a Piece with a finish reason, is the last


@dataclass(frozen=True)
class Length:
    """How many tokens a reply may have. Where the request does not say, the context may make it fewer."""

    tokens: int
    is_asked: bool
    param: str  # the request's field to shorten where the prompt is too long

    def after(self, prompt: int, context: int | None) -> int:
        """The same after a prompt of so many tokens. Raises ApiError where both do not fit the model's context."""
        if not context:
            return self.tokens
        room = context - prompt
        length = self.tokens if self.is_asked else max(min(self.tokens, room), 1)
        if length > room:
            raise ApiError(
                400,
                f"the prompt's {prompt} tokens and a reply of {length} are more than the model's {context}",
                self.param,
                "context_length_exceeded",
            )
        return length


@dataclass(eq=False)
class Job:
    """One sequence: what is asked, and where its events go. `texts` are the questions that it is routed by.

    `encode` makes the tokens of the prompt once its memory is chosen: with a passage in it, or without what was
    said before. `length` is that of the reply; how much of it the context leaves is known with the prompt.
    """

    model: MemoryModel
    tokens: list[int]
    memory: MemoryChoice
    texts: Sequence[str]
    blocked: frozenset[Path]
    sampling: Sampling
    length: Length
    reply: ReplyText | CallingReply
    events: asyncio.Queue[tuple[Job, Event]]
    encode: Callable[[Selection], list[int]]
    counted: bool = True  # of several replies to one prompt only the first counts its tokens
    chosen: Selection | None = field(default=None, init=False)
    bank: MemoryBank | None = field(default=None, init=False)  # in which it was chosen
    started: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)  # set on the event loop, heeded before the next step

    def take(self, chosen: Selection) -> None:
        """Takes its memory up, and with it its prompt. Raises ApiError where that does not fit the context."""
        self.chosen, self.bank = chosen, self.model.bank
        self.tokens = self.encode(chosen)
        length = self.length.after(len(self.tokens), self.model.context)
        self.sampling = replace(self.sampling, max_tokens=length)
