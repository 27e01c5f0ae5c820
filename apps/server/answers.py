"""OpenAI's answers, whole and in chunks, with the fields `memory` and `sources` beside theirs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from mlx_hiermem.apps.server.follow import Usage
from mlx_hiermem.apps.server.text import Call, Piece
from mlx_hiermem.batch import Token
from mlx_hiermem.source_search import Source

LEAST = -9999.0  # stands for a logprob of minus infinity, which JSON does not have


class Answer:
    """What all answers and chunks of one request have in common."""

    prefix = kind = chunk_kind = ""
    one_prompt = False  # whether all choices are replies to one

    def __init__(self, model: str, tokenizer: Any, top: int | None) -> None:
        """`top` is how many of the likeliest tokens are reported beside each; None: no logprobs at all."""
        self.model, self.tokenizer, self.top = model, tokenizer, top
        self._calls: dict[int, int] = {}  # how many a choice has made in a stream
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, pieces: Sequence[Sequence[Piece]], memories: Sequence[dict[str, Any]], usage: Usage) -> Any:
        """One choice for each sequence, from its pieces. Several have a list of memories and of sources."""
        memory = memories[0] if len(memories) == 1 or self.one_prompt else list(memories)
        choices = [self.choice(index, _joined(each)) for index, each in enumerate(pieces)]
        found = [sources_json(each[-1].sources) for each in pieces]
        sources = found[0] if len(found) == 1 else found
        data = {"choices": choices, "usage": usage_json(usage), "memory": memory, "sources": sources}
        return self._head(self.kind) | data

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """One server-sent event."""
        data = self._head(self.chunk_kind) | {"choices": choices} | more
        return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any]:
        """The choice of a sequence's first chunk, before its first text."""
        raise NotImplementedError

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk with text."""
        raise NotImplementedError

    def _text(self, token: int) -> str:
        text: str = self.tokenizer.decode([token])
        return text


class ChatAnswer(Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    one_prompt = True

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.calls:
            message |= {"content": piece.text or None, "tool_calls": [_call_json(call) for call in piece.calls]}
        return self._choice(index, "message", message, piece)

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            first = self._calls.get(index, 0)
            self._calls[index] = first + len(piece.calls)
            rows = [{"index": number} | _call_json(call) for number, call in enumerate(piece.calls, first)]
            delta["tool_calls"] = rows
        return self._choice(index, "delta", delta, piece)

    def _choice(self, index: int, name: str, value: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = None if self.top is None else {"content": self._logprobs(piece), "refusal": None}
        return {"index": index, name: value, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _logprobs(self, piece: Piece) -> list[dict[str, Any]]:
        return [
            self._entry(token.token, token.logprob) | {"top_logprobs": [self._entry(*row) for row in token.top]}
            for token in piece.tokens
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # else a part of a character, whose bytes the tokenizer does not tell
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode()) if whole else None}


class CompletionAnswer(Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None if self.top is None else self._logprobs(piece)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    delta = choice

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        """`text_offset` counts from the beginning of the reply."""
        return {
            "tokens": [self._text(token.token) for token in piece.tokens],
            "token_logprobs": [max(token.logprob, LEAST) for token in piece.tokens],
            "top_logprobs": [self._top(token) for token in piece.tokens] if self.top else None,
            "text_offset": list(piece.offsets),
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest ones, and always the one that was taken."""
        rows = [*token.top, (token.token, token.logprob)]
        return {self._text(other): max(logprob, LEAST) for other, logprob in rows}


def sources_json(sources: Sequence[Source] | None) -> list[dict[str, Any]] | None:
    """Best first; empty where nothing in the leaf says the reply, None where there was nothing to look through."""
    return None if sources is None else [source.to_json() for source in sources]


def _call_json(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.generated,
        "total_tokens": usage.prompt + usage.generated,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _joined(pieces: Sequence[Piece]) -> Piece:
    """A reply as one piece."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(offset for piece in pieces for offset in piece.offsets),
        pieces[-1].generated,
        pieces[-1].finish_reason,
        tuple(call for piece in pieces for call in piece.calls),
    )
