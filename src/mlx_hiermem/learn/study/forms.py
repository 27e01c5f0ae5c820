"""The free forms of self-study: what a model that can write is asked for, and what its replies say.

forms.toml has the forms and their words. A reply is JSON, perhaps between Markdown's fences or after some thinking
aloud; what it says becomes the records that `hiermem learn --prompts` knows (see `prompts`).
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.files import file_digest
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.settings import Prompt

FILE = pathlib.Path(__file__).with_name("forms.toml")
LONGEST = 100_000  # characters of a reply; what is longer is not what was asked for


@dataclass(frozen=True)
class Form:
    """One thing that is asked for."""

    name: str
    kind: str  # of its records: questions, statements, chats or texts
    task: str
    tokens: int  # room for the reply

    @property
    def about_questions(self) -> bool:
        """Whether it needs questions that were written before."""
        return "{questions}" in self.task


@dataclass(frozen=True)
class Forms:
    """All that forms.toml says; the comments there say what each is for."""

    digest: str
    temperature: float
    ask: str
    again: str
    mend: str
    reply: dict[str, str]  # by kind
    forms: tuple[Form, ...]

    def request(self, form: Form, window: Window, questions: Sequence[str], again: bool, mend: bool) -> str:
        """What a form asks for about a window. Passage first: requests that share a beginning are read faster."""
        listed = "\n".join(f"- {question}" for question in questions)
        task = form.task.replace("{questions}", listed)
        task = "\n\n".join([task, *([self.again] if again else []), *([self.mend] if mend else [])])
        parts = {"title": window.title, "passage": window.text, "task": task, "reply": self.reply[form.kind]}
        return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), self.ask)


@functools.cache
def forms() -> Forms:
    """Reads the file, once."""
    data = tomllib.loads(FILE.read_text(encoding="utf-8"))
    texts = {name: data[name].strip() for name in ("ask", "again", "mend")}
    rows = tuple(Form(row["name"], row["kind"], row["task"].strip(), row["tokens"]) for row in data["form"])
    return Forms(file_digest(FILE), data["temperature"], **texts, reply=data["reply"], forms=rows)


def parse_reply(reply: str, kind: str, document: str) -> list[Prompt] | None:
    """The records in a reply; items that lack a part are passed over. None where it is no list in JSON."""
    for value in _json_in(reply) if len(reply) <= LONGEST else ():
        if (items := _items(value, kind)) is not None:
            found = [one for item in items if (one := MAKERS[kind](document, item))]
            return found if found or not items else None
    return None


def _json_in(reply: str) -> Iterator[Any]:
    """The JSON values that a reply may mean: all of it, between fences, or from its first bracket to its last."""
    reply = re.sub(r"^\s*<think>.*?</think>", "", reply, flags=re.DOTALL)
    inner = [match[1] for match in re.finditer(r"```\w*\n(.*?)```", reply, re.DOTALL)]
    spans = [reply[reply.find(a) : reply.rfind(b) + 1] for a, b in ("{}", "[]")]
    for text in (reply, *inner, *spans):
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            continue


def _items(value: Any, kind: str) -> list[Any] | None:
    """A list, or the one that an object holds under the kind's name or alone."""
    if isinstance(value, dict):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = value.get(kind, lists[0] if len(lists) == 1 else None)
    return value if isinstance(value, list) else None


def _parts(item: Any, *names: str) -> list[str] | None:
    """The texts of these names in an item, white space made single; None where one is missing or empty."""
    found = [item.get(name) for name in names] if isinstance(item, dict) else []
    texts = [" ".join(part.split()) for part in found if isinstance(part, str)]
    return texts if len(texts) == len(names) and all(texts) else None


def _question(document: str, item: Any) -> Prompt | None:
    parts = _parts(item, "question", "answer")
    return Prompt(document, parts[0], parts[1], framed=True) if parts else None


def _statement(document: str, item: Any) -> Prompt | None:
    parts = _parts(item, "beginning", "rest")
    return Prompt(document, parts[0].rstrip("… "), f" {parts[1].lstrip('… ')}") if parts else None


def _chat(document: str, item: Any) -> Prompt | None:
    parts = _parts(item, "user", "assistant")
    return Prompt(document, parts[0], parts[1], chat=True) if parts else None


def _text(document: str, item: Any) -> Prompt | None:
    return Prompt(document, "", " ".join(item.split())) if isinstance(item, str) and item.strip() else None


MAKERS: dict[str, Callable[[str, Any], Prompt | None]] = {
    "questions": _question,
    "statements": _statement,
    "chats": _chat,
    "texts": _text,
}
