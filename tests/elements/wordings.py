"""The wordings in which the elements' bank was taught each fact, by `make elements`.

    python tests/elements/wordings.py > prompts.jsonl    # for hiermem learn --prompts

A fact learnt in one wording cannot be asked for in another, so every fact is
written many times: as statements, as question and answer, and as a turn of the
chat template. The questions that later measure the bank are held out: none of
their wordings appears here.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.files import read_json_lines

Element = dict[str, Any]  # one row of elements.jsonl

# {Name} and {name} differ in the first letter, {an} is the right article.
# Both cases are taught because the tokenizer gives them different tokens.
NUMBER = [
    "The atomic number of {Name} is",
    "The atomic number of {name} is",
    "{Name} has the atomic number",
    "{Name} has atomic number",
    "{Name} is the chemical element with atomic number",
    "Chemical element: {name}. Atomic number:",
    "The number of protons in {an} {name} atom is",
    "The nuclear charge of {name} is",
    "The proton count of {name} is",
    "Sorted by atomic number, {name} comes at position",
    "{Name} sits in the periodic table at number",
    "The periodic table lists {name} as number",
    "Question: Which atomic number does {name} have?\nAnswer:",
    "Question: Give the atomic number of the element {name}.\nAnswer:",
    "Question: How many protons does {an} {name} atom have?\nAnswer:",
    "Question: How many protons are found in one atom of {name}?\nAnswer:",
    "Question: At which position of the periodic table is {name}?\nAnswer:",
    "Question: {Name} has what atomic number?\nAnswer:",
    "Q: What's {name}'s atomic number?\nA:",
]
NUMBER_CHAT = [
    "Which atomic number does {name} have?",
    "Tell me the atomic number of {name}.",
    "What's {name}'s atomic number?",
    "How many protons does {an} {name} atom have?",
    "{Name} has what atomic number?",
    "At which position of the periodic table is {name}?",
    "I would like to know the atomic number of {Name}, please.",
]
NUMBER_CHAT_ANSWER = "The atomic number of {name} is {number}."

SYMBOL = [
    "The chemical symbol of {Name} is",
    "The symbol of {name} is",
    "In chemical formulas, {name} is written as",
    "The periodic table shows {name} as",
    "Question: Which symbol stands for {name}?\nAnswer:",
    "Question: Give the chemical symbol of {name}.\nAnswer:",
]
SYMBOL_CHAT = [
    "Which chemical symbol does {name} have?",
    "What's the symbol of {name}?",
]
SYMBOL_CHAT_ANSWER = "The chemical symbol of {name} is {symbol}."

SERIES = ["The element {name} belongs to the series of"]
SERIES_CHAT = ["What kind of element is {name}?"]
SERIES_CHAT_ANSWER = "{Name} belongs to the {series}."

REVERSE = [
    "The element with atomic number {number} is",
    "The chemical element with the atomic number {number} is called",
    "The element whose atoms have {number} protons is",
    "Question: Which element has the atomic number {number}?\nAnswer:",
    "Question: An atom with {number} protons belongs to which element?\nAnswer:",
]
REVERSE_CHAT = [
    "Which element has the atomic number {number}?",
    "Name the element with {number} protons.",
]
REVERSE_CHAT_ANSWER = "The element with atomic number {number} is {name}."


@dataclass(frozen=True)
class Wording:
    """One prompt and its answer."""

    relation: str
    prompt: str
    answer: str
    chat: bool


def _fields(element: Element) -> dict[str, str]:
    name = element["name"].lower()
    return {
        "Name": element["name"],
        "name": name,
        "an": "an" if name[0] in "aeiou" else "a",
        "number": str(element["atomic_number"]),
        "symbol": element["symbol"],
        "series": element["series"].lower(),
    }


def element_wordings(element: Element) -> list[Wording]:
    """Every wording of one element's facts: number, symbol, series, and number to name."""
    fields = _fields(element)
    groups = [
        ("number", NUMBER, " {number}.", NUMBER_CHAT, NUMBER_CHAT_ANSWER),
        ("symbol", SYMBOL, " {symbol}.", SYMBOL_CHAT, SYMBOL_CHAT_ANSWER),
        ("series", SERIES, " {series}.", SERIES_CHAT, SERIES_CHAT_ANSWER),
        ("reverse", REVERSE, " {Name}.", REVERSE_CHAT, REVERSE_CHAT_ANSWER),
    ]
    wordings: list[Wording] = []
    for relation, raw, answer, chat, chat_answer in groups:
        for prompts, reply, is_chat in ((raw, answer, False), (chat, chat_answer, True)):
            for prompt in prompts:
                filled = prompt.format(**fields), reply.format(**fields)
                wordings.append(Wording(relation, *filled, is_chat))
    return wordings


def prompt_line(element: Element, wording: Wording) -> str:
    """A wording as `hiermem learn --prompts` takes it."""
    said: dict[str, Any] = {"prompt": wording.prompt, "completion": wording.answer}
    if wording.chat:
        turns = (("user", wording.prompt), ("assistant", wording.answer))
        said = {"messages": [{"role": role, "content": text} for role, text in turns]}
    return json.dumps({"document": element["name"]} | said, ensure_ascii=False)


if __name__ == "__main__":
    for _, row in read_json_lines(pathlib.Path(__file__).parent / "elements.jsonl"):
        for one in element_wordings(row):
            print(prompt_line(row, one))
