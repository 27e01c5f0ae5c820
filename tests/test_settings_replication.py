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

COUNT = 80
NEVER, OFTEN, ALWAYS = [0] * COUNT, [1, 0, 0, 0] * (COUNT // 4), [1] * COUNT
Right = Mapping[str, list[int]]  # setting -> whether each question was answered


@pytest.fixture
def lessons() -> Material:
    """120 passages with a question each, of which the first 80 are asked, and no other data."""
    titles = [f"d{number}" for number in range(120)]
    exam = [{"id": f"x{n}", "doc": title, "question": "?", "answer": "a"} for n, title in enumerate(titles[:COUNT])]
    study = {title: [{"question": "?", "answer": "a"}] for title in titles}
    return Material([{"title": title, "text": "a" * 60} for title in titles], study, exam)


def keep(work: pathlib.Path, plan: str, memory: str, ids: str, right: Right) -> None:
    """Writes replies as `learn_settings.py` keeps them."""
    for name, own in right.items():
        write(learn_settings.kept_of(work, learn_settings.PLANS[plan][name]), memory, ids, own)


def write(file: pathlib.Path, memory: str, ids: str, right: list[int]) -> None:
    with file.open("a", encoding="utf-8") as out:
        for n, one in enumerate(right):
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
    keep(tmp_path, "bank", "fetched", "x", {small: [0, *ALWAYS[1:27]], middle: ALWAYS[:27] + NEVER[27:]})
    assert verdicts(tmp_path, lessons) == {}
    whole = tmp_path / "model.exam.jsonl"
    write(whole, "fetched", "x", [1, 0, *ALWAYS[2:27], *NEVER[27:]])
    (found,) = settings_replication.findings(tmp_path, lessons, whole)
    assert set(found.figures["shares"]) == {small, middle, large}
    assert {one["of"] for one in found.figures["shares"].values()} == {27}
    assert found.verdict == "unclear"


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
    assert found.figures["harm"]["n"] == 60 + COUNT  # 60 passages
