"""From windows to a tree on disk: the stages, what shapes it, and what measures it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from elements import DOCUMENTS, evaluate
from tiny import unit

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn.corpus.corpus import check_asked, read_corpus
from mlx_hiermem.learn.settings import CorpusSettings, TreeSettings
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.tree import probes
from mlx_hiermem.learn.tree.build import agreement, build_tree, given_agreement
from mlx_hiermem.learn.tree.labels import describe_nodes
from mlx_hiermem.learn.tree.probes import is_held_out
from mlx_hiermem.learn.work import NODES, PROBES, STUDY, TREE, Work, read_rows, write_rows

MADE_UP = CorpusSettings(any_language=True)  # the words of `documents` are of none


class Letters:
    """An embedder that can be reckoned by hand: how often each letter occurs, at length 1."""

    def __init__(self) -> None:
        self.embedded = list[str]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.embedded += texts
        counts = [[1e-3 + text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return unit(np.array(counts))


def documents(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 8)) for _ in range(count)]
    write_rows(
        folder / "rows.jsonl",
        ({"title": n, "text": f"{n} stands in {n[::-1]}. It was built by {n[:4]} {n[4:]}."} for n in names),
    )
    return folder / "rows.jsonl"


def test_the_stages_in_files(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    source, tokenizer = documents(tmp_path), minilm.tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    built = build_tree(work, corpus, embedder, TreeSettings(branching=3, depth=2))
    assert built.agreement["agreement"] is None  # nobody asked anything
    placed = list(built.placed())
    assert [one.window for one in placed] == list(range(corpus.count))
    assert all(built.tree.has(leaf) for one in placed for leaf in one.leaves)
    with TrainingSetWriter(tmp_path / "set") as out:
        for one in placed[1:]:
            out.add(TrainingExample(np.array([1, 2]), np.array([False, True]), one.window), one.leaves)
    examples = TrainingSet.open(tmp_path / "set")
    nodes = describe_nodes(work, built, lambda text: len(text.split()), examples)
    sources = [window.source for window in corpus.windows()]
    assert not any(sources[0] in node["sources"] for node in nodes.values())  # nothing of it is learnt
    assert all(sources[one.window] in nodes[str(leaf)]["sources"] for one in placed[1:] for leaf in one.leaves)
    assert sum(nodes[str(top)]["windows"] for top in built.tree.nodes(1) if str(top) in nodes) == corpus.count
    assert json.loads(work.path(NODES).read_text()) == nodes

    before, tree = len(embedder.embedded), work.path(TREE).read_bytes()
    again = build_tree(Work(tmp_path / "work"), corpus, embedder, TreeSettings(branching=3, depth=2))
    assert (len(embedder.embedded), again.digest) == (before, built.digest)
    other = build_tree(work, corpus, embedder, TreeSettings(branching=3, depth=2, seed=1))
    assert len(embedder.embedded) == before  # another tree of the same vectors
    assert work.path(TREE).read_bytes() != tree
    assert other.digest != built.digest


def test_generated_questions_shape_the_tree_and_some_measure_it(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    source, tokenizer = documents(tmp_path), minilm.tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    asked = [f"Where is {window.title}, and who built {window.title}?" for window in corpus.windows()]
    write_rows(work.path(STUDY), ({"window": i, "question": text, "answer": ""} for i, text in enumerate(asked)))
    built = build_tree(work, corpus, embedder)
    held_out = [row["text"] for row in read_rows(work.path(PROBES)) if row.get("held_out")]
    shaping = [row["text"] for row in read_rows(work.path(PROBES)) if not row.get("held_out")]
    assert held_out == [text for i, text in enumerate(asked) if is_held_out(i, text)]
    assert not set(held_out) & set(shaping)
    assert set(asked) - set(held_out) <= set(shaping)
    assert built.agreement["questions"] == len(held_out) > 1
    assert built.agreement["agreement"] >= 0.75
    assert 1 <= built.agreement["leaves_a_window"] <= TreeSettings.leaves


def test_reversed_questions_shape_no_clusters(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    source, tokenizer = documents(tmp_path), minilm.tokenizer
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
    write_rows(works[0].path(STUDY), (row for three in zip(rows, more, chats, strict=True) for row in three))
    for work, corpus in zip(works, corpora, strict=True):
        build_tree(work, corpus, Letters())
    found = list(read_rows(works[0].path(PROBES)))
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


def test_given_questions_measure_too(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    source, tokenizer = documents(tmp_path), minilm.tokenizer
    work, embedder = Work(tmp_path / "work"), Letters()
    corpus = read_corpus(work, [str(source)], tokenizer, MADE_UP)
    built = build_tree(work, corpus, embedder)
    windows = list(corpus.windows())
    by_title = [(window.title, window.title) for window in windows]
    by_source = [(window.title, window.source) for window in windows]
    found = given_agreement(built, embedder, by_title)
    assert found == given_agreement(built, embedder, by_source)
    placed, reached = list(built.placed()), built.tree.route(embedder.embed([w.title for w in windows]))
    hits = [route.path in place_.leaves for route, place_ in zip(reached, placed, strict=True)]
    assert found == sum(hits) / len(hits) > 0.5
    others = [(asked, windows[i - 1].title) for i, (asked, _) in enumerate(by_title)]
    assert given_agreement(built, embedder, others) < found
    with pytest.raises(CorpusError, match="no document is called 'nobody'"):
        check_asked(built.corpus, [("Who?", "nobody")])


def test_an_interrupted_embedding_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, minilm: Embedder
) -> None:
    monkeypatch.setattr(probes, "BATCH", 16)
    source, tokenizer = documents(tmp_path), minilm.tokenizer
    whole, broken = Work(tmp_path / "whole"), Work(tmp_path / "broken")
    straight = build_tree(whole, read_corpus(whole, [str(source)], tokenizer, MADE_UP), Letters())
    corpus = read_corpus(broken, [str(source)], tokenizer, MADE_UP)

    class Stops(Letters):
        def embed(self, texts: Sequence[str]) -> np.ndarray:
            if len(self.embedded) > 100:
                raise KeyboardInterrupt
            return super().embed(texts)

    with pytest.raises(KeyboardInterrupt):
        build_tree(broken, corpus, Stops())
    embedder = Letters()
    resumed = build_tree(Work(tmp_path / "broken"), corpus, embedder)
    rows = sum(1 for _ in read_rows(broken.path(PROBES)))
    assert rows - 130 < len(embedder.embedded) < rows - 90
    assert broken.path(TREE).read_bytes() == whole.path(TREE).read_bytes()
    assert list(resumed.placed()) == list(straight.placed())


def test_one_window_is_no_tree(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    (tmp_path / "one.txt").write_text("There is just this.")
    work = Work(tmp_path / "work")
    corpus = read_corpus(work, [str(tmp_path / "one.txt")], minilm.tokenizer)
    with pytest.raises(CorpusError, match="1 window of text"):
        build_tree(work, corpus, Letters())


def test_the_elements_questions_reach_their_elements(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    """The target of the issue for one held-out wording, at the tree of their bank; the benchmark has them all."""
    elements = [json.loads(line) for line in DOCUMENTS.read_text().splitlines()][:60]
    rows = (
        {"title": e["name"], "text": f"The atomic number of {e['name']} is {e['atomic_number']}."} for e in elements
    )
    write_rows(tmp_path / "rows.jsonl", rows)
    work = Work(tmp_path / "work")
    corpus = read_corpus(work, [str(tmp_path / "rows.jsonl")], minilm.tokenizer, CorpusSettings())
    built = build_tree(work, corpus, minilm, TreeSettings(branching=4, depth=2))
    placed = [one.leaves for one in built.placed()]
    asked = minilm.embed([q.paraphrases[0] for q in evaluate.questions()[: len(elements)]])
    assert agreement(built.tree, placed, asked, [[i] for i in range(len(elements))]) >= 0.94
