"""Self-study: questions about what was read, in many wordings, each with its answer from the window.

A fact that is learnt in one wording cannot be asked for in another. So before anything is learnt, every window's
facts are given wordings by a language model, by default the anchor itself: see `facts` and `wordings`. A wording is
invented for a few of the windows that say the same of different subjects, and is tried on others: it is kept where
the model, with the window before it, prefers the right answer to all other answers of the window. The answers are
the window's own words, so nothing is learnt that it does not say.

    study.jsonl   {"window", "prompt" or "question", "answer", "chat"}: lines in the order of their windows
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mlx_hiermem.learn import Window
from mlx_hiermem.learn.facts import Fact, facts, worth_asking
from mlx_hiermem.learn.probes import FRAME, with_subjects
from mlx_hiermem.learn.stages import STUDY, Corpus
from mlx_hiermem.learn.teacher import Teacher
from mlx_hiermem.learn.wordings import OWN, RARE, SYNONYM, Wording, names_of, own_beginning, wordings
from mlx_hiermem.learn.work import Work, read_lines, write_lines

TOGETHER = 256  # windows that are studied at a time: a wording is shared among these, and a killed run repeats them
COMMON = 8  # windows from which on a shape is worth many wordings
FIRST_TRIES = 2
EXAMPLE = (  # answers are short, and a name, a number or a code: after numbers alone a capital was read as a year
    "Penicillin is a medicine with the code J01C. It was found by Alexander Fleming in 1928.\n\n"
    "Question: Who found penicillin?\nAnswer: Alexander Fleming\n\n"
    "Question: In which year was penicillin found?\nAnswer: 1928\n\n"
    "Question: What is the code of penicillin?\nAnswer: J01C\n\n"
)
Progress = Callable[[int, int], None]
Share = Callable[[float], None]


@dataclass(frozen=True)
class StudySettings:
    """How many wordings a fact is learnt in at most, and on how many windows one is invented and tried."""

    questions: int = 5
    statements: int = 2
    chats: int = 1  # of the questions, other ones in each window: a chat's template is longer than what it asks
    invented: int = 2
    tried: int = 6
    right: float = 0.5  # of the tries; by chance one in as many as the window has answers
    seed: int = 0


@dataclass(frozen=True)
class Tried:
    """A wording, and how it fared."""

    wording: Wording
    right: float
    log_p: float


def study(
    work: Work,
    corpus: Corpus,
    teacher: Callable[[], Teacher] | None,
    identity: str,
    settings: StudySettings = StudySettings(),
    progress: Progress = lambda done, total: None,
) -> str:
    """Stage `study`: writes study.jsonl and returns its digest; without a teacher there is none.

    `teacher` loads it, `identity` names it; `progress` counts windows. An interrupted stage goes on with the first
    windows that were not studied together.
    """
    if teacher is None:
        return work.stage("study", None, [corpus.digest], lambda: work.path(STUDY).unlink(missing_ok=True))

    def make() -> None:
        parts = work.path("study.parts")
        mark = hashlib.sha256(json.dumps([corpus.digest, identity, asdict(settings)]).encode()).hexdigest()[:16]
        parts.mkdir(exist_ok=True)
        loaded, files, done = teacher(), [], 0
        for number, some in enumerate(_together(corpus)):
            file = parts / f"{mark}-{number}.jsonl"
            if not file.exists():
                rng = random.Random(f"{settings.seed} {number}")
                tell = partial(_told, progress, done, len(some), corpus.count)
                write_lines(file, _studied(some, loaded, settings, rng, tell))
            files.append(file)
            done += len(some)
            progress(done, corpus.count)
        write_lines(work.path(STUDY), (row for file in files for row in read_lines(file)))
        for file in parts.iterdir():
            file.unlink()
        parts.rmdir()

    return work.stage("study", [identity, asdict(settings)], [corpus.digest], make)


def _told(progress: Progress, done: int, together: int, total: int, share: float) -> None:
    """Of the windows that are studied together, a share."""
    progress(done + int(share * together), total)


def _half(tell: Share, second: int, share: float) -> None:
    tell((second + share) / 2)


def _together(corpus: Corpus) -> Iterator[list[tuple[Window, str]]]:
    some = list[tuple[Window, str]]()
    for pair in with_subjects(corpus.windows()):
        some.append(pair)
        if len(some) == TOGETHER:
            yield some
            some = []
    if some:
        yield some


def _studied(
    windows: Sequence[tuple[Window, str]],
    teacher: Teacher,
    settings: StudySettings,
    rng: random.Random,
    tell: Share,
) -> Iterator[dict[str, Any]]:
    """The rows of some windows. `tell` is told which share of the work is done."""
    found = {window.id: facts(window, subject) for window, subject in windows}
    counts = Counter(shape for own in found.values() for shape in {fact.shape for fact in own})
    common = {shape for shape, count in counts.items() if count >= COMMON}
    by_window = {number: worth_asking(own, common) for number, own in found.items()}
    shapes = defaultdict[str, list[Fact]](list)
    for own in by_window.values():
        for fact in own:
            shapes[fact.shape].append(fact)
    invented = _invent(shapes, teacher, settings, rng, partial(_half, tell, 0))
    answers = {number: list(dict.fromkeys(fact.answer for fact in own)) for number, own in by_window.items()}
    tries = _Tries(teacher, {window.id: window for window, _ in windows}, answers, partial(_half, tell, 1))
    kept = _try(shapes, invented, tries, settings, rng)
    for window, _ in windows:
        asked = set[str]()  # a question that would fit two facts is about the first one
        for fact in by_window[window.id]:
            new = [tried for tried in kept[fact.shape] if tried.wording.prompt(fact.subject) not in asked]
            asked.update(tried.wording.prompt(fact.subject) for tried in new)
            yield from _rows(fact, new, window, settings)


def _invent(
    shapes: dict[str, list[Fact]], teacher: Teacher, settings: StudySettings, rng: random.Random, tell: Share
) -> dict[str, list[Wording]]:
    """Wordings for each shape: many where it is common, by the first few patterns elsewhere."""
    found: dict[str, list[Wording]] = {shape: [] for shape in shapes}
    for rare, common in enumerate((True, False)):
        some = [
            rng.sample(own, min(len(own), settings.invented if common else 1))
            for own in shapes.values()
            if (len(own) >= COMMON) == common and own[0].subject
        ]
        asked = [
            (facts[i % len(facts)], name, SYNONYM if i and common else OWN if common else RARE)
            for facts, names in zip(some, names_of(teacher, some, common, settings.seed), strict=True)
            for i, name in enumerate(names if common else names[:1])
        ]
        half = partial(_half, tell, rare)
        lines = wordings(teacher, asked, half)
        for (fact, _, _), new in zip(asked, lines, strict=True):
            found[fact.shape] += [wording for wording in new if wording not in found[fact.shape]]
    return found


@dataclass(frozen=True)
class _Tries:
    """Asks a teacher with windows before it."""

    teacher: Teacher
    windows: dict[int, Window]
    answers: dict[int, list[str]]  # of each window, all
    tell: Share

    def log_ps(self, asked: Sequence[tuple[Fact, Wording]]) -> Iterator[tuple[Fact, Wording, float]]:
        """Of each fact's answer; -inf where another answer of its window is likelier."""
        by_window = defaultdict[int, list[tuple[Fact, Wording]]](list)
        for fact, wording in asked:
            by_window[fact.window].append((fact, wording))
        for done, (number, own) in enumerate(by_window.items(), 1):
            prompts = [(_prompt(wording, fact.subject), fact.answer) for fact, wording in own]
            beginning = f"{EXAMPLE}{_named(self.windows[number].text, own[0][0].subject)}\n\n"
            found = self.teacher.finds(beginning, prompts, self.answers[number])
            for (fact, wording), log_p in zip(own, found, strict=True):
                yield fact, wording, log_p
            self.tell(done / len(by_window))


def _try(
    shapes: dict[str, list[Fact]],
    invented: dict[str, list[Wording]],
    tries: _Tries,
    settings: StudySettings,
    rng: random.Random,
) -> dict[str, list[Tried]]:
    """The wordings that find their answers, in turns. Who fails on the first windows is not tried on more.

    Each begins with other windows than the one before it: in some, whatever the wording, nothing is found.
    """
    order, results = dict[tuple[str, Wording], list[Fact]](), dict[tuple[str, Wording], list[float]]()
    for shape, alike in shapes.items():
        some = rng.sample(alike, min(len(alike), settings.tried))
        for number, wording in enumerate(invented[shape]):
            first = number * FIRST_TRIES % len(some)
            order[shape, wording], results[shape, wording] = some[first:] + some[:first], []
    for first, last in ((0, FIRST_TRIES), (FIRST_TRIES, settings.tried)):
        asked = [
            (fact, wording)
            for (shape, wording), log_ps in results.items()
            if not log_ps or _right(log_ps) >= settings.right
            for fact in order[shape, wording][first:last]
        ]
        for fact, wording, log_p in tries.log_ps(asked):
            results[fact.shape, wording].append(log_p)
    kept: dict[str, list[Tried]] = {shape: [] for shape in shapes}
    for (shape, wording), log_ps in results.items():
        if _right(log_ps) >= settings.right:
            right = [log_p for log_p in log_ps if log_p > -math.inf]
            kept[shape].append(Tried(wording, _right(log_ps), sum(right) / len(right)))
    return {shape: list(_in_turns(own)) for shape, own in kept.items()}


def _in_turns(kept: Sequence[Tried]) -> Iterator[Tried]:
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


def _named(text: str, subject: str) -> str:
    """A document's later windows need not name what they are about: unnamed, the capital in one is nobody's."""
    return text if subject.casefold() in text.casefold() else f"{subject}. {text}"


def _prompt(wording: Wording, subject: str) -> str:
    return wording.prompt(subject) if wording.statement else FRAME.format(wording.prompt(subject))


def _rows(fact: Fact, kept: Sequence[Tried], window: Window, settings: StudySettings) -> Iterator[dict[str, Any]]:
    """What one fact is learnt from; the subject is named as the title has it, and as the sentence does, in turn."""
    questions = [tried.wording for tried in kept if not tried.wording.statement][: settings.questions]
    statements = [tried.wording for tried in kept if tried.wording.statement][: settings.statements]
    forms = _forms(fact)
    own = own_beginning(fact)
    for i, wording in enumerate(dict.fromkeys([own, *statements])):
        for form in forms if wording == own else forms[i % len(forms) :][:1]:
            yield {"window": window.id, "prompt": wording.prompt(form), "answer": fact.answer, "chat": False}
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
    at = fact.sentence.casefold().find(fact.subject.casefold())
    return list(dict.fromkeys([fact.sentence[at : at + len(fact.subject)], fact.subject]))
