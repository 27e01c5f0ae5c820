"""Blocking: where texts go then, what a policy file may say, and that no blocked block is ever attached."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from tiny import HashEmbedder, make_model

from mlx_hiermem import load
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.policy import OPEN, POLICY, BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.tree import ClusterTree


def paths(*texts: str) -> list[Path]:
    return [Path.parse(text) for text in texts]


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "model", absent=("2.0",))


@pytest.fixture
def bank(model: pathlib.Path) -> MemoryBank:
    return MemoryBank.open(model / "bank")


@pytest.fixture
def tree() -> ClusterTree:
    """One dimension, three children at each of two levels; 2.1 is not there."""
    first = np.array([[[0.0], [10.0], [20.0]]], np.float32)
    second = np.array([[[-1.0], [0.0], [1.0]], [[9.0], [10.0], [11.0]], [[19.0], [20.0], [21.0]]], np.float32)
    present = np.ones((3, 3), bool)
    present[2, 1] = False
    return ClusterTree([first, second], [np.ones((1, 3), bool), present])


def went(tree: ClusterTree, place: float, blocked: tuple[str, ...], on_blocked: str = "sibling") -> str:
    return str(tree.route(np.array([place]), paths(*blocked), on_blocked)[0].path)


def test_the_nearest_allowed_sibling_is_taken(tree: ClusterTree) -> None:
    assert went(tree, 10.2, ()) == "1.1"
    assert went(tree, 10.2, ("1.1",)) == "1.2"
    assert went(tree, 9.8, ("1.1",)) == "1.0"
    assert went(tree, 10.2, ("1",)) == "2.0"
    assert went(tree, 9.8, ("1",)) == "0.2"
    assert went(tree, 9.8, ("1", "0.2")) == "0.1"
    assert went(tree, 20.0, ("2.0",)) == "2.2"  # never 2.1, which is absent


def test_with_every_child_blocked_it_stops_at_the_parent(tree: ClusterTree) -> None:
    assert went(tree, 10.0, ("1.0", "1.1", "1.2")) == "1"
    assert went(tree, 20.0, ("2.0", "2.2")) == "2"
    assert went(tree, 10.0, ("0", "1", "2")) == ""


def test_or_it_stops_at_the_parent_at_once(tree: ClusterTree) -> None:
    assert went(tree, 10.2, ("1.1",), "parent") == "1"
    assert went(tree, 10.2, ("1",), "parent") == ""
    assert went(tree, 10.2, ("1.2", "0", "2"), "parent") == "1.1"  # what is not on the way changes nothing


def test_what_was_avoided_is_told(tree: ClusterTree) -> None:
    route = tree.route(np.array([10.2]), paths("1", "2.0"))[0]
    assert (str(route.path), route.avoided) == ("2.2", (Path((1,)), Path((2, 0))))
    assert route.distances == pytest.approx((9.8, 10.8))
    assert tree.route(np.array([10.2]), paths("2.0"))[0].avoided == ()


@pytest.mark.parametrize("seed", range(20))
def test_sibling_is_greedy_descent_of_the_tree_without_the_blocked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, depth = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    centroids = [rng.standard_normal((k**level, k, 4)).astype(np.float32) for level in range(depth)]
    present = [rng.random((k**level, k)) < 0.8 for level in range(depth)]
    tree = ClusterTree(centroids, present)
    nodes = [node for level in range(1, depth + 1) for node in tree.nodes(level)]
    blocked = [node for node in nodes if rng.random() < 0.3]
    vectors = rng.standard_normal((30, 4))
    free = tree.without(blocked).route(vectors)
    taken = tree.route(vectors, blocked)
    assert [(r.path, r.distances) for r in taken] == [(r.path, r.distances) for r in free]
    for route, stopped in zip(tree.route(vectors), tree.route(vectors, blocked, "parent"), strict=True):
        open_ = [node for node in route.path.prefixes() if OPEN.block(blocked).blocker(node) is None]
        assert stopped.path == (open_[-1] if open_ else Path())


def test_unknown_nodes_and_ways_are_refused(tree: ClusterTree) -> None:
    for node in ("3", "2.1", "0.0.0"):
        with pytest.raises(BankError, match=f"no node {node}"):
            tree.route(np.zeros(1), paths(node))
    with pytest.raises(BankError, match="sibling or parent"):
        tree.route(np.zeros(1), (), "uncle")
    with pytest.raises(BankError, match="sibling or parent"):
        BankPolicy(on_blocked="uncle")


def test_the_router_keeps_to_policy_and_request() -> None:
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((1, 4, 384)).astype(np.float32)
    tree = ClusterTree([centroids], [np.ones((1, 4), bool)])
    embedder = HashEmbedder()
    order = [Path((int(child),)) for child in tree.distances(embedder.embed(["text"])[0], Path()).argsort()]
    policy = BankPolicy(frozenset(order[:1]))
    assert Router(tree, embedder).route("text").path == order[0]
    assert Router(tree, embedder, policy).route("text").path == order[1]
    routed = Router(tree, embedder, policy).route("text", blocked=order[1:3])
    assert (routed.path, routed.avoided) == (order[3], (order[0],))
    assert Router(tree, embedder, BankPolicy(frozenset(order[:1]), "parent")).route("text").path == ()


def test_block_and_unblock_stand_for_subtrees() -> None:
    policy = OPEN.block(paths("1.2", "0.1", "0"))
    assert policy.to_json() == {"blocked": ["0", "1.2"], "on_blocked": "sibling"}
    assert [str(policy.blocker(path)) for path in paths("0", "0.2.2", "1.2")] == ["0", "0", "1.2"]
    assert policy.blocker(Path((1,))) is None
    assert policy.unblock(paths("1")).blocked == {Path((0,))}
    with pytest.raises(BankError, match=r"0\.1 is blocked by 0"):
        policy.unblock(paths("0.1"))
    with pytest.raises(BankError, match="2 is not blocked"):
        policy.unblock(paths("2"))


def test_blocking_changes_the_policy_alone(bank: MemoryBank) -> None:
    before = {file: file.read_bytes() for file in bank.root.rglob("*") if file.is_file()}
    edit.block(bank.root, paths("1", "0.2"), "parent")
    after = {file: file.read_bytes() for file in bank.root.rglob("*") if file.is_file()}
    assert set(after) - set(before) == {bank.root / POLICY}
    assert {file: after[file] for file in before} == before
    bank = MemoryBank.open(bank.root)
    assert bank.policy == BankPolicy(frozenset(paths("1", "0.2")), "parent")
    assert list(bank.problems()) == []
    states = {str(node): bank.state(node) for node in bank.manifest.blocks}
    assert {node for node, state in states.items() if state == "blocked"} == {"1", "1.0", "1.1", "1.2", "0.2"}
    (bank.root / "blocks/2.safetensors").unlink()
    assert [bank.state(node) for node in paths("2", "2.1", "1")] == ["missing", "on disk", "blocked"]
    assert edit.unblock(bank.root, paths("0", "1")).blocked == frozenset()
    assert MemoryBank.open(bank.root).policy.on_blocked == "parent"


def test_unknown_nodes_are_not_blocked(bank: MemoryBank) -> None:
    with pytest.raises(BankError, match=r"no node 2\.0"):
        edit.block(bank.root, paths("1", "2.0"))
    assert not (bank.root / POLICY).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ('{"on_blocked": "sibling"}', "cannot read"),
        ('{"blocked": "1"}', "not a list"),
        ('{"blocked": [1]}', "cannot read"),
        ('{"blocked": ["one"]}', "not a path"),
        ('{"blocked": ["1"], "on_blocked": "uncle"}', "uncle"),
        ('{"blocked": ["1"], "allowed": ["1.1"]}', "unknown settings allowed"),
        ('{"blocked": ["1", "7"]}', "blocks 7, which the bank's tree does not have"),
        ('{"blocked": ["2.0"]}', r"blocks 2\.0"),
    ],
)
def test_a_damaged_policy_opens_nothing(model: pathlib.Path, content: str, message: str) -> None:
    (model / "bank" / POLICY).write_text(content)
    with pytest.raises(BankError, match=message):
        _ = MemoryBank.open(model / "bank").policy
    with pytest.raises(BankError, match=message):
        load(model).select("1.1", "")


def test_an_unknown_node_can_be_unblocked(bank: MemoryBank) -> None:
    (bank.root / POLICY).write_text('{"blocked": ["1", "7"]}')
    assert edit.unblock(bank.root, paths("7")).blocked == {Path((1,))}
    assert MemoryBank.open(bank.root).policy.blocked == {Path((1,))}


def test_a_policy_needs_no_way_of_going(bank: MemoryBank) -> None:
    (bank.root / POLICY).write_text(json.dumps({"blocked": ["1"]}))
    assert bank.policy == BankPolicy(frozenset(paths("1")), "sibling")


def test_blocked_memories_are_never_attached(model: pathlib.Path) -> None:
    opened = load(model)
    router = Router(opened.bank.tree, HashEmbedder())
    before = MemoryModel(opened.anchor, None, opened.config, opened.bank, router).select("fetched", "text")
    edit.block(model / "bank", [before.path])
    opened = load(model)
    opened._router = Router(opened.bank.tree, HashEmbedder(), opened.bank.policy)
    after = opened.select("fetched", "text")
    assert after.path != before.path
    assert after.path[:1] == before.path[:1]
    top = Path(before.path[:1])
    elsewhere = opened.select("fetched", "text", blocked=[top])
    assert elsewhere.path[:1] != top
    with pytest.raises(BankError, match=f"{before.path} is blocked"):
        opened.select(str(before.path), "")
    assert opened.select(str(top), "").blocks == (str(top),)
    with pytest.raises(BankError, match=f"blocked \\(at {top}\\)"):
        opened.select(str(after.path), "", blocked=[top])
    assert opened.selection.path == top  # an error leaves what was attached
    assert (model / "bank" / MANIFEST).is_file()


def test_the_model_routes_by_the_banks_policy(model: pathlib.Path) -> None:
    free = load(model).router.route("What is neon?")
    edit.block(model / "bank", [Path(free.path[:1])], "parent")
    routed = load(model).router.route("What is neon?")
    assert (routed.path, routed.avoided) == ((), (Path(free.path[:1]),))
