"""Free self-study: a model that can write is asked for questions, chats, statements and retellings of each window.

Each window is asked about, form by form, until there are enough tokens of study for each of its own. What a reply
says is kept where the window supports it and where it was not said before. A reply that is of no use is asked for
once more; then it is counted, and done without. The records are those that `hiermem learn --prompts` knows.

Whether a model can write is found out on a few windows of the corpus, not by its name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import Prompt, StudySettings
from mlx_hiermem.learn.study.checks import Source, same_words
from mlx_hiermem.learn.study.forms import Form, forms, parse_reply
from mlx_hiermem.learn.study.prompts import line_of
from mlx_hiermem.learn.study.replies import Replies
from mlx_hiermem.learn.study.writers import Request, Writer
from mlx_hiermem.learn.work import Row
from mlx_hiermem.progress import FractionDone, unheard_fraction

TURNS = 6  # times that the forms are gone through, at most
SHOWN = 6  # questions that a form about questions is given
TRIED = 3  # windows on which a model shows whether it can write
ABLE = 0.5  # share of its replies there that must be of use, and of their records that must be kept
COUNTS = ("replies", "no use", "unanswered", "records", "unsupported", "repeated")


class Notes:
    """What was written about one window so far."""

    def __init__(self, window: Window, wanted: float, count: Callable[[str], int]) -> None:
        self.window, self.wanted, self.tokens, self.source = window, wanted, 0, Source(window.title, window.text)
        self.kept, self.counts = list[Prompt](), Counter[str]()
        self._count, self._seen, self._refused = count, set[str](), set[str]()

    @property
    def questions(self) -> list[str]:
        return [one.prompt for one in self.kept if one.framed]

    @property
    def share(self) -> float:
        """How much of what is wanted there is."""
        return min(1.0, self.tokens / max(self.wanted, 1.0))

    def read(self, reply: str, form: Form) -> list[Prompt] | None:
        """A reply's records; None where it is of no use: no JSON, about something else, in another language."""
        found = parse_reply(reply, form.kind, self.window.title or self.window.source)
        return found if found is not None and self.source.shares(found) else None

    def take(self, found: Sequence[Prompt]) -> None:
        """Keeps what the window supports and was not there before."""
        for one in found:
            said, whole = same_words(one.prompt or one.answer), same_words(f"{one.prompt} {one.answer}")
            if said in self._seen or whole in self._refused:
                self.counts["repeated"] += 1
            elif not self.source.supports(one):
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
                self._ask([note for note in active if note.share < 1], form, turn, kept)
                tell(sum(note.share for note in every) / len(every))
            active = [note for note in active if note.share < 1 and note.tokens > before[note.window.id]]
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
