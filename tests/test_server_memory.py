"""A server's memories: each request's own, its route, what it shows of the bank, and models without one."""

from __future__ import annotations

import itertools
import pathlib
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving import CONTEXT, Running, eventually, serving, tiny_model
from test_server import CHAT, chat, complete
from tiny import NAMES, REST, give_sources, load_aimed, make_anchor, make_model

from mlx_hiermem import load
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel

SUBJECTS = ("about neon", "about iron", "about rice", "about tin")


SEVERAL = ("fetched", "none", "generic", "0.1", "2.2", "1", "2.0", "0.1")


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> MemoryModel:
    """The same model, without a server."""
    return tiny_model(folder)


# memory


def test_memory_is_routed_by_the_question(client: openai.OpenAI, model: MemoryModel) -> None:
    routed = model.router.route("hello there")
    for reply in (chat(client, "fetched"), complete(client, "auto"), complete(client, {"use": "fetched"})):
        assert reply.memory["memory"] == "fetched"
        assert reply.memory["path"] == str(routed.path)
        assert reply.memory["labels"] == [f"topic {node}" for node in routed.path.prefixes()]
        assert reply.memory["distances"] == pytest.approx(routed.distances)
        assert reply.memory["blocks"] == [str(node) for node in routed.path.prefixes()]
        assert reply.memory["avoided"] == []
        assert reply.memory["stayed"] is False
        assert reply.memory["memory_bytes"] > 0
    default = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12)  # type: ignore[arg-type]
    assert default.choices == chat(client, "fetched").choices


def test_every_form_of_the_field_memory(client: openai.OpenAI, model: MemoryModel) -> None:
    path = model.router.route("hello there").path
    other = model.router.route("hello there", [path]).path
    top = model.router.route("hello there", [Path(path[:1])]).path
    assert path[0] == other[0] != top[0]
    expected = {
        "none": "",
        "generic": "",
        "1.2": "1.2",
        "1": "1",
        (str(path),): str(other),
        (str(path), str(path[0])): str(top),
    }
    for asked, taken in expected.items():
        reply = complete(client, list(asked) if isinstance(asked, tuple) else asked)
        assert reply.memory["path"] == taken
    assert complete(client, {"use": "2.1"}).memory["path"] == "2.1"
    reply = complete(client, {"use": "fetched", "blocked": [str(path)]})
    assert reply.memory["path"] == str(other)
    assert reply.memory["avoided"] == [str(path)]
    assert complete(client, "none").memory["blocks"] == []
    assert complete(client, "generic").memory["blocks"] == ["generic"]
    assert complete(client, {"use": "none", "blocked": ["1"]}).memory["memory"] == "none"


def test_memory_is_in_a_streams_first_and_last_chunk(client: openai.OpenAI) -> None:
    for stream in (chat(client, "1.2", stream=True), complete(client, "1.2", stream=True)):
        chunks = list(stream)
        carrying = [chunk for chunk in chunks if hasattr(chunk, "memory")]
        assert carrying == [chunks[0], chunks[-1]]
        assert chunks[0].memory == chunks[-1].memory
        assert chunks[0].memory["path"] == "1.2"


def test_blocking_changes_the_text(client: openai.OpenAI) -> None:
    free = complete(client, "fetched")
    blocked = complete(client, [free.memory["path"]])
    assert blocked.memory["path"] != free.memory["path"]
    assert blocked.choices[0].text != free.choices[0].text


def test_a_conversation_is_routed_by_its_turns(client: openai.OpenAI, model: MemoryModel) -> None:
    texts = ["about neon", "and its symbol?", "thanks"]
    messages = [{"role": "user", "content": text} for text in texts]
    turn = model.router.conversation(texts)
    memory = chat(client, "fetched", messages=messages).memory
    assert (memory["path"], memory["stayed"]) == (str(turn.topic.path), turn.route.stayed)


def test_a_question_that_leads_elsewhere_may_leave_out_what_was_said(
    client: openai.OpenAI, model: MemoryModel
) -> None:
    first, second = next(pair for pair in itertools.permutations(SUBJECTS, 2) if leads(model, pair))
    ask, last = ({"role": "user", "content": text} for text in (first, second))
    reply, system = {"role": "assistant", "content": "hm"}, {"role": "system", "content": "Be brief."}
    whole = chat(client, "fetched", messages=[system, ask, reply, last])
    topic = chat(client, {"use": "fetched", "history": "topic"}, messages=[system, ask, reply, last])
    alone = chat(client, "fetched", messages=[system, last])
    assert topic.usage.prompt_tokens == alone.usage.prompt_tokens < whole.usage.prompt_tokens
    assert topic.choices[0].message.content == alone.choices[0].message.content
    assert topic.memory["path"] == alone.memory["path"] == whole.memory["path"]
    bound = {"use": topic.memory["path"], "history": "topic"}  # a path that is named takes the whole conversation
    assert chat(client, bound, messages=[system, ask, reply, last]).usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_reply_is_as_long_as_its_own_prompt_leaves_room_for(client: openai.OpenAI, model: MemoryModel) -> None:
    """Whatever was said before, where the prompt is without it."""
    first, second = next(pair for pair in itertools.permutations(SUBJECTS, 2) if leads(model, pair))
    ask, last = ({"role": "user", "content": text} for text in (first, second))
    free = {"max_tokens": openai.NOT_GIVEN}
    alone = chat(client, "fetched", messages=[last], **free)
    assert alone.usage.completion_tokens > 100
    for length in (100, 2 * CONTEXT):
        said = [ask, {"role": "assistant", "content": "x" * length}, last]
        topic = chat(client, {"use": "fetched", "history": "topic"}, messages=said, **free)
        assert topic.usage.completion_tokens == alone.usage.completion_tokens
        assert topic.choices == alone.choices


def test_a_reply_behind_a_passage_is_as_long_as_there_is_room(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model")

    def aimed() -> MemoryModel:
        model = load_aimed(folder, NAMES, REST)
        model.config["max_position_embeddings"] = CONTEXT
        return model

    give_sources(folder / "bank", {"0.1": [("Neon", "neon is a gas. " * 8)]}, aimed().router.embedder.embed)
    with serving(aimed) as running:
        asked = {"messages": [{"role": "user", "content": "neon"}], "memory": "source"}
        usage = running.json("POST", "/v1/chat/completions", asked)[1]["usage"]
        assert usage["completion_tokens"] > 10
        assert usage["total_tokens"] == CONTEXT
        asked["messages"] = [{"role": "user", "content": "neon " * 25}]
        status, answer = running.json("POST", "/v1/chat/completions", asked)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == "messages"


def leads(model: MemoryModel, texts: tuple[str, ...]) -> bool:
    """Whether the second question takes a path of its own."""
    return model.router.conversation(texts).route.turns == 1


def test_a_question_that_is_like_nothing_says_so(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = next(iter(server.engine.models.values())).router
    monkeypatch.setattr(router, "policy", BankPolicy(reach=1e-3))
    memory = chat(client, "fetched", messages=[{"role": "user", "content": "How do I cook rice?"}]).memory
    assert (memory["far"], memory["path"], memory["blocks"]) == (True, "", [])


@pytest.mark.slow
def test_several_clients_get_what_each_gets_alone(client: openai.OpenAI, server: Running) -> None:
    """Eight at once, on a batch of four."""
    prompts = [f"prompt number {index}" for index in range(len(SEVERAL))]

    def say(row: tuple[str, str]) -> tuple[str, str]:
        reply = complete(client, row[0], prompt=row[1], max_tokens=30)
        return reply.choices[0].text, reply.memory["path"]

    rows = list(zip(SEVERAL, prompts, strict=True))
    expected = [say(row) for row in rows]
    assert len({text for text, _ in expected}) == len(rows)
    with ThreadPoolExecutor(len(rows)) as pool:
        assert list(pool.map(say, rows)) == expected


def test_the_banks_overview_and_what_changes(server: Running, model: MemoryModel) -> None:
    status, overview = server.json("GET", "/v1/memory")
    assert status == 200
    assert model.bank
    assert (overview["model"], overview["context"]) == ("tiny", CONTEXT)
    assert (overview["branching"], overview["depth"], overview["generic"]) == (3, 2, True)
    assert overview["memory"]["kind"] == "ffn"
    assert overview["memory"]["layers"] == [1, 3]
    rows = {row["path"]: row for row in overview["nodes"]}
    assert rows.keys() == {str(path) for path in model.bank.manifest.blocks}
    assert (rows["1.2"]["label"], rows["1.2"]["level"]) == ("topic 1.2", 2)
    assert rows["1.2"]["bytes"] == model.bank.manifest.blocks[Path((1, 2))].bytes
    complete(server.client, "1.2")
    assert eventually(lambda: server.engine.active == 0)
    status, state = server.json("GET", "/v1/memory/state")
    assert state["states"].keys() == rows.keys()
    assert state["states"]["1.2"] == state["states"]["1"] == "in memory"
    assert (state["active"], state["queued"], state["remote_bytes"]) == (0, 0, 0)
    assert state["bytes_read"] > 0
    assert state["cache"] == {"blocks": state["cache"]["blocks"]} | {
        "bytes": server.engine.model.cache.bytes,  # type: ignore[union-attr]
        "budget": server.engine.model.cache.budget,  # type: ignore[union-attr]
    }


def test_routes_of_texts_and_conversations(server: Running, model: MemoryModel) -> None:
    found = model.router.route("hello there")
    status, routed = server.json("POST", "/v1/memory/route", {"text": "hello there"})
    assert status == 200
    assert routed["path"] == str(found.path)
    assert routed["nodes"] == [str(node) for node in found.path.prefixes()]
    assert routed["labels"] == [f"topic {node}" for node in routed["nodes"]]
    assert routed["distances"] == pytest.approx(found.distances)
    assert routed["milliseconds"] > 0
    assert server.json("POST", "/v1/memory/route", {"messages": CHAT})[1]["path"] == routed["path"]
    blocked = server.json("POST", "/v1/memory/route", {"text": "hello there", "blocked": [routed["path"]]})[1]
    assert blocked["avoided"] == [routed["path"]]
    assert blocked["path"] != routed["path"]


def test_the_banks_own_policy(folder: pathlib.Path) -> None:
    def closed() -> MemoryModel:
        model = tiny_model(folder)
        assert model.bank
        path = model.router.route("hello there").path
        model.bank.__dict__["policy"] = model.router.policy = BankPolicy(frozenset([Path(path[:1])]))
        return model

    with serving(closed) as running:
        (node,) = running.engine.model.router.policy.blocked
        states = running.json("GET", "/v1/memory/state")[1]["states"]
        assert {path for path, state in states.items() if state == "blocked"} == {
            path for path in states if path.split(".")[0] == str(node)
        }
        assert complete(running.client, "fetched").memory["avoided"] == [str(node)]
        with pytest.raises(openai.BadRequestError, match="is blocked"):
            complete(running.client, str(node))


def test_a_model_without_a_bank(tmp_path: pathlib.Path) -> None:
    anchor = make_anchor(tmp_path / "anchor")
    with serving(lambda: load(anchor)) as running:
        reply = chat(running.client, "fetched")
        assert reply.memory["memory"] == "none"
        assert reply.choices == chat(running.client, "none").choices
        assert running.json("GET", "/v1/memory")[1]["nodes"] == []
        assert running.json("GET", "/v1/memory/state")[1]["states"] == {}
        for memory in ("generic", "1.2", ["1"]):
            with pytest.raises(openai.BadRequestError) as caught:
                chat(running.client, memory)
            assert caught.value.param == "memory"
        assert running.json("POST", "/v1/memory/route", {"text": "x"})[0] == 400
        assert b"hiermem_active_sequences" in running.ask("GET", "/metrics")[2]
