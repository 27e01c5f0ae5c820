"""Which model and which memory a client gets by the name it asks for, and models that come, go and change."""

from __future__ import annotations

import pathlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Gate, Running, eventually, serving, tiny_model
from tiny import CONFIG, HashEmbedder, make_anchor, make_bank, make_model

from mlx_hiermem import load
from mlx_hiermem.bank.edit import remove
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router

LONGER = MemoryConfig("ffn", 3, (6, 3), (1, 3), 32, dtype="float32", ffn_width=64, q_width=32, kv_width=16)
ELSEWHERE = MemoryConfig("ffn", 3, (4, 2), (0, 2), 32, dtype="float32", ffn_width=64, q_width=32, kv_width=16)


def complete(client: openai.OpenAI, model: str, memory: Any = None, **options: Any) -> Any:
    more = {"memory": memory} if memory is not None else {}
    return client.completions.create(
        **{"model": model, "prompt": "hello there", "max_tokens": 12} | options, extra_body=more
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def other(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Another bank for the same anchor, with longer blocks; a folder without the anchor."""
    return make_bank(tmp_path / "other", folder / "anchor", LONGER, seed=5)


def with_embedder(model: MemoryModel) -> MemoryModel:
    assert model.bank
    model._router = Router(model.bank.tree, HashEmbedder(), model.bank.policy)  # type: ignore[arg-type]
    return model


@pytest.fixture
def two(folder: pathlib.Path, other: pathlib.Path) -> Iterator[Running]:
    """A server of both."""

    def both() -> dict[str, MemoryModel]:
        first = tiny_model(folder)
        return {"first": first, "second": with_embedder(load(other, beside=[first]))}

    with serving(both, allow_loading=True) as running:
        yield running


# memories by the model's name


@pytest.mark.slow
def test_a_memory_can_be_part_of_the_name(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        client = running.client
        for memory in ("none", "generic", "fetched", "1", "1.2"):
            named = complete(client, f"tiny:{memory}")
            assert named.model == f"tiny:{memory}"
            assert named.choices == complete(client, "tiny", memory).choices
            assert named.memory["memory"] == memory
        assert complete(client, "tiny:off").memory["memory"] == "none"  # an earlier word
        assert complete(client, "tiny:1.2", {"blocked": ["2"]}).memory["path"] == "1.2"
        assert client.models.retrieve("tiny:1.2").parent == "tiny"  # type: ignore[attr-defined]
        parents = {row.id: getattr(row, "parent", None) for row in client.models.list()}
        assert parents["tiny"] is None
        assert parents["tiny:none"] == parents["tiny:0"] == "tiny"
        for name in ("tiny:lots", "tiny:9", "tiny:0.9", "other:none", "tiny:"):
            with pytest.raises(openai.NotFoundError) as caught:
                complete(client, name)
            assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="take one"):
            complete(client, "tiny:none", "generic")


def test_blocked_nodes_are_not_offered(folder: pathlib.Path) -> None:
    BankPolicy(frozenset([Path((1,))])).write(folder / "bank" / POLICY)
    with serving(lambda: tiny_model(folder)) as running:
        assert "tiny:1" not in [row.id for row in running.client.models.list()]
        with pytest.raises(openai.BadRequestError, match="blocked"):
            complete(running.client, "tiny:1.2")


def test_a_model_without_a_bank_has_one_name(tmp_path: pathlib.Path) -> None:
    anchor = make_anchor(tmp_path / "anchor")
    with serving(lambda: load(anchor)) as running:
        assert [row.id for row in running.client.models.list()] == ["tiny"]
        assert complete(running.client, "tiny:none").choices == complete(running.client, "tiny").choices
        with pytest.raises(openai.NotFoundError):
            complete(running.client, "tiny:generic")


def test_any_model(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder), any_model=True) as running:
        reply = complete(running.client, "gpt-4o")
        assert reply.model == "tiny"
        assert reply.choices == complete(running.client, "tiny").choices
        with pytest.raises(openai.NotFoundError):
            complete(running.client, "tiny:lots")  # a name of ours, with a memory there is not


# several models


@pytest.mark.slow
def test_banks_of_one_anchor_share_it_and_its_batch(
    two: Running, folder: pathlib.Path, other: pathlib.Path
) -> None:
    first, second = two.engine.models.values()
    assert first.anchor is second.anchor
    ids = [row.id for row in two.client.models.list()]
    assert {"first", "first:generic", "second", "second:2"} <= set(ids)
    asked = [(name, memory) for memory in ("none", "generic", "fetched", "0.1") for name in ("first", "second")]
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda row: complete(two.client, *row, max_tokens=30), asked))
    said = {row: reply.choices[0].text for row, reply in zip(asked, replies, strict=True)}
    assert said["first", "none"] == said["second", "none"]
    assert said["first", "0.1"] != said["second", "0.1"]
    alone = make_model_of(folder, other)
    for name, folder_alone in (("first", folder), ("second", alone)):
        with serving(lambda folder=folder_alone: tiny_model(folder)) as running:  # type: ignore[misc]
            for memory in ("none", "generic", "fetched", "0.1"):
                assert complete(running.client, "tiny", memory, max_tokens=30).choices[0].text == said[name, memory]


def make_model_of(folder: pathlib.Path, bank: pathlib.Path) -> pathlib.Path:
    """The same anchor with the other bank, as a model's folder."""
    whole = folder.parent / "whole"
    shutil.copytree(folder / "anchor", whole / "anchor")
    shutil.copytree(bank, whole / "bank")
    return whole


def test_other_anchors_and_designs_are_loaded_for_themselves(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = tiny_model(folder)
    make_bank(tmp_path / "elsewhere", folder / "anchor", ELSEWHERE)
    with pytest.raises(AnchorError, match="a bank without its anchor"):
        load(tmp_path / "elsewhere", beside=[first])
    make_bank(tmp_path / "strange" / "bank", make_anchor(tmp_path / "strange" / "anchor", seed=3), CONFIG)
    strange = load(tmp_path / "strange", beside=[first])
    assert strange.anchor is not first.anchor
    strange.config["max_position_embeddings"] = 250
    with serving(lambda: {"first": first, "strange": with_embedder(strange)}) as running:
        asked = ("first:none", "strange:none", "first:0.1", "strange:0.1")
        alone = [complete(running.client, name, max_tokens=30).choices[0].text for name in asked]
        assert len(set(alone)) == 4
        with ThreadPoolExecutor(4) as pool:
            together = pool.map(lambda name: complete(running.client, name, max_tokens=30).choices[0].text, asked)
        assert list(together) == alone


def test_three_models_of_one_anchor_take_off_what_is_not_theirs(folder: pathlib.Path) -> None:
    first = load(folder / "anchor")
    second = load(folder / "anchor", beside=[first])
    full = load(folder, beside=[first, second])
    alone = second.generate("abc", max_tokens=8).text
    assert full.generate("abc", memory="0.1", max_tokens=8).text != alone
    full.select("0.1", "")  # stays attached
    assert [one.generate("abc", max_tokens=8).text for one in (second, first)] == [alone] * 2


def test_a_plain_anchor_beside_its_bank(folder: pathlib.Path) -> None:
    def both() -> dict[str, MemoryModel]:
        plain = load(folder / "anchor")
        return {"plain": plain, "full": with_embedder(load(folder, beside=[plain]))}

    with serving(both) as running:
        plain, full = running.engine.models.values()
        assert plain.anchor is full.anchor
        assert complete(running.client, "plain").choices == complete(running.client, "full:none").choices
        assert complete(running.client, "full:0.1").choices != complete(running.client, "plain").choices


def test_banks_come_and_go(two: Running, other: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hiermem.router.load_embedder", lambda _: HashEmbedder())
    said = complete(two.client, "second:0.1").choices[0].text
    assert two.json("POST", "/v1/banks/unload", {"name": "second"}) == (200, {"unloaded": "second"})
    with pytest.raises(openai.NotFoundError):
        complete(two.client, "second")
    assert two.json("POST", "/v1/banks/load", {"name": "third", "path": str(other)}) == (200, {"loaded": "third"})
    assert complete(two.client, "third:0.1").choices[0].text == said
    status, answer = two.json("POST", "/v1/banks/load", {"name": "first", "path": str(other)})
    assert (status, answer["error"]["param"]) == (400, "name")
    status, answer = two.json("POST", "/v1/banks/load", {"name": "x", "path": str(other / "nowhere")})
    assert status == 400
    assert two.json("POST", "/v1/banks/unload", {"name": "second"})[0] == 404
    assert two.json("POST", "/v1/banks/unload", {"name": "first"})[0] == 200
    assert two.json("POST", "/v1/banks/unload", {"name": "third"})[0] == 400
    assert complete(two.client, "third:0.1").choices[0].text == said


@pytest.mark.parametrize("way", ["load", "unload"])
def test_of_two_that_change_the_models_at_once_the_second_sees_what_the_first_did(
    two: Running, other: pathlib.Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("mlx_hiermem.router.load_embedder", lambda _: HashEmbedder())
    names = ("third", "third") if way == "load" else ("first", "second")
    more = {"path": str(other)} if way == "load" else {}
    held, engine = threading.Event(), two.engine
    engine._inbox.put(lambda: held.wait(30) and None)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(two.json, "POST", f"/v1/banks/{way}", {"name": name} | more) for name in names]
        waiting = eventually(lambda: engine._inbox.qsize() == 2)
        held.set()
        assert waiting
        assert sorted(each.result()[0] for each in asked) == [200, 400]
    assert len(engine.models) == (3 if way == "load" else 1)
    assert two.json("GET", "/health")[0] == 200


def test_what_can_be_loaded_is_listed(
    two: Running, folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models and banks beside those that are served, and those that came from the hub; no other folder."""
    monkeypatch.setenv("HIERMEM_CACHE", str(tmp_path / "cache"))
    pulled = tmp_path / "cache" / "models" / "me" / "pulled"
    (pulled / "anchor").mkdir(parents=True)
    for name in ("third/anchor", "pictures", ".hidden/anchor"):
        (tmp_path / name).mkdir(parents=True)
    status, answer = two.json("GET", "/v1/banks")
    assert (status, answer["allow_loading"]) == (200, True)
    blocks = [len(model.bank.manifest.blocks) for model in two.engine.models.values() if model.bank]
    assert [row["name"] for row in answer["data"]] == ["first", "second"]
    assert [row["blocks"] for row in answer["data"]] == blocks
    assert [row["path"] for row in answer["found"]] == [str(pulled), str(tmp_path / "third")]


def test_banks_are_loaded_only_where_that_is_allowed(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        answer = running.json("GET", "/v1/banks")[1]
        assert (answer["allow_loading"], answer["found"]) == (False, [])
        assert running.json("POST", "/v1/banks/load", {"name": "x", "path": str(folder)})[0] == 404


def test_what_runs_goes_on_when_its_bank_goes(two: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    said = complete(two.client, "second:0.1", max_tokens=30).choices[0].text
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, two.client, "second:0.1", max_tokens=30)
        gate.let(3)
        assert eventually(lambda: two.engine.active == 1)
        unloaded = ThreadPoolExecutor(1).submit(two.json, "POST", "/v1/banks/unload", {"name": "second"})
        gate.open()
        assert unloaded.result()[0] == 200
        assert waiting.result().choices[0].text == said


# banks that change on disk


def test_an_edited_bank_is_taken_up(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        before = complete(running.client, "tiny:0.1").choices[0].text
        path = complete(running.client, "tiny").memory["path"]
        remove(folder / "bank", [Path.parse(path)])
        after = complete(running.client, "tiny")
        assert after.memory["path"] != path
        with pytest.raises(openai.BadRequestError):
            complete(running.client, "tiny", path)
        if path != "0.1":
            assert complete(running.client, "tiny:0.1").choices[0].text == before


def test_an_edited_policy_is_taken_up(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        path = complete(running.client, "tiny").memory["path"]
        BankPolicy(frozenset([Path.parse(path)])).write(folder / "bank" / POLICY)
        assert complete(running.client, "tiny").memory["avoided"] == [path]
        (folder / "bank" / POLICY).unlink()
        assert complete(running.client, "tiny").memory["path"] == path


def test_a_replaced_bank_has_new_weights_under_the_same_names(folder: pathlib.Path, other: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        before = complete(running.client, "tiny:0.1", max_tokens=30).choices[0].text
        shutil.move(folder / "bank", folder.parent / "old")
        assert complete(running.client, "tiny:0.1", max_tokens=30).choices[0].text == before  # gone for a moment
        shutil.move(other, folder / "bank")
        after = complete(running.client, "tiny:0.1", max_tokens=30).choices[0].text
    assert after != before
    with serving(lambda: tiny_model(folder)) as running:
        assert complete(running.client, "tiny:0.1", max_tokens=30).choices[0].text == after


def test_a_damaged_edit_leaves_the_bank_as_it_was(folder: pathlib.Path) -> None:
    with serving(lambda: tiny_model(folder)) as running:
        before = complete(running.client, "tiny:0.1").choices[0].text
        manifest = (folder / "bank" / "bank.json").read_text()
        (folder / "bank" / "bank.json").write_text(manifest[:100])
        assert complete(running.client, "tiny:0.1").choices[0].text == before
        (folder / "bank" / "bank.json").write_text(manifest)
        assert complete(running.client, "tiny:0.1").choices[0].text == before
