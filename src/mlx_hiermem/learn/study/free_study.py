"""Free self-study: a model that can write is asked for questions, chats, statements and retellings of each window.

Each window is asked about, form by form, until there are enough tokens of study for each of its own. What a reply
says is kept where the window supports it and where it was not said before. A reply that is of no use is asked for
once more; then it is counted, and done without. The records are those that `hiermem learn --prompts` knows.

Whether a model can write is found out on a few windows of the corpus, not by its name. forms.toml has the forms and
their words. A reply is JSON, perhaps between Markdown's fences or after some thinking aloud.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.files import file_digest
from mlx_hiermem.learn.corpus.formats import clean
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import PromptPair, StudySettings
from mlx_hiermem.learn.study.prompts import Evidence, line_of, same_words
from mlx_hiermem.learn.study.teacher import Replies
from mlx_hiermem.learn.study.writers import Request, Writer
from mlx_hiermem.learn.work import Row
from mlx_hiermem.progress import FractionDone, unheard_fraction

FILE = pathlib.Path(__file__).with_name("forms.toml")
LONGEST = 100_000  # characters of a reply; what is longer is not what was asked for
TURNS = 6  # times that the forms are gone through, at most
SHOWN = 6  # questions that a form about questions is given
TRIED = 3  # windows on which a model shows whether it can write
ABLE = 0.5  # share of its replies there that must be of use, and of their records that must be kept
DOTS = "…. "  # what stands for a text in forms.toml, or is written for that
COUNTS = ("replies", "no use", "unanswered", "records", "unsupported", "repeated")


class Notes:
    """What was written about one window so far."""

    def __init__(self, window: Window, wanted: float, count: Callable[[str], int]) -> None:
        self.window, self.wanted, self.tokens, self.evidence = (
            window,
            wanted,
            0,
            Evidence(window.title, window.text),
        )
        self.kept, self.counts = list[PromptPair](), Counter[str]()
        self._count, self._seen, self._refused = count, set[str](), set[str]()

    @property
    def questions(self) -> list[str]:
        return [one.prompt for one in self.kept if one.framed]

    @property
    def fraction(self) -> float:
        """How much of what is wanted there is."""
        return min(1.0, self.tokens / max(self.wanted, 1.0))

    def read(self, reply: str, form: Form) -> list[PromptPair] | None:
        """A reply's records; None where it is of no use: no JSON, about something else, in another language."""
        found = parse_reply(reply, form.kind, self.window.title or self.window.source)
        return found if found is not None and self.evidence.covers(found) else None

    def take(self, found: Sequence[PromptPair]) -> None:
        """Keeps what the window supports and was not there before."""
        for one in found:
            said, whole = same_words(one.prompt or one.answer), same_words(f"{one.prompt} {one.answer}")
            if said in self._seen or whole in self._refused:
                self.counts["repeated"] += 1
            elif not self.evidence.supports(one):
                self._refused.add(whole)
                self.counts["unsupported"] += 1
            else:
                self._seen.add(said)
                self.kept.append(one)
                self.counts["records"] += 1
                self.tokens += self._count(f"{one.prompt} {one.answer}")


@dataclass(frozen=True)
class Trial:
    """How a model wrote about a few windows."""

    replies: int
    useful: float  # share of the replies
    kept: float  # share of their records
    tokens: float  # of a window's study, by all forms once
    asked: float  # tokens that were read for it
    seconds: float  # for it
    fault: str = ""  # why a request had no reply

    @property
    def able(self) -> bool:
        return self.useful >= ABLE and self.kept >= ABLE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FreeStudy:
    """Asks a writer. `count` says how many tokens a text has."""

    writer: Writer
    count: Callable[[str], int]
    settings: StudySettings

    def records(
        self, windows: Sequence[Window], kept: Replies, tell: FractionDone = unheard_fraction
    ) -> Iterator[Row]:
        """What is kept about some windows: a line with counts, then a record a line, with its window's number."""
        every = [Notes(one, self.settings.amount * self.count(one.text), self.count) for one in windows]
        active = every
        for turn in range(TURNS):
            before = {note.window.id: note.tokens for note in active}
            for form in forms().forms:
                self._ask([note for note in active if note.fraction < 1], form, turn, kept)
                tell(sum(note.fraction for note in every) / len(every))
            active = [note for note in active if note.fraction < 1 and note.tokens > before[note.window.id]]
            if not active:
                break
        counts = sum((note.counts for note in every), Counter[str]())
        yield {"counts": {name: counts[name] for name in COUNTS}}
        for note in every:
            yield from ({"window": note.window.id} | line_of(one) for one in note.kept)

    def trial(self, windows: Sequence[Window], kept: Replies) -> Trial:
        """All forms once, about a few windows; no more than one where nothing comes of it."""
        notes, asked, start = [Notes(one, float("inf"), self.count) for one in windows], 0, time.monotonic()
        for form in forms().forms:
            asked += self._ask(notes, form, 0, kept)
            if not any(note.kept for note in notes):
                break
        seconds, counts = time.monotonic() - start, sum((note.counts for note in notes), Counter[str]())
        replies, found = counts["replies"], counts["records"] + counts["unsupported"]
        return Trial(
            replies,
            1 - counts["no use"] / max(replies, 1),
            counts["records"] / max(found, 1),
            sum(note.tokens for note in notes) / len(notes),
            asked / len(notes),
            seconds / len(notes),
            self.writer.fault,
        )

    def _ask(self, notes: Sequence[Notes], form: Form, turn: int, kept: Replies) -> int:
        """Asks for a form, and once more where a reply is of no use; returns the tokens of what it asked."""
        if form.about_questions:
            notes = [note for note in notes if note.questions]
        asked = 0
        for again in (False, True):
            requests = [self._request(note, form, turn, again) for note in notes]
            asked += sum(self.count(request.text) for request in requests)
            useless = list[Notes]()
            for note, reply in zip(notes, self.writer.write(requests, kept), strict=True):
                found = note.read(reply, form) if reply is not None else None
                note.take(found or ())
                if reply is None:
                    note.counts["unanswered"] += 1
                elif found is None and not again:
                    useless.append(note)
                else:
                    note.counts.update({"replies": 1, "no use": found is None})
            notes = useless
        return asked

    def _request(self, note: Notes, form: Form, turn: int, again: bool) -> Request:
        own = note.questions
        first = turn * SHOWN % max(len(own), 1)
        shown = (own[first:] + own[:first])[:SHOWN]
        text = forms().request(form, note.window, shown, again=turn > 0, mend=again)
        return Request(text, form.tokens, forms().temperature, self.settings.seed + turn)


# What is asked for, and what a reply says


@dataclass(frozen=True)
class Form:
    """One thing that is asked for."""

    name: str
    kind: str  # of its records: questions, statements, chats or texts
    task: str
    tokens: int  # room for the reply

    @property
    def about_questions(self) -> bool:
        """Whether it needs questions that were written before."""
        return "{questions}" in self.task


@dataclass(frozen=True)
class Forms:
    """All that forms.toml says; the comments there say what each is for."""

    digest: str
    temperature: float
    ask: str
    again: str
    mend: str
    reply: dict[str, str]  # by kind
    forms: tuple[Form, ...]

    def request(self, form: Form, window: Window, questions: Sequence[str], again: bool, mend: bool) -> str:
        """What a form asks for about a window. Passage first: requests that share a beginning are read faster."""
        listed = "\n".join(f"- {question}" for question in questions)
        task = form.task.replace("{questions}", listed)
        task = "\n\n".join([task, *([self.again] if again else []), *([self.mend] if mend else [])])
        parts = {"title": window.title, "passage": window.text, "task": task, "reply": self.reply[form.kind]}
        return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), self.ask)


@functools.cache
def forms() -> Forms:
    """Reads the file, once."""
    data = tomllib.loads(FILE.read_text(encoding="utf-8"))
    texts = {name: data[name].strip() for name in ("ask", "again", "mend")}
    rows = tuple(Form(row["name"], row["kind"], row["task"].strip(), row["tokens"]) for row in data["form"])
    return Forms(file_digest(FILE), data["temperature"], **texts, reply=data["reply"], forms=rows)


def parse_reply(reply: str, kind: str, document: str) -> list[PromptPair] | None:
    """The records in a reply; items that lack a part are passed over. None where it is no list in JSON."""
    for value in _json_in(reply) if len(reply) <= LONGEST else ():
        if (items := _items(value, kind)) is not None:
            found = [one for item in items if (one := MAKERS[kind](document, item))]
            return found if found or not items else None
    return None


def _json_in(reply: str) -> Iterator[Any]:
    """The JSON values that a reply may mean: all of it, between fences, or from its first bracket to its last."""
    reply = re.sub(r"^\s*<think>.*?</think>", "", reply, flags=re.DOTALL)
    inner = [match[1] for match in re.finditer(r"```\w*\n(.*?)```", reply, re.DOTALL)]
    spans = [reply[reply.find(a) : reply.rfind(b) + 1] for a, b in ("{}", "[]")]
    for text in (reply, *inner, *spans):
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            continue


def _items(value: Any, kind: str) -> list[Any] | None:
    """A list, or the one that an object holds under the kind's name or alone."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = value.get(kind, lists[0] if len(lists) == 1 else None)
    return value if isinstance(value, list) else None


def _parts(item: Any, *names: str) -> list[str] | None:
    """The texts of these names in an item; None where one is missing or says nothing."""
    found = [item.get(name) for name in names] if isinstance(item, dict) else []
    texts = [text for part in found if (text := _said(part))]
    return texts if len(texts) == len(names) else None


def _said(part: Any) -> str:
    """A text with its white space made single; empty where it says nothing."""
    text = " ".join(clean(part).split()) if isinstance(part, str) else ""
    return text if text.strip(DOTS) else ""  # a small model copies the dots by which it is shown the form


def _question(document: str, item: Any) -> PromptPair | None:
    parts = _parts(item, "question", "answer")
    return PromptPair(document, parts[0], parts[1], framed=True) if parts else None


def _statement(document: str, item: Any) -> PromptPair | None:
    parts = _parts(item, "beginning", "rest")
    return PromptPair(document, parts[0].rstrip("… "), f" {parts[1].lstrip('… ')}") if parts else None


def _chat(document: str, item: Any) -> PromptPair | None:
    parts = _parts(item, "user", "assistant")
    return PromptPair(document, parts[0], parts[1], chat=True) if parts else None


def _text(document: str, item: Any) -> PromptPair | None:
    text = _said(item)
    return PromptPair(document, "", text) if text else None


MAKERS: dict[str, Callable[[str, Any], PromptPair | None]] = {
    "questions": _question,
    "statements": _statement,
    "chats": _chat,
    "texts": _text,
}
