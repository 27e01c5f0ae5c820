"""A model as an assistant's tools, by the official client: in one process, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from mcp import Client, MCPError, StdioServerParameters
from serving import tiny_model
from tiny import HashEmbedder, give_sources, make_anchor, make_model

from mlx_hiermem import load
from mlx_hiermem.apps.server.address import address, bind
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.mcp import serve_http, tools

MAIN = "from mlx_hiermem.apps.cli.main import main; main()"


@pytest.fixture(scope="module")
def engine(folder: pathlib.Path) -> Iterator[Engine]:
    engine = Engine(lambda: {"tiny": tiny_model(folder)}, max_batch=4)
    engine.start()
    yield engine
    engine.stop()


def called(server: Any, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The results of calls that one client makes at the same time."""

    async def run() -> list[Any]:
        async with Client(server) as client:
            return await asyncio.gather(*(client.call_tool(name, arguments) for name, arguments in calls))

    return asyncio.run(run())


def test_the_tools_say_what_they_are(engine: Engine) -> None:
    async def run() -> dict[str, Any]:
        async with Client(tools(engine, "tiny")) as client:
            return {tool.name: tool for tool in (await client.list_tools()).tools}

    found = asyncio.run(run())
    assert found.keys() == {"ask", "route", "sources"}
    assert found["ask"].input_schema["required"] == ["question"]
    assert "fetched" in json.dumps(found["ask"].input_schema)
    assert "tiny" in found["ask"].description


def test_answers_are_those_of_the_api(engine: Engine, folder: pathlib.Path) -> None:
    from serving import serving

    question = {"role": "user", "content": "hello there"}
    with serving(lambda: tiny_model(folder)) as running:
        reply: Any = running.client.chat.completions.create(model="tiny", messages=[question], max_tokens=20)  # type: ignore[list-item]
    (found,) = called(tools(engine, "tiny"), ("ask", {"question": "hello there", "max_tokens": 20}))
    answer = found.structured_content
    assert answer["answer"] == reply.choices[0].message.content.strip()
    assert (answer["memory"], answer["path"]) == ("fetched", reply.memory["path"])
    assert answer["topics"] == reply.memory["labels"]
    assert answer["complete"] is False
    (route,) = called(tools(engine, "tiny"), ("route", {"text": "hello there"}))
    assert route.structured_content["path"] == reply.memory["path"]
    assert route.structured_content["distances"] == pytest.approx(reply.memory["distances"])


def test_calls_that_come_together(engine: Engine) -> None:
    asked = [
        ("ask", {"question": "hello there", "memory": memory, "max_tokens": 20})
        for memory in ("none", "generic", "fetched", "0.1", "2.2", "1")
    ]
    alone = [called(tools(engine, "tiny"), call)[0].structured_content for call in asked]
    together = [result.structured_content for result in called(tools(engine, "tiny"), *asked)]
    assert together == alone
    assert len({answer["answer"] for answer in alone}) > 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ask", {"question": "x", "memory": "lots"}, "no memory 'lots'"),
        ("ask", {"question": "x", "memory": "9"}, "no node 9"),
        ("ask", {"question": "x" * 400}, "more than the model's"),
        ("ask", {"question": "x", "max_tokens": 0}, "max_tokens"),
        ("ask", {"question": "\ud800"}, "Unicode"),
        ("ask", {}, "question"),
        ("route", {"text": ""}, ""),
    ],
)
def test_errors_are_told_to_the_assistant(
    engine: Engine, name: str, arguments: dict[str, Any], message: str
) -> None:
    (result,) = called(tools(engine, "tiny"), (name, arguments))
    if message:
        assert result.is_error
        assert message in result.content[0].text


def test_a_model_without_a_bank(tmp_path: pathlib.Path) -> None:
    anchor = make_anchor(tmp_path / "anchor")
    engine = Engine(lambda: {"tiny": load(anchor)})
    engine.start()
    try:
        ask, route = called(
            tools(engine, "tiny"), ("ask", {"question": "x", "max_tokens": 3}), ("route", {"text": "x"})
        )
        assert ask.structured_content["memory"] == "none"
        assert route.is_error
    finally:
        engine.stop()


def test_sources(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model")
    path = str(tiny_model(folder).choose("fetched", "What glows red?").path)
    give_sources(folder / "bank", {path: [("Neon", "Neon glows red.")]}, HashEmbedder().embed)
    engine = Engine(lambda: {"tiny": tiny_model(folder)})
    engine.start()
    try:
        (found,) = called(tools(engine, "tiny"), ("sources", {"question": "What glows red?"}))
        (source,) = found.structured_content["sources"]
        assert (source["title"], source["sentence"]) == ("Neon", "Neon glows red.")
    finally:
        engine.stop()


def test_a_bank_without_sources(engine: Engine) -> None:
    (found,) = called(tools(engine, "tiny"), ("sources", {"question": "What glows red?"}))
    assert found.is_error
    assert "no sources" in found.content[0].text


@pytest.mark.slow
def test_over_standard_input_and_output(folder: pathlib.Path) -> None:
    command = StdioServerParameters(
        command=sys.executable, args=["-c", MAIN, "mcp", str(folder)], env=dict(os.environ)
    )
    found, again = called(
        command, *[("ask", {"question": "hello there", "memory": memory}) for memory in ("none", "0.1")]
    )
    assert found.structured_content["memory"] == "none"
    assert again.structured_content["path"] == "0.1"


@pytest.mark.slow
def test_over_http(engine: Engine) -> None:
    with bind("127.0.0.1", 0, "secret") as listening:
        threading.Thread(
            target=serve_http, args=(tools(engine, "tiny"), listening, "", 10_000), daemon=True
        ).start()
        (found,) = called(f"{address(listening)}/mcp", ("ask", {"question": "hello there", "memory": "none"}))
        assert found.structured_content["memory"] == "none"
    with bind("127.0.0.1", 0, "secret") as listening:
        arguments = (tools(engine, "tiny"), listening, "secret", 10_000)
        threading.Thread(target=serve_http, args=arguments, daemon=True).start()
        with pytest.raises((MCPError, ExceptionGroup)):
            called(f"{address(listening)}/mcp", ("route", {"text": "x"}))
