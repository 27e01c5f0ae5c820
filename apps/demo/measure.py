"""How many elements a bank gets right: greedy answers to questions it was never trained on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mlx_hiermem.apps.demo.anchor import Anchor, Memory, run_layers
from mlx_hiermem.apps.demo.train import chat_parts

Fetch = Callable[[list[str]], Memory | None]  # routing texts to one memory each; None: the anchor alone


@dataclass(frozen=True)
class Question:
    """What is asked, the text that routes it, and the answer."""

    kind: str
    tokens: tuple[int, ...]
    route: str
    answer: str
    numeric: bool


def questions(anchor: Anchor, rows: list[dict[str, Any]]) -> list[Question]:
    """The paper's prompt, each held-out wording and, for atomic numbers, the last of them as a chat."""
    found = []
    for row in rows:
        numeric = row["relation"] == "atomic_number"
        asked = {"prompt": row["prompt"]}
        asked |= {f"held-out {i}": p for i, p in enumerate(row["heldout_prompts"], 1)}
        for kind, prompt in asked.items():
            tokens = tuple(anchor.tokenizer.encode(prompt))
            found.append(Question(f"{row['relation']}: {kind}", tokens, prompt, row["answer"], numeric))
        if numeric:
            message = row["heldout_prompts"][-1].removeprefix("Question: ").removesuffix("\nAnswer:")
            system, user = chat_parts(anchor, message)
            found.append(Question("atomic_number: chat", tuple(system + user), message, row["answer"], True))
    return found


@torch.no_grad()
def answers(anchor: Anchor, asked: list[Question], fetch: Fetch, first_layer: int, length: int) -> list[str]:
    """Greedy continuations of `length` tokens; questions of equal length run as one batch."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, question in enumerate(asked):
        by_length[len(question.tokens)].append(i)
    replies = [""] * len(asked)
    for rows in by_length.values():
        memory = fetch([asked[i].route for i in rows])
        tokens = torch.tensor([asked[i].tokens for i in rows])
        low: Any = None
        high: Any = None
        said = []
        for _ in range(length):
            x, low = run_layers(anchor, anchor.embed(tokens), range(first_layer), past=low)
            x, high = run_layers(anchor, x, range(first_layer, anchor.layers), past=high, memory=memory)
            tokens = anchor.logits(x[:, -1:]).argmax(-1)
            said.append(tokens)
        for row, i in enumerate(rows):
            ids = torch.cat(said, 1)[row].tolist()
            end = anchor.tokenizer.eos_token_id
            replies[i] = anchor.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    return replies


def is_right(question: Question, reply: str) -> bool:
    """Numbers: the first integer of the reply. Names and symbols: the reply's first word."""
    if question.numeric:
        number = re.search(r"\d+", reply)
        return number is not None and number.group() == question.answer
    word = re.search(r"[A-Za-z]+", reply)
    return word is not None and (word.group() == question.answer or word.group() == question.answer.lower())


def accuracy(anchor: Anchor, asked: list[Question], fetch: Fetch, first_layer: int) -> dict[str, float]:
    """Per kind of question, the share of right answers in per cent."""
    by_kind: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        by_kind[question.kind].append(question)
    table = {}
    for kind, same in by_kind.items():
        replies = answers(anchor, same, fetch, first_layer, 16 if kind.endswith("chat") else 8)
        right = sum(is_right(q, r) for q, r in zip(same, replies, strict=True))
        table[kind] = round(100 * right / len(same), 1)
    return table
