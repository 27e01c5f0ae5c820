"""A bank whose drive is unplugged in a conversation: it goes on with the blocks that are here, and says so."""

from __future__ import annotations

import logging
import pathlib
import shutil

import pytest
from chatting import talk
from serving import serving, tiny_model
from tiny import HashEmbedder, give_sources, load_tiny, make_model

from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.bank.sources import BankSources
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.session import Session

HERE, THERE = "0.1", "0.2"  # two leaves below one node: HERE is in the cache when the drive goes


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = make_model(tmp_path / "model")
    give_sources(folder / "bank", {HERE: [("Gold", "Gold does not rust.")]}, HashEmbedder().embed)
    return folder


@pytest.fixture
def model(folder: pathlib.Path) -> MemoryModel:
    loaded = load_tiny(folder)
    assert isinstance(loaded.search and loaded.bank and loaded.bank.sources, BankSources)
    return loaded


def unplug(folder: pathlib.Path) -> None:
    (folder / "bank").rename(folder / "elsewhere")


def plug_in(folder: pathlib.Path) -> None:
    (folder / "elsewhere").rename(folder / "bank")


def reply(session: Session, memory: str) -> str:
    session.reset()
    session.use(memory)
    return "".join(session.ask("What is gold?"))


def test_a_conversation_goes_on_with_the_blocks_that_are_here(model: MemoryModel, folder: pathlib.Path) -> None:
    session = Session(model, max_tokens=6)
    whole = {memory: reply(session, memory) for memory in (THERE, "0")}
    assert model.cache
    model.cache._blocks.clear()
    whole[HERE] = reply(session, HERE)
    unplug(folder)
    assert reply(session, HERE) == whole[HERE], "all its blocks are in memory"
    assert not session.is_away
    assert reply(session, THERE) == whole["0"], "what is above it is in memory"
    assert session.selection.blocks == ("0",)
    assert session.is_away
    assert reply(session, "2.2")
    assert session.selection.blocks == ()
    assert reply(session, "fetched+source")
    assert session.selection.passage is None
    assert model.response
    assert model.response.sources is None
    plug_in(folder)
    assert reply(session, THERE) == whole[THERE]
    assert session.selection.blocks == ("0", THERE)
    assert not session.is_away


def test_a_block_that_is_missing_in_a_bank_that_is_there_is_an_error(
    model: MemoryModel, folder: pathlib.Path
) -> None:
    (folder / "bank/blocks/0/2.safetensors").unlink()
    with pytest.raises(BankError, match="cannot read the block"):
        reply(Session(model), THERE)
    assert model.cache
    assert not model.cache.away


def test_blocks_of_the_hub_cannot_be_brought_to_a_drive_that_is_gone(folder: pathlib.Path) -> None:
    Origin("me/tiny", "0" * 40).write(folder / "bank")
    model = load_tiny(folder)
    assert model.bank
    assert model.bank.remote
    unplug(folder)
    with pytest.raises(BankError, match="Is its drive there"):
        model.bank.read(Path.parse(THERE))
    assert model.select(THERE, "").blocks == ()


def test_the_chat_says_so_once_and_that_it_is_back(
    model: MemoryModel, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(model, HERE, max_tokens=2)

    def said(*lines: str) -> list[str]:
        assert talk(session, list(lines), monkeypatch)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("hiermem: ")]

    assert said("hm?", f"/memory {THERE}", "hm?") == []
    unplug(folder)
    (line,) = said("/memory 1.1", "hm?", "and now?", "/memory 2.1", "hm?")
    assert "cannot be reached; the chat goes on with the memory that is here" in line
    plug_in(folder)
    (line,) = said("hm?", "/memory 1.1", "hm?")
    assert line == f"hiermem: the bank is back: {folder / 'bank'}"


def test_a_server_goes_on_and_logs_it_once(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    def ask(memory: str) -> tuple[int, list[str]]:
        body = {"model": "tiny", "prompt": "hm?", "max_tokens": 2, "memory": memory}
        status, answer = running.json("POST", "/v1/completions", body)
        return status, answer["memory"]["blocks"]

    with caplog.at_level(logging.WARNING), serving(lambda: tiny_model(folder)) as running:
        assert ask(HERE) == (200, ["0", HERE])
        unplug(folder)
        assert [ask(THERE), ask("1.1"), ask(HERE)] == [(200, ["0"]), (200, []), (200, ["0", HERE])]
        plug_in(folder)
        assert ask(THERE) == (200, ["0", THERE])
    lines = [record.getMessage() for record in caplog.records if "<MemoryBank" in record.getMessage()]
    assert [line.split("> ")[1] for line in lines] == ["cannot be reached: goes on with its cache", "is back"]


def test_a_bank_that_comes_back_edited_is_taken_up(model: MemoryModel, folder: pathlib.Path) -> None:
    session = Session(model, max_tokens=2)
    reply(session, HERE)
    unplug(folder)
    reply(session, "1.1")
    shutil.copytree(folder / "elsewhere", folder / "bank")  # another file system: other inodes
    reply(session, "1.1")
    assert not session.is_away
    assert session.selection.blocks == ("1", "1.1")
