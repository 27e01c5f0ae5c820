"""Retrieval with a small anchor, as good as its prompt can be made: what memory is compared with.

    python benchmarks/retrieval.py DATA        # vital480's files are in DATA/corpus, DATA/study and DATA/qa
    python benchmarks/retrieval.py DATA --ways exchange/right exchange/routed none --rows 240

A way is a wording of the prompt, and which passage is in it: the `right` one, or the best of the leaf to which
the question is `routed`. Only the first 240 questions of the exam are used, by which settings may be chosen. A
reply is right if a name of the answer stands in it as whole words; it ends as soon as one does, or with 48 tokens.
The tree is grown as `hiermem learn` grows it, from passages, their sentences and five questions of the study file
for each.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import common
import numpy as np

from mlx_hiermem import load
from mlx_hiermem.apps.demo import tour
from mlx_hiermem.bank.sources import SourceWindow
from mlx_hiermem.config import Path
from mlx_hiermem.evaluate.generation import Asked, replies
from mlx_hiermem.learn.tree.build import ProbeVectors, Separation, place
from mlx_hiermem.learn.tree.kmeans import Shape, grow
from mlx_hiermem.learn.tree.probes import about
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sentences import sentences
from mlx_hiermem.source_search import messages_with
from mlx_hiermem.tree import ClusterTree

DEVELOPMENT, TOKENS, QUESTIONS = 240, 48, 5
Row = dict[str, Any]
WORDINGS: dict[str, str] = {
    "before": "{title}: {text}\n\n{question}",
    "passage": "Use the passage to answer the question.\n\nPassage: {text}\n\nQuestion: {question}",
    "short": "{text}\n\nAnswer in a few words, from the text above: {question}",
    "titled": "{title}: {text}\n\nAnswer in a few words, from the text above: {question}",
    "framed": "{text}\n\nQuestion: {question}\nAnswer in a few words:",
    "copy": "{text}\n\nCopy the answer from the text above: {question}",
    "exchange": "",  # the one in use: a question before, with the passage as its answer
}


@dataclass(frozen=True)
class Data:
    """vital480: its passages, and the exam's questions that settings may be chosen by."""

    folder: pathlib.Path
    rows: list[Row]

    @classmethod
    def read(cls, folder: pathlib.Path, count: int) -> Data:
        exam = _rows(folder / "qa" / "vital480_exam.jsonl")[:DEVELOPMENT]
        return cls(folder, exam[:: max(1, len(exam) // count)][:count])

    @cached_property
    def passages(self) -> list[Row]:
        return _rows(self.folder / "corpus" / "vital480.jsonl")

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Title -> number of the passage."""
        return {row["title"]: number for number, row in enumerate(self.passages)}

    def right(self, row: Row) -> int:
        return self.numbers[row["doc"]]

    @cached_property
    def asked(self) -> list[list[str]]:
        """Some questions of the study file about each passage."""
        found: list[list[str]] = [[] for _ in self.passages]
        for row in _rows(self.folder / "study" / "vital480_study.jsonl"):
            if "question" in row and len(own := found[self.numbers[row["document"]]]) < QUESTIONS:
                own.append(row["question"])
        return found


@dataclass(frozen=True)
class Leaves:
    """Where every passage is, and its vector [dim]."""

    tree: ClusterTree
    homes: list[tuple[Path, ...]]
    vectors: np.ndarray

    @classmethod
    def grow(cls, data: Data, embed: Callable[[Sequence[str]], np.ndarray]) -> Leaves:
        texts, counts = list[str](), list[int]()
        for row, questions in zip(data.passages, data.asked, strict=True):
            own = [about(row["text"], row["title"]), row["title"]]
            own += [f"{row['title']}. {sentence}" for sentence in sentences(row["text"])] + questions
            texts += own
            counts.append(len(own))
        probes = ProbeVectors.counted(embed(texts), np.array(counts))
        means = np.concatenate(list(probes.means()))
        tree = grow(means, Shape.of(len(counts)), 0, Separation(probes)).tree
        return cls(tree, list(place(tree, probes)), np.asarray(probes.vectors[probes.first[:-1]]))

    def routed(self, vector: np.ndarray) -> tuple[int | None, list[int]]:
        """(the best passage of the leaf that a question [dim] takes, all of them)."""
        leaf = self.tree.route(vector)[0].path
        members = [number for number, homes in enumerate(self.homes) if leaf in homes]
        return (members[int((self.vectors[members] @ vector).argmax())], members) if members else (None, [])


def prompt(wording: str, row: Row, passage: Row | None) -> list[Row]:
    """The messages."""
    if passage is None or wording == "exchange":
        window = passage and SourceWindow(passage["title"], passage["title"], "", passage["text"])
        return messages_with([{"role": "user", "content": row["question"]}], window)
    return [{"role": "user", "content": WORDINGS[wording].format(**passage, question=row["question"])}]


def is_right(names: Sequence[str], reply: str) -> bool:
    """Whether a name of the answer stands in a reply as whole words, in either case, whatever the marks."""
    said = f" {_plain(reply)} "
    return any(f" {_plain(name)} " in said for name in names if _plain(name))


def measure(model: MemoryModel, data: Data, way: str, passages: Sequence[int | None]) -> Row:
    """All replies of one way."""
    wording, begun = way.partition("/")[0], time.process_time()
    prompts = [
        prompt(wording, row, data.passages[number] if number is not None else None)
        for row, number in zip(data.rows, passages, strict=True)
    ]
    chosen, asked = model.choose("none", ""), list[Asked]()
    for row, messages in zip(data.rows, prompts, strict=True):
        done = partial(_said, [row["answer"], *row["aliases"]])
        asked.append(Asked(model.chat_tokens(messages), chosen, TOKENS, done))
    said = dict(replies(model, asked, lambda ids: model.tokenizer.decode(ids, skip_special_tokens=True)))
    rows = [
        {"id": row["id"], "reply": said[n], "right": is_right([row["answer"], *row["aliases"]], said[n])}
        for n, row in enumerate(data.rows)
    ]
    return {
        "right": sum(row["right"] for row in rows),
        "of": len(rows),
        "prompt_tokens": float(np.mean([len(one.tokens) for one in asked])),
        "cpu_seconds": time.process_time() - begun,
        "replies": rows,
    }


def _said(names: Sequence[str], reply: str) -> bool:
    """Whether a reply has said it: its last word may still grow."""
    return is_right(names, reply[: max(reply.rfind(" "), 0)])


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w ]", " ", text.lower()).split())


def _rows(file: pathlib.Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=DEVELOPMENT, help="of the first 240, spread evenly")
    parser.add_argument(
        "--ways", nargs="+", default=["none", *(f"{name}/right" for name in WORDINGS), "exchange/routed"]
    )
    asked, before = common.parsed(parser), os.getloadavg()[0]
    data = Data.read(asked.data, 12 if asked.quick else asked.rows)
    model = load(tour.prepare(lambda line: print(line, file=sys.stderr)))
    found: dict[str, Any] = {"rows": len(data.rows), "wordings": WORDINGS, "ways": {}}
    embed = model.router.embedder.embed
    if any(way.endswith("/routed") for way in asked.ways):
        leaves, questions = Leaves.grow(data, embed), embed([row["question"] for row in data.rows])
        routed = [leaves.routed(vector) for vector in questions]
        right = [data.right(row) for row in data.rows]
        found["leaves"] = len({leaf for homes in leaves.homes for leaf in homes})
        found["passages_of_a_leaf"] = float(np.mean([len(members) for _, members in routed]))
        found["leaf_has_it"] = sum(number in members for number, (_, members) in zip(right, routed, strict=True))
        found["best_is_it"] = sum(number == best for number, (best, _) in zip(right, routed, strict=True))
        print({name: value for name, value in found.items() if name not in ("wordings", "ways")}, flush=True)
    for way in asked.ways:
        passages: list[int | None] = [None] * len(data.rows)
        if way.endswith("/right"):
            passages = [data.right(row) for row in data.rows]
        elif way.endswith("/routed"):
            passages = [best for best, _ in routed]
        one = found["ways"][way] = measure(model, data, way, passages)
        print(way, one["right"], one["of"], f"{one['prompt_tokens']:.0f} tokens", flush=True)
        common.save(__file__, found, asked, before)
    table = [
        (way, f"{one['right']} of {one['of']}", f"{one['prompt_tokens']:.0f}") for way, one in found["ways"].items()
    ]
    common.table(("way", "right", "prompt tokens"), table)


if __name__ == "__main__":
    main()
