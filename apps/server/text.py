"""From tokens to the text that may be shown: whole characters, and nothing that may become a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.batch import Token
from mlx_hiermem.response import held_back
from mlx_hiermem.source_search import Source

TAIL = 4  # tokens of the prompt that the reply's first ones are decoded behind
LONGEST = 4  # tokens that one character can take: its UTF-8 bytes
UNFINISHED = "\ufffd"  # what a decoder makes of half a character


@dataclass(frozen=True)
class Call:
    """A tool that the model calls, with its arguments as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """A stretch of the reply, with the tokens that begin in it and their places in the reply's text.

    `generated` counts the tokens so far, those included that are not shown.
    """

    text: str
    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    generated: int
    finish_reason: str | None = None
    calls: tuple[Call, ...] = ()
    sources: tuple[Source, ...] | None = None  # of the last piece: what in the bank says the reply


class Detokenizer:
    """Text of one token after the other, held back while a character is not whole.

    mlx-lm's takes away a reply's leading space, which a continued prompt needs; this one decodes each stretch
    behind the one before it, for whichever tokenizer.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], with_special: bool = False) -> None:
        self._tokenizer, self._with_special = tokenizer, with_special
        self._advance(list(prompt[-TAIL:]))

    def add(self, token: int) -> str:
        """The text that this token completes; it may be none."""
        self._new.append(token)
        text = self._text()
        if len(self._new) < LONGEST and (not text or text.endswith(UNFINISHED)):
            return ""
        self._advance(self._new)
        return text

    def rest(self) -> str:
        """What is still held back at the end, without half a character."""
        return self._text().rstrip(UNFINISHED)

    def _advance(self, ids: list[int]) -> None:
        self._before, self._new = ids, list[int]()
        self._known = len(self._decode(ids))

    def _text(self) -> str:
        return self._decode(self._before + self._new)[self._known :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not self._with_special)
        return text


class ReplyText:
    """One reply: `add` its tokens, take the pieces. It ends at the first stop string, which is not part of it."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), with_special: bool = False
    ) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer, prompt, with_special), stops
        self._text, self._shown, self._generated = "", 0, 0
        self._waiting: deque[tuple[int, Token]] = deque()  # tokens not shown yet, and where their text begins

    @property
    def text(self) -> str:
        """What was shown so far."""
        return self._text[: self._shown]

    def add(self, token: Token) -> Piece | None:
        """What can be shown now; None where that is nothing. After a piece with a finish reason comes no other."""
        self._generated += 1
        if token.finish_reason != "stop":  # the end-of-text token has no text
            self._waiting.append((len(self._text), token))
            self._text += self._detokenizer.add(token.token)
        if token.finish_reason:
            self._text += self._detokenizer.rest()
        found = [at for stop in self._stops if (at := self._text.find(stop, self._shown)) >= 0]
        if found:
            return self._show(min(found), "stop")
        if token.finish_reason:
            return self._show(len(self._text), token.finish_reason, everything=True)
        end = len(self._text) - held_back(self._text[self._shown :], self._stops)
        return self._show(end) if end > self._shown else None

    def _show(self, end: int, finish_reason: str | None = None, everything: bool = False) -> Piece:
        text, self._shown = self._text[self._shown : end], end
        rows = []
        while self._waiting and (everything or self._waiting[0][0] < end):
            rows.append(self._waiting.popleft())
        tokens, offsets = tuple(token for _, token in rows), tuple(offset for offset, _ in rows)
        return Piece(text, tokens, offsets, self._generated, finish_reason)
