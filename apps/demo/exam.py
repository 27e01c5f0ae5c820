"""The demo's exam: questions about the 480 articles that its bank learnt, and what was measured with all of them.

They are asked in chat and answered greedily, with the rules and the length of benchmarks/knowledge.py: a reply is
right if an accepted answer stands in it (lenient), or is all of it (strict).
"""

from __future__ import annotations

import gzip
import json
import pathlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.evaluate.answers import is_only, mentions
from mlx_hiermem.evaluate.statistics import share_interval
from mlx_hiermem.files import read_json_lines
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.progress import Progress

HERE = pathlib.Path(__file__).parent
MEMORIES = ("none", "generic", "fetched", "fetched+source")
DEVELOPMENT = 240  # of the first questions: settings were chosen by them, and no result is of them
TOKENS = 48  # of a reply, at most
TOGETHER = 32  # questions of `measured`


@dataclass(frozen=True)
class ExamQuestion:
    topic: str
    document: str  # the article's title
    text: str
    names: tuple[str, ...]  # of the answer

    def graded(self, reply: str) -> dict[str, bool]:
        """Whether a reply is right, by either rule."""
        return {"lenient": mentions(reply, self.names), "strict": is_only(reply, self.names)}

    def asked(self, model: MemoryModel, memory: str) -> dict[str, Any]:
        """The reply with a memory, whether it is right, and where the model had it from."""
        response = model.chat(self.text, memory=MemoryChoice(memory), max_tokens=TOKENS)
        sources = response.sources
        return {
            "reply": " ".join(response.text.split()),
            **self.graded(response.text),
            "source": sources[0].to_json() if sources else None,
            "selection": response.selection.to_json(),
        }


def questions() -> list[ExamQuestion]:
    """The whole exam, in its order."""
    topics = {row["title"]: row["topic"] for _, row in read_json_lines(HERE / "vital" / "documents.jsonl")}
    lines = gzip.decompress((HERE / "vital" / "exam.jsonl.gz").read_bytes()).decode().splitlines()
    return [
        ExamQuestion(topics[row["doc"]], row["doc"], row["question"], (row["answer"], *row["aliases"]))
        for row in map(json.loads, lines)
    ]


def sample() -> list[ExamQuestion]:
    """One question of each topic: the first in the exam, whatever it asks and however it is answered."""
    found = dict[str, ExamQuestion]()
    for question in questions()[:DEVELOPMENT]:
        found.setdefault(question.topic, question)
    return list(found.values())


def stored() -> dict[str, Any]:
    """What benchmarks/knowledge.py measured with this bank: a summary of each memory."""
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))["memories"]


def measured(model: MemoryModel, asked: Sequence[ExamQuestion], progress: Progress | None) -> dict[str, Any]:
    """The same, as far as the demo shows it, measured now, many questions at a time."""
    found, count, total = dict[str, Any](), len(asked), len(asked) * len(MEMORIES)
    for turn, memory in enumerate(MEMORIES):
        right = Counter[str]()
        for start in range(0, count, TOGETHER):
            some = asked[start : start + TOGETHER]
            replies = model.batch([one.text for one in some], memory=memory, chat=True, max_tokens=TOKENS)
            for question, reply in zip(some, replies, strict=True):
                right.update(question.graded(reply.text))
            if progress:
                progress(turn * count + start + len(some), total)
        found[memory] = {"questions": count} | {rule: result(right[rule], count) for rule in ("lenient", "strict")}
    return found


def result(right: int, count: int) -> dict[str, Any]:
    return {"right": right, "share": right / count, "interval": share_interval(right, count)}
