"""The sources of the tiny bank that the Swift tests open, and vectors for them without a model."""

from __future__ import annotations

import pathlib
import re
import zlib

import numpy as np

from mlx_hiermem.bank.manifest import SourcesEntry
from mlx_hiermem.bank.sources import LeafSources, SourceWindow, write_sources
from mlx_hiermem.config import Path

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


def write_windows(folder: pathlib.Path, branching: int, dim: int) -> SourcesEntry:
    """The two files of the sources, below a bank's folder."""
    found = []
    for leaf, rows in WINDOWS.items():
        windows = [SourceWindow(*row) for row in rows]
        vectors = np.stack([worded(f"{one.title}. {one.text}", dim) for one in windows])
        found.append(LeafSources(Path.parse(leaf), windows, vectors))
    return write_sources(folder, found, branching, dim)
