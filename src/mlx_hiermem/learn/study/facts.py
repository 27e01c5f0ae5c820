"""What may be asked about a window: its sentences' numbers, names, values and endings, each an answer.

Nothing here knows a subject matter. An answer is a number, a run of words in capitals, what stands after a colon,
or the last words of a sentence, if need be its last word. Sentences that differ only in their subjects and answers
have one *shape*: many a corpus says the same of everything it describes, and a question found for one of them fits
all.

Facts can be turned round. A language model that has learnt that the code of penicillin is J01C does not know which
medicine has the code J01C: it learns one direction at a time. So where almost every window of a common shape has a
value of its own, the value is given and the subject asked for. A *reversed* fact has the value for its subject, and
the subject for its answer, and is treated like any other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.tree.probes import about, names
from mlx_hiermem.sentences import sentences

SUBJECT, BLANK, OTHER = "\u2983", "\u2984", "\u2985"  # in a shape: the subject, the answer, other answers
FACTS = 10  # of a window, at most
COMMON = 8  # windows of one shape, from which on it is worth many wordings
DISTINCT = 0.8  # share of a shape's windows that must have a value of their own before it is turned round
FEW = 4  # facts, below which a window's plain sentences are asked for their last words
WORDS = 60  # of a sentence; what is longer says too much at once to be asked about

NUMBER = r"(?<![\w.,^*-])\d[\d.,:/]*(?<![.,:/])(?![\w^*])"
NAME = r"(?<=[\w,;)] )[A-Z][\w'’-]*(?: (?:(?:of|the|de|von|van) )?[A-Z][\w'’-]*)*(?!:)"
ENTRY = re.compile(
    r"(?:^|(?<=[.;] )|(?<=[\w)%] ))([A-Z][a-z]+(?: [a-z]+){0,3}): ([^:;,.(]{1,50}?)"
    r"(?= *(?:[;,.(]|$| [A-Z][a-z ]{1,30}: ))"
)
ANSWER = re.compile(f"{NUMBER}|{NAME}")
LEADING = re.compile(r"(?:(?:The|A|An) )?([A-Z][\w'’-]{2,}(?: (?:(?:of|the) )?[A-Z][\w'’-]*)*) (?=[a-z])")
ENDING = re.compile(
    r"(?:\b(?:is|are|was|were|by|in|of|as|to|at|on|for|with|from|a|an|the)|:) ([\w'’-]+(?: [\w'’-]+){0,2})[.!]?$"
)
LAST = re.compile(r"\w ([\w'’-]{3,})[.!]?$")


@dataclass(frozen=True)
class Fact:
    """An answer, and the sentence that gives it; the sentence has its window's subject before it or in it."""

    window: int
    subject: str  # the window's, or else what the sentence begins with; "" where there is none
    sentence: str
    start: int  # of the answer, in the sentence
    end: int
    shape: str
    plain: bool = False  # the answer is a plain sentence's last word

    @property
    def answer(self) -> str:
        return self.sentence[self.start : self.end]

    @property
    def blank(self) -> str:
        """The sentence without its answer."""
        return f"{self.sentence[: self.start]}___{self.sentence[self.end :]}"


def facts(window: Window, subject: str) -> list[Fact]:
    """The facts of one window, in its order.

    A plain sentence is asked for its last word only where the window says little else: elsewhere these are the
    least of what one asks, and would only be more to learn.
    """
    found = [fact for text in sentences(window.text) for fact in _of_sentence(window.id, subject, text)]
    return found if sum(not fact.plain for fact in found) < FEW else [fact for fact in found if not fact.plain]


def worth_asking(found: Sequence[Fact], common: Collection[str]) -> list[Fact]:
    """`FACTS` of a window's facts at most: those of `common` shapes first, of the others some all over it.

    What is said of everything is what one asks of everything.
    """
    first = [fact for fact in found if fact.shape in common][:FACTS]
    rest, room = [fact for fact in found if fact.shape not in common], FACTS - len(first)
    chosen = {*first, *(rest if len(rest) <= room else (rest[i * len(rest) // room] for i in range(room)))}
    return [fact for fact in found if fact in chosen]


def _of_sentence(window: int, subject: str, text: str) -> Iterator[Fact]:
    """A list of `Key: value` entries is taken apart, other sentences are asked about as they are.

    Where the window has no subject, a sentence may begin with its own.
    """
    if not subject and (leading := LEADING.match(text)) and not patterns().openers.fullmatch(leading[1]):
        subject = leading[1]
    entries = [f"{found[1]}: {found[2]}" for found in ENTRY.finditer(text)]
    if len(entries) > 1:
        for entry in entries:
            yield from _asked(window, subject, about(entry, subject))
    elif len(text.split()) <= WORDS:
        yield from _asked(window, subject, about(text, subject))


def mention(sentence: str, subject: str) -> tuple[int, int]:
    """Where a sentence first names its subject, in whichever case; (0, 0) where it does not."""
    found = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", sentence, re.IGNORECASE)
    return found.span() if found else (0, 0)


def _asked(window: int, subject: str, sentence: str) -> Iterator[Fact]:
    found = [match.span() for match in ANSWER.finditer(sentence)]
    if ending := _ending(sentence, found):
        found.append(ending)
    spans = [span for span in found if not names(subject, sentence[slice(*span)])]
    if not spans and (last := _ending(sentence, found, LAST)):
        yield Fact(window, subject, sentence, *last, _shape(sentence, subject, [last], last), plain=True)
    for span in spans:
        yield Fact(window, subject, sentence, *span, _shape(sentence, subject, spans, span))


def _ending(
    sentence: str, taken: list[tuple[int, int]], pattern: re.Pattern[str] = ENDING
) -> tuple[int, int] | None:
    """Where the sentence's last words are, unless another answer is among them."""
    match = pattern.search(sentence)
    return match.span(1) if match and not any(end > match.start(1) for _, end in taken) else None


def _shape(sentence: str, subject: str, spans: list[tuple[int, int]], asked: tuple[int, int]) -> str:
    pieces, end = [], 0
    for span in spans:
        pieces += [sentence[end : span[0]], BLANK if span == asked else OTHER]
        end = span[1]
    return without(subject, "".join([*pieces, sentence[end:]]))


def without(subject: str, text: str) -> str:
    """The text with a slot wherever it names the subject."""
    if not subject:
        return text
    return re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", SUBJECT, text, flags=re.IGNORECASE)


def reversible(shapes: Mapping[str, Sequence[Fact]]) -> dict[str, list[Fact]]:
    """Of each shape whose values tell its subjects apart, the facts turned round; ambiguous values are left out.

    Values are told apart among these windows, not in the whole corpus. Mere numbers are left out: a small memory
    hardly learns which name belongs to a number (docs/decisions/).
    """
    found = dict[str, list[Fact]]()
    for shape, alike in shapes.items():
        counts = Counter(fact.answer.casefold() for fact in alike)
        distinct = [fact for fact in alike if counts[fact.answer.casefold()] == 1 and _can_be_turned(fact)]
        subjects = {fact.subject for fact in distinct}
        if len(subjects) >= COMMON and len(distinct) >= DISTINCT * len(alike):
            found[shape] = [_turned(fact) for fact in distinct]
    return found


def _can_be_turned(fact: Fact) -> bool:
    named = fact.subject != "" and mention(fact.sentence, fact.subject) != (0, 0)
    return named and any(map(str.isalpha, fact.answer))


def _turned(fact: Fact) -> Fact:
    """The answer becomes the subject, and the subject, written as the title has it, the answer."""
    start, end = mention(fact.sentence, fact.subject)
    sentence = fact.sentence[:start] + fact.subject + fact.sentence[end:]
    return replace(fact, subject=fact.answer, sentence=sentence, start=start, end=start + len(fact.subject))
