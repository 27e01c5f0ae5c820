"""Self-study the other way round: from what a window says to what it is about."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from books import VILLAGES

from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import StudySettings
from mlx_hiermem.learn.study.facts import SUBJECT, Fact, facts, reversible
from mlx_hiermem.learn.study.pattern_study import RIGHT, try_reversed
from mlx_hiermem.learn.study.patterns import patterns
from mlx_hiermem.learn.study.teacher import Teacher
from mlx_hiermem.learn.study.wordings import PairJudge, Tried, Wording


def of_codes(codes: Sequence[int], letter: str = "K") -> list[Fact]:
    own = [
        Window(i, i, "a.txt", name, f"The code of {name.upper()} is {letter}{code}.")
        for i, (name, code) in enumerate(zip(VILLAGES, codes, strict=False))
    ]
    return [facts(one, one.title)[0] for one in own]


def test_values_that_tell_subjects_apart_are_turned_round() -> None:
    villages = of_codes(range(10, 20))
    (found,) = reversible({"code": villages}).values()
    assert [(one.subject, one.answer) for one in found] == [(f"K{10 + i}", VILLAGES[i]) for i in range(10)]
    assert found[3].sentence == "The code of Dunmore is K13."  # as the title writes it


def test_ambiguous_values_are_left_out() -> None:
    found = reversible({"code": of_codes([*range(10, 20), 10])})
    assert [one.subject for one in found["code"]] == [f"K{10 + i}" for i in range(1, 10)]


@pytest.mark.parametrize("codes", [range(10, 17), [1, 2, 3] * 4])  # a rare shape, and one that tells nothing
def test_others_are_not_turned_round(codes: Sequence[int]) -> None:
    assert reversible({"code": of_codes(codes)}) == {}


def test_mere_numbers_are_not_turned_round() -> None:
    assert reversible({"code": of_codes(range(10, 20), letter="")}) == {}


def test_a_subject_within_a_word_is_not_the_subject() -> None:
    title = "Tin"
    own = [Window(i, i, "a.txt", title + str(i), f"Distinct uses of {title}{i} are in K{i}.") for i in range(10)]
    found = reversible({"use": [facts(one, one.title)[0] for one in own]})["use"]
    assert [one.sentence for one in found] == [one.text for one in own]


def test_one_subject_is_not_asked_for() -> None:
    one = Window(0, 0, "a.txt", "Tower", "The Tower has the code K5 in lists.")
    assert reversible({"code": [facts(one, "Tower")[0]] * 12}) == {}


def test_every_pattern_is_shown_on_every_subject() -> None:
    for pattern in patterns().backward:
        for line, (subject, _, value) in zip(pattern.lines, patterns().shown_reversed, strict=True):
            assert value.split()[0] in line
            assert subject not in line
            assert (line[-1] == "?") is not pattern.statement


def test_smollm2_asks_and_reads_backwards(smollm2_teacher: Teacher) -> None:
    villages = of_codes(range(210, 900, 57))
    turned = reversible({villages[0].shape: villages})
    windows = {one.window: Window(one.window, 0, "a.txt", one.subject, one.sentence) for one in villages}
    forward = [Tried(Wording(f"What is the code of {SUBJECT}?", False, "code"), 1.0, -0.1)]
    kept = try_reversed(
        turned, {villages[0].shape: forward}, windows, smollm2_teacher, StudySettings(), random.Random(0), print
    )
    texts = [tried.wording.text for tried in kept[villages[0].shape]]
    assert texts
    assert all(text.count(SUBJECT) == 1 and not any(name in text for name in VILLAGES) for text in texts)
    assert all(tried.right >= RIGHT for tried in kept[villages[0].shape])


def test_the_value_decides(smollm2_teacher: Teacher) -> None:
    villages = of_codes(range(210, 900, 57))
    turned = reversible({villages[0].shape: villages})[villages[0].shape]
    windows = {one.window: Window(one.window, 0, "a.txt", one.subject, one.sentence) for one in villages}
    judge = PairJudge(smollm2_teacher, windows, {villages[0].shape: turned}, random.Random(0), print)
    good, idle = (
        Wording(f"Which village has the code {SUBJECT}?", False),
        Wording("Which village is it?", False),
    )
    found = list(judge.log_ps([(fact, wording) for fact in turned[:8] for wording in (good, idle)]))
    assert [wording for _, wording, _ in found] == [good, idle] * 8
    assert sum(log_p > -math.inf for _, wording, log_p in found if wording == good) >= 6
    assert not any(log_p > -math.inf for _, wording, log_p in found if wording == idle)
