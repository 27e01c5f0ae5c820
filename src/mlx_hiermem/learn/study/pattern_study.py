"""Self-study: questions about what was read, in many wordings, each with its answer from the window.

A fact that is learnt in one wording cannot be asked for in another. So before anything is learnt, every window's
facts are given wordings by a language model, by default the anchor itself: see `facts` and `wordings`. A wording is
invented for a few of the windows that say the same of different subjects, and is tried on others: it is kept where
the model, with the window before it, prefers the right answer to all other answers of the window. The answers are
the window's own words, so nothing is learnt that it does not say.

The rows are those of study.jsonl: see `stage`. "question" is the prompt without its frame, where it has one, and
"reversed" is there where the answer is what the window is about (see `facts`).
"""

from __future__ import annotations

import itertools
import pathlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.facts import COMMON, Fact, facts, mention, reversible, worth_asking
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.teacher import CachedTeacher, Teacher
from mlx_hiermem.learn.study.wordings import (
    PairJudge,
    Tried,
    WindowJudge,
    Wording,
    echo,
    names_of,
    own_beginning,
    reversed_wordings,
    try_out,
    wordings,
)
from mlx_hiermem.learn.work import write_rows
from mlx_hiermem.progress import FractionDone
from mlx_hiermem.tokenizer import FRAME

TOGETHER = 256  # windows that are studied at a time: a wording is shared among these, and a killed run repeats them
RIGHT, TRIED = 0.65, 12  # for reversed facts: by chance half the tries would be right, so there are more of them
NAMES = 4  # of what is asked for, by which a value is introduced, at most: "the code J01C"


def in_patterns(
    windows: Sequence[tuple[Window, str]],
    teacher: Teacher,
    settings: StudySettings,
    number: int,
    file: pathlib.Path,
    tell: FractionDone,
) -> None:
    """Writes the rows of windows that are studied together, the `number`th of their kind."""
    cached = CachedTeacher.of(teacher, file.with_suffix(".replies"))
    write_rows(file, _studied(windows, cached, settings, random.Random(f"{settings.seed} {number}"), tell))
    cached.kept.file.unlink(missing_ok=True)


def _part(tell: FractionDone, begin: float, end: float, fraction: float) -> None:
    """Tells how much of the whole work is done, when a fraction of the part from `begin` to `end` is."""
    tell(begin + fraction * (end - begin))


def _studied(
    windows: Sequence[tuple[Window, str]],
    teacher: Teacher,
    settings: StudySettings,
    rng: random.Random,
    tell: FractionDone,
) -> Iterator[dict[str, Any]]:
    """The rows of some windows. `tell` is told how much of the work is done."""
    found = {window.id: facts(window, subject) for window, subject in windows}
    counts = Counter(shape for own in found.values() for shape in {fact.shape for fact in own})
    common = {shape for shape, count in counts.items() if count >= COMMON}
    by_window = {number: worth_asking(own, common) for number, own in found.items()}
    shapes = defaultdict[str, list[Fact]](list)
    for own in by_window.values():
        for fact in own:
            shapes[fact.shape].append(fact)
    invented = _invent(shapes, teacher, settings, rng, partial(_part, tell, 0, 0.5))
    answers = {number: list(dict.fromkeys(fact.answer for fact in own)) for number, own in by_window.items()}
    by_id = {window.id: window for window, _ in windows}
    judge = WindowJudge(teacher, by_id, answers, partial(_part, tell, 0.5, 0.9))
    kept = try_out(shapes, invented, judge, settings, rng)
    back = reversible(shapes) if settings.reversed_questions or settings.reversed_statements else {}
    kept_back = try_reversed(back, kept, by_id, teacher, settings, rng, partial(_part, tell, 0.9, 1))
    turned = defaultdict[int, list[Fact]](list)
    for fact in itertools.chain(*back.values()):
        turned[fact.window].append(fact)
    for window, _ in windows:
        asked = set[str]()  # a question that would fit two facts is about the first one
        for fact in by_window[window.id]:
            yield from _rows(fact, _new(fact, kept, asked), window, settings)
        for fact in turned[window.id]:
            yield from _reversed_rows(fact, _new(fact, kept_back, asked), window, settings)


def _new(fact: Fact, kept: dict[str, list[Tried]], asked: set[str]) -> list[Wording]:
    """The wordings of a fact that nothing was asked in before; notes them in `asked`."""
    new = [tried.wording for tried in kept[fact.shape] if tried.wording.prompt(fact.subject) not in asked]
    asked.update(wording.prompt(fact.subject) for wording in new)
    return new


def _invent(
    shapes: dict[str, list[Fact]], teacher: Teacher, settings: StudySettings, rng: random.Random, tell: FractionDone
) -> dict[str, list[Wording]]:
    """Wordings for each shape: many where it is common, by the first few patterns elsewhere."""
    known, found = patterns(), {shape: list[Wording]() for shape in shapes}
    for rare, common in enumerate((True, False)):
        some = [
            rng.sample(own, min(len(own), settings.invented if common else 1))
            for own in shapes.values()
            if (len(own) >= COMMON) == common and own[0].subject
        ]
        begin = rare / 2
        every = names_of(teacher, some, common, settings.seed, partial(_part, tell, begin, begin + 0.25))
        asked = [
            (facts[i % len(facts)], name, known.synonym if i and common else known.own if common else known.rare)
            for facts, names in zip(some, every, strict=True)
            for i, name in enumerate(names if common else names[:1])
        ]
        lines = wordings(teacher, asked, partial(_part, tell, begin + 0.25, begin + 0.5))
        for (fact, _, _), new in zip(asked, lines, strict=True):
            found[fact.shape] += [wording for wording in new if wording not in found[fact.shape]]
    return found


def try_reversed(
    facts: Mapping[str, Sequence[Fact]],
    kept: Mapping[str, Sequence[Tried]],
    windows: Mapping[int, Window],
    teacher: Teacher,
    settings: StudySettings,
    rng: random.Random,
    tell: FractionDone,
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
    for (fact, _), new in zip(asked, reversed_wordings(teacher, asked, partial(_part, tell, 0, 0.5)), strict=True):
        found[fact.shape] += [wording for wording in new if wording not in found[fact.shape]]
    judge = PairJudge(teacher, windows, facts, rng, partial(_part, tell, 0.5, 1))
    return try_out(facts, found, judge, replace(settings, right=RIGHT, tried=TRIED, first_tried=TRIED), rng)


def _rows(fact: Fact, kept: Sequence[Wording], window: Window, settings: StudySettings) -> Iterator[dict[str, Any]]:
    """What one fact is learnt from; the subject is named as the title has it, and as the sentence does, in turn."""
    questions = [wording for wording in kept if not wording.statement][: settings.questions]
    if fact.plain and fact.subject and not questions:
        questions = [echo(fact)][: settings.questions]
    statements = [wording for wording in kept if wording.statement][: settings.statements]
    forms = _forms(fact)
    own = own_beginning(fact)
    for i, wording in enumerate(dict.fromkeys([own, *statements])):
        for form in forms if wording == own else forms[i % len(forms) :][:1]:
            if prompt := wording.prompt(form):  # a sentence without a subject may begin with its answer
                yield {"window": window.id, "prompt": prompt, "answer": fact.answer, "chat": False}
    yield from _asked(fact, questions, forms, window, settings)


def _reversed_rows(
    fact: Fact, kept: Sequence[Wording], window: Window, settings: StudySettings
) -> Iterator[dict[str, Any]]:
    """The same of a fact turned round, whose beginning would give its answer away."""
    questions = [wording for wording in kept if not wording.statement][: settings.reversed_questions]
    for wording in [wording for wording in kept if wording.statement][: settings.reversed_statements]:
        prompt = wording.prompt(fact.subject)
        yield {"window": window.id, "prompt": prompt, "answer": fact.answer, "chat": False, "reversed": True}
    for row in _asked(fact, questions, [fact.subject], window, settings):
        yield row | {"reversed": True}


def _asked(
    fact: Fact, questions: Sequence[Wording], forms: Sequence[str], window: Window, settings: StudySettings
) -> Iterator[dict[str, Any]]:
    """Questions, and the chats that some of them are learnt as too."""
    for i, wording in enumerate(questions):
        text = wording.prompt(forms[i % len(forms)])
        yield {
            "window": window.id,
            "question": text,
            "prompt": FRAME.format(text),
            "answer": fact.answer,
            "chat": False,
        }
        if (i - fact.window) % len(questions) < settings.chats:
            answer = fact.sentence.removeprefix(f"{fact.subject}. ")
            yield {"window": window.id, "prompt": text, "answer": answer, "chat": True}


def _forms(fact: Fact) -> list[str]:
    """The subject as the sentence writes it, and as the title does."""
    return list(
        dict.fromkeys([fact.sentence[slice(*mention(fact.sentence, fact.subject))] or fact.subject, fact.subject])
    )
