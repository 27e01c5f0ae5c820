"""Texts for perplexity: a file's documents, each routed as a whole, in windows of which every token counts once."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Sequence

from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.examples import Example
from mlx_hiermem.evaluate.task_file import Row, read_rows, text_in
from mlx_hiermem.files import read_text

WINDOW = 1024  # tokens, or the model's context where that is less
ARTICLE = re.compile(r"(?m)^ ?= (?!=)[^\n]*[^=\n] = ?$")  # WikiText's title of an article: " = Robert Boulter = "


def read_documents(file: pathlib.Path, skip_bad: bool = False) -> list[Example]:
    """WikiText's articles, a JSON line's `text`, or else the file as one document. Raises TaskError."""
    if file.suffix == ".jsonl":
        found, _ = read_rows(file, _document, skip_bad)
    else:
        found = list(_articles(read_text(file, TaskError)))
    if not found:
        raise TaskError(f"{file} has no text")
    return [Example(ident, line, part.strip(), continuations=(part,)) for ident, line, part in found]


def _document(line: int, row: Row) -> tuple[str, int, str]:
    """(id, line, text) of a JSON line."""
    return str(row.get("id", line)), line, text_in(row, "text")


def _articles(text: str) -> Iterator[tuple[str, int, str]]:
    """(title, line, text) of each article; a file without titles is one document."""
    starts = [match.start() for match in ARTICLE.finditer(text)] or [0]
    if text[: starts[0]].strip():
        starts.insert(0, 0)
    line, before = 1, 0
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        line, before = line + text.count("\n", before, start), start
        part = text[start:end]
        if part.strip():
            title = part.lstrip().split("\n", 1)[0].strip(" =")[:60]
            yield f"{number} {title}", line, part


def windows(tokens: Sequence[int], first: int, size: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs of `size` inputs each that predict every token once, the first behind `first`.

    A last window that predicts fewer has the more context, as lm-evaluation-harness has it.
    """
    found = []
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        context = list(tokens[max(0, end - 1 - size) : start]) or [first]
        found.append((context, list(tokens[start:end])))
    return found
