"""Routing agreement: probes, centroids that tell windows apart, and where windows are learnt."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from mlx_hiermem.apps.demo import evaluate
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn import Window, routing, vectors
from mlx_hiermem.learn.clustering import Shape, grow
from mlx_hiermem.learn.examples import Example, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.planting import TreeSettings, describe_nodes, given_agreement, is_held_out, plant
from mlx_hiermem.learn.probes import FRAME, probes, with_subjects
from mlx_hiermem.learn.routing import ProbeVectors, Separation, agreement, descend, place
from mlx_hiermem.learn.stages import NODES, PROBES, STUDY, TREE, CorpusSettings, read_corpus
from mlx_hiermem.learn.work import Work, read_lines, write_lines
from mlx_hiermem.tree import ClusterTree

MADE_UP = CorpusSettings(any_language=True)  # the words of `documents` are of none


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def worded(windows: int, each: int, seed: int = 0, dim: int = 24) -> ProbeVectors:
    """Probes that are a subject of their window's own plus, twice as long, one of four wordings."""
    rng = np.random.default_rng(seed)
    subjects, wordings = unit(rng.normal(size=(windows, dim))), 2 * unit(rng.normal(size=(4, dim)))
    owner = np.repeat(np.arange(windows), each)
    put = wordings[rng.integers(4, size=len(owner))] + 0.05 * rng.normal(size=(len(owner), dim))
    return ProbeVectors.of(unit(subjects[owner] + put), owner, windows)


def means(probe: ProbeVectors) -> np.ndarray:
    return np.concatenate(list(probe.means()))


class Letters:
    """An embedder that can be reckoned by hand: how often each letter occurs, at length 1."""

    def __init__(self) -> None:
        self.embedded = list[str]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.embedded += texts
        counts = [[1e-3 + text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return unit(np.array(counts))


def test_probes_are_the_ways_to_ask() -> None:
    text = "Oslo is the capital of Norway. It lies on a fjord."
    own = probes(text, "Oslo", ["What is the capital of Norway?", "Oslo"])
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
    assert "The capital of" not in probes(text, "Oslo")
    assert "The capital of" in probes(text, "")


def test_a_title_counts_if_its_document_names_it() -> None:
    rows = [(0, "Oslo", "Oslo is a city."), (0, "Oslo", "It has a fjord."), (1, "chapter 3", "It rained.")]
    rows += [(2, "Tea: Green", "Green tea is steeped."), (3, "", "Nobody knows."), (4, "art", "A part of it.")]
    windows = [Window(i, document, "f", title, text) for i, (document, title, text) in enumerate(rows)]
    assert [subject for _, subject in with_subjects(windows)] == ["Oslo", "Oslo", "", "Tea: Green", "", ""]


def test_rows_of_some_windows() -> None:
    probe = ProbeVectors.of(np.zeros((7, 2), np.float32), np.array([0, 0, 1, 1, 1, 2, 3]), 4)
    rows, owner = probe.rows(np.array([1, 3, 0]))
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
        logits = -routing.SHARPNESS * ((points[:, None] - at) ** 2).sum(-1)
        return float((weight * (np.log(np.exp(logits).sum(1)) - logits[np.arange(20), label])).sum())

    found, step = Separation._gradient(centroids, points, label, weight), 1e-5
    for place_ in np.ndindex(3, 4):
        nudge = np.zeros((3, 4))
        nudge[place_] = step
        slope = (loss(centroids + nudge) - loss(centroids - nudge)) / (2 * step)
        assert found[place_] == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("batch", [routing.BATCH, 300])  # all probes in each step, and a draw of them
def test_centroids_learn_to_look_past_the_wording(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "BATCH", batch)
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
    whole = routing._Part(probe, members, 0.5)
    _, whose, weight = whole.draw(rng)
    assert whose.tolist() == [0, 0, 2, 3, 3, 3]
    each = np.bincount(whose, weight, 4)
    assert each == pytest.approx([0.125, 0, 0.125, 0.125])
    monkeypatch.setattr(routing, "BATCH", 5)
    drawn, parts = np.zeros(4), [routing._Part(probe, members, 0.5).draw(rng) for _ in range(600)]
    for some, whose, weight in parts:
        assert all(owner[point.argmax()] == members[who] for point, who in zip(some, whose, strict=True))
        drawn += np.bincount(whose, weight, 4) / len(parts)
    assert drawn == pytest.approx(each, abs=0.01)
    assert not routing._Part(probe, np.array([1, 3]), 0.5).any


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
                weight = np.exp(-routing.DOUBT * (distance**2 - (distance**2).min()))
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
        assert list(placed[window]) == [leaf for leaf in best if total[leaf] >= routing.LEAST]
    assert all(len(leaves) == 1 for leaves in place(grown.tree, probe, 1))


def test_agreement_counts_any_leaf_of_any_window() -> None:
    tree = ClusterTree([np.array([[[0.0], [1.0], [2.0]]], np.float32)], [np.ones((1, 3), bool)])
    placed = [(Path((0,)), Path((1,))), (Path((2,)),)]
    asked = np.array([[0.1], [0.9], [2.1], [2.1]], np.float32)
    assert agreement(tree, placed, asked, [[0], [0], [0], [0, 1]]) == 0.75
    assert agreement(tree, placed, asked[:0], []) == 0.0


def documents(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 8)) for _ in range(count)]
    write_lines(
        folder / "rows.jsonl",
        ({"title": n, "text": f"{n} stands in {n[::-1]}. It was built by {n[:4]} {n[4:]}."} for n in names),
    )
    return folder / "rows.jsonl"


def test_the_stages_in_files(tmp_path: pathlib.Path) -> None:
    source, tokenizer = documents(tmp_path), Embedder.load().tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    planted = plant(work, corpus, embedder, TreeSettings(branching=3, depth=2))
    assert planted.agreement["agreement"] is None  # nobody asked anything
    placed = list(planted.placed())
    assert [one.window for one in placed] == list(range(corpus.count))
    assert all(planted.tree.has(leaf) for one in placed for leaf in one.leaves)
    with TrainingSetWriter(tmp_path / "set") as out:
        for one in placed[1:]:
            out.add(Example(np.array([1, 2]), np.array([False, True]), one.window), one.leaves)
    examples = TrainingSet.open(tmp_path / "set")
    nodes = describe_nodes(work, planted, lambda text: len(text.split()), examples)
    sources = [window.source for window in corpus.windows()]
    assert not any(sources[0] in node["sources"] for node in nodes.values())  # nothing of it is learnt
    assert all(sources[one.window] in nodes[str(leaf)]["sources"] for one in placed[1:] for leaf in one.leaves)
    assert sum(nodes[str(top)]["windows"] for top in planted.tree.nodes(1) if str(top) in nodes) == corpus.count
    assert json.loads(work.path(NODES).read_text()) == nodes

    before, tree = len(embedder.embedded), work.path(TREE).read_bytes()
    again = plant(Work(tmp_path / "work"), corpus, embedder, TreeSettings(branching=3, depth=2))
    assert (len(embedder.embedded), again.digest) == (before, planted.digest)
    other = plant(work, corpus, embedder, TreeSettings(branching=3, depth=2, seed=1))
    assert len(embedder.embedded) == before  # another tree of the same vectors
    assert work.path(TREE).read_bytes() != tree
    assert other.digest != planted.digest


def test_generated_questions_shape_the_tree_and_some_measure_it(tmp_path: pathlib.Path) -> None:
    source, tokenizer = documents(tmp_path), Embedder.load().tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    asked = [f"Where is {window.title}, and who built {window.title}?" for window in corpus.windows()]
    write_lines(work.path(STUDY), ({"window": i, "question": text, "answer": ""} for i, text in enumerate(asked)))
    planted = plant(work, corpus, embedder)
    held_out = [row["text"] for row in read_lines(work.path(PROBES)) if row.get("held_out")]
    shaping = [row["text"] for row in read_lines(work.path(PROBES)) if not row.get("held_out")]
    assert held_out == [text for i, text in enumerate(asked) if is_held_out(i, text)]
    assert not set(held_out) & set(shaping)
    assert set(asked) - set(held_out) <= set(shaping)
    assert planted.agreement["questions"] == len(held_out) > 1
    assert planted.agreement["agreement"] >= 0.75
    assert 1 <= planted.agreement["leaves_a_window"] <= routing.LEAVES


def test_reversed_questions_shape_no_clusters(tmp_path: pathlib.Path) -> None:
    source, tokenizer = documents(tmp_path), Embedder.load().tokenizer
    works = Work(tmp_path / "work"), Work(tmp_path / "other")
    for work in works:
        read_corpus(work, [str(source)], tokenizer, MADE_UP)
    corpora = [read_corpus(work, [str(source)], tokenizer, MADE_UP) for work in works]
    rows = [
        {"window": one.id, "question": f"What stands in {one.title[::-1]}?", "answer": one.title, "reversed": True}
        for one in corpora[0].windows()
    ]
    more = [{"window": row["window"], "prompt": "It is", "answer": "x", "reversed": True} for row in rows]
    chats = [
        {"window": row["window"], "prompt": "Hello", "answer": "x", "reversed": True, "chat": True} for row in rows
    ]
    write_lines(works[0].path(STUDY), (row for three in zip(rows, more, chats, strict=True) for row in three))
    for work, corpus in zip(works, corpora, strict=True):
        plant(work, corpus, Letters())
    found = list(read_lines(works[0].path(PROBES)))
    turned = [row["text"] for row in found if row.get("reversed") and not row.get("held_out")]
    kept = [row["text"] for row in found if row.get("held_out")]
    asked = [row["question"] for row in rows]
    assert kept == [text for i, text in enumerate(asked) if is_held_out(i, text)]
    assert set(turned) >= set(asked) - set(kept)
    assert not set(turned) & set(kept)
    assert "It is" in turned
    assert "Hello" not in {row["text"] for row in found}
    means_ = [work.path("means.npy").read_bytes() for work in works]
    assert means_[0] == means_[1]
    assert works[0].path(TREE).read_bytes() != works[1].path(TREE).read_bytes()


def test_given_questions_measure_too(tmp_path: pathlib.Path) -> None:
    source, tokenizer = documents(tmp_path), Embedder.load().tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    planted = plant(work, corpus, embedder)
    windows = list(corpus.windows())
    by_title = [(window.title, window.title) for window in windows]
    by_source = [(window.title, window.source) for window in windows]
    found = given_agreement(planted, embedder, by_title)
    assert found == given_agreement(planted, embedder, by_source)
    placed, reached = list(planted.placed()), planted.tree.route(embedder.embed([w.title for w in windows]))
    hits = [route.path in place_.leaves for route, place_ in zip(reached, placed, strict=True)]
    assert found == sum(hits) / len(hits) > 0.5
    others = [(asked, windows[i - 1].title) for i, (asked, _) in enumerate(by_title)]
    assert given_agreement(planted, embedder, others) < found
    with pytest.raises(CorpusError, match="no document is called 'nobody'"):
        given_agreement(planted, embedder, [("Who?", "nobody")])


def test_an_interrupted_embedding_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BATCH", 16)
    source, tokenizer = documents(tmp_path), Embedder.load().tokenizer
    whole, broken = Work(tmp_path / "whole"), Work(tmp_path / "broken")
    straight = plant(whole, read_corpus(whole, [str(source)], tokenizer, MADE_UP), Letters())
    corpus = read_corpus(broken, [str(source)], tokenizer, MADE_UP)

    class Stops(Letters):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            if len(self.embedded) > 100:
                raise KeyboardInterrupt
            return super().embed(texts)

    with pytest.raises(KeyboardInterrupt):
        plant(broken, corpus, Stops())
    embedder = Letters()
    resumed = plant(Work(tmp_path / "broken"), corpus, embedder)
    rows = sum(1 for _ in read_lines(broken.path(PROBES)))
    assert rows - 130 < len(embedder.embedded) < rows - 90
    assert broken.path(TREE).read_bytes() == whole.path(TREE).read_bytes()
    assert list(resumed.placed()) == list(straight.placed())


def test_one_window_is_no_tree(tmp_path: pathlib.Path) -> None:
    (tmp_path / "one.txt").write_text("There is just this.")
    work = Work(tmp_path / "work")
    corpus = read_corpus(work, [str(tmp_path / "one.txt")], Embedder.load().tokenizer)
    with pytest.raises(CorpusError, match="1 window of text"):
        plant(work, corpus, Letters())


def test_the_demos_questions_reach_their_elements(tmp_path: pathlib.Path) -> None:
    """The target of the issue for one held-out wording, at the demo's tree; the benchmark has them all."""
    elements = [json.loads(line) for line in (evaluate.HERE / "elements.jsonl").read_text().splitlines()][:60]
    rows = (
        {"title": e["name"], "text": f"The atomic number of {e['name']} is {e['atomic_number']}."} for e in elements
    )
    write_lines(tmp_path / "rows.jsonl", rows)
    embedder, work = Embedder.load(), Work(tmp_path / "work")
    corpus = read_corpus(work, [str(tmp_path / "rows.jsonl")], embedder.tokenizer, CorpusSettings())
    planted = plant(work, corpus, embedder, TreeSettings(branching=4, depth=2))
    placed = [one.leaves for one in planted.placed()]
    asked = embedder.embed([q.paraphrases[0] for q in evaluate.questions()[: len(elements)]])
    assert agreement(planted.tree, placed, asked, [[i] for i in range(len(elements))]) >= 0.94
