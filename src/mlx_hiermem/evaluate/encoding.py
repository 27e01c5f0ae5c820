"""Examples as tokens: LLM-Foundry's way for its tasks, and whether they fit the model.

The few-shot examples, the context and the continuation are tokenised each on its own, the first with the special
tokens. Where a word is one token together with the space before it, a continuation brings that space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mlx_hiermem.errors import AnchorError
from mlx_hiermem.evaluate.examples import Example
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.tokenizer import encode_text

Tokens = list[int]
NUMBER_ROOM = 8  # tokens that a reply may take beside the answer: "4, so it is …"


@dataclass(frozen=True)
class EncodedPrompt:
    """An example as tokens: pairs (context, continuation) to be scored, or one context to go on from."""

    pairs: tuple[tuple[Tokens, Tokens], ...]
    reply: int = 0  # tokens to generate at most
    shots: int = 0  # tokens of the contexts that are few-shot examples, and what begins a text

    @property
    def length(self) -> int:
        return max(len(context) + len(continuation) for context, continuation in self.pairs) + self.reply

    def cut(self, room: int) -> EncodedPrompt:
        """At most so many tokens: a context loses its beginning."""
        pairs = tuple((c[max(0, len(c) + len(t) + self.reply - room) :], t) for c, t in self.pairs)
        return EncodedPrompt(pairs, self.reply, max(0, self.shots - max(0, self.length - room)))

    def behind(self, passage: Tokens) -> EncodedPrompt:
        """The same with a passage between the few-shot examples and the context."""
        pairs = tuple((c[: self.shots] + passage + c[self.shots :], t) for c, t in self.pairs)
        return replace(self, pairs=pairs)


class Prompter:
    """Tokenises for one model. Raises AnchorError where it has no tokenizer."""

    def __init__(self, model: MemoryModel) -> None:
        if model.tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        self._tokenizer = model.tokenizer
        self.ends = set(model.tokenizer.eos_token_ids)
        bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
        self.first = int(eos if bos is None else bos)  # what a text without a context stands behind
        self._needs_space = len(self.plain(" a")) == 1

    def prompt(self, example: Example, reply: int = 0) -> EncodedPrompt:
        shots = self.special(example.shots)
        contexts = {text: shots + self.plain(text) for text in dict.fromkeys(example.contexts)}
        if not example.continuations:
            return EncodedPrompt(((contexts[example.contexts[0]], []),), reply, len(shots))
        pairs = zip(example.contexts, example.continuations, strict=True)
        paired = tuple((contexts[context], self.continuation(text)) for context, text in pairs)
        return EncodedPrompt(paired, shots=len(shots))

    def longest(self, examples: Iterable[Example]) -> int:
        """Tokens of the longest answer: LLM-Foundry lets a reply be as long as any answer of the task."""
        names = {name for example in examples for name in example.answers}
        longest, more = 0, len(self.special("")) + 1
        for name in sorted(names, key=lambda name: (-len(name.encode()), name)):
            if len(name.encode()) + more < longest:  # no text has more tokens than bytes, but for a first space
                break
            longest = max(longest, len(self.special(name)))
        return longest

    def special(self, text: str) -> Tokens:
        """With the special tokens that begin a text, without those that end it."""
        tokens: Sequence[int] = encode_text(self._tokenizer, text)
        end = len(tokens)
        while end > 1 and tokens[end - 1] in self.ends:
            end -= 1
        return list(tokens[:end])

    def decode(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def plain(self, text: str) -> Tokens:
        """Without special tokens."""
        return encode_text(self._tokenizer, text, special=False)

    def continuation(self, text: str) -> Tokens:
        """With the space before it, where that belongs to its first token."""
        return self.plain(f" {text}" if self._needs_space and not text.startswith(" ") else text)
