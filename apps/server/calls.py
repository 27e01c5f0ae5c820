"""A reply that may call tools: what the model writes between two marks becomes a call, the rest is text.

Every model has its own marks and its own way to write a call; mlx-lm's parsers know them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_hiermem.apps.server.messages import Called
from mlx_hiermem.apps.server.text import Call, Piece, ReplyText
from mlx_hiermem.batch import Token
from mlx_hiermem.response import held_back


class CallingReply:
    """As `ReplyText`, whose pieces it looks through."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str],
        tools: list[dict[str, Any]],
        several: bool = True,
    ) -> None:
        """With `several` false the reply ends with its first call."""
        # Marks may be special tokens, so these are text here too.
        self._inner = ReplyText(tokenizer, prompt, stops, with_special=True)
        self._start, self._end = tokenizer.tool_call_start, tokenizer.tool_call_end
        self._parse, self._tools, self._several = tokenizer.tool_parser, tools, several
        self._waiting = ""  # text that may become a mark; within a call, the call so far
        self._in_call, self._has_text, self._has_call = False, False, False
        self.text = ""

    def add(self, token: Token) -> Piece | None:
        """What can be shown now; None where that is nothing. After a piece with a finish reason comes no other."""
        piece = self._inner.add(token)
        if piece is None:
            return None
        text, calls = self._split(piece.text, piece.finish_reason is not None)
        self._has_call |= bool(calls)
        self.text += text
        reason = piece.finish_reason
        if calls and not self._several:
            calls, reason = calls[:1], "stop"
        if reason == "stop" and self._has_call:
            reason = "tool_calls"
        if not text and not calls and not piece.tokens and reason is None:
            return None
        return replace(piece, text=text, calls=tuple(calls), finish_reason=reason)

    def _split(self, new: str, last: bool) -> tuple[str, list[Call]]:
        """What is text and what are calls; keeps what cannot be told yet, which at the end is nothing."""
        self._waiting += new
        text, calls = "", list[Call]()
        while (mark := self._end if self._in_call else self._start) and mark in self._waiting:
            before, _, self._waiting = self._waiting.partition(mark)
            if self._in_call:
                unread = self._read(before, calls)
                text += unread and f"{self._start}{unread}{mark}"
            else:
                text += before
            self._in_call = not self._in_call
        if self._in_call:
            if last:  # some models end a call with their reply
                unread, self._waiting = self._read(self._waiting, calls), ""
                text += unread and self._start + unread
        else:
            shown = len(self._waiting) - (0 if last else held_back(self._waiting, [self._start]))
            text, self._waiting = text + self._waiting[:shown], self._waiting[shown:]
        return self._without_lead(text, bool(calls) or self._in_call, last), calls

    def _read(self, written: str, calls: list[Call]) -> str:
        """Takes up the calls that a text between the marks is; returns the text where it is none."""
        try:
            found = self._parse(written, self._tools)
            found = [found] if isinstance(found, dict) else list(found)
            calls += [_call(row) for row in found]
        except Exception:  # the parsers raise whatever they meet
            return written
        return ""

    def _without_lead(self, text: str, at_call: bool, last: bool) -> str:
        """Drops the white space that models write around calls where there is no text."""
        if self._has_text or text.strip():
            self._has_text = True
            return text
        if at_call or self._has_call or last:
            return ""
        self._waiting = text + self._waiting
        return ""


def _call(row: dict[str, Any]) -> Call:
    """Raises ValueError for a call that would be refused when the client sends it back with the next turn."""
    arguments = row.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    called = Called(name=str(row["name"]), arguments="{}" if text == "null" else text)
    return Call(str(row.get("id") or f"call_{uuid.uuid4().hex[:24]}"), called.name, called.arguments)
