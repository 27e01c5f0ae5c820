"""A bank's reach: what is like nothing that it knows gets no memory, and everything says so."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from elements import BANK
from tiny import HashEmbedder, make_model
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.display import FAR, describe
from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.merge import merge_policies
from mlx_hiermem.bank.policy import OPEN, POLICY, BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.learn.tree.build import ROOM, reach_of
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import BELONGS, LOOKED_BACK, RememberedTexts, Router, Topic
from mlx_hiermem.tree import ClusterTree

SUBJECTS = pathlib.Path(__file__).parent / "changes_of_subject.jsonl"


@pytest.fixture
def tree() -> ClusterTree:
    """Two dimensions, a leaf at (1, 0) and one at (0, 1)."""
    return ClusterTree([np.eye(2, dtype=np.float32)[None]], [np.ones((1, 2), bool)])


class Placed:
    """An embedder of texts that say where they are; several in one are in their middle."""

    def __init__(self) -> None:
        self.calls = list[int]()

    def embed(self, texts: list[str]) -> np.ndarray:
        self.calls.append(len(texts))
        return np.array([np.array(text.split(), np.float32).reshape(-1, 2).mean(0) for text in texts])


def test_what_is_too_far_enters_nothing(tree: ClusterTree) -> None:
    near, edge, far = tree.route(np.array([[0.8, 0.0], [0.5, 0.0], [0.4, 0.0]]), reach=0.5)
    assert (near.path, near.far) == (Path((0,)), False)
    assert (edge.path, edge.far) == (Path((0,)), False)
    assert (far.path, far.distances, far.far) == (Path(), (), True)
    assert tree.route(np.array([0.4, 0.0]))[0].path == Path((0,))


FIRST, AGAIN, OTHER = "1 0", "0.6 -0.1", "-1 -1"  # a subject, what is like it, and what is not


@pytest.fixture
def router(tree: ClusterTree) -> Router:
    """A text has memory if it is no farther than 0.3 from a leaf."""
    return Router(tree, Placed(), BankPolicy(reach=0.3))


def test_what_belongs_to_a_conversation_stays_and_what_does_not_gets_no_memory(router: Router) -> None:
    alone = router.turn(OTHER)
    assert (alone.topic.path, alone.route.far, alone.route.stayed) == (Path(), True, False)
    opened = router.turn(FIRST, alone.topic)
    assert (opened.route.path, opened.belongs, opened.topic.question) == (Path((0,)), None, FIRST)
    held = router.turn(AGAIN, opened.topic)
    assert (held.route.path, held.route.far, held.route.stayed, held.alone.far) == (Path((0,)), False, True, True)
    assert held.topic == replace(opened.topic, turns=2)
    left = router.turn(OTHER, held.topic)
    assert (left.route.path, left.route.far, left.route.stayed) == (Path(), True, False)
    assert held.belongs
    assert left.belongs
    assert held.belongs > BELONGS > left.belongs
    assert (left.topic.path, left.topic.aside) == (Path((0,)), OTHER)  # it is kept for the turns after it
    back = router.turn(AGAIN, left.topic)
    assert (back.route.path, back.topic.aside) == (Path((0,)), "")


def test_a_turn_like_the_aside_before_it_is_an_aside_too(router: Router) -> None:
    topic = Topic(Path((0,)), 1.0, FIRST)
    assert router.turn(AGAIN, topic).route.stayed
    assert router.turn(AGAIN, replace(topic, aside="0.5 -0.5")).route.far


def test_turns_stay_where_every_text_has_memory_and_where_no_question_was_saved(tree: ClusterTree) -> None:
    router, topic = Router(tree, Placed()), Topic(Path((0,)), 9.0, FIRST)
    turn = router.turn("0.4 0.5", topic)
    assert (turn.alone.path, turn.route.path, turn.route.stayed) == (Path((1,)), Path((0,)), True)
    assert Router(tree, Placed(), BankPolicy(reach=0.5)).turn(OTHER, replace(topic, question="")).route.stayed


def test_a_conversation_is_embedded_in_two_batches_and_never_again(tree: ClusterTree) -> None:
    texts = [OTHER, FIRST, AGAIN, OTHER, AGAIN, "0 1", FIRST]
    router = Router(tree, embedder := Placed(), BankPolicy(reach=0.3))
    topic, paths = None, []
    for number in range(len(texts)):
        turn = Router(tree, Placed(), BankPolicy(reach=0.3)).turn(texts[number], topic)
        topic = turn.topic
        paths.append(turn.route.path)
        assert router.conversation(texts[: number + 1]).route.path == paths[-1]
    assert paths == [(), (0,), (0,), (), (0,), (1,), (0,)]
    fresh = Router(tree, other := Placed(), BankPolicy(reach=0.3))
    assert fresh.conversation(texts).topic == topic
    assert [fresh.conversation(texts[: number + 1]).route.turns for number in range(7)] == [1, 1, 2, 3, 4, 1, 1]
    held = fresh.conversation([FIRST] * (LOOKED_BACK + 1))
    assert held.route.turns == 0, "it began before what is looked at"
    assert other.calls == [4, 2]  # what was said, and two follow-ups behind their question
    assert sum(embedder.calls) == 6


def test_the_time_of_a_route_has_the_embedding_in_it(tree: ClusterTree) -> None:
    class Slow(Placed):
        def embed(self, texts: list[str]) -> np.ndarray:
            time.sleep(0.02)
            return super().embed(texts)

    assert Router(tree, Slow()).conversation(["1 0"]).route.milliseconds >= 20


def test_what_was_said_long_ago_is_embedded_again() -> None:
    said = RememberedTexts(embedder := Placed(), most=2)
    for texts in (["1 1", "2 2"], ["1 1"], ["3 3"], ["1 1", "2 2"]):
        assert said.embed(texts)[:, 0].tolist() == [float(text[0]) for text in texts]
    assert embedder.calls == [2, 1, 1]  # the 2 was the longest ago
    assert said.embed([]).size == 0


def test_genuine_changes_of_subject(minilm: Embedder) -> None:
    """On the elements' bank; benchmarks/turns.py measures other banks too."""
    bank = MemoryBank.open(BANK)
    router, counts = Router(bank.tree, minilm, bank.policy), Counter[tuple[str, bool]]()
    for talk in map(json.loads, SUBJECTS.read_text(encoding="utf-8").splitlines()):
        topic = None
        for turn in talk["turns"] if talk["bank"] == "elements" else ():
            went = router.turn(turn["user"], topic)
            topic = went.topic
            counts["about" in turn, went.route.far] += 1
    assert counts[False, True] >= 28
    assert counts[False, False] <= 2
    assert counts[True, True] <= 1  # of 30 that it knows


def test_cooking_rice_gets_no_memory(minilm: Embedder) -> None:
    bank = MemoryBank.open(BANK)
    router = Router(bank.tree, minilm, bank.policy)
    talk = [
        "What is the symbol of gold?",
        "And its atomic number?",
        "How do I cook rice?",
        "How long does it take?",
    ]
    routes = [router.conversation(talk[:number]).route for number in (1, 2, 3, 4)]
    assert [route.far for route in routes] == [False, False, True, True]
    assert routes[0].path == routes[1].path
    assert router.conversation([*talk[:2], "Thanks!"]).route.far
    assert router.conversation([*talk, "Thanks!", "And the atomic number of gold?"]).route.path == routes[0].path


def test_nothing_is_attached_and_it_is_told(tmp_path: pathlib.Path) -> None:
    opened = load(make_model(tmp_path / "model"))
    assert opened.bank is not None
    model = MemoryModel(opened.anchor, None, opened.config, opened.bank)
    model._router = Router(opened.bank.tree, HashEmbedder(), BankPolicy(reach=1e-3))
    selection = model.select("fetched", "text")
    assert (selection.route.far, selection.path, selection.blocks, selection.bytes_read) == (True, Path(), (), 0)
    assert describe(selection) == FAR
    model._router = Router(opened.bank.tree, HashEmbedder())
    assert model.select("fetched", "text").blocks


def test_it_is_kept_by_every_edit_of_the_policy(tmp_path: pathlib.Path) -> None:
    root = make_model(tmp_path / "model") / "bank"
    assert edit.reach(root, 1.25) == MemoryBank.open(root).policy == BankPolicy(reach=1.25)
    assert edit.block(root, [Path((1,))]).reach == 1.25
    assert edit.unblock(root, [Path((1,))]) == BankPolicy(reach=1.25)
    assert edit.reach(root, math.inf).to_json() == OPEN.to_json()
    assert merge_policies(BankPolicy(reach=1.25), BankPolicy(reach=1.5)).reach == 1.5


@pytest.mark.parametrize("reach", ["0", "-1", '"wide"', "null", "NaN"])
def test_a_reach_that_is_none(tmp_path: pathlib.Path, reach: str) -> None:
    (tmp_path / POLICY).write_text(f'{{"blocked": [], "reach": {reach}}}')
    with pytest.raises(BankError):
        BankPolicy.read(tmp_path / POLICY)


def test_nearly_all_probes_are_within(tree: ClusterTree) -> None:
    angles = np.append(
        np.linspace(0, np.pi / 2, 5_000), np.full(5, np.pi)
    )  # of 5 005 probes, 5 are far from the rest
    probes = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    reach = reach_of(tree, probes)
    far = [route.far for route in tree.route(probes, reach=reach)]
    assert far == [False] * 5_000 + [True] * 5
    # The chord of half the angle between leaves, and what other wordings may be farther.
    assert reach == pytest.approx(ROOM * 2 * math.sin(math.pi / 8), abs=5e-3)


def test_the_command(tmp_path: pathlib.Path) -> None:
    model = str(make_model(tmp_path / "model"))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments])
        return f"{done.exit_code} {done.output}"

    assert "any text gets the memory nearest to it" in run("bank", "reach", model)
    assert "0 reach    0.010" in run("bank", "reach", model, "0.01")
    assert FAR in run("route", model, "What is neon?")
    assert json.loads(run("route", model, "What is neon?", "--json")[2:])["far"] is True
    assert run("bank", "reach", model, "1", "--off").startswith("2")
    assert run("bank", "reach", model, "--off").startswith("0 reach    any text")
    assert FAR not in run("route", model, "What is neon?")
