"""A prompt with its answer, as a user gives it or a teacher writes it: its forms, its window, whether it is true.

A line of the user's file names a document and has one of four forms, the first two as mlx-lm's trainer takes them:

    {"document": "Gold", "prompt": "The symbol of gold is", "completion": " Au."}
    {"document": "Gold", "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"document": "Gold", "question": "Which symbol does gold have?", "answer": "Au"}
    {"document": "Gold", "text": "Gold, whose symbol is Au, is a metal that does not rust."}

A question is learnt twice, as `Question: … Answer:` and in the chat template: people ask in a chat, and what was
learnt in one form is known less well in the other. They join the rows of self-study, where there are any, in the
window of the document that has most of their words:

    prompts.jsonl   what study.jsonl has, and {"window", "prompt", "answer", "chat", "given": true, ...}

What a teacher wrote is checked against the window that it read. A language model adds what it knows, or believes,
of a subject. Numbers and names are where that shows, and where it harms: a record with a number or a name that the
window and its title do not have is dropped. Words may be inflected (a window about Spain supports "Spanish"), and
small numbers written out. A reply is also checked as a whole. Where most of its words are neither the window's nor
words that any text is made of, it is about something else, or in another language.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import pathlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlx_hiermem.errors import FileError
from mlx_hiermem.files import MALFORMED, parse_json, read_lines
from mlx_hiermem.learn.corpus.corpus import Corpus, not_there
from mlx_hiermem.learn.corpus.formats import clean
from mlx_hiermem.learn.settings import PromptPair
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.tree.probes import names, with_subjects
from mlx_hiermem.learn.work import PROMPTS, STUDY, Row, Work, read_rows, write_rows
from mlx_hiermem.tokenizer import FRAME

FORMS = (
    'A line has a "document", its title or file, and "prompt" and "completion", or "question" and "answer", '
    'or "messages" of a user and an assistant, or a "text".'
)
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
WORD = re.compile(r"[^\W\d_]+")
# Where a sentence may begin, so that a capital need not mean a name.
BEGINS = re.compile(r"(?:^|[.!?:;…]|\n)[\s\"'“‘(\[*-]*")
SHORT = 6  # words, up to which an answer's first word is taken for a name where it has a capital
OWN = 0.45  # share of a reply's words that must be the window's; of a right one 0.67 or more, of a French one 0.2
COUNTED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
COUNTED += "seventeen eighteen nineteen twenty"
WRITTEN = {word: str(number) for number, word in enumerate(COUNTED.split())}
WRITTEN |= {"half": "2", "hundred": "100", "thousand": "1000"}


def read_prompts(file: pathlib.Path) -> tuple[PromptPair, ...]:
    """All prompts of a file. Raises FileError for the first line that is none."""
    found = []
    for number, line in read_lines(file):
        try:
            found.append(parse(line))
        except MALFORMED as error:
            raise FileError(f"line {number} of {file} is no prompt with what follows it", FORMS) from error
    return tuple(found)


def parse(line: str) -> PromptPair:
    """The prompt of a line. Raises ValueError where it has none of the forms."""
    return prompt_of(parse_json(line))


def prompt_of(row: Any) -> PromptPair:
    """The prompt of a line's JSON. Raises ValueError as `parse` does."""
    match row:
        case {"document": str(document), "messages": [{"role": "user"} as asked, {"role": "assistant"} as said]}:
            found = PromptPair(document, str(asked["content"]), str(said["content"]), chat=True)
        case {"document": str(document), "prompt": str(prompt), "completion": str(answer)}:
            found = PromptPair(document, prompt, answer)
        case {"document": str(document), "question": str(question), "answer": str(answer)}:
            found = PromptPair(document, question, answer, framed=True)
        case {"document": str(document), "text": str(text)}:
            found = PromptPair(document, "", text)
        case _:
            raise ValueError("it has none of the forms")
    if not found.answer.strip() or not (found.prompt.strip() or "text" in row):
        raise ValueError("a part of it is empty")
    # JSON may hold halves of characters, which no file and no tokenizer takes.
    return replace(found, document=clean(found.document), prompt=clean(found.prompt), answer=clean(found.answer))


def line_of(one: PromptPair) -> Row:
    """A prompt as a line of the file has it."""
    match one:
        case PromptPair(document, asked, said, chat=True):
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            return {"document": document, "messages": turns}
        case PromptPair(document, asked, said, framed=True):
            return {"document": document, "question": asked, "answer": said}
        case PromptPair(document, "", said):
            return {"document": document, "text": said}
    return {"document": one.document, "prompt": one.prompt, "completion": one.answer}


def about_windows(corpus: Corpus, given: Sequence[PromptPair]) -> list[Row]:
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


def rows_of(one: PromptPair, window: int, subject: str, mark: str) -> list[Row]:
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


# Whether a window supports what a teacher wrote


class Evidence:
    """What a window and its title say, as far as it is compared."""

    def __init__(self, title: str, text: str) -> None:
        said = _plain(f"{title}. {text}")
        self.words = {word.casefold() for word in WORD.findall(said)}
        self._numbers = {_digits(number) for number in NUMBER.findall(said)}
        self._numbers |= {number for word, number in WRITTEN.items() if word in self.words}

    def supports(self, one: PromptPair) -> bool:
        """Whether all numbers and names of a record stand there."""
        prompt, answer = _plain(one.prompt), _plain(one.answer)
        parts = [prompt, answer] if one.framed or one.chat else [f"{prompt}{answer}"]  # a statement is one sentence
        numbers = (number for part in parts for number in NUMBER.findall(part))
        names = [name for part in parts for name in _names(part)]
        if one.framed and len(answer.split()) <= SHORT:
            names += [word for word in WORD.findall(answer)[:1] if word[0].isupper() and not _opens(word)]
        return all(_digits(number) in self._numbers for number in numbers) and all(map(self._has, names))

    def covers(self, records: Iterable[PromptPair]) -> bool:
        """Whether most words of a reply are from there, or such as any text is made of."""
        text = _plain(" ".join(f"{one.prompt} {one.answer}" for one in records))
        words = [word.casefold() for word in WORD.findall(text)]
        known = patterns().function_words | patterns().asking_words
        return sum(word in self.words or word in known for word in words) >= OWN * len(words)

    def _has(self, name: str) -> bool:
        """Whether a word is there, or one that begins like it."""
        name = name.casefold()
        beginning = name[: max(4, len(name) - 3)]
        return name in self.words or (len(name) > 4 and any(word.startswith(beginning) for word in self.words))


def same_words(text: str) -> str:
    """A text by which repetitions are known: its words and numbers, in small letters."""
    return " ".join(re.findall(r"\w+", _plain(text).casefold()))


def _names(text: str) -> Iterator[str]:
    """Words in capitals that do not begin a sentence."""
    begins = {match.end() for match in BEGINS.finditer(text)}
    for match in WORD.finditer(text):
        word = match[0]
        if word[0].isupper() and len(word) > 1 and match.start() not in begins:
            yield word


def _opens(word: str) -> bool:
    """Whether a word begins sentences and names nothing."""
    small = {"yes", "no"} | patterns().function_words
    return word.casefold() in small or patterns().openers.fullmatch(word) is not None


def _plain(text: str) -> str:
    """A text without accents, which people leave out."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))


def _digits(number: str) -> str:
    return number.replace(",", "")
