"""The scripts behind docs/replication.md: what they ask, learn and conclude, on tiny models and made-up replies."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from evaluating import evaluation, write
from tiny import CONFIG, LLAMA, give_sources, load_tiny, make_model

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import followups
import harm
import learn_settings
import material
import replication
from knowledge import Exam, read_kept, with_level_alone

from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.train.monitor import TrainingProgress
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


# Follow-ups


@pytest.mark.parametrize(
    ("question", "article", "first", "then"),
    [
        (
            "Which river does Turin stand on?",
            {"topic": "Geography"},
            "What is Turin?",
            "Which river does it stand on?",
        ),
        ("Turin's river is called what?", {"topic": "Geography"}, "What is Turin?", "Its river is called what?"),
        (
            "Where was Turin born?",
            {"topic": "People", "text": "She paints. Her …"},
            "Who is Turin?",
            "Where was she born?",
        ),
    ],
)
def test_a_pronoun_stands_for_the_subject(question: str, article: dict[str, str], first: str, then: str) -> None:
    made = followups.FollowUp.of({"doc": "Turin (city)", "question": question}, article)
    assert made is not None
    assert (made.first, made.then) == (first, then)
    assert followups.FollowUp.of({"doc": "Lisbon", "question": question}, article) is None


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


def other_data(folder: pathlib.Path) -> pathlib.Path:
    """Questions and countries in the form of those that are asked."""
    for name in ("qa", "corpus", "evals"):
        (folder / name).mkdir(parents=True)
    rows = [
        {
            "id": f"w{n}",
            "doc": f"w{n}",
            "prompt": f"Thing {n} is a kind of",
            "answer": "thing",
            "aliases": ["thing"],
            "heldout_prompts": [f"Question: What type of thing is {n}?\nAnswer: a kind of"],
        }
        for n in range(6)
    ]
    write(folder / "qa" / "wordnet_isa_qa.jsonl", rows)
    country = {"id": "c", "name": "Utopia", "capital_factbook": "Amaurot", "text": "Utopia. Capital: Amaurot"}
    write(folder / "corpus" / "countries.jsonl", [country])
    (folder / "evals" / "wikitext2_raw_test.txt").write_text(
        " = Title = \n\n short \n" + " A tree @-@ house , it is said , stands here . \n".strip() * 8 + "\n"
    )
    return folder


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


# Settings of learning


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
    setting = material.Setting(passages=2)
    assert [row["doc"] for row in lessons.asked(setting)] == [row["doc"] for row in lessons.learnt(setting)]
    assert lessons.learnt(setting)[0]["question"].startswith("What is Oak")


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
    for name, setting in learn_settings.PLANS["kinds"].items():
        config = MemoryConfig(setting.kind, 3, setting.sizes, tuple(range(20, 30)), **widths)
        found[name] = config.fetched_parameters / 1_105_920
    assert all(abs(share - 1) < 0.04 for share in found.values()), found
    assert {sum(setting.sizes) for setting in learn_settings.PLANS["levels"].values()} == {64}


def test_settings_that_differ_in_asking_alone_are_learnt_once() -> None:
    base = learn_settings.BASE
    assert replace(base, amplitude=0.5).name == base.name != replace(base, replay=0.05).name
    changed = learn_settings.with_changes(base, ["rate=0.003", "sizes=8,4", "kind=kv"])
    assert (changed.rate, changed.sizes, changed.kind) == (0.003, (8, 4), "kv")


def test_an_amplitude_scales_what_a_memory_adds(model: MemoryModel) -> None:
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
