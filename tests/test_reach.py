"""A bank's reach: what is like nothing that it knows gets no memory, and everything says so."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
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
from mlx_hiermem.errors import BankError
from mlx_hiermem.learn.tree.build import ROOM, reach_of
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router, Topic
from mlx_hiermem.tree import ClusterTree


@pytest.fixture
def tree() -> ClusterTree:
    """Two dimensions, a leaf at (1, 0) and one at (0, 1)."""
    return ClusterTree([np.eye(2, dtype=np.float32)[None]], [np.ones((1, 2), bool)])


class Placed:
    """An embedder of texts that say where they are."""

    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([[float(value) for value in text.split()] for text in texts], np.float32)


def test_what_is_too_far_enters_nothing(tree: ClusterTree) -> None:
    near, edge, far = tree.route(np.array([[0.8, 0.0], [0.5, 0.0], [0.4, 0.0]]), reach=0.5)
    assert (near.path, near.far) == (Path((0,)), False)
    assert (edge.path, edge.far) == (Path((0,)), False)
    assert (far.path, far.distances, far.far) == (Path(), (), True)
    assert tree.route(np.array([0.4, 0.0]))[0].path == Path((0,))


def test_a_conversation_stays_with_a_text_that_is_far(tree: ClusterTree) -> None:
    router = Router(tree, Placed(), BankPolicy(reach=0.5))
    alone = router.turn("-1 -1")
    assert (alone.topic.path, alone.route.far, alone.route.stayed) == (Path(), True, False)
    assert router.turn("1 0", alone.topic).topic.path == Path((0,))
    held = router.turn("-1 -1", Topic(Path((0,)), 1.0))
    assert (held.topic.path, held.route.far, held.route.stayed, held.alone.far) == (Path((0,)), False, True, True)


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
