"""Wordings: ways to ask for a fact, invented by a language model, and tried out on it.

A small model cannot write a good question when it is told to, but it can do two things well: say a word in other
words, and go on with a pattern. So it first says what is asked for (the sentence's own words give one name for it,
the model another, and others that mean the same: of a height, "how high it is"). Then it is shown one pattern on
subjects of everyday knowledge, and continues it with the subject and each of those names.

Nothing is believed: only those wordings are kept by which the model, with the window before it, finds the answer.
A wording is tried on a few of the windows that say the same of different subjects. There it has to make the right
answer likelier, token by token, than every other answer of that window. The wordings of reversed facts are tried
with two windows before the model, one of them about another subject: the right subject must be likelier after its
own value than after the other's.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.facts import SUBJECT, Fact, without
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.teacher import Teacher
from mlx_hiermem.progress import FractionDone, unheard_fraction
from mlx_hiermem.tokenizer import FRAME

SYNONYMS = 3  # tries besides the likeliest
LINE = 18  # tokens of a wording
ROUNDING = 1e-3  # nats by which a likelihood may differ because of what it is computed beside


@dataclass(frozen=True)
class Wording:
    """A question, or the beginning of a statement; SUBJECT stands where the subject is named."""

    text: str
    statement: bool
    what: str = field(default="", compare=False)  # is asked for

    def prompt(self, subject: str) -> str:
        text = self.text.replace(SUBJECT, subject)
        return text[:1].upper() + text[1:]


def own_words(fact: Fact) -> str:
    """What is asked for, in the sentence's words: those right before the answer. "" where there are none."""
    function_words = patterns().function_words
    before = without(fact.subject, fact.sentence[: fact.start])
    words = re.findall(rf"[\w'’-]+|{SUBJECT}|[.;,()]", before)
    while words and (words[-1] in function_words or words[-1] == SUBJECT):
        words.pop()
    name: list[str] = []
    while words and re.match(r"[^\W\d]", words[-1]) and words[-1].lower() not in function_words and len(name) < 4:
        name.insert(0, words.pop())
    return " ".join(name).lower()


def own_beginning(fact: Fact) -> Wording:
    """The sentence up to its answer, with the subject before it where it comes later."""
    beginning = without(fact.subject, fact.sentence[: fact.start]).strip()
    if fact.subject and SUBJECT not in beginning:
        beginning = f"{SUBJECT}. {beginning}".strip()
    return Wording(beginning, statement=True)


def echo(fact: Fact) -> Wording:
    """A plain sentence with "what" for its last word: of "makes" a small model makes no question.

    Nothing has to be tried here. The words are the sentence's own.
    """
    return Wording(f"{own_beginning(fact).text} what?", statement=False)


def names_of(
    teacher: Teacher,
    groups: Sequence[Sequence[Fact]],
    synonyms: bool,
    seed: int,
    tell: FractionDone = unheard_fraction,
) -> list[list[str]]:
    """What is asked for by each group of facts of one shape, in several words, with `synonyms` in others too.

    `tell` is told how much is done; synonyms are few, and are not counted.
    """
    facts = [fact for group in groups for fact in group]
    prompts = [f"Text: {fact.sentence}\nAnswer: {fact.answer}\nAsked for:" for fact in facts]
    lines = teacher.lines([(patterns().asked_for, prompt) for prompt in prompts], 8, tell=tell)
    said = dict(zip(facts, lines, strict=True))
    names = [_unique([own_words(group[0]), *(said[fact] for fact in group)], group[0]) for group in groups]
    for temperature, tries in ((0.0, 1), (0.8, SYNONYMS)) if synonyms else ():
        asked = [(i, own[0]) for i, own in enumerate(names) if own for _ in range(tries)]
        more = teacher.lines([(patterns().other_words, f"{name}:") for _, name in asked], 10, temperature, seed)
        for (i, _), name in zip(asked, more, strict=True):
            names[i] = _unique([*names[i], name], groups[i][0])
    return names


def _unique(names: Iterable[str], fact: Fact) -> list[str]:
    kept = dict.fromkeys(re.sub(r"^(?:the|an?) ", "", name.strip(" .,;:").lower()) for name in names)
    return [name for name in kept if name and fact.answer.lower() not in name.split()]


def wordings(
    teacher: Teacher,
    asked: Sequence[tuple[Fact, str, Sequence[int]]],
    tell: FractionDone = unheard_fraction,
) -> list[list[Wording]]:
    """For each (fact, what is asked for, numbers of patterns) its wordings; `tell` is told how much is done."""
    subjects = [f"{subject}, {what}" for subject, what in patterns().shown]
    shown = [_shown(subjects, pattern.lines) for pattern in patterns().forward]
    tasks = [
        _Task(i, shown[number], f"{fact.subject}, {what}:", patterns().forward[number].statement)
        for i, (fact, what, numbers) in enumerate(asked)
        for number in numbers
    ]
    return _continued(teacher, [(fact, what) for fact, what, _ in asked], tasks, tell)


def reversed_wordings(
    teacher: Teacher, asked: Sequence[tuple[Fact, str]], tell: FractionDone = unheard_fraction
) -> list[list[Wording]]:
    """For each (reversed fact, what its value is) its wordings, by all patterns."""
    subjects = [", ".join(one) for one in patterns().shown_reversed]
    shown = [_shown(subjects, pattern.lines) for pattern in patterns().backward]
    tasks = [
        _Task(i, lines, f"{fact.answer}, {what}, {fact.subject}:", pattern.statement)
        for i, (fact, what) in enumerate(asked)
        for lines, pattern in zip(shown, patterns().backward, strict=True)
    ]
    return _continued(teacher, asked, tasks, tell)


@dataclass(frozen=True)
class _Task:
    """A pattern to go on with, for the fact of this number."""

    number: int
    shown: str
    prompt: str
    statement: bool


def _continued(
    teacher: Teacher,
    asked: Sequence[tuple[Fact, str]],
    tasks: Sequence[_Task],
    tell: FractionDone,
) -> list[list[Wording]]:
    found: list[list[Wording]] = [[] for _ in asked]
    lines = teacher.lines([(task.shown, task.prompt) for task in tasks], LINE, tell=tell)
    for task, line in zip(tasks, lines, strict=True):
        fact, what = asked[task.number]
        wording = Wording(without(fact.subject, line), task.statement, what)
        if wording not in found[task.number] and _is_whole(wording, fact):
            found[task.number].append(wording)
    return found


def _shown(asked: Sequence[str], lines: Sequence[str]) -> str:
    """A pattern on the examples' subjects."""
    return "".join(f"{what}: {line}\n" for what, line in zip(asked, lines, strict=True))


def _is_whole(wording: Wording, fact: Fact) -> bool:
    """Names the subject once, asks for something of it, gives nothing away, no circles, ends as it should."""
    text = wording.text
    words = text.lower().split()
    phrases = list(zip(words, words[1:], words[2:], strict=False))
    gives_away = re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", text, re.IGNORECASE)
    ends = text[-1:].isalpha() or text[-1:] == SUBJECT if wording.statement else text[-1:] in "?."
    asks = (
        {word.lower() for word in re.findall(r"[^\W\d_]+", text.replace(SUBJECT, ""))}
        - patterns().function_words
        - patterns().asking_words
    )
    circles = len(set(phrases)) < len(phrases)  # a small model's "of the element of the element of"
    return text.count(SUBJECT) == 1 and bool(asks) and not (gives_away or circles) and ends


# Which are kept


@dataclass(frozen=True)
class Tried:
    """A wording, the share of its tries that found the answer, and the mean log p of those answers."""

    wording: Wording
    right: float
    log_p: float


class Judge(Protocol):
    """Says of wordings whether a model finds the answer by them."""

    def log_ps(self, asked: Sequence[tuple[Fact, Wording]]) -> Iterable[tuple[Fact, Wording, float]]:
        """Mean log p of each fact's answer; -inf where another one is found."""


@dataclass(frozen=True)
class WindowJudge:
    """Asks a teacher that has the fact's window before it."""

    teacher: Teacher
    windows: Mapping[int, Window]
    answers: Mapping[int, list[str]]  # all of each window
    tell: FractionDone

    def log_ps(self, asked: Sequence[tuple[Fact, Wording]]) -> Iterator[tuple[Fact, Wording, float]]:
        """Of each fact's answer; -inf where another answer of its window is likelier."""
        by_window = defaultdict[int, list[tuple[Fact, Wording]]](list)
        for fact, wording in asked:
            by_window[fact.window].append((fact, wording))
        for done, (number, own) in enumerate(by_window.items(), 1):
            prompts = [(as_asked(wording, fact.subject), fact.answer) for fact, wording in own]
            beginning = f"{patterns().example}{named(self.windows[number].text, own[0][0].subject)}\n\n"
            found = self.teacher.finds(beginning, prompts, self.answers[number])
            for (fact, wording), log_p in zip(own, found, strict=True):
                yield fact, wording, log_p
            self.tell(done / len(by_window))


@dataclass(frozen=True)
class PairJudge:
    """Asks a teacher that has a window and another one of the same shape before it."""

    teacher: Teacher
    windows: Mapping[int, Window]
    facts: Mapping[str, Sequence[Fact]]
    rng: random.Random
    tell: FractionDone

    def log_ps(self, asked: Sequence[tuple[Fact, Wording]]) -> Iterator[tuple[Fact, Wording, float]]:
        """Of each fact's subject; -inf where it is no likelier than after the other window's value.

        Which of two subjects is likelier says little: a small model prefers the one that it read last.
        """
        by_fact = defaultdict[Fact, list[Wording]](list)
        for fact, wording in asked:
            by_fact[fact].append(wording)
        for done, (fact, wordings) in enumerate(by_fact.items(), 1):
            others = [one for one in self.facts[fact.shape] if one.answer != fact.answer]
            other = self.rng.choice([one for one in others if one.window != fact.window] or others)
            both = self.rng.sample([fact, other], 2)
            text = "\n\n".join(named(self.windows[one.window].text, one.answer) for one in both)
            values = [one.subject for one in (fact, other)]
            prompts = [(as_asked(wording, value), fact.answer) for wording in wordings for value in values]
            found = self.teacher.finds(f"{patterns().example}{text}\n\n", prompts, [])
            for wording, right, wrong in zip(wordings, found[::2], found[1::2], strict=True):
                yield fact, wording, right if right > wrong + ROUNDING else -math.inf
            self.tell(done / len(by_fact))


def try_out(
    shapes: Mapping[str, Sequence[Fact]],
    invented: Mapping[str, Sequence[Wording]],
    judge: Judge,
    settings: StudySettings,
    rng: random.Random,
) -> dict[str, list[Tried]]:
    """The wordings that find their answers in enough of the windows they are tried on, in turns.

    Each begins with other windows than the one before it: in some, whatever the wording, nothing is found.
    """
    order, results = dict[tuple[str, Wording], list[Fact]](), dict[tuple[str, Wording], list[float]]()
    for shape, alike in shapes.items():
        some = rng.sample(alike, min(len(alike), settings.tried))
        for number, wording in enumerate(invented[shape]):
            first = number * settings.first_tried % len(some)
            order[shape, wording], results[shape, wording] = some[first:] + some[:first], []
    for begin, end in ((0, settings.first_tried), (settings.first_tried, settings.tried)):
        asked = [
            (fact, wording)
            for (shape, wording), log_ps in results.items()
            if not log_ps or _right(log_ps) >= settings.right
            for fact in order[shape, wording][begin:end]
        ]
        for fact, wording, log_p in judge.log_ps(asked):
            results[fact.shape, wording].append(log_p)
    kept: dict[str, list[Tried]] = {shape: [] for shape in shapes}
    for (shape, wording), log_ps in results.items():
        if _right(log_ps) >= settings.right:
            right = [log_p for log_p in log_ps if log_p > -math.inf]
            kept[shape].append(Tried(wording, _right(log_ps), sum(right) / len(right)))
    return {shape: list(in_turns(own)) for shape, own in kept.items()}


def in_turns(kept: Sequence[Tried]) -> Iterator[Tried]:
    """Best first, but no name of what is asked for comes again before all others have: a few ask in many ways."""
    best = sorted(kept, key=lambda tried: (-tried.right, -tried.log_p))
    before = Counter[tuple[bool, str]]()
    turns = []
    for tried in best:
        name = (tried.wording.statement, tried.wording.what)
        turns.append(before[name])
        before[name] += 1
    return (best[i] for i in sorted(range(len(best)), key=turns.__getitem__))


def _right(log_ps: Sequence[float]) -> float:
    return sum(log_p > -math.inf for log_p in log_ps) / len(log_ps)


def named(text: str, subject: str) -> str:
    """A document's later windows need not name what they are about: unnamed, the capital in one is nobody's."""
    return text if subject.casefold() in text.casefold() else f"{subject}. {text}"


def as_asked(wording: Wording, subject: str) -> str:
    """A wording as it is asked: a question in its frame, a statement as it stands."""
    return wording.prompt(subject) if wording.statement else FRAME.format(wording.prompt(subject))
