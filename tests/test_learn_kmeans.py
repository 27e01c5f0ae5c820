"""Hierarchical balanced k-means: the rule of arXiv:2510.02375, App. C, on vectors whose clusters are known."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
from tiny import unit

from mlx_hiermem.config import Path
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn.tree import kmeans as kmeans_module
from mlx_hiermem.learn.tree.kmeans import BALANCE, Shape, assign, grow, kmeans, plus_plus, rebalance, squared
from mlx_hiermem.learn.tree.probes import write_vectors


def clouds(
    count: int, each: int, seed: int = 0, spread: float = 0.05, dim: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around `count` directions, and which direction each is from."""
    rng = np.random.default_rng(seed)
    middles = unit(rng.normal(size=(count, dim)))
    label = np.repeat(np.arange(count), each)
    return unit(middles[label] + spread * rng.normal(size=(len(label), dim))), label


def test_squared_distances() -> None:
    rng = np.random.default_rng(1)
    points, centroids = rng.normal(size=(7, 5)), rng.normal(size=(3, 5))
    direct = ((points[:, None] - centroids) ** 2).sum(-1)
    assert squared(points, centroids) == pytest.approx(direct, abs=1e-12)
    assert (squared(points, points) >= 0).all()  # rounding may not make one negative


def test_clouds_are_found() -> None:
    vectors, label = clouds(6, 40)
    centroids = kmeans(vectors, np.arange(len(vectors)), 6, np.random.default_rng(0))
    nearest = squared(vectors, centroids).argmin(1)
    assert all(len(set(nearest[label == cloud])) == 1 for cloud in range(6))
    assert len(set(nearest)) == 6


def test_a_sample_is_enough() -> None:
    vectors, label = clouds(4, 500)
    centroids = kmeans(vectors, np.arange(len(vectors)), 4, np.random.default_rng(0), sample=200)
    middles = np.stack([vectors[label == cloud].mean(0) for cloud in range(4)])
    assert np.sqrt(squared(middles, centroids).min(1)).max() < 0.1


def test_only_the_given_rows_count() -> None:
    vectors, label = clouds(3, 30)
    centroids = kmeans(vectors, np.flatnonzero(label != 2), 2, np.random.default_rng(0))
    middle = vectors[label == 2].mean(0, keepdims=True)
    assert squared(middle, centroids).min() > 0.3


def test_equal_vectors_do_not_break_the_start() -> None:
    same = np.ones((5, 4), np.float32) / 2
    assert np.array_equal(plus_plus(same, 3, np.random.default_rng(0)), same[:3])


def test_too_large_a_cluster_is_split_with_the_smallest() -> None:
    child = np.array([0] * 90 + [1] * 6 + [2] * 4)
    rebalance(child, 3, np.random.default_rng(0))
    count = np.bincount(child, minlength=3)
    assert count.sum() == 100
    assert count.max() <= math.ceil(BALANCE * 100 / 3)
    balanced = np.array([0] * 40 + [1] * 30 + [2] * 30)
    before = balanced.copy()
    rebalance(balanced, 3, np.random.default_rng(0))
    assert np.array_equal(balanced, before)


def test_assignment_gives_room_to_those_who_need_it() -> None:
    centroids = np.array([[0.0], [10.0]], np.float32)
    vectors = np.array([[0.0], [1.0], [4.0], [10.0]], np.float32)
    child = assign(vectors, np.arange(4), centroids, most=2)
    assert child.tolist() == [0, 0, 1, 1]  # 4 loses least by going to 10
    assert assign(vectors, np.arange(4), centroids, most=3).tolist() == [0, 0, 0, 1]


def test_every_child_is_within_the_balance() -> None:
    vectors, _ = clouds(2, 60)  # two clouds, four children: some must share
    uneven = np.concatenate([vectors[:60], vectors[60:80]])
    assert np.bincount(grow(uneven, Shape(4, 1)).row).tolist() == [20] * 4
    assert 20 < np.bincount(grow(uneven, Shape(4, 1), balance=BALANCE).row).max() <= BALANCE * 20


def test_the_tree_separates_at_both_levels() -> None:
    vectors, label = clouds(16, 12, spread=0.02, dim=32)
    grown = grow(vectors, Shape(4, 2), balance=BALANCE)  # an even share would send some elsewhere
    assert grown.tree.depth == 2
    assert len({grown.leaf(i) for i in range(len(vectors))}) == 16
    together = [len({grown.leaf(i) for i in np.flatnonzero(label == cloud)}) for cloud in range(16)]
    assert sum(together) <= 18  # hardly a cloud is torn apart
    routed = [route.path for route in grown.tree.route(vectors)]
    agree = np.mean([path == grown.leaf(i) for i, path in enumerate(routed)])
    assert agree > 0.95


def test_small_nodes_stay_leaves() -> None:
    vectors, _ = clouds(3, 5)
    grown = grow(vectors, Shape(4, 3))
    assert all(grown.tree.has(grown.leaf(i)) for i in range(len(vectors)))
    sizes = {leaf: int(np.sum([grown.leaf(i) == leaf for i in range(15)])) for leaf in map(grown.leaf, range(15))}
    assert max(sizes.values()) < 2 * kmeans_module.SMALLEST + 1
    assert grown.tree.depth < 3


def test_two_windows_make_a_tree_of_one_block() -> None:
    vectors, _ = clouds(1, 2)
    grown = grow(vectors, Shape(4, 2))
    assert grown.tree.nodes(1) == [Path((0,))]
    assert [grown.leaf(0), grown.leaf(1)] == [Path((0,))] * 2
    with pytest.raises(CorpusError, match="1 window of text"):
        grow(vectors[:1], Shape(4, 2))


def test_equal_seeds_give_equal_trees_from_memory_or_disk(tmp_path: pathlib.Path) -> None:
    vectors, _ = clouds(9, 30)
    mapped = write_vectors([vectors[:100], vectors[100:]], len(vectors), vectors.shape[1], tmp_path / "v.npy")
    trees = [grow(array, Shape(3, 2), seed) for array, seed in ((vectors, 5), (mapped, 5), (vectors, 6))]
    first, second, other = (np.concatenate([c.ravel() for c in grown.tree.centroids]) for grown in trees)
    assert np.array_equal(first, second)
    assert np.array_equal(trees[0].row, trees[1].row)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("windows", "shape"),
    [(2, (2, 2)), (118, (4, 2)), (2000, (16, 2)), (10_000, (11, 3)), (1_000_000, (16, 4)), (10**9, (16, 4))],
)
def test_the_shape_follows_the_corpus(windows: int, shape: tuple[int, int]) -> None:
    chosen = Shape.of(windows)
    assert (chosen.branching, chosen.depth) == shape


def test_impossible_shapes() -> None:
    with pytest.raises(CorpusError, match="1 children"):
        Shape(1, 2)
