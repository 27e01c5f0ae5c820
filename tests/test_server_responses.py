"""/v1/responses by OpenAI's client, streaming and not, alone and beside others."""

from __future__ import annotations

import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Running
from test_server_tools import DICTATED, TOOL, WEIGHT, dictating

from mlx_hiermem.apps.server import responses
from mlx_hiermem.apps.server.responses import Stored

QUESTION = "hello there"


def respond(client: openai.OpenAI, memory: Any = "none", **options: Any) -> Any:
    given = {"model": "tiny", "input": QUESTION, "max_output_tokens": 12, "extra_body": {"memory": memory}}
    return client.responses.create(**given | options)


def chat(client: openai.OpenAI, messages: Any, memory: Any = "none", **options: Any) -> str:
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, extra_body={"memory": memory}, **options
    )
    return str(reply.choices[0].message.content)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_response_is_the_chats_reply(client: openai.OpenAI) -> None:
    for memory in ("none", "fetched", "0.1"):
        reply = respond(client, memory)
        assert reply.output_text == chat(client, [turn("user", QUESTION)], memory)
        assert reply.memory["memory"] == memory
        assert (reply.object, reply.model) == ("response", "tiny")
    assert reply.status == "incomplete"
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage.output_tokens == 12
    assert reply.usage.total_tokens == reply.usage.input_tokens + 12
    told = respond(client, instructions="Be brief.")
    assert told.output_text == chat(client, [turn("system", "Be brief."), turn("user", QUESTION)])
    assert (
        client.responses.create(model="tiny:0.1", input=QUESTION, max_output_tokens=12).output_text
        == reply.output_text
    )


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    whole = respond(client, "0.1")
    events = list(respond(client, "0.1", stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    last = events[-1].response
    assert (last.output_text, last.memory["path"]) == (whole.output_text, "0.1")
    assert last.usage.output_tokens == whole.usage.output_tokens
    with client.responses.stream(model="tiny:0.1", input=QUESTION, max_output_tokens=12) as stream:
        assert (
            "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            == whole.output_text
        )


def test_in_company(client: openai.OpenAI) -> None:
    asked = [(memory, f"question {index}") for index, memory in enumerate(("none", "generic", "0.1", "2.2"))]

    def say(row: tuple[str, str]) -> str:
        return str(respond(client, row[0], input=row[1]).output_text)

    alone = [say(row) for row in asked]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(say, asked)) == alone


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = respond(client, instructions="Be brief.")
    second = respond(client, input="and then?", previous_response_id=first.id)
    said = [turn("user", QUESTION), turn("assistant", first.output_text), turn("user", "and then?")]
    assert second.output_text == chat(client, said)  # instructions are of one response alone
    items = [*({"role": row["role"], "content": row["content"]} for row in said)]
    assert respond(client, input=items).output_text == second.output_text
    output = [item.model_dump(exclude_none=True) for item in first.output]
    same = [
        turn("user", QUESTION),
        *output,
        {"role": "user", "content": [{"type": "input_text", "text": "and then?"}]},
    ]
    assert respond(client, input=same).output_text == second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    for gone in (first.id, respond(client, store=False).id, "resp_x"):
        with pytest.raises(openai.NotFoundError):
            respond(client, previous_response_id=gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
    assert second.id == client.responses.retrieve(second.id).id  # and what came after it is still there


def test_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "n", "schema": schema | {"additionalProperties": False}, "strict": True}
    reply = respond(client, text={"format": form}, temperature=1.0, max_output_tokens=100, extra_body={"seed": 3})
    assert reply.status == "completed"
    assert list(json.loads(reply.output_text)) == ["n"]


@pytest.mark.slow
def test_tools(tmp_path: pathlib.Path) -> None:
    function = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    with dictating(tmp_path) as client:

        def ask(seed: int, **options: Any) -> Any:
            given = {"model": "tiny:none", "input": "gold?", "tools": [function], "max_output_tokens": 300}
            return client.responses.create(**given | options, extra_body={"seed": seed})

        message, first, second = ask(2).output
        assert (message.type, message.content[0].text) == ("message", "I look.\n\n\n")
        assert (first.type, first.name, first.arguments) == ("function_call", *WEIGHT)
        assert first.call_id != second.call_id
        kinds = [event.type for event in ask(1, stream=True)]
        assert "response.function_call_arguments.done" in kinds
        assert "response.output_text.delta" not in kinds
        called = ask(1)
        (call,) = called.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "197 u"}
        answer = ask(6, input=[result], previous_response_id=called.id)
        assert answer.output_text == DICTATED[6]
        again = ask(6, input=[turn("user", "gold?"), call.model_dump(exclude_none=True), result])
        assert again.usage.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"wings": 2}, "wings"),
    ],
)
def test_what_is_refused(server: Running, change: dict[str, Any], param: str) -> None:
    status, answer = server.json("POST", "/v1/responses", {"input": "x", "memory": "none"} | change)
    assert status == 400
    assert answer["error"]["param"] == param


def test_what_is_kept_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "KEPT", 3)
    stored = Stored()
    for number in range(5):
        stored.put([turn("user", "x")], {"id": str(number)})
    assert [name for name in map(str, range(5)) if name in stored._kept] == ["2", "3", "4"]
    monkeypatch.setattr(responses, "KEPT_CHARACTERS", 100)
    stored.put([turn("user", "x" * 40)], {"id": "long"})
    assert list(stored._kept) == ["long"]
    stored.drop("long")
    assert stored._size == 0
