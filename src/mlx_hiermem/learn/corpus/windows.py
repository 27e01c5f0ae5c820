"""A document, and its text in windows: whole sentences, as many as fit into a given number of tokens.

Tokens are the embedder's. It reads the first 256 of a text, so a longer window would be routed by its beginning
only.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Tokenizer

from mlx_hiermem.learn.settings import CorpusSettings
from mlx_hiermem.sentences import placed


@dataclass(frozen=True)
class Document:
    """One document as a reader gives it. `source` says where it was: a file, or a file and a line.

    `line` is the one at which the text begins, where its lines are those of the file; `pages` are the places in the
    text at which the file's pages begin, where it has pages. `file` is the file's whole path, where it is one.
    """

    source: str
    title: str
    text: str
    line: int = 0
    pages: tuple[int, ...] = ()
    file: str = field(default="", compare=False)

    def place(self, at: int) -> str:
        """Where in the file a character of the text stands: `page 3`, `line 12`; empty where that is not known."""
        if self.pages:
            return f"page {bisect.bisect_right(self.pages, at)}"
        return f"line {self.line + bisect.bisect_left(self._breaks, at)}" if self.line else ""

    @cached_property
    def _breaks(self) -> list[int]:
        return [found.start() for found in re.finditer("\n", self.text)]


@dataclass(frozen=True)
class Skipped:
    """What was not learnt, and why, in words for the user."""

    what: str
    why: str


@dataclass(frozen=True)
class Window:
    """A piece of a document that is learnt as a whole: full sentences, up to a number of tokens.

    `id` counts the windows of a corpus from 0, `document` its documents. `place` is where in the file it begins,
    where that is known, and `file` that file's whole path.
    """

    id: int
    document: int
    source: str
    title: str
    text: str
    place: str = ""
    file: str = field(default="", compare=False)


def untruncated(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads the whole of a text, however long; the embedder's own stops after 256 tokens."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def splintered(text: str, tokenizer: Tokenizer) -> float:
    """Of the tokens of a text's words, the share that only goes on with a word, or stands for an unknown one.

    It tells a language that the embedder's vocabulary was not made for: of English prose 10 to 13 %, of French,
    Italian, Spanish and German 39 to 52, of Japanese, Chinese and Russian more.
    """
    words = " ".join(re.findall(r"[^\W\d_]+", text))
    tokens = tokenizer.encode(words, add_special_tokens=False).tokens
    return sum(token.startswith("##") or token == "[UNK]" for token in tokens) / max(len(tokens), 1)


def split(text: str, tokenizer: Tokenizer, tokens: int = CorpusSettings.tokens) -> Iterator[tuple[int, str]]:
    """The windows of a text, each at most `tokens` long, and where in the text their first sentence begins.

    A longer sentence is cut, if possible between words.

    The tokenizer must be one that does not truncate: see `untruncated`.
    """
    if tokenizer.truncation:
        raise ValueError("a tokenizer that truncates loses the ends of long sentences")
    window, used, start = list[str](), 0, 0
    for begins, sentence in placed(text):
        for piece, size in _cut(sentence, tokenizer, tokens):
            if window and used + size > tokens:
                yield start, " ".join(window)
                window, used = [], 0
            start = start if window else begins
            window.append(piece)
            used += size
    if window:
        yield start, " ".join(window)


def _cut(sentence: str, tokenizer: Tokenizer, tokens: int) -> Iterator[tuple[str, int]]:
    """(piece, its tokens): the whole sentence if it fits."""
    spans = tokenizer.encode(sentence, add_special_tokens=False).offsets
    if len(spans) <= tokens:
        yield sentence, len(spans)
        return
    begin = 0
    while begin < len(spans):
        end = min(begin + tokens, len(spans))
        # Back to the start of a word, unless one word is longer than a window.
        back = end
        while end < len(spans) and back > begin and spans[back][0] == spans[back - 1][1]:
            back -= 1
        end = back if back > begin else end
        yield sentence[spans[begin][0] : spans[end - 1][1]], end - begin
        begin = end
