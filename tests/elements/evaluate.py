"""How many of the 118 elements' atomic numbers a model gets right, asked in several ways and backwards.

    python tests/elements/evaluate.py      # of the elements' model: what results.json has; some minutes

The protocol is the paper's (arXiv:2510.02375, App. B): prompt `The atomic number of {X} is`, greedy decoding,
the first integer of the continuation, routed by the prompt itself. Backwards it is `The element with atomic number
{N} is` and the first word. The paraphrases and the chat question were held out of everything the bank learnt from.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.evaluate.answers import first_integer
from mlx_hiermem.evaluate.questions import read_questions
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.progress import Progress

HERE = pathlib.Path(__file__).parent

MEMORIES = ("none", "generic", "fetched")
TOGETHER = 48  # sequences in a decode step

Asked = str | list[dict[str, str]]  # a prompt, or the messages of a chat


@dataclass(frozen=True)
class Element:
    """What is asked of one element: the paper's prompt, its paraphrases, a user's turn, and both backwards."""

    name: str
    number: int
    prompt: str
    paraphrases: tuple[str, ...]
    back: str  # asks for the element of the number
    back_paraphrase: str

    @property
    def chat(self) -> str:
        return f"What is the atomic number of {self.name.lower()}?"


def questions() -> list[Element]:
    """The 118 elements, in order of atomic number."""
    rows = read_questions(HERE / "elements_qa.jsonl")
    back = {row.answer: row for row in rows if row.tags["relation"] == "element_of_number"}
    return [
        Element(
            row.tags["subject"],
            int(row.answer),
            row.prompt,
            row.heldout_prompts,
            back[row.tags["subject"]].prompt,
            *back[row.tags["subject"]].heldout_prompts,
        )
        for row in rows
        if row.tags["relation"] == "atomic_number"
    ]


def first_word(text: str) -> str:
    found = re.search(r"[A-Za-z]+", text)
    return found.group() if found else ""


def _limit(chat: bool) -> int:
    """Tokens to decode: a chat answer is a sentence, with the number at its end."""
    return 32 if chat else 8


def answers(model: MemoryModel, prompts: Sequence[str], memory: str, chat: bool = False) -> list[int | None]:
    """The first integers of the greedy continuations."""
    return [first_integer(text) for text in replies(model, prompts, memory, chat)]


def replies(model: MemoryModel, prompts: Sequence[str], memory: str, chat: bool = False) -> list[str]:
    """The greedy continuations, or replies in chat."""
    found = model.batch(prompts, memory=memory, chat=chat, max_sequences=TOGETHER, max_tokens=_limit(chat))
    return [response.text for response in found]


def said(model: MemoryModel, asked: Sequence[tuple[Asked, str]], memory: str, tokens: int) -> list[str]:
    """What the model says to each (prompt or messages, the text that is routed), greedily.

    Those of one path share its memory and are decoded as one batch.
    """
    from mlx_lm.generate import batch_generate

    groups: dict[str, list[int]] = defaultdict(list)
    if memory == "fetched":
        for index, routed in enumerate(model.router.route_batch([text for _, text in asked])):
            groups[str(routed.path) or "none"].append(index)
    else:
        groups[memory] = list(range(len(asked)))
    found = [""] * len(asked)
    for selected, rows in groups.items():
        model.select(selected, "")
        prompts = [
            model.tokens(one) if isinstance(one, str) else model.chat_tokens(one)
            for one, _ in (asked[i] for i in rows)
        ]
        texts = batch_generate(model.anchor, model.tokenizer, prompts, max_tokens=tokens).texts
        for row, text in zip(rows, texts, strict=True):
            found[row] = text
    return found


def evaluate(model: MemoryModel, progress: Progress | None = None) -> dict[str, Any]:
    """Right answers of 118: no, generic and fetched memory; the mean over paraphrases; the chat question.

    `paraphrased` is the mean over the held-out wordings, rounded down; `paraphrases` has each; `back` is backwards.
    """
    asked = questions()
    prompts, back = [question.prompt for question in asked], [question.back for question in asked]
    wordings = [list(same) for same in zip(*(question.paraphrases for question in asked), strict=True)]
    ways = [(prompts, memory, False) for memory in MEMORIES]
    ways += [(same, "fetched", False) for same in wordings]
    ways += [([question.chat for question in asked], "fetched", True)]
    forward = len(ways)
    ways += [(back, memory, False) for memory in MEMORIES]
    ways += [([question.back_paraphrase for question in asked], "fetched", False)]
    right = []
    for number, (texts, memory, chat) in enumerate(ways, 1):
        found = zip(replies(model, texts, memory, chat), asked, strict=True)
        right.append(sum(is_right(text, question, number > forward) for text, question in found))
        if progress:
            progress(number * len(asked), len(ways) * len(asked))
    none, generic, fetched, *paraphrases, in_chat = right[:forward]
    return {
        "none": none,
        "generic": generic,
        "fetched": fetched,
        "paraphrased": sum(paraphrases) // len(paraphrases),
        "paraphrases": paraphrases,
        "chat": in_chat,
        "back": dict(zip((*MEMORIES, "paraphrased"), right[forward:], strict=True)),
        "total": len(asked),
    }


def is_right(text: str, question: Element, back: bool) -> bool:
    """The continuation's first integer is the number, or where it was asked backwards its first word the name."""
    if back:
        return first_word(text).casefold() == question.name.casefold()
    return first_integer(text) == question.number


def stored() -> dict[str, Any]:
    """The result that was measured when the bank was made."""
    return json.loads((HERE / "results.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    from model import prepare  # of this folder

    from mlx_hiermem import load

    print(json.dumps(evaluate(load(prepare())), indent=1))
