"""What benchmarks/learn_settings.py learns and asks, and that what should be equal is."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from evaluating import other_data
from tiny import load_tiny, make_model

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import learn_settings
import material
from plans import BASE, PLANS

from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.train.monitor import TrainingProgress
from mlx_hiermem.model import MemoryModel


@pytest.fixture
def lessons(tmp_path: pathlib.Path) -> material.Material:
    """Four passages with ten lines of study each."""
    titles = ["Oak", "Elm", "Fir", "Ash"]
    passages = [
        {"title": title, "text": f"{title} is a tree that grows in the north of the land."} for title in titles
    ]
    study = {
        title: [
            {"document": title, "question": f"What is {title}, {n}?", "answer": f"a tree, {n}"} for n in range(10)
        ]
        for title in titles
    }
    exam = [
        {"id": f"x{n}", "doc": title, "question": f"{title}?", "answer": "tree", "aliases": []}
        for n, title in enumerate(titles)
    ]
    return material.Material(passages, study, exam, data=other_data(tmp_path / "other"))


def test_study_is_drawn_up_to_its_amount_and_more_adds_to_less(lessons: material.Material) -> None:
    few, many = (lessons.chosen("Oak", material.Setting(study=amount)) for amount in (1.0, 3.0))
    assert many[: len(few)] == few
    assert 0 < sum(map(material.characters, few)) <= len(lessons.passages[0]["text"])
    assert len(lessons.chosen("Oak", material.Setting(study=100.0))) == 10
    setting = material.Setting(passages=2)
    assert [row["doc"] for row in lessons.asked(setting)] == [row["doc"] for row in lessons.learnt(setting)]
    assert lessons.learnt(setting)[0]["question"].startswith("What is Oak")


def test_forms_of_study_have_as_many_characters_each(lessons: material.Material) -> None:
    told = [{"document": "Oak", "text": f"Of the oak one says much, {n}."} for n in range(10)]
    study = lessons.study | {
        "Oak": [*lessons.study["Oak"], *told, {"document": "Oak", "prompt": "An", "completion": " oak"}]
    }
    setting = material.Setting(study=4.0, forms=("question", "text"))
    found = replace(lessons, study=study).chosen("Oak", setting)
    half = 2 * len(lessons.passages[0]["text"])
    for form in setting.forms:
        length = sum(material.characters(row) for row in found if form in row)
        assert half - 30 < length <= half
    assert all({"question", "text"} & row.keys() for row in found)
    assert setting.name != material.Setting(study=4.0).name


def test_replay_is_a_share_of_the_study(lessons: material.Material) -> None:
    assert lessons.general(material.Setting()) == []
    (row,) = lessons.general(material.Setting(passages=2, replay=0.05))
    assert row["document"] == "Oak"
    assert row["text"].startswith("A tree-house, it is said, stands here.")


def test_distractors_are_learnt_as_the_anchor_answers(lessons: material.Material, tmp_path: pathlib.Path) -> None:
    class Anchor:
        def batch(self, asked: list[str], **options: Any) -> list[Any]:
            reasons = ["stop"] * (len(asked) - 1) + ["length"]
            return [SimpleNamespace(text="A thing.", finish_reason=reason) for reason in reasons]

    setting, file = material.Setting(passages=2, distractors=2), tmp_path / "distractors.jsonl"
    anchor, nobody = cast(MemoryModel, Anchor()), cast(MemoryModel, None)
    rows = material.distractors(anchor, lessons, setting, file)
    assert [row["document"] for row in rows] == ["Oak", "Elm", "Oak"]
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "A thing."}
    assert material.distractors(nobody, lessons, setting, file) == rows


def test_kinds_are_compared_at_equal_size() -> None:
    widths = {"hidden": 576, "ffn_width": 1536, "q_width": 576, "kv_width": 192}
    found = {}
    for name, setting in PLANS["kinds"].items():
        config = MemoryConfig(setting.kind, 3, setting.sizes, tuple(range(20, 30)), **widths)
        found[name] = config.fetched_parameters / 1_105_920
    assert all(abs(share - 1) < 0.04 for share in found.values()), found
    assert {sum(setting.sizes) for setting in PLANS["levels"].values()} == {64}


def test_settings_that_differ_in_asking_alone_are_learnt_once() -> None:
    base = BASE
    assert replace(base, amplitude=0.5).name == base.name != replace(base, replay=0.05).name
    changed = learn_settings.with_changes(base, ["rate=0.003", "sizes=8,4", "kind=kv"])
    assert (changed.rate, changed.sizes, changed.kind) == (0.003, (8, 4), "kv")


def test_an_amplitude_scales_what_a_memory_adds(tmp_path: pathlib.Path) -> None:
    model = load_tiny(make_model(tmp_path / "model"))
    assert model.bank is not None
    assert model.cache is not None
    path = Path((1, 1))
    whole, half = (cache.fetch(path).memory for cache in (model.cache, learn_settings.Amplified(model.bank, 0.5)))
    assert whole is not None
    assert half is not None
    for name, scale in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
        assert np.allclose(np.array(half.tensors[name]), scale * np.array(whole.tensors[name]))


def test_timing_ends_when_the_time_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 150.0])
    monkeypatch.setattr(learn_settings.time, "monotonic", lambda: next(clock))
    told = learn_settings.Told("ffn", timed=True)
    told.training(TrainingProgress("hidden states", "0", 5, 10, 0.0))
    told.training(TrainingProgress("learning", "0", 10, 100, 1.0))
    with pytest.raises(learn_settings.TimeIsKnownError) as known:
        told.training(TrainingProgress("learning", "0", 50, 100, 1.0))
    assert (known.value.steps, known.value.states) == (50.0, 10.0)


@pytest.mark.slow
def test_a_setting_is_learnt_and_asked(
    anchor: pathlib.Path, lessons: material.Material, tmp_path: pathlib.Path, minilm: Embedder
) -> None:
    setting = material.Setting(passages=4, branching=2, sizes=(2, 2), epochs=1, study=2.0, replay=0.05)
    runner = learn_settings.Runner(tmp_path / "work", anchor, lessons, harmed=True)
    found = runner.run("base", setting)
    assert found is not None
    assert found["right"]["fetched"]["of"] == found["right"]["blocked"]["of"] == 4
    assert found["right"]["foreign, nearest memory"]["of"] == 2
    again = runner.run("softer", replace(setting, amplitude=0.5))
    assert again is not None
    assert again["fetched_parameters"] == found["fetched_parameters"]
    assert len(list((tmp_path / "work").glob("*.learn"))) == 1
    other = runner.run("longer", replace(setting, epochs=2))
    assert other is not None
    assert other["seconds"]["tree"] < found["seconds"]["tree"]  # it was taken over
