"""How a request has its tokens drawn, by OpenAI's client: alone, streamed, and beside others in one batch."""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import CONTEXT, Running, serving, tiny_model
from tiny import make_model

from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.apps.server.text import Detokenizer
from mlx_hiermem.errors import ArgumentError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.printable import printable
from mlx_hiermem.sampling import Sampling

CHAT = [{"role": "user", "content": "hello there"}]
THINKING = "{% if enable_thinking %}<think>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = make_model(tmp_path_factory.mktemp("sampling") / "model")
    file = folder / "anchor" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] += THINKING
    file.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> MemoryModel:
    return tiny_model(folder)


def complete(client: openai.OpenAI, **options: Any) -> Any:
    more = {name: options.pop(name) for name in ("top_k", "min_p", "repetition_penalty") if name in options}
    given = {"model": "tiny:none", "prompt": "hello there", "max_tokens": 40} | options
    return client.completions.create(**given, extra_body=more)


def text(client: openai.OpenAI, **options: Any) -> str:
    return str(complete(client, **options).choices[0].text)


WAYS: list[dict[str, Any]] = [
    {"top_k": 3, "temperature": 1.2, "seed": 4},
    {"min_p": 0.4, "temperature": 1.2, "seed": 4},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.5},
    {"logit_bias": {str(ord("e") - ord("!")): 20}},
    {"temperature": 1.0, "seed": 9},
    {},
]


@pytest.mark.slow
def test_each_way_says_something_else(client: openai.OpenAI) -> None:
    assert len({text(client, **way) for way in WAYS}) == len(WAYS)


@pytest.mark.slow
def test_each_way_is_the_models_own(client: openai.OpenAI, model: MemoryModel) -> None:
    """The server and `generate` draw the same tokens."""
    for way in WAYS:
        options = way | {"logit_bias": {int(token): bias for token, bias in way.get("logit_bias", {}).items()}}
        ids = [
            response.token
            for response in model.responses(model.tokens("hello there"), Sampling(max_tokens=40, **options))
        ]
        streamed = "".join(chunk.choices[0].text for chunk in complete(client, stream=True, **way))
        assert streamed == text(client, **way)
        detokenizer = Detokenizer(model.tokenizer, model.tokens("hello there"))
        assert "".join(map(detokenizer.add, ids)) + detokenizer.rest() == streamed


@pytest.mark.slow
def test_each_way_holds_in_company(client: openai.OpenAI) -> None:
    alone = [text(client, **way) for way in WAYS]
    with ThreadPoolExecutor(len(WAYS)) as pool:
        assert list(pool.map(lambda way: text(client, **way), WAYS)) == alone


@pytest.mark.slow
def test_what_the_ways_do(client: openai.OpenAI) -> None:
    plain = text(client)
    assert text(client, top_k=1, temperature=1.5) == plain
    assert text(client, top_k=-1, min_p=1, temperature=1.5) == plain
    letters = Counter(text(client, frequency_penalty=2, max_tokens=100)).most_common(1)[0][1]
    assert letters < Counter(text(client, max_tokens=100)).most_common(1)[0][1]
    forced = text(client, logit_bias={"65": 100}, max_tokens=5)
    assert len(set(forced)) == 1
    assert forced[0] not in text(client, logit_bias={"65": -100})


def test_penalties_count_the_reply_alone(model: MemoryModel) -> None:
    """The prompt's tokens are not penalised, and every token of the reply is, however long ago it came."""
    import mlx.core as mx

    for penalty, expected in (("presence_penalty", {3: -1.0, 4: -1.0}), ("frequency_penalty", {3: -2.0, 4: -1.0})):
        (process,) = Sampling(max_tokens=30, **{penalty: 1.0}).processors()  # type: ignore[arg-type]
        prompt = [1, 2, 3]
        assert process(mx.array(prompt), mx.zeros((1, 8))).tolist() == [[0.0] * 8]
        after = process(mx.array([*prompt, 3, 4, 3]), mx.zeros((1, 8)))[0].tolist()
        assert {token: value for token, value in enumerate(after) if value} == expected
        after = process(mx.array([*prompt, 4, *[5] * 25]), mx.zeros((1, 8)))[0].tolist()
        assert after[4] == -1.0


@pytest.mark.slow
def test_several_replies(client: openai.OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 20}
    single = [text(client, **options | {"seed": seed}) for seed in (5, 6, 7)]
    reply = complete(client, n=3, **options)
    assert [choice.text for choice in reply.choices] == single
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == complete(client).usage.prompt_tokens
    assert reply.usage.completion_tokens == 60
    streamed = ["", "", ""]
    for chunk in complete(client, n=3, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == single
    several = complete(client, n=2, prompt=["hello there", "other"], **options)
    assert [choice.text for choice in several.choices][:2] == single[:2]
    assert several.choices[2].text == text(client, prompt="other", **options)
    assert len(several.memory) == 4
    chat = client.chat.completions.create(model="tiny:1.2", messages=CHAT, n=2, **options)  # type: ignore[call-overload]
    assert len(chat.choices) == 2
    assert chat.memory["path"] == "1.2"
    assert chat.choices[0].message.content != chat.choices[1].message.content


def test_variables_of_the_template(client: openai.OpenAI, model: MemoryModel) -> None:
    def prompt_tokens(**variables: Any) -> int:
        body = {"chat_template_kwargs": variables} if variables else {}
        reply = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=1, extra_body=body)  # type: ignore[arg-type]
        assert reply.usage
        return reply.usage.prompt_tokens

    assert prompt_tokens() == prompt_tokens(enable_thinking=False) == len(model.chat_tokens(CHAT))
    assert prompt_tokens(enable_thinking=True) == prompt_tokens() + len("<think>")
    for taken in ("chat_template", "messages", "add_generation_prompt", "self", "tokenizer", "reply"):
        with pytest.raises(openai.BadRequestError, match="not for clients"):
            prompt_tokens(**{taken: "x"})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "greater than or equal to 1"),
        ("n", 13, "13 replies are more than"),
        ("frequency_penalty", 3, "less than or equal to 2"),
        ("logit_bias", {"x": 1}, "token ids"),
        ("logit_bias", {"260": 1}, "token 260"),
        ("logit_bias", {"5": 101}, "less than or equal to 100"),
        ("top_k", -2, "greater than or equal to -1"),
        ("min_p", 1.5, "less than or equal to 1"),
        ("repetition_penalty", 0, "greater than 0"),
    ],
)
def test_what_cannot_be(server: Running, field: str, value: Any, message: str) -> None:
    status, answer = server.json("POST", "/v1/completions", {"prompt": "x", "memory": "none", field: value})
    assert status == 400
    assert answer["error"]["param"].startswith(field)
    assert message in answer["error"]["message"]


def test_the_servers_defaults(folder: pathlib.Path, client: openai.OpenAI) -> None:
    defaults = {"temperature": 1.0, "max_tokens": 7, "chat_template_kwargs": {"enable_thinking": True}}
    with serving(lambda: tiny_model(folder), defaults=defaults) as running:
        reply = running.client.chat.completions.create(model="tiny", messages=CHAT, seed=3)  # type: ignore[call-overload]
        assert reply.usage.completion_tokens == 7
        assert reply.usage.prompt_tokens == len(tiny_model(folder).chat_tokens(CHAT, enable_thinking=True))
        plain = text(client, temperature=1.0, seed=3, max_tokens=7)
        assert text(running.client, seed=3, max_tokens=openai.NOT_GIVEN) == plain
        assert text(running.client, temperature=0, max_tokens=9) == text(client, max_tokens=9)
        short = {"max_completion_tokens": 3}
        reply = running.client.chat.completions.create(model="tiny", messages=CHAT, **short)  # type: ignore[call-overload]
        assert reply.usage.completion_tokens == 3


def test_a_default_length_is_what_the_context_leaves_of_it(folder: pathlib.Path) -> None:
    """Only a client that asks for too much is refused."""
    with serving(lambda: tiny_model(folder), defaults={"max_tokens": CONTEXT}) as running:
        for path, body in (
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/v1/completions", {"prompt": "hello there"}),
            ("/v1/responses", {"input": "hello there"}),
        ):
            status, answer = running.json("POST", path, body | {"memory": "none"})
            assert status == 200, answer
            assert answer["usage"]["total_tokens"] == CONTEXT
        assert running.json("POST", "/v1/completions", {"prompt": "x", "max_tokens": CONTEXT})[0] == 400
    with serving(lambda: tiny_model(folder)) as running:
        prompt = "x" * (CONTEXT - 5)
        answer = running.json("POST", "/v1/completions", {"prompt": prompt, "memory": "none"})[1]
        assert answer["usage"]["completion_tokens"] == 5


def test_the_options_of_ask(
    folder: pathlib.Path, model: MemoryModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*options: str) -> str:
        words = ["ask", "--plain", "-m", str(folder), "--memory", "none", "-n", "20", "hello there", *options]
        monkeypatch.setattr(sys, "argv", ["hiermem", *words])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().out.strip()

    options = ["--frequency-penalty", "1.5", "--repetition-penalty", "1.2"]
    expected = model.generate(
        "hello there", memory="none", max_tokens=20, frequency_penalty=1.5, repetition_penalty=1.2
    )
    assert asked(*options) == printable(expected.text).strip()
    assert asked(*options) != asked()


def test_the_sampling_that_cannot_be(model: MemoryModel) -> None:
    with pytest.raises(ArgumentError, match="logit_bias has token 300"):
        model.generate("x", memory="none", logit_bias={300: 1.0})
    with pytest.raises(ArgumentError, match="logit_bias"):
        Sampling(logit_bias={"5": 1.0})  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match=r"presence_penalty is 'x'.*It is a number\."):
        Sampling(presence_penalty="x")  # type: ignore[arg-type]
