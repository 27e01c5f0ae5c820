"""A chat template taken apart, for readers that run no Jinja: what stands between the words of a conversation.

Most templates only put marks between one role's words and the next's. Those are found by rendering a conversation
of probes, and are held against the template on other conversations. A template that does more gives None. A base
model has no template; `Framed` stands for one where its bank has learnt questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from mlx_hiermem.tokenizer import encode_text, framed

Messages = list[dict[str, str]]

PROBES = ("Ωone", "Ωtwo", "Ωthree", "Ωfour")  # in no template, and none a part of another
CHECKS = (  # what is said in the conversations that the result is checked on
    ["Hi", "Hello.", "What is neon?", "A gas.", "  And its symbol?\n", "Ne\n\n"],
    ["{{ x }} <b>", "Two\nlines", "😀 ¿qué?", "", " "],
    ["Hi", "<think>\nWell.\n</think>\n\nHello.", "And?", "<think></think>", "So?"],
)
THOUGHTS = "</think>"  # ends what a model says to itself


class ChatTemplate(Protocol):
    """What is needed of a tokenizer."""

    def apply_chat_template(self, messages: Messages, *, tokenize: bool, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True)
class Framed:
    """Questions in the frame that they were learnt in; what the tokenizer itself puts in front is in the text."""

    beginning: str

    @classmethod
    def of(cls, tokenizer: Any) -> Framed:
        return cls(tokenizer.decode(encode_text(tokenizer, "")))

    def apply_chat_template(self, messages: Messages, *, tokenize: bool, add_generation_prompt: bool) -> str:
        return self.beginning + framed(messages)


def chat_format(template: ChatTemplate) -> dict[str, Any] | None:
    """{"marks": {"start>user": …, "user>assistant": …, "assistant>user": …, "user>reply": …}, "trim", "thoughts"}.

    `reply` is where the assistant is to speak. With a system message there are also "start>system" and
    "system>user"; they are absent where the template takes none. `trim` says that white space around what is said
    is dropped, `thoughts` that a reply loses all that stands in front of this mark. None where the template is not
    made of such parts.
    """
    marks = _marks(template, [])
    if marks is None:
        return None
    with_system = _marks(template, _said("system", PROBES[3]))
    for system in (with_system, {}) if with_system else ({},):
        for trim, thoughts in product((False, True), ("", THOUGHTS)):
            form = {"marks": (system or {}) | marks, "trim": trim, "thoughts": thoughts}
            if _same(template, form):
                return form
    return None


def render(form: dict[str, Any], messages: Messages) -> str:
    """The prompt of a conversation, ready for the assistant's words; HierMemKit's ChatFormat does the same."""
    text, before = "", "start"
    for message in messages:
        role, said = message["role"], message["content"].strip() if form["trim"] else message["content"]
        if role == "assistant" and form["thoughts"]:
            said = said.split(form["thoughts"])[-1].lstrip("\n")
        text, before = text + form["marks"][f"{before}>{role}"] + said, role
    return str(text + form["marks"][f"{before}>reply"])


def _said(role: str, words: str) -> Messages:
    return [{"role": role, "content": words}]


def _talk(*words: str) -> Messages:
    """A conversation that the user opens."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": said} for i, said in enumerate(words)]


def _rendered(template: ChatTemplate, messages: Messages) -> str | None:
    try:
        return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates refuse by raising whatever they like
        return None


def _marks(template: ChatTemplate, system: Messages) -> dict[str, str] | None:
    """What stands between probes; None where a probe is not rendered as it is, once and in its place."""
    messages = [*system, *_talk(*PROBES[:3])]
    text, marks, before = _rendered(template, messages), {}, "start"
    if text is None:
        return None
    for message in messages:
        mark, found, text = text.partition(message["content"])
        if not found:
            return None
        marks[f"{before}>{message['role']}"], before = mark, message["role"]
    return marks | {"user>reply": text}


def _same(template: ChatTemplate, form: dict[str, Any]) -> bool:
    """Whether the parts give what the template does."""
    systems = [[], _said("system", "Be brief."), _said("system", " ")] if "start>system" in form["marks"] else [[]]
    talks = [_talk(*words[:length]) for words in CHECKS for length in (1, 3, 5) if length <= len(words)]
    talks = [[*system, *talk] for system in systems for talk in talks]
    return all(_rendered(template, talk) == render(form, talk) for talk in talks)
