"""Questions the other way round: from what a window says to what it is about.

Who has learnt that the code of penicillin is J01C does not know which medicine has the code J01C: a language
model learns one direction at a time. So where almost every window of a common shape has a value of its own, the
value is given and the subject asked for. A *reversed* fact has the value for its subject, and the subject for its
answer; so its wordings are written, tried and learnt as all others are. They are tried with two windows before the
model, one of them of another subject: the right one must be likelier after its own value than after the other's.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_hiermem.learn.records import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.facts import COMMON, Fact, mention
from mlx_hiermem.learn.study.judge import EXAMPLE, Share, Tried, as_asked, named, try_out
from mlx_hiermem.learn.study.teacher import Teacher
from mlx_hiermem.learn.study.wordings import Wording, reversed_wordings

TELLING = 0.8  # of a shape's windows have a value that no other has
RIGHT, TRIED = 0.65, 12  # of the tries; by chance it would be half, so there are more of them
NAMES = 4  # of what is asked for, by which a value is introduced: "the code J01C"


def reversible(shapes: Mapping[str, Sequence[Fact]]) -> dict[str, list[Fact]]:
    """Of each shape whose values tell its subjects apart, the facts turned round; ambiguous values are left out.

    Values are told apart among these windows, not in the whole corpus. Mere numbers are left out: a small memory
    hardly learns which name belongs to a number (docs/learning.md).
    """
    found = dict[str, list[Fact]]()
    for shape, alike in shapes.items():
        counts = Counter(fact.answer.casefold() for fact in alike)
        telling = [fact for fact in alike if counts[fact.answer.casefold()] == 1 and _can_be_turned(fact)]
        subjects = {fact.subject for fact in telling}
        if len(subjects) >= COMMON and len(telling) >= TELLING * len(alike):
            found[shape] = [_turned(fact) for fact in telling]
    return found


def _can_be_turned(fact: Fact) -> bool:
    named = fact.subject != "" and mention(fact.sentence, fact.subject) != (0, 0)
    return named and any(map(str.isalpha, fact.answer))


def _turned(fact: Fact) -> Fact:
    """The answer becomes the subject, and the subject, written as the title has it, the answer."""
    start, end = mention(fact.sentence, fact.subject)
    sentence = fact.sentence[:start] + fact.subject + fact.sentence[end:]
    return replace(fact, subject=fact.answer, sentence=sentence, start=start, end=start + len(fact.subject))


def try_reversed(
    facts: Mapping[str, Sequence[Fact]],
    kept: Mapping[str, Sequence[Tried]],
    windows: Mapping[int, Window],
    teacher: Teacher,
    settings: StudySettings,
    rng: random.Random,
    tell: Share,
) -> dict[str, list[Tried]]:
    """The wordings that are kept for each shape of reversed facts. `kept` are those of the facts as they stand:
    a value is introduced by the names by which it was found."""
    asked = [
        (fact, name)
        for shape, alike in facts.items()
        for name in list(dict.fromkeys(one.wording.what for one in kept[shape] if one.wording.what))[:NAMES]
        for fact in rng.sample(alike, min(len(alike), settings.invented))
    ]
    found: dict[str, list[Wording]] = {shape: [] for shape in facts}
    for (fact, _), new in zip(asked, reversed_wordings(teacher, asked, lambda share: tell(share / 2)), strict=True):
        found[fact.shape] += [wording for wording in new if wording not in found[fact.shape]]
    chooser = Chooser(teacher, windows, facts, rng, lambda share: tell((1 + share) / 2))
    return try_out(facts, found, chooser, replace(settings, right=RIGHT, tried=TRIED, first_tried=TRIED), rng)


@dataclass(frozen=True)
class Chooser:
    """Asks a teacher that has a window and another one of the same shape before it."""

    teacher: Teacher
    windows: Mapping[int, Window]
    facts: Mapping[str, Sequence[Fact]]
    rng: random.Random
    tell: Share

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
            found = self.teacher.finds(f"{EXAMPLE}{text}\n\n", prompts, [])
            for wording, right, wrong in zip(wordings, found[::2], found[1::2], strict=True):
                yield fact, wording, right if right > wrong else -math.inf
            self.tell(done / len(by_fact))
