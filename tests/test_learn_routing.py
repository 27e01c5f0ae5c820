"""Routing agreement: probes, centroids that tell windows apart, and where windows are learnt."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import unit

from mlx_hiermem.config import Path
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import CorpusSettings
from mlx_hiermem.learn.tree import build, kmeans
from mlx_hiermem.learn.tree.build import agreement, descend, place
from mlx_hiermem.learn.tree.kmeans import Separation, Shape, grow
from mlx_hiermem.learn.tree.probes import ProbeVectors, probe_texts, with_subjects
from mlx_hiermem.tokenizer import FRAME
from mlx_hiermem.tree import ClusterTree

MADE_UP = CorpusSettings(any_language=True)  # the words of `documents` are of none


def worded(windows: int, each: int, seed: int = 0, dim: int = 24) -> ProbeVectors:
    """Probes that are a subject of their window's own plus, twice as long, one of four wordings."""
    rng = np.random.default_rng(seed)
    subjects, wordings = unit(rng.normal(size=(windows, dim))), 2 * unit(rng.normal(size=(4, dim)))
    owner = np.repeat(np.arange(windows), each)
    put = wordings[rng.integers(4, size=len(owner))] + 0.05 * rng.normal(size=(len(owner), dim))
    return ProbeVectors.of(unit(subjects[owner] + put), owner, windows)


def means(probe: ProbeVectors) -> np.ndarray:
    return np.concatenate(list(probe.means()))


def test_probes_are_the_ways_to_ask() -> None:
    text = "Oslo is the capital of Norway. It lies on a fjord."
    own = probe_texts(text, "Oslo", ["What is the capital of Norway?", "Oslo"])
    half = len(own) // 2
    assert own[half:] == [FRAME.format(text) for text in own[:half]]
    assert own[:half] == [
        text,
        "Oslo",
        "Oslo. Oslo is the capital of Norway.",
        "Oslo is",
        "Oslo is the capital",
        "Oslo. It lies on a fjord.",
        "Oslo. It",
        "Oslo. It lies on",
        "What is the capital of Norway?",
    ]


def test_a_beginning_without_the_title_could_be_anybodys() -> None:
    text = "The capital of Norway since 1814 is Oslo."
    assert "The capital of" not in probe_texts(text, "Oslo")
    assert "The capital of" in probe_texts(text, "")


def test_a_title_counts_if_its_document_names_it() -> None:
    rows = [(0, "Oslo", "Oslo is a city."), (0, "Oslo", "It has a fjord."), (1, "chapter 3", "It rained.")]
    rows += [(2, "Tea: Green", "Green tea is steeped."), (3, "", "Nobody knows."), (4, "art", "A part of it.")]
    windows = [Window(i, document, "f", title, text) for i, (document, title, text) in enumerate(rows)]
    assert [subject for _, subject in with_subjects(windows)] == ["Oslo", "Oslo", "", "Tea: Green", "", ""]


def test_rows_of_some_windows() -> None:
    probe = ProbeVectors.of(np.zeros((7, 2), np.float32), np.array([0, 0, 1, 1, 1, 2, 3]), 4)
    rows, owner = probe.of_windows(np.array([1, 3, 0]))
    assert rows.tolist() == [2, 3, 4, 6, 0, 1]
    assert owner.tolist() == [0, 0, 0, 1, 2, 2]


def test_means_weigh_the_probes_of_a_window_alike() -> None:
    probe = worded(2500, 3)  # more than one chunk
    direct = unit(probe.vectors.reshape(2500, 3, -1).sum(1))
    assert means(probe) == pytest.approx(direct, abs=1e-6)


def test_the_gradient_is_that_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    points, centroids = unit(rng.normal(size=(20, 4))), unit(rng.normal(size=(3, 4))).astype(np.float64)
    label, weight = rng.integers(3, size=20), np.full(20, 1 / 20)

    def loss(at: np.ndarray) -> float:
        logits = -kmeans.SHARPNESS * ((points[:, None] - at) ** 2).sum(-1)
        return float((weight * (np.log(np.exp(logits).sum(1)) - logits[np.arange(20), label])).sum())

    found, step = Separation._gradient(centroids, points, label, weight), 1e-5
    for place_ in np.ndindex(3, 4):
        nudge = np.zeros((3, 4))
        nudge[place_] = step
        slope = (loss(centroids + nudge) - loss(centroids - nudge)) / (2 * step)
        assert found[place_] == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("batch", [kmeans.PROBES_A_MOVE, 300])  # all probes in each step, and a draw of them
def test_centroids_learn_to_look_past_the_wording(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "PROBES_A_MOVE", batch)
    probe = worded(48, 12)
    held_out = worded(48, 16)  # the same subjects and wordings, put together anew
    right = {}
    for tuned in (False, True):
        grown = grow(means(probe), Shape(4, 1), 0, Separation(probe) if tuned else None)
        _, rows = descend(grown.tree, held_out.vectors)
        right[tuned] = float(np.mean(rows == np.repeat(grown.row, 16)))
    assert right[True] > 0.95
    assert right[False] < 0.8


def test_questions_that_name_no_subject_are_told_apart_too() -> None:
    probe, rng = worded(48, 12, dim=96), np.random.default_rng(1)
    subjects, wordings = unit(rng.normal(size=(40, 96))), 2 * unit(rng.normal(size=(4, 96)))  # 8 windows have none
    owner = np.repeat(np.arange(40), 12)
    points = unit(subjects[owner] + wordings[rng.integers(4, size=len(owner))])
    turned = ProbeVectors.of(points, owner, 48)
    right = {}
    for name, tune in (("alone", Separation(probe)), ("with", Separation(probe, turned))):
        grown = grow(means(probe), Shape(4, 1), 0, tune)
        for kind, vectors_, whose in (
            ("plain", probe.vectors, np.repeat(np.arange(48), 12)),
            ("turned", points, owner),
        ):
            right[name, kind] = float(np.mean(descend(grown.tree, vectors_)[1] == grown.row[whose]))
    assert right["alone", "turned"] < 0.5
    assert right["with", "turned"] > 0.8
    assert right["with", "plain"] > 0.95


def test_a_draw_of_probes_weighs_windows_as_all_of_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = np.array([0, 0, 0, 2, 5, 5])  # windows 1, 3 and 4 have none
    probe = ProbeVectors.of(np.eye(6, dtype=np.float32), owner, 6)
    members, rng = np.array([5, 1, 2, 0]), np.random.default_rng(0)
    whole = kmeans._Part(probe, members, 0.5)
    _, whose, weight = whole.draw(rng)
    assert whose.tolist() == [0, 0, 2, 3, 3, 3]
    each = np.bincount(whose, weight, 4)
    assert each == pytest.approx([0.125, 0, 0.125, 0.125])
    monkeypatch.setattr(kmeans, "PROBES_A_MOVE", 5)
    drawn, parts = np.zeros(4), [kmeans._Part(probe, members, 0.5).draw(rng) for _ in range(600)]
    for some, whose, weight in parts:
        assert all(owner[point.argmax()] == members[who] for point, who in zip(some, whose, strict=True))
        drawn += np.bincount(whose, weight, 4) / len(parts)
    assert drawn == pytest.approx(each, abs=0.01)
    assert not kmeans._Part(probe, np.array([1, 3]), 0.5).any


def test_descent_is_the_routers() -> None:
    probe = worded(90, 5)
    grown = grow(means(probe), Shape(4, 3), 0, Separation(probe))  # ragged: some nodes of level 2 have 5 windows
    levels, rows = descend(grown.tree, probe.vectors)
    paths = [Path.of_row(int(row), int(level), 4) for row, level in zip(rows, levels, strict=True)]
    assert paths == [route.path for route in grown.tree.route(probe.vectors)]
    assert len(set(map(len, paths))) > 1


def likely(tree: ClusterTree, point: np.ndarray) -> dict[Path, float]:
    """Every leaf and how likely it is, by the definition: two branches at each node."""
    ends = {Path(()): 1.0}
    for depth in range(tree.depth):
        for node in [path for path in ends if len(path) == depth]:
            distance = tree.distances(point, node)
            if np.isfinite(distance).any():
                weight = np.exp(-build.DOUBT * (distance**2 - (distance**2).min()))
                share = ends.pop(node)
                for child in np.argsort(distance)[:2]:
                    if np.isfinite(distance[child]):
                        ends[Path((*node, int(child)))] = share * weight[child] / weight.sum()
    return ends


def test_windows_are_placed_where_their_probes_are_likely_to_go() -> None:
    probe = worded(90, 5)
    grown = grow(means(probe), Shape(4, 3), 0, Separation(probe))
    placed = list(place(grown.tree, probe, 3))
    for window in range(90):
        total: dict[Path, float] = {}
        for point in probe.vectors[5 * window : 5 * window + 5]:
            for leaf, share in likely(grown.tree, point).items():
                total[leaf] = total.get(leaf, 0.0) + share / 5
        best = sorted(total, key=lambda leaf: -total[leaf])[:3]
        assert list(placed[window]) == [leaf for leaf in best if total[leaf] >= build.LEAST]
    assert all(len(leaves) == 1 for leaves in place(grown.tree, probe, 1))


def test_agreement_counts_any_leaf_of_any_window() -> None:
    tree = ClusterTree([np.array([[[0.0], [1.0], [2.0]]], np.float32)], [np.ones((1, 3), bool)])
    placed = [(Path((0,)), Path((1,))), (Path((2,)),)]
    asked = np.array([[0.1], [0.9], [2.1], [2.1]], np.float32)
    assert agreement(tree, placed, asked, [[0], [0], [0], [0, 1]]) == 0.75
    assert agreement(tree, placed, asked[:0], []) == 0.0
