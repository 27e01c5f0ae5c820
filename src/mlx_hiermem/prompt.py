"""A prompt as callers write it, and as a model is asked: its user's words, which are routed, and its token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_hiermem.bank.sources import SourceWindow
from mlx_hiermem.errors import ArgumentError
from mlx_hiermem.selection import Selection
from mlx_hiermem.source_search import messages_with, text_with

Message = Mapping[str, str]  # of a conversation: role and content
Prompt = str | Sequence[Message]
History = Literal["topic", "all"]  # what of a conversation a turn sees: since its memory was taken, or everything


@dataclass(frozen=True)
class Asked:
    """A prompt: the user's words in it, its token ids, and what makes these, with a passage in the prompt."""

    questions: list[str]
    plain: list[int]
    encode: Callable[[SourceWindow | None], list[int]]

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        chat: bool,
        tokens: Callable[[str], list[int]],
        chat_tokens: Callable[[list[dict[str, Any]]], list[int]],
    ) -> Asked:
        """Looks at a prompt and encodes it: as a text, or (`chat`, or a list of messages) in the chat template.

        At once, so that what cannot be asked is refused before anything is chosen or fetched. Raises ArgumentError
        for what is no prompt.
        """
        if not prompt:
            raise ArgumentError("the prompt is empty", "Give a text, or a list of messages.")
        if isinstance(prompt, str) and not chat:
            return cls([prompt], tokens(prompt), lambda passage: tokens(text_with(prompt, passage)))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
        questions = [one["content"] for one in messages if one["role"] == "user"]
        return cls(questions, chat_tokens(messages), lambda passage: chat_tokens(messages_with(messages, passage)))

    def tokens(self, passage: SourceWindow | None) -> list[int]:
        return self.encode(passage) if passage else self.plain


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages of a conversation; ArgumentError for what are none."""
    if not isinstance(messages, Sequence):
        raise ArgumentError(f"{messages!r} is no prompt", "Give a text, or a list of messages.")
    for message in messages:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ArgumentError(f"{message!r} is no message", 'Write {"role": "user", "content": "…"}.')
    return [dict(message) for message in messages]


def begin(messages: Sequence[Mapping[str, Any]], chosen: Selection, history: History) -> int:
    """The first message, behind the system's, that the conversation's last turn sees.

    With `topic`, blocks see nothing of what was said before their path was taken: they were learnt with questions
    that stand alone, and answer worse behind exchanges on other things (benchmarks/history.py).
    """
    turns = chosen.route.turns
    asks = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if history == "all" or not chosen.memory.has_blocks or not chosen.path or not 0 < turns < len(asks):
        return 0
    return asks[-turns]
