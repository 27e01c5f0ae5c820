"""A conversation: its messages, the path it is on, and the KV cache that goes with that path.

Each turn is routed by what the user just said. After a change of path only the first memory layer's inputs
would still be right, so the whole history is prefilled again; on the same path the cache goes on.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_hiermem.model import MemoryModel, Selection

Message = dict[str, str]


@dataclass
class Session:
    """`ask` streams a reply and remembers it.

    `memory` is none, generic, fetched or a path; by default fetched where the model has a bank.
    """

    model: MemoryModel
    memory: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    prefilled: int = 0  # tokens of the last turn's prompt that had to be computed

    def __post_init__(self) -> None:
        self.memory = self.memory or ("fetched" if self.model.bank else "none")
        self._cache: list[Any] = []
        self._cached: list[int] = []  # the tokens whose keys and values are in the cache
        self._key: tuple[str, ...] = ()  # the blocks that they were computed under

    @property
    def selection(self) -> Selection:
        return self.model.selection

    def ask(self, text: str) -> Generator[str, None, None]:
        """Streams the reply. A reply that is broken off keeps what was said so far."""
        self.messages.append({"role": "user", "content": text})
        reply, generated = "", []
        try:
            self.model.select(self.memory, text)
            tokens = self.model.chat_tokens(self.messages)
            rest = self._reuse(tokens)
        except BaseException:
            self.messages.pop()  # nothing was asked after all
            raise
        try:
            for response in self.model.responses(rest, self.max_tokens, self.temperature, prompt_cache=self._cache):
                generated.append(response.token)
                reply += response.text
                yield response.text
        finally:
            self._cached = (tokens + generated)[: self._cache[0].offset]
            self.messages.append({"role": "assistant", "content": reply})

    def reset(self) -> None:
        """Forgets the conversation."""
        self.messages.clear()
        self._cache, self._cached = [], []

    def _reuse(self, tokens: list[int]) -> list[int]:
        """Makes the cache a prefix of `tokens`, as long as it can be; returns the tokens still to compute."""
        shared = 0
        if self._cache and self._key == self.selection.blocks:
            pairs = zip(self._cached, tokens[:-1], strict=False)  # the last token is always computed
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._cached), len(tokens) - 1))
        surplus = len(self._cached) - shared
        if not shared or (surplus and not can_trim_prompt_cache(self._cache)):
            self._cache, shared = make_prompt_cache(self.model.anchor), 0
        elif surplus:
            trim_prompt_cache(self._cache, surplus)
        self._key, self.prefilled = self.selection.blocks, len(tokens) - shared
        return tokens[shared:]
