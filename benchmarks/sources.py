"""How often an answer's source is the right one, and from which score on it is named.

    python benchmarks/retrieval.py DATA && python benchmarks/sources.py DATA [--cache vectors.npz]

Answers are the replies of `retrieval.py` to the first 240 questions of vital480's exam, and answers from the exam
itself. A leaf is a passage and the seven nearest to it, which is harder than a real one; `away` means without the
right passage. To be named: right answers whose passage is there. Not to be named: right answers whose passage is
away, and the answers of other questions. Wrong replies to a prompt with a passage are shown, but not counted: they
are mostly the passage's own words. The weights are those of a logistic regression in which both sides weigh the
same.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from retrieval import DEVELOPMENT, Data

from mlx_hiermem import source_search
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.tree.probes import about
from mlx_hiermem.sentences import sentences

LEAF, STEPS, TRIED = 8, 30, 60
BOUNDS = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class Case:
    """An answer in a leaf. `counted`: 1 where its passage is to be named, 0 where none is, None: only shown."""

    kind: str
    question: str
    answer: str
    right: int
    leaf: list[int]
    counted: int | None


@dataclass(frozen=True)
class Corpus:
    """Sentences (passage, text) and vectors of both."""

    titles: list[str]
    told: list[tuple[int, str]]
    windows: np.ndarray  # [480, dim]
    vectors: np.ndarray  # [sentences, dim]

    @classmethod
    def of(cls, data: Data, embedder: Embedder, cache: pathlib.Path | None) -> Corpus:
        titles = [row["title"] for row in data.passages]
        told = [(n, text) for n, row in enumerate(data.passages) for text in sentences(row["text"])]
        if cache and cache.exists():
            kept = np.load(cache)
            return cls(titles, told, kept["windows"], kept["sentences"])
        windows = embedder.embed([about(row["text"], row["title"]) for row in data.passages])
        vectors = embedder.embed([f"{titles[n]}. {text}" for n, text in told])
        if cache:
            np.savez(cache, windows=windows, sentences=vectors)
        return cls(titles, told, windows, vectors)

    def candidates(self, case: Case, claims: np.ndarray) -> list[tuple[int, float, float]]:
        """(passage, nearness, agreement) of the sentences that would be looked at."""
        best = sorted(case.leaf, key=lambda n: -float((self.windows[n] @ claims.T).max()))[
            : source_search.LOOKED_INTO
        ]
        found = []
        for row, (number, text) in enumerate(self.told):
            if number in best:
                near = float((self.vectors[row] @ claims.T).max())
                said = source_search._agreement(case.question, case.answer, f"{self.titles[number]} {text}")
                found.append((number, near, said))
        return found


def cases(data: Data, windows: np.ndarray, replies: dict[str, Any]) -> list[Case]:
    """From the exam, and from the replies of every way."""
    nearest, rng = np.argsort(-(windows @ windows.T), axis=1)[:, :LEAF], random.Random(0)
    rows, found = {row["id"]: row for row in data.rows}, list[Case]()

    def add(kind: str, row: dict[str, Any], answer: str, counted: int | None, away: bool = False) -> None:
        right = data.right(row)
        leaf = [int(n) for n in nearest[right]]
        found.append(Case(kind, row["question"], answer, right, leaf[1:] if away else leaf, counted))

    for row in data.rows[:: max(1, len(data.rows) // TRIED)]:
        other = rng.choice([one for one in data.rows if one["doc"] != row["doc"]])
        add("exam answer", row, row["answer"], 1)
        add("exam answer, away", row, row["answer"], 0, away=True)
        add("another question's answer", row, other["answer"], 0)
    for way, one in replies.items():
        for reply in one["replies"]:
            row, text = rows[reply["id"]], reply["reply"]
            if reply["right"]:
                add(f"{way}, right", row, text, 1)
                add(f"{way}, right, away", row, text, 0, away=True)
            else:
                add(f"{way}, wrong", row, text, None if way != "none" else 0)
    return found


def score(weights: np.ndarray, near: float, said: float) -> float:
    return float(1 / (1 + np.exp(-(weights[0] + weights[1] * near + weights[2] * said))))


def fit(found: list[Case], candidates: list[list[tuple[int, float, float]]]) -> np.ndarray:
    """Of 1, nearness and agreement. The sentence of a case is the best one by the weights so far."""
    weights = np.array([-4.0, 4.0, 4.0])
    counted = [n for n, case in enumerate(found) if case.counted is not None and candidates[n]]
    wanted = np.array([found[n].counted for n in counted])
    weight = np.where(wanted == 1, 0.5 / wanted.sum(), 0.5 / (1 - wanted).sum())
    for _ in range(STEPS):
        rows = []
        for n in counted:
            own = [one for one in candidates[n] if not found[n].counted or one[0] == found[n].right]
            _, near, said = max(own or candidates[n], key=lambda one: score(weights, one[1], one[2]))
            rows.append((1.0, near, said))
        features = np.array(rows)
        for _ in range(200):
            error = 1 / (1 + np.exp(-features @ weights)) - wanted
            weights = weights - 2 * (features.T @ (error * weight) + np.array([0, 1e-3, 1e-3]) * weights)
    return weights


def rates(
    found: list[Case], candidates: list[list[tuple[int, float, float]]], weights: np.ndarray, bound: float
) -> dict[str, Any]:
    """Kind -> how many there are, in how many a source is named, and in how many the right one."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for case, own in zip(found, candidates, strict=True):
        best = max(own, key=lambda one: score(weights, one[1], one[2]), default=(-1, 0.0, 0.0))
        named = score(weights, best[1], best[2]) >= bound
        for place, one in enumerate((True, named, named and best[0] == case.right)):
            counts[case.kind][place] += one
    return {kind: {"of": n, "named": named, "right": right} for kind, (n, named, right) in counts.items()}


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--replies", type=pathlib.Path, default=common.RESULTS / "retrieval.json")
    parser.add_argument("--cache", type=pathlib.Path, help="keeps vectors between runs")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    data, embedder = Data.read(asked.data, DEVELOPMENT), Embedder.load()
    corpus = Corpus.of(data, embedder, asked.cache)
    found = cases(data, corpus.windows, json.loads(asked.replies.read_text(encoding="utf-8"))["ways"])
    claims = [
        [f"{case.question} {said}" for said in sentences(case.answer)[: source_search.CLAIMS] or [""]]
        for case in found
    ]
    texts = list(dict.fromkeys(text for own in claims for text in own))
    vectors = dict(zip(texts, embedder.embed(texts), strict=True))
    candidates = [
        corpus.candidates(case, np.stack([vectors[text] for text in own]))
        for case, own in zip(found, claims, strict=True)
    ]
    in_use = np.array(source_search.WEIGHTS)
    result = {
        "fitted": [round(float(value), 2) for value in fit(found, candidates)],
        "weights": list(source_search.WEIGHTS),
        "bound": source_search.BOUND,
        "bounds": {str(bound): rates(found, candidates, in_use, bound) for bound in BOUNDS},
    }
    common.save(__file__, result, asked, before)
    print(f"fitted {result['fitted']}, in use {result['weights']}, bound {source_search.BOUND}")
    table = [
        (kind, str(one["of"]), f"{one['named'] / one['of']:.0%}", f"{one['right'] / one['of']:.0%}")
        for kind, one in rates(found, candidates, in_use, source_search.BOUND).items()
    ]
    common.table(("answer", "cases", "a source is named", "the right one"), table)


if __name__ == "__main__":
    main()
