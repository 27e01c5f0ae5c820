"""How many of the 118 elements' atomic numbers a model gets right, asked in several ways.

The protocol is the paper's (arXiv:2510.02375, App. B): prompt `The atomic number of {X} is`, greedy decoding,
the first integer of the continuation, routed by the prompt itself. The paraphrases and the chat question were
held out of everything the bank learnt from.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.evaluate.answers import first_integer
from mlx_hiermem.model import MemoryModel

HERE = pathlib.Path(__file__).parent

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
    for piece in model.stream(prompt, memory=memory, chat=chat, max_tokens=_limit(chat)):
        text += piece
        if re.search(r"\d\D", text):
            break
    found = re.match(r"\D*\d+", text)
    return first_integer(text), found.group() if found else text


def _limit(chat: bool) -> int:
    """Tokens to decode: a chat answer is a sentence, with the number at its end."""
    return 32 if chat else 8


def answers(model: MemoryModel, prompts: Sequence[str], memory: str, chat: bool = False) -> list[int | None]:
    """The first integers of the greedy continuations, as `answer` gives them, but many questions at a time.

    Questions that fetch the same path share its memory, so they are decoded as one batch.
    """
    from mlx_lm.generate import batch_generate

    groups: dict[str, list[int]] = defaultdict(list)
    if memory == "fetched":
        for index, routed in enumerate(model.router.route_batch(prompts)):
            groups[str(routed.path) or "none"].append(index)
    else:
        groups[memory] = list(range(len(prompts)))
    found: list[int | None] = [None] * len(prompts)
    for selected, rows in groups.items():
        model.select(selected, "")
        tokens = [
            model.chat_tokens([{"role": "user", "content": prompts[i]}]) if chat else model.tokens(prompts[i])
            for i in rows
        ]
        texts = batch_generate(model.anchor, model.tokenizer, tokens, max_tokens=_limit(chat)).texts
        for row, text in zip(rows, texts, strict=True):
            found[row] = first_integer(text)
    return found


def evaluate(model: MemoryModel, progress: Progress | None = None) -> dict[str, Any]:
    """Right answers of 118: no, generic and fetched memory; the mean over paraphrases; the chat question.

    `paraphrased` is the mean over the held-out wordings, rounded down; `paraphrases` has each.
    """
    asked = questions()
    prompts = [question.prompt for question in asked]
    wordings = [list(same) for same in zip(*(question.paraphrases for question in asked), strict=True)]
    ways = [(prompts, memory, False) for memory in ("none", "generic", "fetched")]
    ways += [(same, "fetched", False) for same in wordings]
    ways += [([question.chat for question in asked], "fetched", True)]
    right = []
    for texts, memory, chat in ways:
        found = answers(model, texts, memory, chat)
        right.append(sum(got == question.number for got, question in zip(found, asked, strict=True)))
        if progress:
            progress(len(right) * len(asked), len(ways) * len(asked))
    none, generic, fetched, *paraphrases, in_chat = right
    return {
        "none": none,
        "generic": generic,
        "fetched": fetched,
        "paraphrased": sum(paraphrases) // len(paraphrases),
        "paraphrases": paraphrases,
        "chat": in_chat,
        "total": len(asked),
    }


def stored() -> dict[str, Any]:
    """The result that was measured when the bank was made; `hiermem demo --full` measures it again."""
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


def sample(count: int = 5) -> Iterator[Question]:
    """A few elements spread over the table, from the well known to the obscure."""
    asked = questions()
    picked = (7, 41, 63, 73, 106, 25, 86, 117)[:count]
    return (asked[index] for index in picked)
