"""Texts that are known rest, a question's two forms take turns, and a killed run rests the same texts."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from lessons import QUICK, make_set, tiny_config

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.config import Path
from mlx_hiermem.learn.train.dataset import FRAMED, IN_CHAT, TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.monitor import ProgressMeter, TrainingProgress, read_log
from mlx_hiermem.learn.train.schedule import KNOWN, Known


@pytest.fixture
def examples(tmp_path: pathlib.Path) -> TrainingSet:
    return make_set(tmp_path / "set", 6)


def seen(known: Known, epoch: int, losses: dict[int, float]) -> None:
    values = np.array(list(losses.values()))
    known.add(epoch, np.array(list(losses)), values, values < 1)


def test_a_text_rests_longer_each_time_it_is_known(examples: TrainingSet, tmp_path: pathlib.Path) -> None:
    known = Known(tmp_path / "known", 0, examples)
    assert known.due(0).all()
    seen(known, 0, {0: 2.0, 1: KNOWN / 2})
    assert known.due(1)[[0, 1]].tolist() == [True, False]
    assert known.due(2)[1]
    seen(known, 1, {0: KNOWN / 2})
    seen(known, 2, {1: KNOWN / 2})
    assert [bool(known.due(epoch)[1]) for epoch in (3, 4, 5)] == [False, False, True]
    seen(known, 5, {1: 0.5})  # forgotten again
    assert known.due(6)[1]


def test_what_came_after_the_last_commit_is_forgotten(examples: TrainingSet, tmp_path: pathlib.Path) -> None:
    known = Known(tmp_path / "known", 0, examples)
    seen(known, 0, {0: 0.0})
    known.flush()
    size = known.size
    seen(known, 0, {1: 0.0})
    known.flush()
    again = Known(tmp_path / "known", size, examples)
    assert again.due(1)[[0, 1]].tolist() == [False, True]


def test_shares_are_of_the_last_time_that_each_text_was_learnt(
    examples: TrainingSet, tmp_path: pathlib.Path
) -> None:
    known = Known(tmp_path / "known", 0, examples)
    assert known.fractions() == (0.0, 0.0)
    seen(known, 0, {0: 2.0, 1: 0.01, 2: 0.5, 3: 2.0})
    seen(known, 1, {0: 0.01})
    assert known.fractions() == (0.5, 0.75)


def test_the_two_forms_of_a_question_take_turns(tmp_path: pathlib.Path) -> None:
    with TrainingSetWriter(tmp_path / "set") as out:
        for number in range(5):
            tokens, learn = np.arange(4, dtype=np.int32), np.arange(4) > 1
            out.add(TrainingExample(tokens, learn, number, form=FRAMED), [Path((0,))])
            out.add(TrainingExample(tokens, learn, number, form=IN_CHAT), [Path((0,))])
        out.add(TrainingExample(tokens, learn, 5), [Path((0,))])
    found = TrainingSet.open(tmp_path / "set")
    turns = np.array([found.turns(epoch) for epoch in range(6)])  # bool [epochs, N]
    assert (turns[:, 0:10:2] != turns[:, 1:10:2]).all()  # one of each pair
    assert turns[:, 10].all()
    assert np.allclose(turns.mean(0), found.often)


def test_what_is_known_is_not_learnt_in_each_epoch(
    anchor: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log and the meter tell it, and the last epoch goes through everything once more."""
    monkeypatch.setattr("mlx_hiermem.learn.train.schedule.KNOWN", 5.0)  # a tiny anchor learns random tokens slowly
    model = load_anchor(anchor / "anchor")[0]
    examples = make_set(tmp_path / "set", 6)
    settings = dataclasses.replace(QUICK, epochs=10, group_tokens=32, rate=3e-2, generic=False)
    trainer = Trainer(tmp_path / "work", model, tiny_config(model, placement="uniform"), examples, settings)
    told: list[TrainingProgress] = []
    trainer.run(told.append)
    rows = [row for row in read_log(tmp_path / "work" / "log.jsonl") if "known" in row and row["job"] == "0"]
    assert rows[-1]["known"] > 0.5
    tokens = np.diff([0, *(row["tokens"] for row in rows)])  # of each epoch
    assert tokens[-1] == tokens[0] == tokens.max()
    assert tokens[1:-1].mean() < 0.8 * tokens[0]
    assert told[-1].tokens == told[-1].total


def test_the_meter_takes_what_rests_off_the_whole() -> None:
    told: list[TrainingProgress] = []
    meter = ProgressMeter(told.append, 300)
    meter.begin("0", 0)
    meter.learnt(80, 1.0)
    meter.rested(20)
    meter.learnt(50, 1.0)
    meter.rested(70)
    meter.known(0.5, 0.75)
    assert (told[-1].tokens, told[-1].total, told[-1].known) == (130, 230, (0.5, 0.75))
