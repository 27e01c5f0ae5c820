"""The rows of docs/replication.md that compare settings of learning, from made-up replies."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import learn_settings
import settings_replication
from material import Material
from plans import PLANS

COUNT = 80
NEVER, OFTEN, ALWAYS = [0] * COUNT, [1, 0, 0, 0] * (COUNT // 4), [1] * COUNT
Right = Mapping[str, list[int]]  # setting -> whether each question was answered


@pytest.fixture
def lessons() -> Material:
    """480 passages with two questions each, and no other data."""
    titles = [f"d{number}" for number in range(480)]
    exam = [{"id": f"x{n}", "doc": titles[n // 2], "question": "?", "answer": "a"} for n in range(960)]
    study = {title: [{"question": "?", "answer": "a"}] for title in titles}
    return Material([{"title": title, "text": "a" * 60} for title in titles], study, exam)


def keep(work: pathlib.Path, plan: str, memory: str, ids: str, right: Right, first: int = 0) -> None:
    """Writes replies as `learn_settings.py` keeps them, to the questions from `first` on."""
    for name, own in right.items():
        write(learn_settings.kept_of(work, PLANS[plan][name]), memory, ids, own, first)


def write(file: pathlib.Path, memory: str, ids: str, right: list[int], first: int = 0) -> None:
    with file.open("a", encoding="utf-8") as out:
        for n, one in enumerate(right, first):
            out.write(json.dumps({"id": f"{ids}{n}", "memory": memory, "lenient": bool(one)}) + "\n")


def verdicts(work: pathlib.Path, lessons: Material) -> dict[str, str]:
    return {one.number: one.verdict for one in settings_replication.findings(work, lessons)}


def test_a_kind_wins_where_it_is_ahead_of_every_other(lessons: Material, tmp_path: pathlib.Path) -> None:
    others = dict.fromkeys(settings_replication.OTHERS, OFTEN)
    keep(tmp_path, "kinds", "fetched", "x", others)
    assert verdicts(tmp_path, lessons) == {}  # ffn was not asked yet
    keep(tmp_path, "kinds", "fetched", "x", {"ffn": ALWAYS})
    assert verdicts(tmp_path, lessons) == {"2": "yes"}


def test_a_kind_does_not_win_where_one_is_ahead_of_it(lessons: Material, tmp_path: pathlib.Path) -> None:
    others = dict.fromkeys(settings_replication.OTHERS, OFTEN) | {"kv": ALWAYS}
    keep(tmp_path, "kinds", "fetched", "x", others | {"ffn": OFTEN})
    assert verdicts(tmp_path, lessons)["2"] == "no"


def test_growth_is_told_for_each_doubling(lessons: Material, tmp_path: pathlib.Path) -> None:
    half = [1, 0] * (COUNT // 2)
    keep(tmp_path, "sizes", "fetched", "x", {"8 and 8": NEVER, "32 and 32": half, "128 and 128": ALWAYS})
    (found,) = settings_replication.findings(tmp_path, lessons)
    assert (found.number, found.verdict) == ("9", "yes")
    assert found.figures["doubling"]["value"] == pytest.approx(0.25)  # from 0 to 1 in four doublings


def test_a_bank_is_compared_on_the_questions_of_the_smallest(lessons: Material, tmp_path: pathlib.Path) -> None:
    small, middle, large = settings_replication.PASSAGES
    always, never = [1] * 720, [0] * 720
    keep(tmp_path, "whole", "fetched", "x", {small: always[:120]}, first=840)
    keep(tmp_path, "whole", "fetched", "x", {middle: never[:360] + always[:120]}, first=480)
    assert verdicts(tmp_path, lessons) == {}
    whole = tmp_path / "model.exam.jsonl"
    write(whole, "fetched", "x", always[:715] + never[:5], first=240)
    found, more = settings_replication.findings(tmp_path, lessons, {large: whole})
    assert (found.number, more.number) == ("3c", "3d")
    assert set(found.figures["shares"]) == {small, middle, large}
    assert set(more.figures["shares"]) == {middle, large}
    assert {one["of"] for one in found.figures["shares"].values()} == {120}
    assert {one["of"] for one in more.figures["shares"].values()} == {480}
    assert (found.verdict, more.verdict) == ("unclear", "yes")


def test_harm_is_counted_over_blocked_and_foreign_questions(
    lessons: Material, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Material, "foreign", lambda *_: [{"id": f"f{n}", "question": "?"} for n in range(COUNT)])
    settings: dict[str, Any] = {"as it is": NEVER, "4 distractors": OFTEN}
    for memory, ids in (("fetched", "x"), ("blocked", "x"), ("fetched", "f")):
        keep(tmp_path, "harm", memory, ids, settings)
    assert verdicts(tmp_path, lessons) == {}  # the foreign questions need data
    told = Material(lessons.passages, lessons.study, lessons.exam, data=tmp_path)
    (found,) = settings_replication.findings(tmp_path, told)
    assert (found.number, found.verdict) == ("11c", "yes")
    assert found.figures["harm"]["n"] == 2 * COUNT
