"""Tools by OpenAI's client. A random model calls none, so what it says is dictated, a token at a time."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import openai
import pytest
from serving import serving, tiny_model
from tiny import make_model

from mlx_hiermem.apps.server.calls import CallingReply
from mlx_hiermem.apps.server.text import Call
from mlx_hiermem.batch import Token
from mlx_hiermem.sampling import LogitsProcessor, Sampling

TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t.function.name }} {{ t.function.parameters | tojson }}\n{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set tool_call = call.function %}"
    "<tool_call>{{ tool_call.name }}{{ tool_call.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weight",
        "description": "Of an element.",
        "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
    },
}
ASKED = [{"role": "user", "content": "gold?"}]
CALL = '<tool_call>\n{"name": "weight", "arguments": {"of": "gold", "né": 1}}\n</tool_call>'
DICTATED = {
    1: CALL,
    2: f"I look.\n{CALL}\n{CALL}\n",
    3: "No <tool> is needed <tool_",
    4: "<tool_call>not json</tool_call>",
    5: CALL.removesuffix("</tool_call>"),
    6: " \n Plain.",
}


def with_tools(folder: pathlib.Path) -> pathlib.Path:
    """A tiny model whose chat template has tools."""
    file = make_model(folder) / "anchor" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@contextmanager
def dictating(place: pathlib.Path) -> Iterator[openai.OpenAI]:
    """The client of a server whose model says what the seed of a request stands for."""
    folder = with_tools(place / "model")
    tokenizer = tiny_model(folder).tokenizer
    processors = Sampling.processors

    def dictated(sampling: Sampling) -> list[LogitsProcessor]:
        said = tokenizer.encode(DICTATED[sampling.seed or 1], add_special_tokens=False)
        prompt: int | None = None

        def say(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal prompt
            prompt = len(tokens) if prompt is None else prompt
            at = len(tokens) - prompt
            return mx.where(mx.arange(logits.shape[-1]) == (said[at] if at < len(said) else 259), logits, -mx.inf)

        return [*processors(sampling), say]

    def larger() -> Any:
        model = tiny_model(folder)
        model.config["max_position_embeddings"] = 1000
        return model

    with pytest.MonkeyPatch.context() as patch, serving(larger) as running:
        patch.setattr(Sampling, "processors", dictated)
        yield running.client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with dictating(tmp_path_factory.mktemp("tools")) as client:
        yield client


def chat(client: openai.OpenAI, seed: int, **options: Any) -> Any:
    given = {"model": "tiny:none", "messages": ASKED, "tools": [TOOL], "seed": seed, "max_tokens": 300}
    return client.chat.completions.create(**given | options)


def streamed(client: openai.OpenAI, seed: int) -> tuple[str, list[tuple[str, str]], str]:
    """Text, calls and finish reason, put together as clients do."""
    text, calls, reason = "", dict[int, list[str]](), ""
    for chunk in chat(client, seed, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            row = calls.setdefault(call.index, ["", ""])
            row[0] += call.function.name or ""
            row[1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return text, [(name, arguments) for name, arguments in calls.values()], reason


def summary(reply: Any) -> tuple[str, list[tuple[str, str]], str]:
    choice = reply.choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


WEIGHT = ("weight", '{"of": "gold", "né": 1}')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (1, ("", [WEIGHT], "tool_calls")),
        (2, ("I look.\n\n\n", [WEIGHT, WEIGHT], "tool_calls")),
        (3, (DICTATED[3], [], "stop")),
        (4, (DICTATED[4], [], "stop")),
        (5, ("", [WEIGHT], "tool_calls")),
        (6, (DICTATED[6], [], "stop")),
    ],
)
def test_calls_and_text(client: openai.OpenAI, seed: int, expected: Any) -> None:
    assert summary(chat(client, seed)) == streamed(client, seed) == expected


def test_a_call_is_null_content_and_has_an_id(client: openai.OpenAI) -> None:
    message = chat(client, 1).choices[0].message
    assert message.content is None
    assert message.tool_calls[0].id.startswith("call_")
    two = chat(client, 2).choices[0].message.tool_calls
    assert two[0].id != two[1].id


def test_one_call_alone(client: openai.OpenAI) -> None:
    one = ("I look.\n", [WEIGHT], "tool_calls")
    assert summary(chat(client, 2, parallel_tool_calls=False)) == one
    assert summary(chat(client, 2, parallel_tool_calls=True))[1] == [WEIGHT, WEIGHT]


@pytest.mark.slow
def test_calls_in_company(client: openai.OpenAI) -> None:
    alone = [summary(chat(client, seed)) for seed in DICTATED]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda seed: summary(chat(client, seed)), DICTATED)) == alone


def test_the_whole_round(client: openai.OpenAI, tmp_path: pathlib.Path) -> None:
    """A call, its result, an answer: as a client goes on, and as the template gets it."""
    called = chat(client, 1).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "197 u"}
    answer = chat(client, 6, messages=[*ASKED, called, result])
    assert answer.choices[0].message.content == DICTATED[6]
    model = tiny_model(with_tools(tmp_path / "model"))
    expected = (
        'tool weight {"type": "object", "properties": {"of": {"type": "string"}}}\n<user>gold?'
        '<assistant><tool_call>weight{"of": "gold", "né": 1}<tool>197 u<assistant>'
    )
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(expected, add_special_tokens=False))
    without = chat(client, 1, tool_choice="none")
    assert summary(without) == (CALL, [], "stop")
    assert without.usage.prompt_tokens == len(model.chat_tokens(ASKED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tool_choice": "required"}, "auto or none"),
        ({"tool_choice": {"type": "function", "function": {"name": "weight"}}}, "auto or none"),
        ({"tools": [{"type": "function", "function": {"name": "<eos>"}}]}, "control token"),
        ({"tools": [{"type": "code"}]}, "function"),
        ({"response_format": {"type": "json_object"}}, "held to JSON cannot call tools"),
        ({"messages": [*ASKED, {"role": "tool", "content": "x"}]}, "tool_call_id"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, change: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, 1, **change)


def test_arguments_that_are_no_object(client: openai.OpenAI) -> None:
    for arguments in ("[1]", "{", "1", "[" * 50_000):
        call = {"id": "1", "type": "function", "function": {"name": "weight", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        with pytest.raises(openai.BadRequestError, match="JSON object"):
            chat(client, 1, messages=[*ASKED, turn])


class Marked:
    """A tokenizer of characters, with one model's marks and its parser."""

    def __init__(self, parser: str) -> None:
        import importlib

        module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
        self.tool_call_start, self.tool_call_end = module.tool_call_start, module.tool_call_end
        self.tool_parser = module.parse_tool_call

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return "".join(map(chr, ids))


def read(parser: str, written: str) -> tuple[str, list[Call]]:
    """The text and the calls of a reply that comes a character at a time."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}
    reply, calls, text = CallingReply(Marked(parser), [], (), [tool]), list[Call](), ""
    for index, character in enumerate(written):
        last = index == len(written) - 1
        piece = reply.add(Token(0, ord(character), "length" if last else None))
        calls += piece.calls if piece else ()
        text += piece.text if piece else ""
    return text, calls


@pytest.mark.parametrize(
    ("parser", "written"),
    [
        ("json_tools", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'),
        ("pythonic", "<|tool_call_start|>[f(x=1)]<|tool_call_end|>"),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}'),
        ("qwen3_coder", "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>"),
    ],
)
def test_the_ways_that_models_write_a_call(parser: str, written: str) -> None:
    text, calls = read(parser, written)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("f", {"x": 1})]
    assert text == ""


@pytest.mark.parametrize("arguments", ["null", '"null"', '""', "{}"])
def test_a_call_without_arguments(arguments: str) -> None:
    text, calls = read("json_tools", f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
    assert [(call.name, call.arguments) for call in calls] == [("f", "{}")]
    assert text == ""


@pytest.mark.parametrize("arguments", ['"gold"', r'"\"gold\""', '["gold"]', "5"])
def test_a_call_that_could_not_be_sent_back_is_text(arguments: str) -> None:
    written = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert read("json_tools", written) == (written, [])
