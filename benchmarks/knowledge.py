"""An exam in chat: what a model answers without memory, with the fetched one, and from its sources.

    python benchmarks/knowledge.py build/vital apps/demo/vital/exam.jsonl.gz                 # to choose settings by
    python benchmarks/knowledge.py build/vital apps/demo/vital/exam.jsonl.gz --rows 240-960  # to report

Lenient: an accepted answer stands in the reply, as whole words. Strict: the reply is one. Capitals, punctuation and
articles do not count. `oracle` is the leaf that learnt the question's document, `source` retrieval alone: the best
passage of the leaf in the prompt, and no block. `--learnt` asks questions of a study file in the words that were
learnt. Questions are answered several at a time. Replies are kept as they come in; a stopped run goes on. At the
end the first token of the first `--timed` questions is timed, one by one.

Three more memories are asked for by name: of the path `level1` is the first block alone, `leaf` the last one alone,
and `blocked` is the path when the question's own branch of level 1 is closed. `replication.py` compares them.

Bytes moved are those that a decoder reads: the anchor and the attached blocks once for the prompt and once for each
token, and the blocks from disk. It is what energy goes with on a device that is bound by memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import common
from mlx.utils import tree_flatten

from mlx_hiermem import load
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.evaluate.answers import is_only, mentions
from mlx_hiermem.evaluate.statistics import share_interval
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.response import Response

MEMORIES = ("none", "generic", "fetched", "oracle", "source", "fetched+source")
PARTS = ("level1", "leaf", "blocked")
TOKENS = 48  # of a reply, at most
TOGETHER = 24  # questions between two looks at what is kept
Row = dict[str, Any]
Kept = dict[tuple[str, str], Row]  # (memory, id of the question) -> what it answered


class Exam:
    """A model, and where it learnt each document."""

    def __init__(self, model: MemoryModel) -> None:
        self.model = model
        self.anchor_bytes = sum(value.nbytes for _, value in tree_flatten(model.anchor.parameters()))
        sources = model.bank.sources if model.bank else None
        self.leaves = {window.title: one.leaf for one in sources.all() for window in one.windows} if sources else {}
        self.level = cache(lambda level: with_level_alone(model, level))

    def ask(self, rows: Sequence[Row], memory: str) -> list[Row]:
        """The replies to some questions, and what they took."""
        found = [self._memory(row, memory) for row in rows]
        texts, wanted = [row["question"] for row in rows], [memory for _, memory in found]
        replies = found[0][0].batch(texts, memory=wanted, chat=True, max_tokens=TOKENS)
        return [self.graded(row, memory, reply) for row, reply in zip(rows, replies, strict=True)]

    def first_ms(self, row: Row, memory: str) -> float:
        """How long one question's first token takes, routing and reading included."""
        model, wanted = self._memory(row, memory)
        start = time.perf_counter()
        for _ in model.stream(row["question"], memory=wanted, chat=True, max_tokens=1):
            pass
        return 1e3 * (time.perf_counter() - start)

    def graded(self, row: Row, memory: str, reply: Response) -> Row:
        """What a reply is worth, and what it took."""
        names, chosen = (row["answer"], *row["aliases"]), reply.selection
        moved = (self.anchor_bytes + chosen.memory_bytes) * (1 + reply.generation_tokens) + chosen.bytes_read
        return {
            "id": row["id"],
            "memory": memory,
            "reply": reply.text,
            "lenient": mentions(reply.text, names),
            "strict": is_only(reply.text, names),
            "path": str(chosen.path),
            "right_leaf": chosen.path == self.leaves.get(row["doc"]) if chosen.path else None,
            "prompt_tokens": reply.prompt_tokens,
            "tokens": reply.generation_tokens,
            "bytes_moved": moved,
        }

    def ask_all(self, rows: Sequence[Row], memories: Sequence[str], kept: pathlib.Path) -> Kept:
        """All rows under all memories; what the file has is not asked again, and what is new is added to it."""
        have = read_kept(kept)
        if kept.is_file() and not (data := kept.read_bytes()).endswith(b"\n"):
            os.truncate(kept, data.rfind(b"\n") + 1)  # what a killed run was writing
        with kept.open("a", encoding="utf-8") as out:
            for memory in memories:
                missing = [row for row in rows if (memory, row["id"]) not in have]
                for start in range(0, len(missing), TOGETHER):
                    some = missing[start : start + TOGETHER]
                    for row, found in zip(some, self.ask(some, memory), strict=True):
                        have[memory, row["id"]] = found
                        out.write(json.dumps(found, ensure_ascii=False) + "\n")
                    out.flush()
        return have

    def _memory(self, row: Row, memory: str) -> tuple[MemoryModel, Path | str]:
        """The model and its memory that a word stands for."""
        model, bank = self.model, self.model.bank
        if memory == "oracle":
            return model, self.leaves[row["doc"]]
        if memory == "blocked":
            path = model.choose(MemoryChoice.FETCHED, row["question"]).path
            if path:
                path = model.choose(MemoryChoice.FETCHED, row["question"], [Path(path[:1])]).path
            return model, path or MemoryChoice.NONE
        if memory in PARTS and bank is not None:
            return self.level(1 if memory == "level1" else bank.config.depth), MemoryChoice.FETCHED
        return model, memory


def with_level_alone(model: MemoryModel, level: int) -> MemoryModel:
    """The model with the blocks of one level. It has the same anchor and routes as before."""
    bank = model.bank_for(MemoryChoice.FETCHED)
    blocks = {path: entry for path, entry in bank.manifest.blocks.items() if len(path) == level}
    alone = MemoryBank(bank.root, replace(bank.manifest, blocks=blocks))
    return MemoryModel(
        model.anchor, model.tokenizer, model.config, alone, model.router, attachment=model.attachment
    )


def read_kept(file: pathlib.Path) -> Kept:
    """Replies that were kept; a line that a killed run did not finish is none."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    return {(row["memory"], row["id"]): row for row in map(json.loads, lines)}


def kept_of(model: pathlib.Path) -> pathlib.Path:
    """Where a model's replies are kept."""
    return model.with_name(f"{model.name}.exam.jsonl")


def read_exam(file: pathlib.Path, rows: str) -> list[Row]:
    """The rows `first-end` of an exam, which may be gzipped."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    first, end = (int(part) for part in rows.split("-"))
    return [json.loads(line) for line in data.decode().splitlines()][first:end]


def read_learnt(file: pathlib.Path) -> list[Row]:
    """The first question about each document in a study file."""
    found = dict[str, Row]()
    for row in map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines()):
        if "question" in row and (doc := row["document"]) not in found:
            found[doc] = row | {"id": f"learnt: {doc}", "doc": doc, "aliases": []}
    return list(found.values())


def summary(rows: Sequence[Row]) -> Row:
    """One memory's rows in figures."""
    count, found = len(rows), {"questions": len(rows)} | dict[str, Any]()
    for name in ("lenient", "strict"):
        right = sum(row[name] for row in rows)
        found[name] = {"right": right, "share": right / count, "interval": share_interval(right, count)}
    routed = [row["right_leaf"] for row in rows if row["right_leaf"] is not None]
    found["right_leaf"] = sum(routed) / len(routed) if routed else None
    for name in ("prompt_tokens", "tokens", "bytes_moved"):
        found[name] = common.spread(row[name] for row in rows)["median"]
    return found


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("exam", type=pathlib.Path)
    parser.add_argument("--rows", default="0-240", help="first-end; default 0-240, by which settings may be chosen")
    parser.add_argument("--learnt", type=pathlib.Path, help="a study file: a question of each of its documents")
    parser.add_argument("--timed", type=int, default=40, help="questions whose first token is timed; default 40")
    parser.add_argument("--memory", nargs="+", default=MEMORIES, choices=(*MEMORIES, *PARTS))
    parser.add_argument("--kept", type=pathlib.Path, help="replies go here, and are read from here")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    model, kept = load(asked.model), asked.kept or kept_of(asked.model)
    rows = read_exam(asked.exam, asked.rows)
    exam = Exam(model)
    have = exam.ask_all(rows, asked.memory, kept)
    results = {memory: summary([have[memory, row["id"]] for row in rows]) for memory in asked.memory}
    for row in rows[: asked.timed]:  # in turns: whatever else the machine does, it does to all
        for memory in asked.memory:
            results[memory].setdefault("first_ms", []).append(exam.first_ms(row, memory))
    found, cells = dict[str, Any](exam=asked.exam.name, rows=asked.rows, memories=results), _cells(results)
    if asked.learnt:
        learnt = read_learnt(asked.learnt)
        have = exam.ask_all(learnt, ["fetched"], kept)
        found["learnt"] = summary([have["fetched", row["id"]] for row in learnt])
        cells += _cells({"fetched, learnt questions": found["learnt"]})
    common.save(__file__, found, _plain(asked), before)
    common.table(("", "lenient", "strict", "right leaf", "prompt", "first token, ms", "MB moved"), cells)


def _plain(asked: argparse.Namespace) -> argparse.Namespace:
    """The options without paths: a result is of no machine."""
    return argparse.Namespace(runs=asked.runs, quick=asked.quick, rows=asked.rows, memory=list(asked.memory))


def _cells(results: dict[str, Row]) -> list[list[str]]:
    def share(one: Row) -> str:
        low, high = one["interval"]
        return f"{one['share']:.1%} ({low:.0%}–{high:.0%})"

    return [
        [
            memory,
            share(row["lenient"]),
            share(row["strict"]),
            "" if row["right_leaf"] is None else f"{row['right_leaf']:.0%}",
            f"{row['prompt_tokens']:.0f}",
            f"{common.spread(row['first_ms'])['median']:.0f}" if "first_ms" in row else "",
            f"{row['bytes_moved'] / 1e6:,.0f}",
        ]
        for memory, row in results.items()
    ]


if __name__ == "__main__":
    main()
