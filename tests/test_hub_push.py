"""Pushing a model: what a hub gets, what is left out, and what is refused; on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import pytest
from hub_server import (
    CLOSED,
    REPO,
    HubServer,
    copy,
    files_of,
    use_in_this_process,
)
from tiny import HashEmbedder, give_sources, make_anchor, make_bank
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.commit import STAGING
from mlx_hiermem.bank.quantize import design, quantize
from mlx_hiermem.bank.sources import WINDOWS_FILE
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError, HubError
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import model_card, push


@pytest.mark.slow
def test_pushed_and_pulled_is_the_same_model(hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    steps: list[tuple[int, int]] = []
    source = copy(folder, tmp_path / "source")
    pushed = push(source, REPO, private=True, message="first", progress=lambda *step: steps.append(step))
    assert hub.repo(REPO).private
    assert pushed.commit == hub.repo(REPO).branches["main"]
    assert pushed.url.endswith(pushed.commit)
    assert steps[-1][0] == steps[-1][1] > pushed.bytes  # the tree and the generic block are checked too
    pulled = pull(REPO, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps[-1] == (pulled.bytes, pulled.bytes)
    assert (pulled.revision, pulled.blocks, pulled.remote_blocks) == (pushed.commit, 12, 0)
    ours, theirs = files_of(tmp_path / "out"), files_of(source)
    assert ours.keys() - theirs.keys() == {"bank/remote.json"}
    assert all(ours[name].read_bytes() == theirs[name].read_bytes() for name in theirs)
    assert not list(tmp_path.glob("out.*"))
    answer = load(tmp_path / "out").generate("abc", memory="1.2", max_tokens=5).text
    assert answer == load(folder).generate("abc", memory="1.2", max_tokens=5).text


def test_what_is_blocked_stays_blocked_and_what_is_removed_is_not_pushed(
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = copy(folder, tmp_path / "source")
    gone = (source / "bank/blocks/2/2.safetensors").read_bytes()
    edit.block(source / "bank", [Path((1,))])
    edit.remove(source / "bank", [Path((2, 2))])
    push(source, REPO)
    assert not [name for name, data in hub.repo(REPO).head.items() if data == gone or "blocks/2/2" in name]
    for lazy in (False, True):
        pull(REPO, tmp_path / f"out-{lazy}", lazy=lazy)
        pulled = load(tmp_path / f"out-{lazy}")
        with pytest.raises(BankError, match="is blocked"):
            pulled.generate("abc", memory="1.2", max_tokens=1)
        with pytest.raises(BankError, match="no node"):
            pulled.generate("abc", memory="2.2", max_tokens=1)


def test_card_says_what_it_is_and_leaves_a_persons_text_alone(
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = copy(folder, tmp_path / "source")
    push(source, REPO)
    text = hub.repo(REPO).head["README.md"].decode()
    head = dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())
    assert json.loads(head["license"]) == "cc0-1.0"
    assert "hiermem chat me/tiny" in text
    assert "12 blocks, 5,760 parameters, 25,536 bytes" in text
    (source / "README.md").write_text(text.replace("tiny", "old"))
    push(source, REPO)
    assert hub.repo(REPO).head["README.md"].decode() == text
    (source / "README.md").write_text("my own words")
    push(source, REPO)
    assert hub.repo(REPO).head["README.md"] == b"my own words"


def test_sources_are_shared_only_where_that_was_said(
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = copy(folder, tmp_path / "source")
    give_sources(source / "bank", {"1.2": [("Gold", "Gold does not rust.")]}, HashEmbedder().embed)
    manifest = (source / "bank" / MANIFEST).read_bytes()
    with pytest.raises(BankError, match="keeps the texts that it has learnt"):
        push(source, REPO)
    assert not hub.repos
    push(source, REPO, with_sources=True)
    assert b"Gold does not rust" in hub.repo(REPO).head[f"bank/{WINDOWS_FILE}"]
    assert "1 passages of them" in hub.repo(REPO).head["README.md"].decode()
    for number, wanted in enumerate((True, False)):
        pull(REPO, tmp_path / f"out{number}", sources=wanted)
        bank = MemoryBank.open(tmp_path / f"out{number}" / "bank")
        assert (bank.sources is not None) is wanted
        assert list(bank.problems()) == []
    # What was pulled without them is quantised without them,
    quantize(bank, tmp_path / "few", design(bank.config, [4]))
    assert "sources" not in json.loads((tmp_path / "few" / MANIFEST).read_text())
    assert list(MemoryBank.open(tmp_path / "few").problems()) == []
    # edited without them, and a later pull does not bring them back.
    edit.remove(bank.root, [Path((1, 2))])
    pull(REPO, tmp_path / "out1")
    assert not (bank.root / WINDOWS_FILE).exists()
    half = source / "bank" / STAGING / WINDOWS_FILE  # of an edit that was killed before it stood
    half.parent.mkdir(parents=True)
    half.write_text("Gold does not rust.")
    push(source, REPO, with_sources=False)
    head = hub.repo(REPO).head
    assert not [name for name in head if name.startswith(("bank/sources", "bank/edit"))]
    assert "sources" not in json.loads(head[f"bank/{MANIFEST}"])
    assert "passages of them" not in head["README.md"].decode()
    assert (source / "bank" / MANIFEST).read_bytes() == manifest
    pulled = pull(REPO, tmp_path / "bare")
    assert pulled.blocks == 12
    assert list(MemoryBank.open(tmp_path / "bare" / "bank").problems()) == []


def test_push_asks_whether_sources_go_too(
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy(folder, tmp_path / "source")
    give_sources(source / "bank", {"1.2": [("Gold", "Gold does not rust.")]}, HashEmbedder().embed)
    refused = CliRunner().invoke(app, ["bank", "push", str(source), REPO])
    assert isinstance(refused.exception, BankError)
    assert "--with-sources or --no-sources" in str(refused.exception)
    monkeypatch.setattr("mlx_hiermem.apps.cli.bank_hub.asks", lambda: True)
    done = CliRunner().invoke(app, ["bank", "push", str(source), REPO], input="n\n", catch_exceptions=False)
    assert "1 text of 1 document" in done.output
    assert f"bank/{WINDOWS_FILE}" not in hub.repo(REPO).head
    done = CliRunner().invoke(app, ["bank", "push", str(source), REPO], input="y\n", catch_exceptions=False)
    assert f"bank/{WINDOWS_FILE}" in hub.repo(REPO).head


def test_card_names_sources_and_unusual_licences(folder: pathlib.Path) -> None:
    manifest = MemoryBank.open(folder / "bank").manifest
    rows = {
        node: dataclasses.replace(entry, documents=10, tokens=100, sources=(f"book {node}", "encyclopaedia"))
        for node, entry in manifest.blocks.items()
    }
    text = model_card("a/b", dataclasses.replace(manifest, blocks=rows, licence="Our Own (Licence)"))
    assert "30 documents.\n300 tokens.\n13 sources, all of them in `bank/bank.json`: encyclopaedia, book 0," in text
    assert "book 2.1, …" in text
    assert 'license: "other"\nlicense_name: "our-own-licence"' in text


def test_pushing_again_replaces_what_is_gone(hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = copy(folder, tmp_path / "source")
    first = push(source, REPO)
    hub.repo(REPO).head["bank/blocks/7.safetensors"] = b"left over"
    second = push(source, REPO, branch="next")
    assert first.commit == hub.repo(REPO).branches["main"] != second.commit
    assert "bank/blocks/7.safetensors" not in hub.repo(REPO).commits[second.commit]
    assert "bank/blocks/2.safetensors" in hub.repo(REPO).commits[second.commit]


def test_push_refuses(
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, model: pathlib.Path = folder, repo: str = REPO, private: bool = False) -> None:
        with pytest.raises(HierMemError, match=match) as caught:
            push(model, repo, private=private)
        assert len(str(caught.value)) < 300

    damaged = copy(folder, tmp_path / "damaged")
    (damaged / "bank" / "generic.safetensors").write_bytes(b"?")
    refused("damaged: generic.safetensors has 1 bytes", damaged)
    refused("there is no anchor/", folder / "bank")
    other = make_anchor(tmp_path / "other" / "anchor", seed=1).parent
    make_bank(other / "bank", folder / "anchor")
    refused("was made for the anchor", other)
    assert hub.repos == {}
    refused("may not write to foreign/x", repo="foreign/x")
    refused("is no repository id", repo="a/b/c")
    refused("is no repository id", repo="x")
    hub.repo("me/public").commit({"weights.bin": b"?"})
    refused("exists and is public", repo="me/public", private=True)
    refused("exists and holds something else", repo="me/public")
    hub.meanwhile = lambda: hub.repo(REPO).commit({"bank/bank.json": b"{}"})
    refused("somebody else has pushed to me/tiny meanwhile")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("does not accept your token", repo="me/new")
    monkeypatch.delenv("HF_TOKEN")
    refused("no token for the hub")


def test_push_to_a_hub_out_of_reach(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    use_in_this_process(monkeypatch, CLOSED, tmp_path)
    start = time.perf_counter()
    with pytest.raises(HubError, match=f"cannot reach the hub at {CLOSED}"):
        push(folder, REPO)
    assert time.perf_counter() - start < 10
