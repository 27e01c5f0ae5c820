"""The scripts behind docs/replication.md: what they ask and conclude, on tiny models and made-up replies."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluating import evaluation, other_data
from tiny import CONFIG, LLAMA, give_sources, load_tiny, make_model

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import harm
import replication
from knowledge import Exam, read_kept, with_level_alone

from mlx_hiermem.model import MemoryModel

Row = dict[str, Any]
QUESTION = {"id": "q", "doc": "Oak", "question": "What is an oak?", "answer": "a tree", "aliases": []}


@pytest.fixture
def model(tmp_path: pathlib.Path) -> MemoryModel:
    """A tiny model, in whose leaf 1.1 is a window."""
    made = make_model(tmp_path / "model")
    give_sources(made / "bank", {"1.1": [("Oak", "An oak is a tree.")]}, lambda texts: np.ones((len(texts), 384)))
    return load_tiny(made)


# Asking


def test_parts_of_a_path_are_asked_apart(model: MemoryModel) -> None:
    whole = model.select("fetched", QUESTION["question"])
    assert len(whole.blocks) == 2
    for level in (1, 2):
        alone = with_level_alone(model, level).select("fetched", QUESTION["question"])
        assert (alone.path, alone.blocks) == (whole.path, whole.blocks[level - 1 : level])


def test_the_questions_own_branch_can_be_blocked(model: MemoryModel) -> None:
    exam = Exam(model)
    fetched, blocked = (exam.ask([QUESTION], memory)[0]["path"] for memory in ("fetched", "blocked"))
    assert len(blocked) == len(fetched)
    assert blocked[0] != fetched[0]


def test_replies_are_kept_and_an_unfinished_line_is_asked_again(model: MemoryModel, tmp_path: pathlib.Path) -> None:
    exam, kept = Exam(model), tmp_path / "kept.jsonl"
    first = exam.ask_all([QUESTION], ["none", "leaf"], kept)
    assert set(first) == {("none", "q"), ("leaf", "q")}
    text = kept.read_text()
    kept.write_text(text[:-5])
    assert exam.ask_all([QUESTION], ["none", "leaf"], kept)["none", "q"] == first["none", "q"]
    assert [row["memory"] for row in map(json.loads, kept.read_text().splitlines())] == ["none", "leaf"]
    assert set(read_kept(kept)) == set(first)


# Findings


def replies(right: dict[str, list[int]]) -> replication.Replies:
    """Memory -> whether each of the questions, two an article, was answered."""
    count = len(next(iter(right.values())))
    exam = [{"id": f"q{n}", "doc": f"d{n // 2}"} for n in range(count)]
    row = {"prompt_tokens": 50.0, "bytes_moved": 1e9, "tokens": 4.0}
    kept = {
        (memory, f"q{n}"): row | {"lenient": bool(one), "prompt_tokens": 50.0 + 100 * ("source" in memory)}
        for memory, own in right.items()
        for n, one in enumerate(own)
    }
    return replication.Replies(exam, kept)


NEVER, OFTEN, ALWAYS = [0] * 80, [1, 0, 0, 0] * 20, [1] * 80


def test_more_is_right_with_the_fetched_memory() -> None:
    found = replication.more_is_fetched(replies({"none": NEVER, "generic": OFTEN, "fetched": ALWAYS}))
    assert found is not None
    assert found.verdict == "yes"
    assert found.figures["gains"]["fetched − generic"]["value"] == 0.75
    other = replication.more_is_fetched(replies({"none": NEVER, "generic": OFTEN, "fetched": NEVER}))
    assert other is not None
    assert other.verdict == "no"
    without = replication.more_is_fetched(replies({"none": NEVER, "fetched": ALWAYS}))
    assert without is not None
    assert list(without.figures["gains"]) == ["fetched − none"]
    assert replication.more_is_fetched(replies({"none": NEVER, "generic": OFTEN})) is None


def test_facts_that_the_anchor_knows_are_left_out() -> None:
    found = replication.new_facts(replies({"none": OFTEN, "generic": OFTEN, "fetched": ALWAYS}))
    assert found is not None
    assert found.figures["shares"]["generic"]["right"] == 0
    assert found.figures["shares"]["fetched"]["of"] == 60


def test_blocking_collapses_where_more_than_half_of_the_gain_is_lost() -> None:
    verdicts = []
    for left in (NEVER, OFTEN, ALWAYS):
        found = replication.blocking_collapses(replies({"none": NEVER, "fetched": ALWAYS, "blocked": left}))
        assert found is not None
        verdicts.append(found.verdict)
    assert verdicts == ["yes", "yes", "no"]


def test_the_gain_is_told_by_fifths_of_rarity() -> None:
    gained = [1] * 40 + [0] * 40  # by the first half of the articles, which are the rarest
    rarity = {f"d{n}": 100.0 - n for n in range(40)}
    found = replication.rarer_gains_more(replies({"none": NEVER, "fetched": gained}), rarity, "the title")
    assert found is not None
    assert found.verdict == "yes"
    assert [one["gain"]["value"] for one in found.figures["fifths"].values()] == [1, 1, 0.5, 0, 0]


def test_the_slope_is_that_of_least_squares() -> None:
    x, y = np.linspace(0, 1, 30), np.random.default_rng(0).random(30)
    found = replication.slope(list(x), list(y))
    (value, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert found.value == pytest.approx(value)
    assert (found.high - found.value) / 1.96 == pytest.approx(math.sqrt(covariance[0, 0]))


def test_retrieval_costs_what_its_prompt_has_more() -> None:
    right = {"none": NEVER, "fetched": ALWAYS, "source": OFTEN, "fetched+source": ALWAYS}
    cost, both = replication.beats_retrieval(replies(right), (1_000_000_000, 0))
    assert (cost.verdict, both.verdict) == ("yes", "unclear")
    more = cost.figures["times the FLOPs of none"]
    assert more["source"] == pytest.approx(3, abs=0.02)  # 150 tokens for 50
    assert more["fetched"] == pytest.approx(1, abs=0.02)  # the router reads the question


def test_weights_are_those_of_the_layers(model: MemoryModel) -> None:
    d, ffn, width = LLAMA["hidden_size"], LLAMA["intermediate_size"], 16
    layers = LLAMA["num_hidden_layers"] * (2 * d * d + 2 * d * width + 3 * d * ffn)
    assert replication.weights_of(model) == (layers, CONFIG.fetched_parameters)


def test_rarity_is_the_anchors_loss_and_is_computed_once(model: MemoryModel, tmp_path: pathlib.Path) -> None:
    kept = tmp_path / "rarity.jsonl"
    found = replication.rarities(model, ["Oak", "Elm", "Oak"], kept)
    assert replication.rarities(model, ["Oak"], kept) == found
    assert len(kept.read_text().splitlines()) == 1
    assert list(found["title"]) == list(found["passage"]) == ["Oak"]
    assert found["title"]["Oak"] > found["passage"]["Oak"] > 0  # a title's is the sum, a passage's that of a token


# Harm


def test_paired_intervals_are_wide_where_nothing_changed() -> None:
    low, high = harm.paired_interval(0, 0, 200)
    assert high == -low == pytest.approx(1.96 * math.sqrt(2 / 202 / 202))
    low, high = harm.paired_interval(3, 9, 100)
    assert (low + high) / 2 == pytest.approx((4 - 10) / 102)


def test_harm_counts_what_changed() -> None:
    found = harm.compared("task", [True, True, False, False], [True, False, True, True], reached=3)
    assert (found.before, found.after, found.gained, found.lost, found.difference) == (2, 3, 2, 1, 0.25)
    assert harm.compared("task", [True] * 900, [True] * 900, 0).verdict == "yes"
    assert harm.compared("task", [True] * 900, [False] * 900, 900).verdict == "no"
    mean = harm.mean_of([harm.compared("a", [True] * 300, [True] * 300, 0)] * 3)
    assert mean["interval"][1] == pytest.approx(harm.paired_interval(0, 0, 300)[1] / math.sqrt(3))


def test_other_corpora_are_asked_with_and_without_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, made = other_data(tmp_path / "data"), make_model(tmp_path / "model")
    assert harm.other_questions(data, "wordnet")[0]["question"] == "What type of thing is 0?"
    assert harm.other_questions(data, "countries")[0]["question"] == "What is the capital of Utopia?"
    opened = evaluation(made, tmp_path / "model.harm")
    monkeypatch.setattr(harm.Evaluation, "of", lambda folder, out: opened)
    asker = harm.Asker(made, data, limit=6, everywhere=True)
    for name, count in (("wordnet", 6), ("countries", 2), ("countries in chat", 2)):
        found = asker.ask(name)
        assert (found.n, found.reached) == (count, count)
    assert [file.name.partition(".")[0] for file in sorted((tmp_path / "model.harm").glob("*.jsonl"))] == [
        "countries",
        "countries",
        "wordnet",
        "wordnet",
    ]


def test_a_bank_without_reach_gives_memory_to_all(model: MemoryModel) -> None:
    model.router.policy = replace(model.router.policy, reach=1e-3, passage_reach=1e-3)
    assert model.choose("fetched", "far away").path == ()
    with harm.without_reach(model):
        assert len(model.choose("fetched", "far away").path) == 2
    assert model.choose("fetched", "far away").path == ()
