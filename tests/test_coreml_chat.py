"""Chat templates taken apart: those made of marks come out whole, others are not guessed at."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_hiermem.convert.export.chat import Framed, Messages, chat_format, render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
)
GEMMA = (  # a system message goes into the user's turn; what is said is trimmed
    "<bos>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
SHOUTS = CHATML.replace("m['content']", "m['content'] | upper")
NUMBERS = CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}")
LAST_ONLY = CHATML.replace("messages %}", "messages[-1:] %}")
QWEN3 = CHATML.replace(  # a reply goes without what the model has said to itself
    "m['content'] }}",
    r"m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] }}",
)


class Template:
    def __init__(self, source: str) -> None:
        self.template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)

    def apply_chat_template(self, messages: Messages, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize

        def refuse(what: str) -> None:
            raise ValueError(what)

        return self.template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse
        )


def talk(*words: str, system: str = "") -> Messages:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(words)]
    return [{"role": "system", "content": system}, *said] if system else said


@pytest.mark.parametrize("source", [CHATML, DEFAULT_SYSTEM], ids=["chatml", "default system"])
def test_marks_give_what_the_template_gives(source: str) -> None:
    template = Template(source)
    form = chat_format(template)
    assert form is not None
    assert not form["trim"]
    for messages in (talk(" Hi\n"), talk("a", "b", "c", "d", "e"), talk("a", "b", "c", system="Be brief.")):
        assert render(form, messages) == template.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def test_trimming_is_found_and_a_system_message_in_the_users_turn_is_not_promised() -> None:
    template = Template(GEMMA)
    form = chat_format(template)
    assert form is not None
    assert form["trim"]
    messages = talk("  Hi \n", "\nHello. ", "And?")
    assert render(form, messages) == template.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert "start>system" not in form["marks"]  # it is not trimmed as the rest is


def test_thoughts_are_left_out() -> None:
    template = Template(QWEN3)
    form = chat_format(template)
    assert form is not None
    assert form["thoughts"] == "</think>"
    messages = talk("</think> is what I said", "<think>\nWell.\n</think>\n\nHello.", "And?", "No.", "So?")
    expected = template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "Well" not in expected
    assert render(form, messages) == expected
    assert chat_format(Template(CHATML))["thoughts"] == ""  # type: ignore[index]


def test_a_template_without_a_place_for_system_messages() -> None:
    form = chat_format(Template(REFUSES_SYSTEM))
    assert form is not None
    assert set(form["marks"]) == {"start>user", "user>assistant", "assistant>user", "user>reply"}


def test_a_base_model_is_asked_in_the_frame_of_its_lessons() -> None:
    form = chat_format(Framed("<bos>"))
    assert form is not None
    assert render(form, talk(" Hi\n", " Hello.", "And?")) == (
        "<bos>Question: Hi\nAnswer: Hello.\n\nQuestion: And?\nAnswer:"
    )
    assert render(form, talk("Hi", system="Be brief.")) == "<bos>Be brief.\n\nQuestion: Hi\nAnswer:"


@pytest.mark.parametrize("source", [SHOUTS, NUMBERS, LAST_ONLY, "{{ nothing() }}"])
def test_templates_that_do_more_are_not_taken_apart(source: str) -> None:
    found: Any = chat_format(Template(source))
    assert found is None
