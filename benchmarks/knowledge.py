"""An exam in chat: what a model answers without memory, with the fetched one, and from its sources.

    python benchmarks/knowledge.py build/vital apps/demo/vital/exam.jsonl.gz                 # to choose settings by
    python benchmarks/knowledge.py build/vital apps/demo/vital/exam.jsonl.gz --rows 240-960  # to report

Lenient: an accepted answer stands in the reply, as whole words. Strict: the reply is one. Capitals, punctuation and
articles do not count. `oracle` is the leaf that learnt the question's document, `source` retrieval alone: the best
passage of the leaf in the prompt, and no block. Questions are answered several at a time. Replies are kept as they
come in, and a stopped run goes on. At the end the first token of the first `--timed` questions is timed one by one.

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
from typing import Any

import common
from mlx.utils import tree_flatten

from mlx_hiermem import load
from mlx_hiermem.evaluate.answers import is_only, mentions
from mlx_hiermem.evaluate.statistics import share_interval
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.response import Response

MEMORIES = ("none", "generic", "fetched", "oracle", "source", "fetched+source")
TOKENS = 48  # of a reply, at most
TOGETHER = 24  # questions between two looks at what is kept
Row = dict[str, Any]


class Exam:
    """A model, and where it learnt each document."""

    def __init__(self, model: MemoryModel) -> None:
        self.model = model
        self.anchor_bytes = sum(value.nbytes for _, value in tree_flatten(model.anchor.parameters()))
        sources = model.bank.sources if model.bank else None
        self.leaves = {window.title: one.leaf for one in sources.all() for window in one.windows} if sources else {}

    def ask(self, rows: Sequence[Row], memory: str) -> list[Row]:
        """The replies to some questions, and what they took."""
        wanted = [self._wanted(row, memory) for row in rows]
        texts = [row["question"] for row in rows]
        replies = self.model.batch(texts, memory=wanted, chat=True, max_tokens=TOKENS)
        return [self._graded(row, memory, reply) for row, reply in zip(rows, replies, strict=True)]

    def first_ms(self, row: Row, memory: str) -> float:
        """How long one question's first token takes, routing and reading included."""
        start = time.perf_counter()
        for _ in self.model.stream(row["question"], memory=self._wanted(row, memory), chat=True, max_tokens=1):
            pass
        return 1e3 * (time.perf_counter() - start)

    def _wanted(self, row: Row, memory: str) -> str:
        return str(self.leaves[row["doc"]]) if memory == "oracle" else memory

    def _graded(self, row: Row, memory: str, reply: Response) -> Row:
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


def read_exam(file: pathlib.Path, rows: str) -> list[Row]:
    """The rows `first-end` of an exam, which may be gzipped."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    first, end = (int(part) for part in rows.split("-"))
    return [json.loads(line) for line in data.decode().splitlines()][first:end]


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
    parser.add_argument("--timed", type=int, default=40, help="questions whose first token is timed; default 40")
    parser.add_argument("--memory", nargs="+", default=MEMORIES, choices=MEMORIES)
    parser.add_argument("--kept", type=pathlib.Path, help="replies go here, and are read from here")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    model, kept = load(asked.model), asked.kept or asked.model.with_name(f"{asked.model.name}.exam.jsonl")
    rows = read_exam(asked.exam, asked.rows)
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    have, exam = {(row["memory"], row["id"]): row for row in done}, Exam(model)
    with kept.open("a", encoding="utf-8") as out:
        for memory in asked.memory:
            missing = [row for row in rows if (memory, row["id"]) not in have]
            for start in range(0, len(missing), TOGETHER):
                some = missing[start : start + TOGETHER]
                for row, found in zip(some, exam.ask(some, memory), strict=True):
                    have[memory, row["id"]] = found
                    out.write(json.dumps(found, ensure_ascii=False) + "\n")
                out.flush()
    results = {memory: summary([have[memory, row["id"]] for row in rows]) for memory in asked.memory}
    for row in rows[: asked.timed]:  # in turns: whatever else the machine does, it does to all
        for memory in asked.memory:
            results[memory].setdefault("first_ms", []).append(exam.first_ms(row, memory))
    common.save(__file__, {"exam": asked.exam.name, "rows": asked.rows, "memories": results}, _plain(asked), before)
    common.table(("", "lenient", "strict", "right leaf", "prompt", "first token, ms", "MB moved"), _cells(results))


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
