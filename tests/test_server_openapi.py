"""The document that the server publishes, from which other programs make their requests and what they expect."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, serving, tiny_model

ROUTES = {
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/v1/memory"),
    *("/v1/memory/route", "/v1/banks", "/v1/learning", "/health", "/metrics"),
}


@pytest.fixture(scope="module")
def locked(folder: pathlib.Path) -> Iterator[Running]:
    with serving(lambda: tiny_model(folder), api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def document(locked: Running) -> Any:
    status, found = locked.json("GET", "/openapi.json")
    assert status == 200
    return found


def test_it_needs_the_key(locked: Running) -> None:
    status, _ = locked.json("GET", "/openapi.json", headers={"Authorization": "Bearer wrong"})
    assert status == 401


def test_it_has_every_route_and_field(document: Any) -> None:
    assert document["paths"].keys() >= ROUTES
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields.keys() >= {"messages", "memory", "stream", "temperature", "response_format", "tools"}


def test_it_has_each_form_of_a_field(document: Any) -> None:
    def forms(request: str, field: str) -> set[str]:
        found = document["components"]["schemas"][request]["properties"][field]["anyOf"]
        return {one.get("type", "object") for one in found} - {"null"}

    assert forms("ChatRequest", "memory") == {"string", "array", "object"}
    for request, field in (
        ("Message", "content"),
        ("ChatRequest", "stop"),
        ("CompletionRequest", "prompt"),
        ("ResponsesRequest", "input"),
        ("EmbeddingRequest", "input"),
    ):
        assert forms(request, field) == {"string", "array"}, field


def test_what_is_refused_has_the_shape_that_it_says(document: Any, locked: Running) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["responses"].keys() == {"200", "default"}, path
    _, found = locked.json("POST", "/v1/chat/completions", {"messages": []})
    refused = document["components"]["schemas"]["Refusal"]
    assert found["error"].keys() == refused["properties"].keys() == set(refused["required"])


def test_what_need_not_be_given_may_be_null(document: Any, locked: Running) -> None:
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    rest = {name: field for name, field in fields.items() if name != "prompt"}
    assert all({"type": "null"} in field["anyOf"] for field in rest.values())
    status, _ = locked.json("POST", "/v1/completions", {"prompt": "hello", **dict.fromkeys(rest), "max_tokens": 2})
    assert status == 200


def test_a_path_says_what_may_be_done_with_it(locked: Running) -> None:
    status, headers, _ = locked.ask("PATCH", "/v1/responses/x")
    assert (status, headers["allow"]) == (405, "DELETE, GET")
    status, headers, _ = locked.ask("PATCH", "/v1/models")
    assert (status, headers["allow"]) == (405, "GET")


def test_streams_are_said_to_be_streams(document: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
