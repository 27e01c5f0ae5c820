"""Routing by passages: the nearest one says which leaf a text goes to, and whether it gets memory at all."""

from __future__ import annotations

import json
import math
import os
import pathlib
from dataclasses import replace

import numpy as np
import pytest
from tiny import HashEmbedder, give_sources, make_model
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import edit, passages
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.passages import LACKING, passage_distance
from mlx_hiermem.bank.policy import OPEN, POLICY, BankPolicy
from mlx_hiermem.bank.sources import WINDOWS_FILE
from mlx_hiermem.config import ROOT, Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.model_folder import load
from mlx_hiermem.router import BELONGS, Router, Topic
from mlx_hiermem.tree import ClusterTree

NEAR, NEXT, OTHER = Path((0, 0)), Path((0, 1)), Path((1, 0))
TEXTS = {"0.0": [("Neon", "neon")], "0.1": [("Argon", "argon")], "1.0": [("Gold", "gold"), ("Iron", "iron")]}


class Said:
    """Embeds "neon" and the like as unit vectors of their own, mixtures as they are written: `neon 0.9 gold`."""

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> np.ndarray:
        words, weights = text.split()[::2], [float(w) for w in text.split()[1::2]]
        named = HashEmbedder().embed(words)
        if not weights:
            return named[0]
        mixed = weights[0] * named[0] + (1 - weights[0]) * named[1]
        return mixed / np.linalg.norm(mixed)


class Together(Said):
    """Also embeds a text behind "neon, ": between the two."""

    def _one(self, text: str) -> np.ndarray:
        parts = [super(Together, self)._one(part) for part in text.split(",") if part]
        return np.sum(parts, axis=0) / np.linalg.norm(np.sum(parts, axis=0))


@pytest.fixture
def bank(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> MemoryBank:
    """A bank of 3² leaves, three of which have passages; all are looked through, for its centroids are random."""
    monkeypatch.setattr(passages, "PROBED", 9)
    folder = make_model(tmp_path / "model") / "bank"
    give_sources(folder, TEXTS, Said().embed)
    return MemoryBank.open(folder)


def router(bank: MemoryBank, policy: BankPolicy = OPEN) -> Router:
    return Router(bank.tree, Said(), policy, bank.sources)


@pytest.mark.parametrize(
    ("text", "leaf"), [("neon", NEAR), ("argon", NEXT), ("iron", OTHER), ("gold 0.7 neon", OTHER)]
)
def test_a_text_goes_to_the_leaf_of_the_nearest_passage(bank: MemoryBank, text: str, leaf: Path) -> None:
    """The tree's random centroids know nothing of these words; so its descent goes elsewhere with some of them."""
    route = router(bank).route(text)
    vector = Said().embed([text])[0]
    assert route.path == leaf
    assert route.distances == bank.tree.distances_on(vector, leaf)
    assert route.passage is not None
    assert route.passage < 0.5
    assert router(bank).conversation([text]).route.path == leaf


def test_descent_alone_goes_elsewhere(bank: MemoryBank) -> None:
    alone = [Router(bank.tree, Said()).route(text) for text in ("neon", "argon", "gold", "iron")]
    assert [one.path for one in alone] != [NEAR, NEXT, OTHER, OTHER]
    assert all(one.passage is None for one in alone)


def test_a_text_far_from_every_passage_gets_no_memory(bank: MemoryBank) -> None:
    narrow = router(bank, BankPolicy(passage_reach=0.5))
    assert narrow.route("neon").path == NEAR
    route = narrow.route("tungsten")
    assert (route.path, route.far) == (ROOT, True)
    assert route.passage is not None
    assert route.passage > 0.5
    assert not router(bank).route("tungsten").far
    # A bank with no reach of its passages keeps to that of its leaves.
    assert router(bank, BankPolicy(reach=1e-3)).route("neon").far
    assert not router(bank, BankPolicy(reach=1e-3, passage_reach=0.5)).route("neon").far


def test_a_turn_near_to_a_passage_leaves_the_path_of_its_conversation(bank: MemoryBank) -> None:
    """However decided the turn that chose the path was: the tree's distances say little of what passages know."""
    narrow = Router(bank.tree, Together(), BankPolicy(passage_reach=0.5), bank.sources)
    topic = Topic(NEAR, 9.0, "neon,", turns=3)
    led = narrow.turn("gold", topic)
    assert (led.route.path, led.topic.turns, led.near) == (OTHER, 1, 0.45)
    assert router(bank).turn("gold", topic).route.path == NEAR, "without a reach decidedness says it"
    texts = [f"gold 0.{weight} tungsten" for weight in range(50, 99)]
    between = next(text for text in texts if 0.45 < (narrow.route(text).passage or 0) < 0.5)
    other = narrow.turn(between, topic)  # not so near, but nothing that belongs to neon
    assert (other.route.path, other.topic.turns) == (OTHER, 1)
    assert other.belongs is not None
    assert other.belongs <= BELONGS
    held = narrow.turn("neon 0.6 gold", replace(topic, path=OTHER))
    assert held.alone.far
    assert held.route.path == OTHER


def test_a_blocked_leaf_is_passed_over(bank: MemoryBank) -> None:
    mixed = "neon 0.7 argon"
    sibling = router(bank, BankPolicy(frozenset([NEAR]))).route(mixed)
    assert (sibling.path, sibling.avoided) == (NEXT, (NEAR,))
    parent = router(bank, BankPolicy(frozenset([NEAR]), "parent")).route(mixed)
    assert (parent.path, parent.avoided) == (Path((0,)), (NEAR,))
    top = router(bank, BankPolicy(frozenset([Path((0,))]), "parent")).route(mixed)
    assert (top.path, top.avoided) == (ROOT, (Path((0,)),))
    here = router(bank).route(mixed, blocked=[NEAR])
    assert (here.path, here.avoided) == (NEXT, (NEAR,))


def test_a_bank_that_was_edited_is_routed_by_its_passages_again(bank: MemoryBank) -> None:
    model = load(bank.root.parent)
    model._router = router(bank)
    BankPolicy(frozenset([NEAR])).write(bank.root / POLICY)
    model.router.pieces = HashEmbedder().rare_pieces
    assert model.refresh()
    assert model.router.pieces is not None  # a question's rare words count as before
    route = model.router.route("neon 0.7 argon")
    assert (route.path, route.avoided) == (NEXT, (NEAR,))
    assert route.passage is not None


def test_where_all_passages_are_blocked_the_tree_says_where_to_go(bank: MemoryBank) -> None:
    policy = BankPolicy(frozenset(map(Path.parse, TEXTS)))
    assert router(bank, policy).route("neon").path == Router(bank.tree, Said(), policy).route("neon").path
    with pytest.raises(BankError, match="no node"):
        router(bank).route("neon", blocked=[Path((7, 7))])


def test_a_beam_as_wide_as_the_tree_finds_all_leaves_nearest_first() -> None:
    rng = np.random.default_rng(0)
    present = [np.ones((1, 4), bool), rng.random((4, 4)) < 0.7]
    present[1][2] = False  # a leaf at level 1
    tree = ClusterTree([rng.normal(size=(1, 4, 8)), rng.normal(size=(4, 4, 8))], present)
    vector = rng.normal(size=8).astype(np.float32)
    leaves = [node for node in (*tree.nodes(1), *tree.nodes(2)) if len(node) == 2 or node == Path((2,))]
    by_distance = sorted(leaves, key=lambda leaf: tree.distances_on(vector, leaf)[-1])
    assert tree.beam(vector, 16) == by_distance
    assert tree.beam(vector, 1) == [tree.route(vector)[0].path]
    assert len(tree.beam(vector, 3)) == 3


def test_the_reach_in_force_is_that_of_passages(bank: MemoryBank) -> None:
    assert edit.reach(bank.root, 0.9) == BankPolicy(passage_reach=0.9)
    model = str(bank.root.parent)
    said = CliRunner().invoke(app, ["bank", "reach", model])
    assert "0.900: a text farther than that from the nearest passage" in " ".join(said.output.split())
    assert BankPolicy.read(bank.root / "policy.json").passage_reach == 0.9
    assert edit.reach(bank.root, math.inf) == BankPolicy()
    assert json.loads((bank.root / "policy.json").read_text()) == {"blocked": [], "on_blocked": "sibling"}


def test_a_distance_of_unit_vectors() -> None:
    assert passage_distance(1.0000001) == 0
    assert passage_distance(0.0) == pytest.approx(math.sqrt(2))


def test_a_passage_that_lacks_a_texts_rare_words_is_farther(bank: MemoryBank) -> None:
    """By `LACKING` where it has none of them, by half of it where it has half of what is expected."""
    known = {"neon": frozenset({1, 2, 3, 4})}
    plain = router(bank).route("neon").passage
    for passage, added in (({1, 2, 3, 4}, 0.0), ({1, 2}, 0.0), ({1}, LACKING / 2), (set[int](), LACKING)):
        told = known | {"Neon. neon": frozenset(passage)}
        found = Router(bank.tree, Said(), OPEN, bank.sources, told.__getitem__).route("neon")
        assert (found.path, found.passage) == (NEAR, pytest.approx(plain + added))
    narrow = BankPolicy(passage_reach=0.07)
    for pieces in (frozenset({1}), frozenset[int]()):  # all of them shared; and none to share
        same = dict.fromkeys(("neon", "Neon. neon"), pieces)
        assert not Router(bank.tree, Said(), narrow, bank.sources, same.__getitem__).route("neon").far
    assert Router(bank.tree, Said(), narrow, bank.sources, lambda text: {len(text)}).route("neon").far


def test_a_passage_that_cannot_be_read_is_as_near_as_its_vector_says(bank: MemoryBank) -> None:
    worded = Router(bank.tree, Said(), OPEN, bank.sources, lambda text: {len(text)})
    assert worded.route("neon").passage == pytest.approx(LACKING)
    os.truncate(bank.root / WINDOWS_FILE, 0)
    assert worded.route("neon").passage == pytest.approx(0)


def test_a_window_is_read_by_its_number(bank: MemoryBank) -> None:
    assert bank.sources is not None
    assert bank.sources.text(OTHER, 1) == "Iron. iron"
    for leaf, number in ((OTHER, 2), (OTHER, -1), (Path((2, 2)), 0)):
        with pytest.raises(BankError, match="no window"):
            bank.sources.text(leaf, number)


def test_rare_pieces_are_those_of_names(minilm: Embedder) -> None:
    assert minilm.rare_pieces("What is the capital of the country?") == frozenset()
    names = minilm.rare_pieces("What is the capital of Zimbabwe?")
    assert names
    assert names <= minilm.rare_pieces("Zimbabwe's capital is Harare.")
    assert not names & minilm.rare_pieces("The capital of Chad is N'Djamena.")
