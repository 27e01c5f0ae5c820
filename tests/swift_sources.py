"""The sources of the tiny bank that the Swift tests open, and vectors for them without a model."""

from __future__ import annotations

import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_hiermem.bank.manifest import SourcesEntry
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.bank.sources import BankSources, LeafSources, SourceWindow, write_sources
from mlx_hiermem.config import Path
from mlx_hiermem.router import Router
from mlx_hiermem.sentences import PLAIN_WORDS, sentences
from mlx_hiermem.source_search import SourceSearch, messages_with
from mlx_hiermem.tree import ClusterTree

# By leaf: document, title, place, text. The leaf 1.0 has none.
WINDOWS = {
    "0.0": [
        (
            "gases.pdf",
            "Helium",
            "page 1",
            "Helium is the lightest noble gas. Its atomic number is 2. It boils at -269 °C.",
        ),
        (
            "gases.pdf",
            "Hydrogen",
            "page 9",
            "The lightest element of all burns with oxygen to water. It is the fuel of stars.",
        ),
    ],
    "0.1": [
        (
            "gases.pdf",
            "Neon",
            "page 2",
            "Neon is a noble gas, which glows in tubes. Its atomic number is 10! “It is rare.” Found 1898.",
        ),
        (
            "lamps.txt",
            "Signs",
            "",
            "Red signs are filled with neon. Other colours need argon, or a coat of phosphor.",
        ),
        ("notes.jsonl line 7", "", "line 7", "A tube of neon needs some 2 kV; ask Dr. Ray before you touch it."),
    ],
    "0.2": [
        (
            "gases.pdf",
            "Argon",
            "page 3",
            "Argon makes up 0.93 % of the air.\n\nIts neighbour in the group is krypton.",
        )
    ],
    "1.1": [("solids.md", "Carbon", "line 12", "Carbon is no metal. Diamonds and graphite are made of it.")],
    "1.2": [
        ("metals.md", "Gold", "line 1", "Gold has the symbol Au. It does not rust. 金是金属。它不生锈。"),
        ("metals.md", "Gold", "line 20", "Most gold was mined after 1950."),
    ],
    "2.0": [
        (
            "metals.md",
            "Iron",
            "line 40",
            "Iron has the symbol Fe, from ferrum. It rusts in wet air, and leaves nothing out.",
        ),
        (
            "metals.md",
            "Steel",
            "line 61",
            "Steel is iron with some carbon in it. Knives and bridges are made of steel.",
        ),
    ],
    "2.1": [
        ("food.html", "Rice", "", "Wash the rice. Cook it in twice as much water for 15 minutes. Let it rest.")
    ],
    "2.2": [("food.html", "Bread", "", "Bread is made of flour, water, salt and yeast.")],
}


def worded(text: str, dim: int) -> np.ndarray:
    """A vector of length 1 that texts with words in common have nearly in common."""
    from swift_goldens import uniform

    words = re.findall(r"\w+", text.lower()) or [""]
    total = sum(uniform(zlib.crc32(word.encode()), dim).astype(float) for word in words)
    return (total / np.sqrt((total**2).sum())).astype(np.float32)


# Leaf, question and answer of which the sources are looked for.
ASKED = [
    ("0.1", "What is the atomic number of neon?", "The atomic number of neon is 10."),
    ("0.1", "What is the atomic number of neon?", ""),
    ("0.1", "When was it found?", "Found in 1898. It is rare. Nothing else is known."),
    ("0.1", "Who is Dr. Ray?", "Nobody knows."),
    ("0.0", "At what does helium boil?", "At −269 °C: it boils at -269."),
    ("0.2", "What is in the air?", "Argon makes up 0.93 % of the air."),
    ("1.2", "金是什么？", "金是金属。它不生锈。"),
    ("2.0", "What are knives made of?", "Knife and bridges: steel."),
    ("2.1", "How do I cook rice?", "How do I cook rice?"),
    ("1.0", "Is there anything?", "There is not."),
]
# Texts whose sentences end in many ways.
SENTENCES = [
    "“It is rare.” Found in 1898 (or so). 2 kV are enough! and more follows; Mr. ray said. so",
    "It was destroyed. then built again?Yes. No\n \nA blank line.  Double   spaces\tand tabs… Über alles. ½ of it.",
    "金是金属。它不生锈！真的？ 是。\n\n다음 문장. É tarde. 😀 Done. _x y. [Note] z.\u2028Next\u00a0one",
    "",
    " \n ",
]


class Worded:
    """An embedder of `worded`; it keeps what it was asked for."""

    def __init__(self, dim: int) -> None:
        self.dim, self.vectors = dim, dict[str, np.ndarray]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.vectors |= {text: worded(text, self.dim) for text in texts}
        return np.stack([self.vectors[text] for text in texts])


def pieces(text: str) -> frozenset[int]:
    """A number for each word, in place of a tokenizer's rare pieces."""
    return frozenset(zlib.crc32(word.encode()) % 30000 for word in re.findall(r"\w+", text.lower()))


# Texts of which the nearest passage has all rare words, some, and none.
ROUTED = [*dict.fromkeys(question for _, question, _ in ASKED), "neon", "Who found the symbol of Zorblax?", "?"]


def routed_with_words(tree: ClusterTree, sources: BankSources, reach: float) -> dict[str, Any]:
    """Where texts go alone if their words count, and what they are routed by."""
    embedder, policy = Worded(tree.dim), BankPolicy(passage_reach=reach)
    routes = Router(tree, embedder, policy, sources, pieces).route_batch(ROUTED)
    windows = [f"{window.title}. {window.text}" for one in sources.all() for window in one.windows]
    return {
        "texts": ROUTED,
        "passage_reach": reach,
        "vectors": {text: vector.tolist() for text, vector in embedder.vectors.items()},
        "pieces": {text: sorted(pieces(text)) for text in [*ROUTED, *windows]},
        "paths": [str(route.path) for route in routes],
        "passages": [route.passage for route in routes],
        "far": [route.far for route in routes],
    }


def found_sources(sources: BankSources, embedder: Worded) -> dict[str, Any]:
    """What Python finds in the sources, and the prompts that it makes of passages."""
    search, found, prompts = SourceSearch(sources, embedder), [], []
    for leaf, question, answer in ASKED:
        said = [
            source.to_json() | {"name": source.name} for source in search.find(Path.parse(leaf), question, answer)
        ]
        passage = search.passage(Path.parse(leaf), question)
        told = messages_with([{"role": "user", "content": question}], passage)
        found.append({"leaf": leaf, "question": question, "answer": answer, "sources": said})
        prompts.append([message["content"] for message in told])
    return {
        "found": found,
        "prompts": prompts,
        "sentences": [{"text": text, "sentences": sentences(text)} for text in SENTENCES],
        "plain": sorted(PLAIN_WORDS),
    }


def write_windows(folder: pathlib.Path, branching: int, dim: int) -> SourcesEntry:
    """The two files of the sources, below a bank's folder."""
    found = []
    for leaf, rows in WINDOWS.items():
        windows = [SourceWindow(*row) for row in rows]
        vectors = np.stack([worded(f"{one.title}. {one.text}", dim) for one in windows])
        found.append(LeafSources(Path.parse(leaf), windows, vectors))
    return write_sources(folder, found, branching, dim)
