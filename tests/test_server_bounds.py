"""What the server refuses: bad requests, each with a message that names the field."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from serving import CONTEXT, Running

from mlx_hiermem.apps.server import generate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "memory": "none", "max_tokens": 5}
DEEP = b'{"messages": [{"role": "user", "content": "x"}], "memory": ' + b"[" * 900 + b"]" * 900 + b"}"
TOOLS = [{"type": "function", "function": {"name": "f"}}]
IMPOSSIBLE = {"type": "integer", "minimum": 5, "maximum": 3}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": IMPOSSIBLE}}
PROMPT = {"prompt": "hello", "memory": "none", "max_tokens": 5}


# bad requests


@pytest.mark.parametrize(
    ("change", "param", "code", "message"),
    [
        ({"messages": []}, "messages", None, "at least 1"),
        ({"messages": "hello"}, "messages", None, "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", None, "'user'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", None, "tool_call_id"),
        (
            {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
            "messages",
            "unsupported_parameter",
            "no tools",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None, "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            None,
            "",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]", None, "no Unicode text"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", None, "required"),
        ({"tools": TOOLS}, "tools", "unsupported_parameter", "no tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", None, "auto or none"),
        ({"response_format": {"type": "xml"}}, "response_format.type", None, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", None, "go together"),
        ({"response_format": SCHEMA | {"type": "text"}}, "response_format", None, "go together"),
        ({"response_format": SCHEMA}, "response_format", None, "cannot be met: Unsatisfiable schema: minimum (5)"),
        ({"top_a": 5}, "top_a", "unknown_parameter", "unknown field top_a"),
        ({"\ud800": 5}, None, None, "no Unicode text"),
        ({"stop": ["a", "\udfff"]}, None, None, "no Unicode text"),
        ({"temperature": 3}, "temperature", None, "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", None, "number"),
        ({"temperature": float("nan")}, "temperature", None, "finite"),
        ({"top_p": -1}, "top_p", None, "greater than or equal to 0"),
        ({"seed": 2**64}, "seed", None, "less than"),
        ({"max_tokens": 0}, "max_tokens", None, "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", None, "integer"),
        ({"max_completion_tokens": 5}, None, None, "give one of them"),
        ({"stream": "yes"}, "stream", None, "boolean"),
        ({"stream_options": {"include_usage": True}}, None, None, "stream: true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", None, "at most 4"),
        ({"stop": ""}, "stop[0]", None, "at least 1"),
        ({"top_logprobs": 2}, None, None, "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None, "less than or equal to 20"),
        ({"max_tokens": CONTEXT}, "messages", "context_length_exceeded", f"more than the model's {CONTEXT}"),
        (
            {"memory": "lots"},
            "memory",
            None,
            "no memory 'lots'; take none, generic, fetched, source, fetched+source, or a path",
        ),
        ({"memory": 5}, "memory", None, "memory: it is fetched, none, generic, a path, a list of blocked nodes"),
        ({"memory": "9"}, "memory", None, "no node 9"),
        ({"memory": ["x"]}, "memory", None, "'x' is not a path"),
        ({"memory": ["0.9"]}, "memory", None, "no node 0.9"),
        ({"memory": {"use": "fetched", "block": []}}, "memory.block", "unknown_parameter", "unknown field"),
        ({"memory": {"use": "1.2", "blocked": ["1"]}}, "memory", None, "1.2 is blocked"),
        (
            {"memory": "auto", "messages": [{"role": "system", "content": "x"}]},
            "memory",
            None,
            "memory fetched is",
        ),
    ],
)
def test_bad_requests(
    server: Running, change: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    status, answer = server.json("POST", CHAT, HELLO | change)
    assert status == 400
    assert answer.keys() == {"error"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "not empty"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": [[]]}, "prompt", "not empty"),
        ({"prompt": ["a", 5]}, "prompt", "token ids"),
        ({"prompt": [1, -5]}, "prompt", "token ids"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": [1, 260]}, "prompt", "there is no token 260"),
        ({"prompt": ["a"] * 13}, "n", "13 replies"),
        ({"prompt": "a" * CONTEXT}, "prompt", "more than the model's"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"prompt": ["a"] * 2049}, "prompt", "at most 2048"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"echo": True}, "echo", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
    ],
)
def test_bad_completions(server: Running, change: dict[str, Any], param: str, message: str) -> None:
    status, answer = server.json("POST", COMPLETIONS, PROMPT | change)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]


def test_too_many_replies_are_refused_before_they_are_prepared(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*_: Any) -> Any:
        raise AssertionError("it is prepared")

    monkeypatch.setattr(generate, "_reply", prepare)
    for path, body in ((CHAT, HELLO), (COMPLETIONS, PROMPT)):
        status, answer = server.json("POST", path, body | {"n": 100})
        assert (status, answer["error"]["param"]) == (400, "n")
        assert answer["error"]["message"] == "100 replies are more than the server gives at once (12)"


def test_what_openais_client_raises(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(
            model="tiny", reasoning_effort="high", messages=[{"role": "user", "content": "x"}]
        )
    assert (caught.value.param, caught.value.code) == ("reasoning_effort", "unsupported_parameter")
    assert caught.value.type == "invalid_request_error"


def test_what_changes_nothing_is_taken(server: Running) -> None:
    plain = server.json("POST", CHAT, HELLO)[1]["choices"]
    more = {"n": 1, "user": "me", "store": True, "metadata": {"a": "b"}, "tools": [], "tool_choice": "none"}
    more |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "stop": None, "seed": None}
    more |= {"response_format": {"type": "text"}, "service_tier": "auto", "stream_options": None}
    status, answer = server.json("POST", CHAT, HELLO | more)
    assert (status, answer["choices"]) == (200, plain)
    more = {"echo": False, "best_of": 1, "suffix": None, "logprobs": None, "model": None}
    assert server.json("POST", COMPLETIONS, PROMPT | more)[0] == 200


def test_replies_as_clients_send_them_back(server: Running) -> None:
    """What OpenAI's library makes of a reply (`model_dump`) is a turn of the next request."""
    reply = server.client.chat.completions.create(model="tiny", max_tokens=4, messages=HELLO["messages"])
    dumped = reply.choices[0].message.model_dump()
    assert {"tool_calls", "annotations", "refusal"} <= dumped.keys()
    plain = {"role": "assistant", "content": reply.choices[0].message.content}
    said = [
        server.json("POST", CHAT, HELLO | {"messages": [*HELLO["messages"], turn, *HELLO["messages"]]})
        for turn in (plain, dumped, dumped | {"tool_calls": [], "annotations": []})
    ]
    assert [status for status, _ in said] == [200] * 3
    assert said[0][1]["choices"] == said[1][1]["choices"] == said[2][1]["choices"]
    empty = {"role": "assistant", "content": None, "tool_calls": []}
    assert server.json("POST", CHAT, HELLO | {"messages": [*HELLO["messages"], empty]})[0] == 200
    called = empty | {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    status, answer = server.json("POST", CHAT, HELLO | {"messages": [*HELLO["messages"], called]})
    assert (status, answer["error"]["param"]) == (400, "messages")
    status, _ = server.json("POST", CHAT, HELLO | {"messages": [{"role": "user", "content": None}]})
    assert status == 400


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{no json", "application/json", "not JSON"),
        (b"[1]", "application/json", "not a JSON object"),
        (b"", "application/json", "not a JSON object"),
        (json.dumps(HELLO).encode(), "text/plain", "Content-Type: application/json"),
        (b"[" * 50_000, "application/json", "parsing"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "memory": ' + b"[" * 900 + b"]" * 900 + b"}",
            "application/json",
            "deep",
        ),
    ],
)
def test_bodies_that_are_no_request(server: Running, body: bytes, kind: str, message: str) -> None:
    status, answer = server.json("POST", CHAT, body, {"Content-Type": kind})
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("GET", "/page/nothing.js", 404), ("GET", "/docs", 404)],
)
def test_what_is_not_there(server: Running, method: str, path: str, status: int) -> None:
    found, answer = server.json(method, path)
    assert (found, answer["error"]["message"]) == (status, f"there is no {method} {path}")
    assert server.ask(method, path)[1].get("allow") == ("POST" if status == 405 else None)


def test_a_route_to_nowhere(server: Running) -> None:
    for body in (
        {},
        {"messages": []},
        {"text": "x", "blocked": ["9"]},
        {"text": "x", "blocked": ["x"]},
        {"texts": "x"},
    ):
        assert server.json("POST", "/v1/memory/route", body)[0] == 400
