"""A bank's sources: the files, what edits make of them, and what is found in them for an answer."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from tiny import HashEmbedder, give_sources, make_anchor, make_bank, make_model

from mlx_hiermem import load
from mlx_hiermem.bank import commit, edit, merge, quantize
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE, BankSources, write_sources
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError, OutputError
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.session import Session
from mlx_hiermem.source_search import SourceSearch, messages_with, text_with
from mlx_hiermem.tree import Route

TEXTS_OF = {
    "0.1": [("Neon", "Neon glows red. It is a noble gas."), ("Argon", "Argon makes up 1 % of air.")],
    "1.0": [("Gold", "Gold has the symbol Au. It does not rust.")],
    "2.2": [("Iron", "Iron rusts. Its symbol is Fe.")],
}


@pytest.fixture
def bank(tmp_path: pathlib.Path) -> pathlib.Path:
    """A bank with sources in three of its leaves; the anchor is beside it."""
    folder = make_model(tmp_path / "model") / "bank"
    give_sources(folder, TEXTS_OF, HashEmbedder().embed)
    return folder


def kept(folder: pathlib.Path) -> dict[str, list[str]]:
    """Leaf -> titles, as the files have them."""
    sources = MemoryBank.open(folder).sources
    assert sources is not None
    return {str(one.leaf): [window.title for window in one.windows] for one in sources.all()}


@pytest.mark.parametrize("first", [WINDOWS_FILE, INDEX_FILE])
def test_of_an_edit_that_was_interrupted_between_the_two_files_readers_see_the_new_ones(
    bank: pathlib.Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    replace, moved = os.replace, list[str]()

    def failing(source: pathlib.Path, target: pathlib.Path) -> None:
        """The disk takes one of the two, and no more."""
        name = os.path.relpath(target, bank)
        if name in (WINDOWS_FILE, INDEX_FILE) and (name != first or moved):
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)
        moved.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        order = [first, *{WINDOWS_FILE, INDEX_FILE} - {first}]
        patch.setattr(commit, "LAST", (*order, *commit.LAST))
        with pytest.raises(OutputError, match="Read-only"):
            edit.remove(bank, [Path((0, 1))])
    assert kept(bank) == {"1.0": ["Gold"], "2.2": ["Iron"]}
    opened = MemoryBank.open(bank).sources
    edit.unblock(bank, [])  # finishes it
    assert kept(bank) == {"1.0": ["Gold"], "2.2": ["Iron"]}
    assert opened is not None
    assert [one.windows[0].title for one in opened.all()] == ["Gold", "Iron"], "opened before, read after"


def test_a_leaf_is_read_as_it_was_written(bank: pathlib.Path) -> None:
    opened = MemoryBank.open(bank)
    assert opened.sources is not None
    assert opened.manifest.sources is not None
    assert (opened.manifest.sources.windows, opened.manifest.sources.documents) == (4, 4)
    assert (len(opened.sources), list(map(str, opened.sources.leaves()))) == (4, ["0.1", "1.0", "2.2"])
    found = opened.sources.read(Path((0, 1)))
    assert found is not None
    assert [(w.document, w.title, w.place) for w in found.windows] == [
        ("Neon.txt", "Neon", "line 1"),
        ("Argon.txt", "Argon", "line 2"),
    ]
    assert [window.text for window in found.windows] == [text for _, text in TEXTS_OF["0.1"]]
    exact = HashEmbedder().embed([text for _, text in TEXTS_OF["0.1"]])
    np.testing.assert_allclose(found.vectors, exact, atol=1e-3)  # float16
    assert [opened.sources.read(Path(path)) for path in ((0, 0), (0,), (2, 1))] == [None] * 3
    assert list(check(opened)) == []
    lines = (bank / WINDOWS_FILE).read_text().splitlines()
    assert json.loads(lines[2]) == {
        "leaf": "1.0",
        "document": "Gold.txt",
        "title": "Gold",
        "place": "line 1",
        "text": TEXTS_OF["1.0"][0][1],
    }


def test_sources_that_are_open_stay_what_they_were(bank: pathlib.Path) -> None:
    opened = MemoryBank.open(bank).sources
    assert opened is not None
    before = list(opened.all())
    edit.remove(bank, [Path((0, 1))])
    assert [one.windows for one in opened.all()] == [one.windows for one in before]


def test_a_bank_without_sources_has_none(tmp_path: pathlib.Path) -> None:
    opened = MemoryBank.open(make_bank(tmp_path / "bank", make_anchor(tmp_path / "anchor")))
    assert opened.sources is None
    assert "sources" not in json.loads((tmp_path / "bank" / MANIFEST).read_text())


def test_many_leaves_open_as_quickly_as_few(tmp_path: pathlib.Path) -> None:
    """Opening looks at the header alone; a search touches as many entries as there are bits in their number."""
    from mlx_hiermem.bank.sources import LeafSources, SourceWindow

    vector = HashEmbedder().embed(["x"])

    def leaf(row: int) -> LeafSources:
        window = SourceWindow(f"{row}.txt", "", "", f"text {row}")
        return LeafSources(Path.of_row(row, 4, 8), [window], vector)

    write_sources(tmp_path, map(leaf, range(0, 4096, 3)), 8, 384)
    sources = BankSources(tmp_path)
    for row in range(4096):
        found = sources.read(Path.of_row(row, 4, 8))
        assert (found.windows[0].text if found else None) == (f"text {row}" if row % 3 == 0 else None)


def test_damaged_sources_are_named(bank: pathlib.Path) -> None:
    whole = (bank / WINDOWS_FILE).read_bytes()
    (bank / WINDOWS_FILE).write_bytes(whole[:-10])
    with pytest.raises(BankError, match=r"windows\.jsonl has changed"):
        _ = MemoryBank.open(bank).sources
    with pytest.raises(BankError, match=r"is not what index\.safetensors was made for"):
        BankSources(bank)
    assert any(WINDOWS_FILE in line for line in check(MemoryBank.open(bank)))
    (bank / WINDOWS_FILE).write_bytes(whole.replace(b'"title"', b'"tittle"')[: len(whole) - 4] + b"oops")
    with pytest.raises(BankError, match="cannot read"):
        BankSources(bank).read(Path((0, 1)))
    (bank / INDEX_FILE).write_bytes(b"no safetensors")
    with pytest.raises(BankError, match="truncated or damaged"):
        BankSources(bank)
    manifest = json.loads((bank / MANIFEST).read_text())
    del manifest["sources"]
    (bank / MANIFEST).write_text(json.dumps(manifest))
    assert f"{WINDOWS_FILE} is not in the manifest" in list(check(MemoryBank.open(bank)))


def test_what_is_removed_is_gone_from_the_sources(bank: pathlib.Path) -> None:
    edit.remove(bank, [Path((0, 1)), Path((2,))])
    assert kept(bank) == {"1.0": ["Gold"]}
    assert b"Neon" not in (bank / WINDOWS_FILE).read_bytes()
    assert b"Iron" not in (bank / WINDOWS_FILE).read_bytes()
    assert list(check(MemoryBank.open(bank))) == []
    edit.remove(bank, [Path((1, 0))])
    assert kept(bank) == {}
    assert list(check(MemoryBank.open(bank))) == []


def test_a_block_brings_its_windows_along(bank: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bank, other)
    edit.remove(bank, [Path((1, 0))])
    vector = MemoryBank.open(other).tree.centroids[1][1, 0]
    edit.add(bank, other / block_name(Path((1, 0))), Path((1, 0)), centroid=np.array(vector))
    assert kept(bank) == {leaf: [title for title, _ in rows] for leaf, rows in TEXTS_OF.items()}
    # In the place of another block, that one's windows go; a file of no bank brings none.
    edit.add(bank, other / block_name(Path((0, 1))), Path((2, 2)), replacing=True)
    assert kept(bank)["2.2"] == ["Neon", "Argon"]
    alone = tmp_path / "alone.safetensors"
    shutil.copyfile(other / block_name(Path((1, 0))), alone)
    edit.add(bank, alone, Path((2, 2)), replacing=True)
    assert "2.2" not in kept(bank)
    assert list(check(MemoryBank.open(bank))) == []


def test_merging_and_quantising_keep_the_sources(bank: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bank, other)
    edit.remove(bank, [Path((1,)), Path((2,))])
    edit.remove(other, [Path((0,))])
    merge.merge(MemoryBank.open(bank), MemoryBank.open(other), tmp_path / "merged")
    assert kept(tmp_path / "merged") == {leaf: [title for title, _ in rows] for leaf, rows in TEXTS_OF.items()}
    opened = MemoryBank.open(tmp_path / "merged")
    quantize.quantize(opened, tmp_path / "small", quantize.design(opened.config, [8]))
    assert kept(tmp_path / "small") == kept(tmp_path / "merged")
    for folder in ("merged", "small"):
        assert list(check(MemoryBank.open(tmp_path / folder))) == []


def test_of_a_conflict_the_preferred_banks_windows_count(bank: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = make_bank(tmp_path / "other", bank.parent / "anchor", seed=0)
    blocks = MemoryBank.open(other).manifest.blocks
    shutil.copyfile(other / block_name(Path((0, 0))), tmp_path / "block.safetensors")
    assert len(blocks) == 12
    edit.add(other, tmp_path / "block.safetensors", Path((0, 1)), replacing=True)
    give_sources(other, {"0.1": [("Xenon", "Xenon is heavy.")]}, HashEmbedder().embed)
    for prefer, titles in (("first", ["Neon", "Argon"]), ("second", ["Xenon"])):
        merge.merge(MemoryBank.open(bank), MemoryBank.open(other), tmp_path / prefer, prefer)
        assert kept(tmp_path / prefer) == {"0.1": titles, "1.0": ["Gold"], "2.2": ["Iron"]}


# In use


@pytest.fixture
def model(bank: pathlib.Path) -> MemoryModel:
    loaded = load(bank.parent)
    assert loaded.bank
    loaded._router = Router(loaded.bank.tree, HashEmbedder())  # type: ignore[arg-type]
    return loaded


def question_for(model: MemoryModel, leaf: str) -> str:
    """A text that is routed to a leaf."""
    return next(t for n in range(999) if str(model.router.route(t := f"question {n}").path) == leaf)


def test_the_memories_of_sources(model: MemoryModel) -> None:
    question = question_for(model, "1.0")
    none, source, both = (model.choose(memory, question) for memory in ("none", "source", "fetched+source"))
    assert none.passage is None
    assert source.passage == both.passage
    assert source.passage is not None
    assert source.passage.title == "Gold"
    said = {memory: model.chat(question, memory=memory, max_tokens=4) for memory in MemoryChoice.WORDS}
    assert said["source"].selection.blocks == ()
    assert said["source"].selection.memory_bytes == 0
    assert said["fetched+source"].selection.blocks == said["fetched"].selection.blocks == ("1", "1.0")
    assert said["none"].prompt_tokens == said["fetched"].prompt_tokens < said["source"].prompt_tokens
    assert said["source"].prompt_tokens == said["fetched+source"].prompt_tokens
    told = [{"role": "user", "content": question}]
    assert said["source"].text == model.chat(messages_with(told, source.passage), memory="none", max_tokens=4).text
    plain = model.generate(question, memory="source", max_tokens=4)
    assert plain.text == model.generate(text_with(question, source.passage), memory="none", max_tokens=4).text
    assert said["source"].selection.to_json()["passage"] == {
        "document": "Gold.txt",
        "title": "Gold",
        "place": "line 1",
    }
    in_batch = model.batch([question] * 5, memory=MemoryChoice.WORDS, chat=True, max_tokens=4)
    assert [one.text for one in in_batch] == [said[memory].text for memory in MemoryChoice.WORDS]


def test_kv_caches_are_not_shared_between_memories(model: MemoryModel) -> None:
    question = question_for(model, "1.0")
    keys = [model.select(memory, question).key for memory in MemoryChoice.WORDS]
    assert len(set(keys)) == len(keys)


def test_a_conversation_has_the_passage_of_its_last_question(model: MemoryModel) -> None:
    first, second = question_for(model, "1.0"), question_for(model, "2.2")
    session = Session(model, "source", max_tokens=3)
    for question, title in ((first, "Gold"), (second, "Iron")):
        reply = "".join(session.ask(question))
        assert session.selection.passage is not None
        assert session.selection.passage.title == title
        assert session.messages[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    alone = model.chat(messages_with(session.messages[:-1], session.selection.passage), memory="none", max_tokens=3)
    assert alone.text == reply
    assert session.kv_tokens > 0


def test_where_there_are_no_sources(model: MemoryModel, tmp_path: pathlib.Path) -> None:
    bare = load(make_model(tmp_path / "bare"))
    assert bare.bank
    bare._router = Router(bare.bank.tree, HashEmbedder())  # type: ignore[arg-type]
    for memory in ("source", "fetched+source"):
        with pytest.raises(BankError, match="keeps no sources"):
            bare.choose(memory, "abc")
        with pytest.raises(BankError, match="keeps no sources"):
            Session(bare).use(memory)
    with pytest.raises(BankError, match="keeps no sources"):
        bare.sources("abc")
    assert bare.chat("abc", max_tokens=2).sources is None
    empty = question_for(model, "0.0")  # a leaf that has no windows
    assert model.choose("source", empty).passage is None
    assert model.sources(empty) == () == model.chat(empty, max_tokens=2).sources
    assert model.chat(empty, memory="none", max_tokens=2).sources is None


def test_a_follow_up_is_looked_for_with_the_question_before_it() -> None:
    from mlx_hiermem.source_search import asked

    talk = ["About cats?", "What of gold?", "And its symbol?"]
    assert asked(talk, Route(Path((1,)), stayed=True)) == "What of gold? And its symbol?"
    assert asked(talk, Route(Path((1,)))) == "And its symbol?" == asked("And its symbol?", Route(stayed=True))


def test_the_sentence_that_says_it_is_named(bank: pathlib.Path) -> None:
    embedder = Embedder.load()
    give_sources(bank, TEXTS_OF, lambda texts: embedder.embed(texts))
    sources = MemoryBank.open(bank).sources
    assert sources is not None
    search = SourceSearch(sources, embedder)
    said = search.find(Path((0, 1)), "Which colour does neon glow in?", "It glows red.")
    assert (said[0].title, said[0].document, said[0].place) == ("Neon", "Neon.txt", "line 1")
    assert said[0].sentence == "Neon glows red."
    assert 0.4 <= said[0].score <= 1
    assert str(said[0]) == "Neon (Neon.txt, line 1): Neon glows red."
    said = search.find(Path((2, 2)), "What is the symbol of iron?", "The symbol of iron is Fe.")
    assert said[0].sentence == "Its symbol is Fe."
    assert search.find(Path((2, 2)), "What is the symbol of iron?", "The symbol of iron is Zn.") == ()
    assert search.find(Path((1, 1)), "What is the symbol of iron?", "Fe") == ()
    # Without an answer, what suits the question, best first.
    suits = search.find(Path((0, 1)), "How much of the air is argon?")
    assert [source.title for source in suits] == ["Argon", "Neon"]
    passage = search.passage(Path((0, 1)), "How much of the air is argon?")
    assert passage is not None
    assert passage.title == "Argon"
    assert search.passage(Path(()), "How much of the air is argon?") is None
