"""A document, and its text in windows: whole sentences, as many as fit into a given number of tokens.

Tokens are the embedder's. It reads the first 256 of a text, so a longer window would be routed by its beginning
only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from mlx_hiermem.learn.settings import CorpusSettings

# A sentence ends with its mark, closing quotes and brackets included, before something that can begin one: a small
# letter can where the mark follows a word too long for an abbreviation. It also ends with a blank line, and scripts
# without spaces end theirs with a mark of their own.
BETWEEN = re.compile(
    r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-z])|(?<=[^\W\d_]{5}[.!?])\s+|(?<=[。！？])|\n\s*\n"
)


@dataclass(frozen=True)
class Document:
    """One document as a reader gives it. `source` says where it was: a file, or a file and a line."""

    source: str
    title: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """What was not learnt, and why, in words for the user."""

    what: str
    why: str


@dataclass(frozen=True)
class Window:
    """A piece of a document that is learnt as a whole: full sentences, up to a number of tokens.

    `id` counts the windows of a corpus from 0, `document` its documents.
    """

    id: int
    document: int
    source: str
    title: str
    text: str


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


def sentences(text: str) -> list[str]:
    """The sentences of a text, white space between them dropped and made single within them."""
    pieces, start = [], 0
    for mark in BETWEEN.finditer(text):
        # What closes the sentence belongs to it.
        pieces.append(text[start : mark.end()])
        start = mark.end()
    pieces.append(text[start:])
    return [sentence for piece in pieces if (sentence := " ".join(piece.split()))]


def split(text: str, tokenizer: Tokenizer, tokens: int = CorpusSettings.tokens) -> Iterator[str]:
    """The windows of a text, each at most `tokens` long. A longer sentence is cut, if possible between words.

    The tokenizer must be one that does not truncate: see `untruncated`.
    """
    if tokenizer.truncation:
        raise ValueError("a tokenizer that truncates loses the ends of long sentences")
    window, used = list[str](), 0
    for sentence in sentences(text):
        for piece, size in _cut(sentence, tokenizer, tokens):
            if window and used + size > tokens:
                yield " ".join(window)
                window, used = [], 0
            window.append(piece)
            used += size
    if window:
        yield " ".join(window)


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
