"""Replies by a schema, by OpenAI's client: alone, streamed, and beside others in one batch."""

from __future__ import annotations

import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from serving import tiny_model
from tiny import make_model

from mlx_hiermem.errors import ArgumentError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling

CHAT = [{"role": "user", "content": "hello there"}]
ELEMENT = {
    "type": "object",
    "properties": {
        "state": {"enum": ["solid", "liquid", "gas"]},
        "number": {"type": "integer", "minimum": 1, "maximum": 118},
        "stable": {"type": "boolean"},
    },
    "required": ["state", "number", "stable"],
    "additionalProperties": False,
}


class Element(BaseModel):
    state: Literal["solid", "liquid", "gas"]
    stable: bool


def chat(client: openai.OpenAI, schema: Any = ELEMENT, **options: Any) -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "element", "schema": schema, "strict": True}}
    given = {"model": "tiny", "messages": CHAT, "max_tokens": 150, "temperature": 1.0, "response_format": form}
    return client.chat.completions.create(**given | options)


def said(reply: Any) -> str:
    return str(reply.choices[0].message.content)


def check(text: str) -> None:
    found = json.loads(text)
    assert found["state"] in ("solid", "liquid", "gas")
    assert 1 <= found["number"] <= 118
    assert type(found["stable"]) is bool
    assert found.keys() == {"state", "number", "stable"}


@pytest.mark.slow
def test_a_random_model_keeps_to_a_schema(client: openai.OpenAI) -> None:
    texts = []
    for seed in range(6):
        reply = chat(client, seed=seed)
        assert reply.choices[0].finish_reason == "stop"
        check(said(reply))
        texts.append(said(reply))
        streamed = [chunk.choices[0] for chunk in chat(client, seed=seed, stream=True)]
        assert "".join(choice.delta.content or "" for choice in streamed) == said(reply)
        assert streamed[-1].finish_reason == "stop"
    assert len(set(texts)) > 1
    check(said(chat(client, temperature=0)))


@pytest.mark.slow
def test_schemas_hold_in_company(client: openai.OpenAI) -> None:
    """Two schemas, several of one prompt, and text that is no JSON, in one batch."""
    number = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    number |= {"additionalProperties": False}
    plain = {"response_format": {"type": "text"}}
    asked: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "schema": number}, plain | {"seed": 3}, {"seed": 4}]
    alone = [said(chat(client, **row)) for row in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: said(chat(client, **row)), asked)) == alone
    assert list(json.loads(alone[1])) == ["n"]
    assert not alone[2].startswith("{")
    several = chat(client, n=3, seed=1)
    assert said(several) == alone[0]
    for choice in several.choices:
        check(choice.message.content)


def test_any_object(client: openai.OpenAI) -> None:
    form = {"type": "json_object"}
    reply = chat(client, response_format=form, seed=3, logit_bias={str(ord("}") - ord("!")): 8})
    assert reply.choices[0].finish_reason == "stop"
    assert type(json.loads(said(reply))) is dict
    cut = chat(client, response_format=form, max_tokens=1)
    assert (said(cut)[0], cut.choices[0].finish_reason) == ("{", "length")


def test_the_client_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="tiny", messages=CHAT, response_format=Element, max_tokens=150, temperature=1.0, seed=1
    )  # type: ignore[call-overload]
    assert type(reply.choices[0].message.parsed) is Element


@pytest.mark.slow
def test_other_wishes_do_not_break_a_schema(client: openai.OpenAI) -> None:
    check(said(chat(client, seed=1, top_p=0.5, logit_bias={"5": 100}, frequency_penalty=2)))
    check(said(chat(client, seed=1, logprobs=True, top_logprobs=3)))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"enum": []}, "anyOf is empty"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ({"type": "foo"}, "Invalid type"),
        ({"not": {}}, "Unimplemented"),
        ({"$ref": "https://example.org/x"}, "not fetch"),
        ({"type": "string", "pattern": "("}, "regex"),
    ],
)
def test_schemas_that_cannot_be_met(client: openai.OpenAI, schema: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(client, schema)
    assert caught.value.param == "response_format"


def test_after_the_end_a_grammar_asks_for_nothing(tmp_path: pathlib.Path) -> None:
    """A batch computes a step more than it needs; a processor that failed there would end all its sequences."""
    import mlx.core as mx

    model: MemoryModel = tiny_model(make_model(tmp_path / "model"))
    (process,) = Sampling(grammar=model.grammars.json({"const": 1})).processors()
    prompt, one = model.tokens("x"), model.tokens("1")
    logits = mx.zeros((1, 264))  # a padded vocabulary
    first = process(mx.array(prompt), logits)
    assert [token for token, value in enumerate(first[0].tolist()) if value == 0] == one
    last = process(mx.array(prompt + one), logits)
    assert [token for token, value in enumerate(last[0].tolist()) if value == 0] == [259]
    process(mx.array([*prompt, *one, 259]), logits)
    process(mx.array([*prompt, *one, 259, 5]), logits)
    with pytest.raises(ArgumentError, match="cannot be met"):
        model.grammars.json(False)
