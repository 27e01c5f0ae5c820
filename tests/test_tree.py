"""ClusterTree: greedy descent, ragged trees, ties, and the file it is kept in."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.tree import ClusterTree


def random_tree(seed: int) -> ClusterTree:
    """Any branching and depth; about a third of the nodes absent, sometimes a whole level."""
    rng = np.random.default_rng(seed)
    k, depth, dim = int(rng.integers(2, 6)), int(rng.integers(1, 5)), int(rng.integers(1, 9))
    centroids, present = [], []
    for level in range(1, depth + 1):
        nodes = k ** (level - 1)
        # coarse values, so that equal distances happen
        centroids.append(rng.integers(-2, 3, (nodes, k, dim)).astype(np.float32))
        present.append(rng.random((nodes, k)) < rng.choice([0.0, 0.65, 1.0], p=[0.1, 0.6, 0.3]))
    return ClusterTree(centroids, present)


def walk(tree: ClusterTree, vector: np.ndarray) -> tuple[Path, list[float]]:
    """Greedy descent as the definition has it, one child at a time."""
    path: tuple[int, ...] = ()
    distances = []
    for level in range(tree.depth):
        row = 0
        for child in path:
            row = row * tree.branching + child
        best = None
        for child in range(tree.branching):
            if tree.present[level][row, child]:
                distance = float(np.sqrt(((tree.centroids[level][row, child] - vector) ** 2).sum()))
                if best is None or distance < best[0]:  # of equals the first
                    best = (distance, child)
        if best is None:
            break
        distances.append(best[0])
        path = (*path, best[1])
    return Path(path), distances


@pytest.mark.parametrize("seed", range(60))
def test_route_is_greedy_descent(seed: int) -> None:
    tree = random_tree(seed)
    vectors = np.random.default_rng(seed).integers(-2, 3, (20, tree.dim)).astype(np.float32)
    routes = tree.route(vectors)
    for vector, route in zip(vectors, routes, strict=True):
        path, distances = walk(tree, vector)
        assert route.path == path
        assert route.distances == pytest.approx(distances)
        assert not path or tree.has(path)
        assert tree.route(vector[None]) == [route]  # a batch is its texts one by one


@pytest.mark.parametrize("seed", range(20))
def test_nodes_are_those_that_a_walk_can_reach(seed: int) -> None:
    tree = random_tree(seed)
    reachable: list[list[Path]] = [[Path()]]
    for level in range(tree.depth):
        parents = reachable[-1]
        reachable.append(
            [
                Path((*node, child))
                for node in parents
                for child in range(tree.branching)
                if tree.present[level][node.row(tree.branching), child]
            ]
        )
        assert tree.nodes(level + 1) == reachable[-1]
        assert all(map(tree.has, reachable[-1]))


def test_ties_go_to_the_lowest_index_that_is_present() -> None:
    tree = ClusterTree([np.zeros((1, 4, 2), np.float32)], [np.array([[False, False, True, True]])])
    assert [route.path for route in tree.route(np.ones((3, 2)))] == [(2,)] * 3
    assert tree.distances(np.zeros(2), Path()).tolist() == [np.inf, np.inf, 0, 0]


def test_has_refuses_what_is_no_node() -> None:
    present = [np.array([[True, False]]), np.array([[True, False], [True, True]])]
    tree = ClusterTree([np.zeros((1, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32)], present)
    nodes = [(0,), (0, 0)]
    others = [(), (1,), (2,), (-1,), (0, 1), (1, 0), (0, 0, 0)]
    assert [tree.has(Path(path)) for path in nodes + others] == [True] * 2 + [False] * 7


def test_paper_size_comparisons() -> None:
    """16 children and 4 levels: the path has 4 steps, its row is the path read in base 16."""
    rng = np.random.default_rng(0)
    centroids = [rng.standard_normal((16**level, 16, 8), dtype=np.float32) for level in range(4)]
    tree = ClusterTree(centroids, [np.ones(c.shape[:2], bool) for c in centroids])
    for vector in rng.standard_normal((10, 8), dtype=np.float32):
        (route,) = tree.route(vector[None])
        assert (route.path, list(route.distances)) == (walk(tree, vector)[0], pytest.approx(walk(tree, vector)[1]))
        assert Path.of_row(route.path.row(16), 4, 16) == route.path


@pytest.mark.parametrize("seed", range(5))
def test_a_saved_tree_is_the_same_and_stays_on_disk(seed: int, tmp_path: pathlib.Path) -> None:
    tree, file = random_tree(seed), tmp_path / "tree.safetensors"
    tree.save(file)
    loaded = ClusterTree.load(file)
    for level in range(tree.depth):
        assert np.array_equal(loaded.centroids[level], tree.centroids[level])
        assert np.array_equal(loaded.present[level], tree.present[level])
        assert isinstance(loaded.centroids[level], np.memmap)
    vectors = np.random.default_rng(seed).standard_normal((10, tree.dim))
    assert loaded.route(vectors) == tree.route(vectors)


def test_damaged_files_are_bank_errors(tmp_path: pathlib.Path) -> None:
    file, damaged = tmp_path / "tree.safetensors", tmp_path / "damaged.safetensors"
    random_tree(3).save(file)
    whole = file.read_bytes()
    broken = [whole[:length] for length in range(len(whole))]
    broken += [b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"{}"]
    broken += [whole.replace(b'"F32"', b'"F99"'), whole.replace(b"level1", b"levelx")]
    for content in broken:
        damaged.write_bytes(content)
        with pytest.raises(BankError):
            ClusterTree.load(damaged)
    with pytest.raises(BankError, match=r"cannot read .*none\.safetensors: No such file"):
        ClusterTree.load(tmp_path / "none.safetensors")


def test_levels_that_do_not_belong_together() -> None:
    one, two = np.zeros((1, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32)
    for centroids, present in [
        ([], []),
        ([one], []),
        ([one, one], [np.ones((1, 2), bool)] * 2),
        ([one, two], [np.ones((1, 2), bool)] * 2),
        ([one, two[..., :2]], [np.ones((1, 2), bool), np.ones((2, 2), bool)]),
        ([one[0]], [np.ones((1, 2), bool)]),
    ]:
        with pytest.raises(BankError):
            ClusterTree(centroids, present)


def test_embeddings_of_another_size() -> None:
    tree = ClusterTree([np.zeros((1, 2, 3), np.float32)], [np.ones((1, 2), bool)])
    for shape in [(4,), (1, 4), (1, 1, 3)]:
        with pytest.raises(BankError, match="3 values"):
            tree.route(np.zeros(shape))
    assert tree.route(np.zeros((0, 3))) == []
    assert tree.route(np.zeros(3)) == tree.route(np.zeros((1, 3)))
