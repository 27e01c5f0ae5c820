"""Replies of a form: JSON by a schema, which llguidance makes a mask of, token after token.

A grammar says which tokens may come next; all others get no probability. So a reply that comes to its end is valid.
One that `max_tokens` cuts off is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.errors import ArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between the parts of JSON: a space, or a new line and its indentation. Small models otherwise go on with spaces.
WHITESPACE = r"( |\n {0,32}|\n\t{0,8})"


class Grammar:
    """What a reply may be. `processor` makes what one sequence needs."""

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher, self._words = matcher, words

    def processor(self) -> Callable[[mx.array, mx.array], mx.array]:
        """A logits processor for one reply, from its first token on."""
        from llguidance.numpy import fill_next_token_bitmask

        matcher, mask = self._matcher.deep_copy(), np.zeros((1, self._words), np.int32)
        seen: int | None = None

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal seen
            if seen is not None and not matcher.is_stopped():
                matcher.consume_tokens([int(token) for token in np.asarray(tokens[seen:])])
            seen = len(tokens)
            if matcher.is_error():  # after the end nothing is asked for any more, and another row must not suffer
                return logits
            fill_next_token_bitmask(matcher, mask)
            allowed = np.zeros(logits.shape[-1], np.bool_)
            bits = np.unpackbits(mask.view(np.uint8)[0], bitorder="little")[: len(allowed)]
            allowed[: len(bits)] = bits
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return process


class Grammars:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """Takes a moment for a large vocabulary."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "replies by a schema need llguidance", "pip install 'mlx-hiermem[server]' brings it."
            ) from error
        inner = getattr(self._tokenizer, "_tokenizer", self._tokenizer)  # mlx-lm wraps it
        try:
            return from_tokenizer(inner, eos_token=sorted(self._tokenizer.eos_token_ids))
        except ValueError as error:
            raise ArgumentError(f"this model's tokenizer allows no replies by a schema: {error}") from error

    def json(self, schema: Mapping[str, Any] | bool) -> Grammar:
        """Raises ArgumentError for a schema that nothing can meet, or that llguidance does not know."""
        tokens = self._tokens
        from llguidance import LLMatcher

        try:
            text = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise ArgumentError(f"the schema cannot be met: {error}") from error
        matcher = LLMatcher(tokens, text, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise ArgumentError(f"the schema cannot be met: {reason}")
        return Grammar(matcher, (tokens.vocab_size + 31) // 32)
