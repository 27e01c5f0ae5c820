"""A sequence that the engine is asked for, and what it tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass(eq=False)
class Job:
    """One sequence: what is asked, and where its events go. `texts` are the questions that it is routed by.

    `encode` makes the tokens of the prompt once its memory is chosen: with a passage in it, or without what was
    said before.
    """

    model: MemoryModel
    tokens: list[int]
    memory: MemoryChoice
    texts: Sequence[str]
    blocked: frozenset[Path]
    sampling: Sampling
    reply: ReplyText | CallingReply
    events: asyncio.Queue[tuple[Job, Event]]
    encode: Callable[[Selection], list[int]]
    counted: bool = True  # of several replies to one prompt only the first counts its tokens
    chosen: Selection | None = field(default=None, init=False)
    bank: MemoryBank | None = field(default=None, init=False)  # in which it was chosen
    started: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)  # set on the event loop, heeded before the next step
