"""Right answers of a bank of the elements, in every way that elements_qa.jsonl asks.

    python benchmarks/elements_ways.py elements       # a model; its results go to results/elements_ways.json

Greedy, with the generic block and with fetched memory: the prompts of `tests/elements/elements_qa.jsonl`, each
held-out wording, and for atomic numbers the last of these as a user's turn. A number is the reply's first integer;
a name or a symbol is its first word. Then follow-ups, which name nothing, behind a question and its right answer,
on the path of that question; there a symbol is right anywhere in the reply.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
from collections import defaultdict
from dataclasses import dataclass

import common  # noqa: F401  # before MLX, for which it picks the BLAS
from elements import QUESTIONS

from mlx_hiermem import load
from mlx_hiermem.apps.demo.evaluate import first_word, said
from mlx_hiermem.evaluate.answers import first_integer
from mlx_hiermem.model import MemoryModel

RESULTS = pathlib.Path(__file__).parent / "results" / "elements_ways.json"


NUMBER, SYMBOL = (
    ("What is the atomic number of {}?", "The atomic number of {} is {}."),
    ("What is the symbol of {}?", "The chemical symbol of {} is {}."),
)
FOLLOW_UPS = {  # (what was asked before, the relation that is asked for now)
    "and its symbol?": (NUMBER, "symbol"),
    "And its symbol?": (NUMBER, "symbol"),
    "What is its symbol?": (NUMBER, "symbol"),
    "and its atomic number?": (SYMBOL, "atomic_number"),
    "How many protons does it have?": (SYMBOL, "atomic_number"),
}


@dataclass(frozen=True)
class Asked:
    """`before` are the turns before it, of which the first is routed."""

    text: str
    answer: str
    chat: bool
    before: tuple[str, ...] = ()

    @property
    def put(self) -> str | list[dict[str, str]]:
        """As a prompt, or as messages."""
        if not self.chat:
            return self.text
        roles = itertools.cycle(("user", "assistant"))
        return [
            {"role": role, "content": text} for role, text in zip(roles, (*self.before, self.text), strict=False)
        ]

    def is_right(self, reply: str) -> bool:
        if self.answer.isdigit():
            return first_integer(reply) == int(self.answer)
        if self.before:
            return re.search(rf"\b{self.answer}\b", reply) is not None
        return first_word(reply) in (self.answer, self.answer.lower())


def ways() -> dict[str, list[Asked]]:
    found = defaultdict[str, list[Asked]](list)
    for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()):
        relation, answer, heldout = row["relation"], row["answer"], row["heldout_prompts"]
        found[f"{relation}: prompt"].append(Asked(row["prompt"], answer, False))
        for number, text in enumerate(heldout, 1):
            found[f"{relation}: held-out {number}"].append(Asked(text, answer, False))
        if relation == "atomic_number":
            turn = heldout[-1].removeprefix("Question: ").removesuffix("\nAnswer:")
            found[f"{relation}: chat"].append(Asked(turn, answer, True))
    return found


def follow_ups() -> dict[str, list[Asked]]:
    answers = defaultdict[str, dict[str, str]](dict)
    for row in map(json.loads, QUESTIONS.read_text(encoding="utf-8").splitlines()):
        answers[row["relation"]][row["subject"].lower()] = row["answer"]
    found = defaultdict[str, list[Asked]](list)
    for text, (told, relation) in FOLLOW_UPS.items():
        known = answers["atomic_number" if told is NUMBER else "symbol"]
        for name, answer in answers[relation].items():
            before = (told[0].format(name), told[1].format(name, known[name]))
            found[f"after its {'number' if told is NUMBER else 'symbol'}: {text}"].append(
                Asked(text, answer, True, before)
            )
    return found


def right(model: MemoryModel, asked: list[Asked], memory: str) -> int:
    """How many."""
    put = [(one.put, one.before[0] if one.before else one.text) for one in asked]
    texts = said(model, put, memory, 16 if asked[0].chat else 8)
    return sum(one.is_right(text) for one, text in zip(asked, texts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    options = parser.parse_args()
    model, found = load(options.model), {}
    assert model.bank is not None
    for way, asked in (ways() | follow_ups()).items():
        found[way] = {memory: right(model, asked, memory) for memory in ("generic", "fetched")} | {"of": len(asked)}
        print(f"{way:<50}{found[way]}", flush=True)
    report = options.model / "learning" / "report.json"
    learnt = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
    result = {"right": found, "recipe": model.bank.manifest.recipe, "report": learnt}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
