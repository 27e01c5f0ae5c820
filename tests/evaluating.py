"""Task files for tests, and a tiny model whose texts are routed by a hash of themselves."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tiny import HashEmbedder, make_model

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.evaluate.runner import Evaluation
from mlx_hiermem.router import Router

WORDS = [
    "oak",
    "elm",
    "fir",
    "ash",
    "yew",
    "bay",
    "fig",
    "sap",
    "bud",
    "leaf",
    "bark",
    "root",
    "twig",
    "stem",
    "seed",
    "cone",
]


def write(file: pathlib.Path, rows: Sequence[Any]) -> pathlib.Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def task_files(folder: pathlib.Path, count: int = 12) -> pathlib.Path:
    """One small file of each kind, and tasks.toml that names them."""
    rng = np.random.default_rng(0)
    numbers = range(count)
    write(folder / "cloze.jsonl", [{"context": text(rng, 6), "continuation": text(rng, 1)} for _ in numbers])
    choices = [[text(rng, 1 + int(rng.integers(4))) for _ in range(3)] for _ in numbers]
    rows = [{"query": text(rng, 5), "choices": c, "gold": int(rng.integers(3))} for c in choices]
    write(folder / "choice.jsonl", rows)
    rows = []
    for _ in numbers:
        start = text(rng, 4)
        options = [f"{start} {text(rng, 1)}" for _ in range(2)]
        rows.append({"context_options": options, "continuation": text(rng, 2), "gold": int(rng.integers(2))})
    write(folder / "schema.jsonl", rows)
    rows = [{"context": text(rng, 4), "answer": text(rng, 1), "aliases": [text(rng, 2)]} for _ in numbers]
    write(folder / "reply.jsonl", rows)
    rows = [
        {
            "id": f"q{n}",
            "doc": f"d{n}",
            "relation": "number" if n % 2 else "name",
            "subject": WORDS[n],
            "answer": str(n) if n % 2 else WORDS[n],
            "prompt": f"What is {text(rng, 3)}?",
            "heldout_prompts": [f"Say {text(rng, 2)}:"],
        }
        for n in numbers
    ]
    write(folder / "asked.jsonl", rows)
    articles = [f" = Title {n} = \n\n {text(rng, 30)} \n = = Part = = \n {text(rng, 9)} \n" for n in range(4)]
    (folder / "wiki.txt").write_text("".join(articles), encoding="utf-8")
    (folder / "tasks.toml").write_text(
        """
[cloze]
kind = "language_modeling"
file = "cloze.jsonl"
group = "common"

[choice]
kind = "multiple_choice"
file = "choice.jsonl"
shots = 2
delimiter = "\\nAnswer: "
group = "common"

[schema]
kind = "schema"
file = "schema.jsonl"
shots = 2

[reply]
kind = "generation"
file = "reply.jsonl"
shots = 1

[asked]
kind = "questions"
file = "asked.jsonl"

[wiki]
kind = "perplexity"
file = "wiki.txt"
"""
    )
    return folder / "tasks.toml"


def name_sources(bank: pathlib.Path, count: int = 12) -> None:
    """Says in the manifest that document d{n} was learnt in leaf n modulo their number."""
    manifest = MemoryBank.open(bank).manifest
    leaves = [path for path in manifest.blocks if len(path) == 2]
    sources = {leaf: [f"d{n}" for n in range(i, count, len(leaves))] for i, leaf in enumerate(leaves)}
    blocks = {p: dataclasses.replace(e, sources=tuple(sources.get(p, ()))) for p, e in manifest.blocks.items()}
    dataclasses.replace(manifest, blocks=blocks).write(bank / MANIFEST)


def named_model(folder: pathlib.Path) -> pathlib.Path:
    """A model whose bank says where each document was learnt."""
    name_sources(make_model(folder) / "bank")
    return folder


def evaluation(model: pathlib.Path, out: pathlib.Path) -> Evaluation:
    """A model's evaluation, routed by HashEmbedder."""
    found = Evaluation.of(model, out)
    bank = found.model.bank
    assert bank is not None
    found.model._router = Router(bank.tree, HashEmbedder(), bank.policy)
    return found


def other_data(folder: pathlib.Path) -> pathlib.Path:
    """Questions and countries in the form of those that are asked."""
    for name in ("qa", "corpus", "evals"):
        (folder / name).mkdir(parents=True)
    rows = [
        {
            "id": f"w{n}",
            "doc": f"w{n}",
            "prompt": f"Thing {n} is a kind of",
            "answer": "thing",
            "aliases": ["thing"],
            "heldout_prompts": [f"Question: What type of thing is {n}?\nAnswer: a kind of"],
        }
        for n in range(6)
    ]
    write(folder / "qa" / "wordnet_isa_qa.jsonl", rows)
    country = {"id": "c", "name": "Utopia", "capital_factbook": "Amaurot", "text": "Utopia. Capital: Amaurot"}
    write(folder / "corpus" / "countries.jsonl", [country])
    (folder / "evals" / "wikitext2_raw_test.txt").write_text(
        " = Title = \n\n short \n" + " A tree @-@ house , it is said , stands here . \n".strip() * 8 + "\n"
    )
    return folder
