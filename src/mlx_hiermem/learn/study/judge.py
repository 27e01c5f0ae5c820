"""Which wordings are kept: those by which a model that has the window before it finds the answer.

A wording is tried on a few of the windows that say the same of different subjects. There it has to make the right
answer likelier, token by token, than every other answer of that window. The wordings of reversed facts are tried
with two windows before the model, one of them about another subject: the right subject must be likelier after its
own value than after the other's.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_hiermem.learn.records import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.facts import Fact
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.teacher import Teacher
from mlx_hiermem.learn.study.wordings import Wording
from mlx_hiermem.learn.tree.probes import FRAME
from mlx_hiermem.progress import FractionDone


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
                yield fact, wording, right if right > wrong else -math.inf
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
