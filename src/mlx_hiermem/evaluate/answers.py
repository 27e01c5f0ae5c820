"""When a reply is right, and when it need not go on because that is decided.

Three rules of tasks: LLM-Foundry's for generation tasks (the normalised reply starts with a normalised name of the
answer), the paper's for numbers (the first integer), and for questions of a bank's own the answer's name as whole
words, since the symbol H is not to be found in “Helium”. Two of an exam in chat: an accepted answer stands
anywhere in the reply, or is all of it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

Rule = Callable[[str, Sequence[str]], bool]  # reply, the answer's names -> right

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´", " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles, underscores and surplus space, as LLM-Foundry v0.9 has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def starts_with(reply: str, names: Sequence[str]) -> bool:
    """LLM-Foundry's rule."""
    said = normalise(reply)
    return any(said.startswith(normalise(name)) for name in names)


def begins_with(reply: str, names: Sequence[str]) -> bool:
    """The answer's name as whole words, in either case, whatever marks are before it."""
    return any(re.match(rf"\W*{re.escape(name)}(?!\w)", reply, re.IGNORECASE) for name in names)


def first_integer(text: str) -> int | None:
    found = re.search(r"\d+", text)
    return int(found.group()) if found else None


def is_number(reply: str, names: Sequence[str]) -> bool:
    """The paper's rule for atomic numbers: the first integer of the reply is the answer."""
    return first_integer(reply) in [int(name) for name in names if name.isdecimal()]


def mentions(reply: str, names: Sequence[str]) -> bool:
    """An exam's lenient rule: a name stands in the reply as whole words."""
    said = f" {' '.join(_compared(reply))} "
    return any(f" {' '.join(own)} " in said for name in names if (own := _compared(name)))


def is_only(reply: str, names: Sequence[str]) -> bool:
    """An exam's strict rule: the reply is a name."""
    said = _compared(reply)
    return said != [] and said in [_compared(name) for name in names]


def _compared(text: str) -> list[str]:
    """A text's words as an exam compares them: without capitals, marks and articles."""
    found = re.sub(r"[^a-z0-9 ]", " ", text.lower().replace(",", "")).split()
    return [word for word in found if word not in ("a", "an", "the")]


def rule_for(kind: str, answer: str) -> Rule:
    """The rule by which a task's replies are right."""
    if kind == "generation":
        return starts_with
    return is_number if answer.isdecimal() else begins_with


def is_decided(reply: str, rule: Rule, names: Sequence[str]) -> bool:
    """Whether more text cannot change whether the reply is right: only its last word may still grow."""
    if rule is is_number:
        number = re.search(r"\d+", reply)
        grows = number is not None and number.end() == len(reply)
        return number is not None and not (grows and any(name.startswith(number.group()) for name in names))
    if rule is starts_with:
        said = normalise(reply[: max(reply.rfind(" "), reply.rfind("\n"), 0)])
        wanted = [normalise(name) for name in names]
        return any(map(said.startswith, wanted)) or not any(name.startswith(said) for name in wanted)
    said = re.sub(r"^\W+", "", reply).lower()
    wanted = [re.sub(r"^\W+", "", name).lower() for name in names]
    return said != "" and not any(name.startswith(said) for name in wanted)
