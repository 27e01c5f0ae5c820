"""How many of the 118 elements' atomic numbers a model gets right, asked in several ways.

The protocol is the paper's (arXiv:2510.02375, App. B): prompt `The atomic number of {X} is`, greedy decoding,
the first integer of the continuation, routed by the prompt itself. The paraphrases and the chat question were
held out of everything the bank learnt from.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.model import MemoryModel

HERE = pathlib.Path(__file__).parent
MAX_TOKENS = {"plain": 12, "chat": 48}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """One element: the paper's prompt, its held-out paraphrases, and the same question as a user's turn."""

    name: str
    number: int
    prompt: str
    paraphrases: tuple[str, ...]

    @property
    def chat(self) -> str:
        return f"What is the atomic number of {self.name.lower()}?"


def questions() -> list[Question]:
    """The 118 atomic-number questions, in order of atomic number."""
    rows = map(json.loads, (HERE / "elements_qa.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Question(row["subject"], int(row["answer"]), row["prompt"], tuple(row["heldout_prompts"]))
        for row in rows
        if row["relation"] == "atomic_number"
    ]


def answer(model: MemoryModel, prompt: str, memory: str, chat: bool = False) -> tuple[int | None, str]:
    """(first integer, text up to it) of the greedy continuation; decoding stops once the integer is complete."""
    text = ""
    limit = MAX_TOKENS["chat" if chat else "plain"]
    for piece in model.stream(prompt, memory=memory, chat=chat, max_tokens=limit):
        text += piece
        if re.search(r"\d\D", text):
            break
    found = re.search(r"\d+", text)
    return (int(found.group()), text[: found.end()]) if found else (None, text)


def evaluate(model: MemoryModel, progress: Progress | None = None) -> dict[str, Any]:
    """Right answers of 118: no, generic and fetched memory; the mean over paraphrases; the chat question.

    `paraphrased` is the mean over the held-out wordings, rounded down; `paraphrases` has each.
    """
    asked = questions()
    ways: list[tuple[str, Callable[[Question], str], str]] = [
        ("none", lambda q: q.prompt, "none"),
        ("generic", lambda q: q.prompt, "generic"),
        ("fetched", lambda q: q.prompt, "fetched"),
        *((f"paraphrase {i + 1}", _paraphrase(i), "fetched") for i in range(len(asked[0].paraphrases))),
        ("chat", lambda q: q.chat, "fetched"),
    ]
    total, done, right = len(ways) * len(asked), 0, {}
    for name, prompt_of, memory in ways:
        right[name] = 0
        for question in asked:
            got, _ = answer(model, prompt_of(question), memory, chat=name == "chat")
            right[name] += got == question.number
            done += 1
            if progress:
                progress(done, total)
    paraphrases = [right.pop(name) for name in list(right) if name.startswith("paraphrase")]
    return {
        **right,
        "paraphrased": sum(paraphrases) // len(paraphrases),
        "paraphrases": paraphrases,
        "total": len(asked),
    }


def _paraphrase(index: int) -> Callable[[Question], str]:
    return lambda question: question.paraphrases[index]


def stored() -> dict[str, Any]:
    """The result that was measured when the bank was made; `hiermem demo --full` measures it again."""
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


def sample(count: int = 5) -> Iterator[Question]:
    """A few elements spread over the table, from the well known to the obscure."""
    asked = questions()
    picked = (7, 41, 63, 73, 106, 25, 86, 117)[:count]
    return (asked[index] for index in picked)
