"""How often a question reaches a leaf in which its answer was learnt, by the way the tree was made.

    python benchmarks/routing_agreement.py              results/routing_agreement.md; some minutes on two cores
    python benchmarks/routing_agreement.py --run WORK   of the default way alone, with the questions of a self-study

The 118 elements are the documents, and their 354 questions with all held-out wordings are asked; none of these
shapes a tree. Trees are of their bank's shape (two levels of 4) and of one level of 16. Only the embedder is used:
nothing is trained but centroids. Figures are over several seeds, because any way has lucky trees. WORK is the
folder that `hiermem learn elements.jsonl OUT --keep` leaves.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from elements import DOCUMENTS, QUESTIONS

from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.tree.build import agreement, descend, place
from mlx_hiermem.learn.tree.kmeans import BALANCE, Separation, Shape, grow
from mlx_hiermem.learn.tree.probes import ProbeVectors, framed, probe_texts, statements, with_subjects
from mlx_hiermem.sentences import sentences
from mlx_hiermem.tree import ClusterTree

RESULTS = pathlib.Path(__file__).parent / "results" / "routing_agreement.json"
SHAPES = (Shape(4, 2), Shape(16, 1))
SEEDS = range(5)
NAMED = ("atomic_number", "symbol")  # questions that name their document; the third kind gives a number only

Places = list[tuple[Path, ...]]  # of each document


@dataclass(frozen=True)
class Candidate:
    """One way: the texts whose middle is clustered, those that place a document, and how.

    `placing` None takes the leaf that the clustering put the document in; `most` 0 takes every leaf that one of its
    texts goes to, otherwise the likeliest so many. `tried` leaves are tried by a question.
    """

    name: str
    shaping: str
    placing: str | None = None
    most: int = 0
    tuned: bool = False
    turned: bool = False  # centroids are moved by reversed questions too
    balance: float = BALANCE
    tried: int = 1


CANDIDATES = (
    Candidate("whole document", "whole"),
    Candidate("whole document, even trees", "whole", balance=1.0),
    Candidate("whole document, a question tries its best 2 leaves", "whole", tried=2),
    Candidate("whole document, learnt wherever its sentences go", "whole", "sentences"),
    Candidate("whole document, learnt wherever its sentences with title go", "whole", "titled sentences"),
    Candidate("sentences with title", "titled sentences"),
    Candidate("sentences with title, learnt wherever they go", "titled sentences", "titled sentences"),
    Candidate("expected questions", "probes"),
    Candidate("expected questions, learnt wherever they go", "probes", "probes"),
    Candidate("sentences with title, centroids moved", "titled sentences", "titled sentences", 1, True),
    Candidate("statements and beginnings, centroids moved", "statements", "statements", 1, True),
    Candidate("expected questions, centroids moved", "probes", "probes", 1, True),
    Candidate("expected questions, centroids moved, learnt in the likeliest 3 leaves", "probes", "probes", 3, True),
    Candidate("expected questions, centroids moved, even trees", "probes", "probes", 1, True, balance=1.0),
    Candidate(
        "expected questions, centroids moved, even trees, likeliest 2 leaves",
        "probes",
        "probes",
        2,
        True,
        balance=1.0,
    ),
    Candidate(
        "expected questions, centroids moved, even trees, likeliest 3 leaves",
        "probes",
        "probes",
        3,
        True,
        balance=1.0,
    ),
    Candidate(
        "expected questions, centroids moved by reversed ones too, even trees, likeliest 2 leaves",
        "probes",
        "probes",
        2,
        True,
        True,
        balance=1.0,
    ),
)
# What self-study (SmolLM2-135M) writes about the elements; none of it is among the questions.
TURNED = (
    "Which element has the atomic number {}?",
    "The element with the atomic number {} is",
    "Which element has the number of protons {}?",
    "{} is the number of protons of which element?",
)


class Corpus:
    """The elements, one window each, and the embeddings of what is asked of them."""

    def __init__(self) -> None:
        rows = [json.loads(line) for line in DOCUMENTS.read_text(encoding="utf-8").splitlines()]
        windows = [Window(i, i, row["id"], row["name"], row["text"]) for i, row in enumerate(rows)]
        self.windows = list(with_subjects(windows))
        self.embedder, self.vectors = Embedder.load(), dict[str, np.ndarray]()
        self.sets: dict[str, list[list[str]]] = {
            "whole": [[window.text] for window, _ in self.windows],
            "sentences": [sentences(window.text) for window, _ in self.windows],
            "titled sentences": [[f"{about}. {s}" for s in sentences(w.text)] for w, about in self.windows],
            "statements": [list(dict.fromkeys(statements(w.text, about))) for w, about in self.windows],
            "probes": [probe_texts(window.text, about) for window, about in self.windows],
            "turned": [framed([text.format(row["atomic_number"]) for text in TURNED]) for row in rows],
        }
        document = {row["id"]: i for i, row in enumerate(rows)}
        self.questions: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for number, text in enumerate([row["prompt"], *row["heldout_prompts"]]):
                self.questions[f"{row['relation']} {number}"].append((text, document[row["doc"]]))
        asked = {text for kind in self.questions.values() for text, _ in kind}
        overlap = asked & {text for name in ("probes", "turned") for texts in self.sets[name] for text in texts}
        if overlap:
            raise SystemExit(f"{len(overlap)} of the questions are among the texts that shape the tree")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in dict.fromkeys(texts) if text not in self.vectors]
        for start in range(0, len(new), 512):
            part = new[start : start + 512]
            self.vectors.update(zip(part, self.embedder.embed(part), strict=True))
        return np.stack([self.vectors[text] for text in texts])

    def probe_vectors(self, name: str) -> ProbeVectors:
        texts = self.sets[name]
        owner = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        return ProbeVectors.of(self.embed([text for own in texts for text in own]), owner, len(texts))


def leaf(tree: ClusterTree, levels: np.ndarray, rows: np.ndarray) -> list[Path]:
    pairs = zip(rows.tolist(), levels.tolist(), strict=True)
    return [Path.of_row(row, level, tree.branching) for row, level in pairs]


def measure(corpus: Corpus, candidate: Candidate, shape: Shape, seed: int) -> dict[str, Any]:
    """One tree: the share of each kind of question that reaches its document, and what that takes."""
    start, shaping = time.perf_counter(), corpus.probe_vectors(candidate.shaping)
    middles = np.concatenate(list(shaping.means()))
    turned = corpus.probe_vectors("turned") if candidate.turned else None
    grown = grow(middles, shape, seed, Separation(shaping, turned) if candidate.tuned else None, candidate.balance)
    tree, count = grown.tree, len(corpus.windows)
    placed: Places
    if candidate.placing is None:
        placed = [(grown.leaf(i),) for i in range(count)]
    elif candidate.most:
        placed = list(place(tree, corpus.probe_vectors(candidate.placing), candidate.most))
    else:
        placing = corpus.probe_vectors(candidate.placing)
        goes = leaf(tree, *descend(tree, placing.vectors))
        placed = [tuple(dict.fromkeys(goes[a:b])) for a, b in zip(placing.first, placing.first[1:], strict=False)]
    seconds = time.perf_counter() - start
    inside = Counter(node for leaves in placed for node in leaves)
    return {
        "leaves": sum(map(len, placed)) / count,
        "largest": max(inside.values()) / count,
        "seconds": seconds,
        **{kind: ask(corpus, candidate, tree, placed, kind) for kind in corpus.questions},
    }


def ask(corpus: Corpus, candidate: Candidate, tree: ClusterTree, placed: Places, kind: str) -> float:
    texts, documents = zip(*corpus.questions[kind], strict=True)
    asked = corpus.embed(texts)
    if candidate.tried == 1:
        return agreement(tree, placed, asked, [[document] for document in documents])
    best = place(tree, ProbeVectors.of(asked, np.arange(len(asked)), len(asked)), candidate.tried)
    return float(np.mean([bool(set(own) & set(placed[d])) for own, d in zip(best, documents, strict=True)]))


def summary(corpus: Corpus, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds: mean and worst of the canonical questions and of the worst paraphrase."""
    named = [kind for kind in corpus.questions if kind.startswith(NAMED)]
    other = [kind for kind in corpus.questions if kind not in named]
    groups = {
        "canonical": [kind for kind in named if kind.endswith(" 0")],
        "paraphrase": [kind for kind in named if not kind.endswith(" 0")],
        "number only": other,
    }
    found: dict[str, Any] = {
        key: float(np.mean([row[key] for row in rows])) for key in ("leaves", "largest", "seconds")
    }
    for group, kinds in groups.items():
        worst = [min(row[kind] for kind in kinds) for row in rows]
        found[group] = {"mean": float(np.mean(worst)), "worst": min(worst)}
    return found


def show(results: Sequence[dict[str, Any]]) -> None:
    """The tables, as Markdown."""
    for shape in SHAPES:
        print(f"\nk = {shape.branching}, {shape.depth} level{'s' * (shape.depth > 1)}:\n")
        print("| way | leaves a document | largest leaf | canonical | worst paraphrase | by number only |")
        print("|---|---|---|---|---|---|")
        for result in results:
            if result["shape"] == [shape.branching, shape.depth]:
                row = result["summary"]
                groups = (row[group] for group in ("canonical", "paraphrase", "number only"))
                figures = " | ".join(f"{100 * g['mean']:.1f} ({100 * g['worst']:.1f})" for g in groups)
                print(f"| {result['way']} | {row['leaves']:.2f} | {row['largest']:.0%} | {figures} |")


def of_run(work: pathlib.Path) -> None:
    """Each wording's agreement with the probes of a run, reversed questions among them: mean and worst seed."""
    corpus, rows = Corpus(), [json.loads(line) for line in (work / "probes.jsonl").read_text().splitlines()]
    titles = [json.loads(line)["title"] for line in (work / "windows.jsonl").read_text().splitlines()]
    of_document = [titles.index(subject) for _, subject in corpus.windows]  # a document's first window
    asked = {text for kind in corpus.questions.values() for text, _ in kind}
    if among := asked & {row["text"] for row in rows}:
        raise SystemExit(f"{len(among)} of the questions are among the probes of {work}")
    vectors, owner = np.load(work / "probes.npy"), np.array([row["window"] for row in rows])
    kind = np.array([2 if "held_out" in row else int("reversed" in row) for row in rows])
    plain, turned = (ProbeVectors.of(vectors[kind == i], owner[kind == i], len(titles)) for i in range(2))
    for shape in SHAPES:
        found, leaves = defaultdict[str, list[float]](list), list[float]()
        for seed in SEEDS:
            tree = grow(np.concatenate(list(plain.means())), shape, seed, Separation(plain, turned), 1.0).tree
            placed = list(place(tree, plain, 2))
            leaves.append(sum(map(len, placed)) / len(placed))
            for name, questions in corpus.questions.items():
                texts, documents = zip(*questions, strict=True)
                windows = [[of_document[document]] for document in documents]
                found[name].append(agreement(tree, placed, corpus.embed(texts), windows))
        print(f"k = {shape.branching}: {np.mean(leaves):.2f} leaves a window")
        for name, values in found.items():
            print(f"  {name:22} {100 * np.mean(values):.1f} ({100 * min(values):.1f})")


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return of_run(pathlib.Path(sys.argv[2]))
    corpus, results = Corpus(), list[dict[str, Any]]()
    for shape in SHAPES:
        for candidate in CANDIDATES:
            rows = [measure(corpus, candidate, shape, seed) for seed in SEEDS]
            found = summary(corpus, rows)
            results.append(
                {
                    "way": candidate.name,
                    "shape": [shape.branching, shape.depth],
                    "summary": found,
                    "seeds": rows,
                }
            )
            print(shape, candidate.name, found["canonical"], found["paraphrase"], file=sys.stderr, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"machine": common.machine(), "rows": results}, indent=1) + "\n", encoding="utf-8"
    )
    show(results)


if __name__ == "__main__":
    main()
