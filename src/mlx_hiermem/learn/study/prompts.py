"""Prompts that the user gives: what is to be said, and in which words, is known better than self-study can guess.

A line of the file names a document and has one of four forms, the first two as mlx-lm's trainer takes them:

    {"document": "Gold", "prompt": "The symbol of gold is", "completion": " Au."}
    {"document": "Gold", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"document": "Gold", "question": "Which symbol does gold have?", "answer": "Au"}
    {"document": "Gold", "text": "Gold, whose symbol is Au, is a metal that does not rust."}

A question is learnt twice, as `Question: … Answer:` and in the chat template: people ask in a chat, and what was
learnt in one form is known less well in the other. They join the rows of self-study, where there are any, in the
window of the document that has most of their words:

    prompts.jsonl   what study.jsonl has, and {"window", "prompt", "answer", "chat", "given": true, ...}
"""

from __future__ import annotations

import hashlib
import heapq
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mlx_hiermem.errors import FileError
from mlx_hiermem.files import MALFORMED, parse_json, read_lines
from mlx_hiermem.learn.corpus.corpus import Corpus, not_there
from mlx_hiermem.learn.settings import Prompt
from mlx_hiermem.learn.tree.probes import names, with_subjects
from mlx_hiermem.learn.work import PROMPTS, STUDY, Row, Work, read_rows, write_rows
from mlx_hiermem.tokenizer import FRAME

FORMS = (
    'A line has a "document", its title or file, and "prompt" and "completion", or "question" and "answer", '
    'or "messages" of a user and an assistant, or a "text".'
)


def read_prompts(file: pathlib.Path) -> tuple[Prompt, ...]:
    """All prompts of a file. Raises FileError for the first line that is none."""
    found = []
    for number, line in read_lines(file):
        try:
            found.append(parse(line))
        except MALFORMED as error:
            raise FileError(f"line {number} of {file} is no prompt with what follows it", FORMS) from error
    return tuple(found)


def parse(line: str) -> Prompt:
    """The prompt of a line. Raises ValueError where it has none of the forms."""
    return prompt_of(parse_json(line))


def prompt_of(row: Any) -> Prompt:
    """The prompt of a line's JSON. Raises ValueError as `parse` does."""
    match row:
        case {"document": str(document), "messages": [{"role": "user"} as asked, {"role": "assistant"} as said]}:
            found = Prompt(document, str(asked["content"]), str(said["content"]), chat=True)
        case {"document": str(document), "prompt": str(prompt), "completion": str(answer)}:
            found = Prompt(document, prompt, answer)
        case {"document": str(document), "question": str(question), "answer": str(answer)}:
            found = Prompt(document, question, answer, framed=True)
        case {"document": str(document), "text": str(text)}:
            found = Prompt(document, "", text)
        case _:
            raise ValueError("it has none of the forms")
    if not found.answer.strip() or not (found.prompt.strip() or "text" in row):
        raise ValueError("a part of it is empty")
    return found


def line_of(one: Prompt) -> Row:
    """A prompt as a line of the file has it."""
    match one:
        case Prompt(document, asked, said, chat=True):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            return {"document": document, "messages": turns}
        case Prompt(document, asked, said, framed=True):
            return {"document": document, "question": asked, "answer": said}
        case Prompt(document, "", said):
            return {"document": document, "text": said}
    return {"document": one.document, "prompt": one.prompt, "completion": one.answer}


def about_windows(corpus: Corpus, given: Sequence[Prompt]) -> list[Row]:
    """The rows of the prompts, in the order of their windows.

    Raises CorpusError where a prompt is about a document that is not there.
    """
    by_document = defaultdict[str, list[int]](list)
    for number, one in enumerate(given):
        by_document[one.document].append(number)
    words = [_words(f"{one.prompt} {one.answer}") for one in given]
    best: list[tuple[int, int, str]] = [(-1, 0, "")] * len(given)  # words in common, window, its subject
    for window, subject in with_subjects(corpus.windows()) if given else ():
        own = {number for name in {window.source, window.title} for number in by_document.get(name, ())}
        said = _words(window.text) if own else set()
        for number in own:
            common = len(words[number] & said)
            if common > best[number][0]:
                best[number] = common, window.id, subject
    for one, (common, _, _) in zip(given, best, strict=True):
        if common < 0:
            raise not_there(one.document, "a prompt")
    rows = [
        row for one, (_, window, of) in zip(given, best, strict=True) for row in rows_of(one, window, of, "given")
    ]
    return sorted(rows, key=_window)


def give(work: Work, rows: Sequence[Row], studied: str) -> str:
    """Stage `prompts`, after that of self-study with the digest `studied`; returns its own digest."""

    def make() -> None:
        if not rows:
            work.path(PROMPTS).unlink(missing_ok=True)
            return
        study = work.path(STUDY)
        own = read_rows(study) if study.exists() else iter(())
        write_rows(work.path(PROMPTS), heapq.merge(own, rows, key=_window))

    stamp = hashlib.sha256(json.dumps(rows).encode()).hexdigest() if rows else None
    return work.stage("prompts", stamp, [studied], make)


def _window(row: Row) -> int:
    return int(row["window"])


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def rows_of(one: Prompt, window: int, subject: str, mark: str) -> list[Row]:
    """What a prompt is learnt as. Without a mark, "given" or "learnt", one question in ten is held out instead."""
    row: dict[str, Any] = {"window": window, "answer": one.answer} | ({mark: True} if mark else {})
    if not one.prompt:
        return [row]  # a text is learnt as it stands
    row |= {"prompt": one.prompt, "chat": one.chat}
    if names(one.answer, subject) and not names(one.prompt, subject):
        row |= {"reversed": True}
    if not one.framed:
        return [row | ({"question": one.prompt} if one.chat and mark != "given" else {})]
    row |= {"both": True}  # these two take turns
    return [row | {"question": one.prompt, "prompt": FRAME.format(one.prompt)}, row | {"chat": True}]
