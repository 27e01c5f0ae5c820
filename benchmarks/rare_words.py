"""What it is worth that a question's rare words count in routing (`mlx_hiermem/bank/passages.py`).

    python benchmarks/rare_words.py DATA     # the demo's bank; DATA has qa/ and corpus/: some minutes

Routes with words and without, of questions that the bank is for, of requests about its articles, and of questions
about other things: how many get memory, and how many reach the leaf of their article. The rule was chosen on the
first 240 questions of the exam and the first 300 of each other corpus; the others are counted. Writes
results/rare_words.json, and prints Markdown.
"""

from __future__ import annotations

import os
import pathlib
import random
from typing import Any

import common
from harm import other_questions
from knowledge import read_exam

from mlx_hiermem.apps.demo.tour import BANK
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.router import Router

EXAM = BANK.parent / "vital" / "exam.jsonl.gz"
CHOSEN, MOST = 300, 600  # questions of another corpus that the rule was chosen on, and those that are counted
REQUESTS = (
    "Tell me about {}.",
    "Explain {} to a child in two sentences.",
    "I am writing an essay about {} for school. Can you help me with some facts?",
)


def texts(data: pathlib.Path, homes: dict[str, Path]) -> dict[str, list[tuple[str, Path | None]]]:
    """By what they are: each text, and the leaf that it should reach, if any."""
    exam = read_exam(EXAM, "240-960")
    found: dict[str, list[tuple[str, Path | None]]] = {
        "the exam, 241 to 960": [(row["question"], homes[row["doc"]]) for row in exam]
    }
    for request in REQUESTS:
        found[request.format("…")] = [(request.format(title), leaf) for title, leaf in homes.items()]
    for corpus in ("countries", "wordnet"):
        rows = other_questions(data, corpus)
        random.Random(0).shuffle(rows)
        found[f"other questions: {corpus}"] = [(row["question"], None) for row in rows[CHOSEN : CHOSEN + MOST]]
    return found


def routed(router: Router, asked: list[tuple[str, Path | None]]) -> dict[str, Any]:
    routes = router.route_batch([text for text, _ in asked])
    pairs = list(zip(routes, (leaf for _, leaf in asked), strict=True))
    return {
        "of": len(pairs),
        "with memory": sum(bool(route.path) for route, _ in pairs),
        "right leaf": sum(route.path == leaf for route, leaf in pairs if leaf is not None),
    }


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("data", type=pathlib.Path)
    asked, before = common.parsed(parser), os.getloadavg()[0]
    bank = MemoryBank.open(BANK)
    assert bank.sources
    homes = {window.title: one.leaf for one in bank.sources.all() for window in one.windows}
    words = Router.of_bank(bank)
    vectors = Router(bank.tree, words.embedder, bank.policy, bank.sources)
    found = {
        name: {"vectors alone": routed(vectors, rows), "with words": routed(words, rows)}
        for name, rows in texts(asked.data, homes).items()
    }
    asked.data = None  # a result is of no machine
    common.save(__file__, {"texts": found}, asked, before)
    cells = []
    for name, ways in found.items():
        shares = [f"{way['with memory'] / way['of']:.1%}" for way in ways.values()]
        leaves = [f"{way['right leaf'] / way['of']:.1%}" if way["right leaf"] else "" for way in ways.values()]
        cells.append([name, str(ways["with words"]["of"]), *shares, *leaves])
    header = (
        "",
        "n",
        "memory, by vectors",
        "memory, with words",
        "right leaf, by vectors",
        "right leaf, with words",
    )
    common.table(header, cells)


if __name__ == "__main__":
    main()
