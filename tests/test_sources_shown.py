"""Where an answer's source is shown: the server's answers, the chat and `hiermem ask`; the page has its own."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Running, serving
from tiny import Aimed, HashEmbedder, give_sources, make_model

from mlx_hiermem import load
from mlx_hiermem.apps.cli import slash
from mlx_hiermem.apps.cli.display import console
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.session import Session
from mlx_hiermem.source_search import Source, SourceSearch, messages_with, text_with

NAMES = {"neon": Path((1, 1)), "iron": Path((2, 0))}
NEON = Source("Neon.txt", "Neon", "line 1", "Neon glows red.", 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = make_model(tmp_path_factory.mktemp("sources") / "model")
    texts = {
        "1.1": [("Neon", "Neon glows red."), ("Argon", "Argon is in the air.")],
        "2.0": [("Iron", "It rusts.")],
    }
    give_sources(folder / "bank", texts, HashEmbedder().embed)
    return folder


def opened_model(folder: pathlib.Path) -> MemoryModel:
    model = load(folder)
    assert model.bank
    embedder: Any = Aimed(model.bank.tree, NAMES, Path((0, 1)))
    model._router = Router(model.bank.tree, embedder, model.bank.policy)
    model.config["max_position_embeddings"] = 800
    return model


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """What is found for every answer, as a test wishes; random replies say nothing."""
    wished: list[Source] = []
    monkeypatch.setattr(SourceSearch, "find", lambda *_: tuple(wished))
    return wished


@pytest.fixture(scope="module")
def server(folder: pathlib.Path) -> Iterator[Running]:
    with serving(lambda: opened_model(folder)) as running:
        yield running


def asked(server: Running, memory: Any, **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "tell me of neon"}], "memory": memory, "max_tokens": 6} | more
    status, answer = server.json("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer


def test_the_servers_answers_have_sources(server: Running, found: list[Source]) -> None:
    for memory in ("fetched", "source", "fetched+source", "1.1"):
        assert asked(server, memory)["sources"] == []
    found.append(NEON)
    for memory in ("fetched", "source"):
        assert asked(server, memory)["sources"] == [
            {
                "document": "Neon.txt",
                "title": "Neon",
                "place": "line 1",
                "sentence": "Neon glows red.",
                "score": 0.9,
            }
        ]
    for memory in ("none", "generic"):
        assert asked(server, memory)["sources"] is None
    several = asked(server, "fetched", n=2)
    assert [len(each) for each in several["sources"]] == [1, 1]
    body = {"messages": [{"role": "user", "content": "of neon"}], "stream": True, "max_tokens": 6}
    status, _, data = server.ask("POST", "/v1/chat/completions", body)
    chunks = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: {")]
    assert status == 200
    assert [chunk["sources"][0]["title"] for chunk in chunks if "sources" in chunk] == ["Neon"]
    assert chunks[-1]["sources"]


def test_the_server_has_the_memories_of_sources(server: Running, folder: pathlib.Path) -> None:
    """They are the passage in the prompt, without blocks or with the path's."""
    model, talk = opened_model(folder), [{"role": "user", "content": "tell me of neon"}]
    passage = model.choose("source", "tell me of neon").passage
    for memory, same in (("source", "none"), ("fetched+source", "1.1")):
        answer, by_hand = asked(server, memory), asked(server, same, messages=messages_with(talk, passage))
        assert answer["choices"] == by_hand["choices"]
        assert answer["usage"]["prompt_tokens"] == by_hand["usage"]["prompt_tokens"]
        assert answer["memory"]["passage"]["title"] in ("Neon", "Argon")
        assert answer["memory"]["blocks"] == by_hand["memory"]["blocks"]
    status, rows = server.json("GET", "/v1/models")
    assert status == 200
    assert {"tiny:source", "tiny:fetched+source"} <= {row["id"] for row in rows["data"]}
    named = asked(server, {"blocked": []}, model="tiny:source")
    assert named["memory"]["memory"] == "source"
    told = text_with("of neon", model.choose("source", "of neon").passage)
    texts = []
    for prompt, memory in (("of neon", "source"), (told, "none")):
        body = {"prompt": prompt, "memory": memory, "max_tokens": 4}
        texts.append(server.json("POST", "/v1/completions", body)[1]["choices"][0]["text"])
    assert texts[0] == texts[1]
    assert server.json("GET", "/v1/memory")[1]["sources"] == {"windows": 3, "documents": 3}


def test_the_server_shows_the_passages_of_a_leaf(server: Running) -> None:
    status, found = server.json("GET", "/v1/memory/passages?path=1.1")
    assert (status, found["path"]) == (200, "1.1")
    assert [(one["title"], one["text"]) for one in found["passages"]] == [
        ("Neon", "Neon glows red."),
        ("Argon", "Argon is in the air."),
    ]
    for path, expected, words in (
        ("2.2", 404, "keeps no passages of 2.2"),
        ("9.9.9", 404, "keeps no passages"),
        ("x", 400, "'x' is not a path"),
        ("", 400, "is not a path"),
    ):
        status, answer = server.json("GET", f"/v1/memory/passages?path={path}")
        assert (status, words in answer["error"]["message"]) == (expected, True)


def test_a_server_without_sources_says_so(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model")
    with serving(lambda: opened_model(folder)) as running:
        body = {"messages": [{"role": "user", "content": "neon"}], "memory": "source"}
        status, answer = running.json("POST", "/v1/chat/completions", body)
        assert status == 400
        assert "keeps no sources" in answer["error"]["message"]
        assert running.json("GET", "/v1/memory")[1]["sources"] is None
        status, answer = running.json("GET", "/v1/memory/passages?path=1.1")
        assert (status, "keeps no sources" in answer["error"]["message"]) == (400, True)
        assert "tiny:source" not in [row["id"] for row in running.json("GET", "/v1/models")[1]["data"]]


def test_chat_names_the_source(
    folder: pathlib.Path, found: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(opened_model(folder), max_tokens=4)

    def said(line: str) -> str:
        capsys.readouterr()
        console.width = 100
        slash.run(session, line)
        return " ".join(capsys.readouterr().out.split())

    "".join(session.ask("of neon"))
    assert "(1.1). no source in this bank says this" in said("/why")
    assert "says the answer" not in said("/sources")
    found.append(NEON)
    "".join(session.ask("of neon"))
    assert "Neon (Neon.txt, line 1) says: “Neon glows red.”" in said("/why")
    text = said("/sources")
    assert "Neon (Neon.txt, line 1) [says the answer] Neon glows red." in text
    assert "Argon (Argon.txt, line 2) Argon is in the air." in text
    assert said("/memory fetched+source").endswith("each turn is routed, and a passage goes into the prompt")
    "".join(session.ask("of iron"))
    assert "Iron (Iron.txt, line 1) [in the prompt] It rusts." in said("/sources")


def test_ask_names_the_source(
    folder: pathlib.Path, found: list[Source], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_hiermem.router.load_embedder", lambda _: HashEmbedder())

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["hiermem", "ask", "-m", str(folder), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        said = capsys.readouterr()
        return said.out, said.err

    bank = load(folder).bank
    assert bank
    router = Router.of_bank(bank)
    routed = next(text for n in range(99) if str(router.route(text := f"question {n}").path) == "1.1")
    assert "no source in this bank says this" in run(routed, "-n", "3")[1]
    found.append(NEON)
    assert "from Neon (Neon.txt, line 1): “Neon glows red.”" in run(routed, "-n", "3")[1]
    out, _ = run(routed, "-n", "3", "--json", "--memory", "source")
    assert json.loads(out)["sources"][0]["sentence"] == "Neon glows red."
    assert "from" not in run(routed, "-n", "3", "--memory", "none")[1]
