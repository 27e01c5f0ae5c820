"""Sharing a model: push and pull, against a hub of our own on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hub_server import REPO, HubServer, Repository, environment, files_of, use_in_this_process
from tiny import HashEmbedder, give_sources, make_anchor, make_bank
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.hub import RemoteFile
from mlx_hiermem.bank.remote import Origin, node_of
from mlx_hiermem.bank.sources import WINDOWS_FILE
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, AnchorMismatchError, BankError, HierMemError, HubError, OutputError
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import model_card, push

CLOSED = "http://127.0.0.1:9"  # nobody listens on the discard port
BLOCKS = {"0", "1", "2"} | {f"{a}.{b}" for a in range(3) for b in range(3)}


def blocks_in(folder: pathlib.Path) -> set[str]:
    return {
        str(node_of(name.removeprefix("bank/"))) for name in files_of(folder) if name.startswith("bank/blocks/")
    }


def copy(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(model, folder))


def remote_name(node: str) -> str:
    return "bank/" + block_name(Path.parse(node))


# --- push


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
    # What was pulled without them is edited without them, and a later pull does not bring them back.
    edit.remove(bank.root, [Path((1, 2))])
    pull(REPO, tmp_path / "out1")
    assert not (bank.root / WINDOWS_FILE).exists()
    push(source, REPO, with_sources=False)
    head = hub.repo(REPO).head
    assert not [name for name in head if name.startswith("bank/sources")]
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


# --- pull


@pytest.mark.parametrize(
    ("only", "lazy", "expected"),
    [
        (("2.1",), False, {"2", "2.1"}),
        (("2",), False, {"2", "2.0", "2.1", "2.2"}),
        (("TOPIC 0.2", "1.1"), False, {"0", "0.2", "1", "1.1"}),
        (("topic",), False, BLOCKS),
        (("1.0",), True, {"0", "1", "2", "1.0"}),
        ((), True, {"0", "1", "2"}),
    ],
)
def test_part_of_a_model(
    shared: Repository,
    hub: HubServer,
    tmp_path: pathlib.Path,
    only: tuple[str, ...],
    lazy: bool,
    expected: set[str],
) -> None:
    pulled = pull(REPO, tmp_path / "out", only=only, lazy=lazy)
    assert blocks_in(tmp_path / "out") == expected
    assert {name for name in hub.downloads() if "blocks" in name} == set(map(remote_name, expected))
    assert (tmp_path / "out/anchor/model.safetensors").is_file()
    assert not (tmp_path / "out/bank/generic.safetensors").exists()
    bank = MemoryBank.open(tmp_path / "out/bank")
    assert {str(node) for node in bank.manifest.blocks} == BLOCKS
    states = {str(node): bank.state(node) for node in bank.manifest.blocks}
    assert states == {node: "on disk" if node in expected else "remote" for node in BLOCKS}
    assert (pulled.blocks, pulled.remote_blocks) == (len(expected), 12 - len(expected))
    assert list(bank.problems()) == []


def test_tree_alone(shared: Repository, tmp_path: pathlib.Path) -> None:
    pull(REPO, tmp_path / "out", tree_only=True)
    with pytest.raises(AnchorError, match=r"pulled without its anchor.*bank pull me/tiny .*out --lazy"):
        load(tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == {"bank/bank.json", "bank/remote.json", "bank/tree.safetensors"}
    assert MemoryBank.open(tmp_path / "out/bank").tree.depth == 2


def test_more_is_added_in_place(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> None:
    out, pinned = tmp_path / "out", shared.branches["main"]
    pull(REPO, out, only=["2.1"])
    shared.commit(shared.head | {"bank/bank.json": b"{}"})  # a later version is no concern of this copy
    hub.requests.clear()
    pulled = pull(REPO, out, only=["topic 0"], disk_budget=5000)
    assert pulled.revision == pinned
    assert blocks_in(out) == {"2", "2.1", "0", "0.0", "0.1", "0.2"}
    assert len(hub.downloads()) == 4
    origin = Origin.read(out / "bank")
    assert origin == Origin(REPO, pinned, subtrees=frozenset({Path((0,)), Path((2, 1))}), disk_budget_bytes=5000)
    with pytest.raises(OutputError, match=f"holds revision {pinned[:12]}"):
        pull(REPO, out, revision="main")
    with pytest.raises(OutputError, match="was not pulled from me/other"):
        pull("me/other", out)
    assert pull(REPO, out).remote_blocks == 0
    assert not (out / ".incoming").exists()


def test_what_was_removed_here_does_not_come_back(shared: Repository, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    pull(REPO, out)
    manifest = MemoryBank.open(out / "bank").manifest
    blocks = {node: row for node, row in manifest.blocks.items() if node != (2, 1)}
    manifest = dataclasses.replace(manifest, blocks=blocks)
    manifest.write(out / "bank/bank.json")
    (out / "bank" / block_name(Path((2, 1)))).unlink()
    pull(REPO, out)
    assert blocks_in(out) == BLOCKS - {"2.1"}


def test_pull_says_what_is_wrong(
    shared: Repository, hub: HubServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(HubError, match="no repository me/none, or it is private"):
        pull("me/none", out)
    with pytest.raises(HubError, match="no revision v9"):
        pull(REPO, out, revision="v9")
    with pytest.raises(BankError, match=r"nothing in the bank is called 'chemistry'.*“topic 0”, “topic 0.0”"):
        pull(REPO, out, only=["chemistry"])
    assert not list(tmp_path.glob("out*"))
    hub.repo("me/plain").commit({"config.json": b"{}"})
    with pytest.raises(HubError, match=r"me/plain is not a memory model: it has no bank/bank.json"):
        pull("me/plain", out)
    hub.repo("me/half").commit({name: content for name, content in shared.head.items() if "anchor" not in name})
    with pytest.raises(HubError, match="it has no anchor/"):
        pull("me/half", out)
    shared.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="or it is private"):
        pull(REPO, out)
    out.mkdir()
    with pytest.raises(OutputError, match="exists already and was not pulled"):
        pull(REPO, out)


def test_another_anchor_than_the_banks_is_refused(
    shared: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_anchor(tmp_path / "anchor", seed=1)
    shared.head["anchor/model.safetensors"] = (other / "model.safetensors").read_bytes()
    with pytest.raises(AnchorMismatchError):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_connection_that_breaks_off(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> None:
    out, broken = tmp_path / "out", remote_name("1.1")
    hub.cut[broken] = 700
    with pytest.raises(HubError, match=r"the hub answered 503.*goes on where it stopped") as caught:
        pull(REPO, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    done = files_of(tmp_path / "out.partial").keys() - {"bank/remote.json"}
    assert broken not in done
    hub.cut.clear()
    hub.requests.clear()
    pull(REPO, out)
    assert blocks_in(out) == BLOCKS
    assert broken in hub.downloads()
    assert not done.intersection(hub.downloads())
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_killed_in_the_middle(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> None:
    out, stalled = tmp_path / "out", remote_name("2")
    hub.stall.add(stalled)
    script = f"from mlx_hiermem.share.pull import pull; import pathlib; pull({REPO!r}, pathlib.Path({str(out)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | environment(hub.url, tmp_path)
    ) as process:
        wait_for(lambda: blocks_in(tmp_path / "out.partial") == BLOCKS - {"2"})
        with pytest.raises(OutputError, match="another process is pulling"):
            pull(REPO, out)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    hub.stall.clear()
    hub.released.set()
    hub.requests.clear()
    pull(REPO, out)
    assert blocks_in(out) == BLOCKS
    assert [name for name in hub.downloads() if "blocks" in name] == [stalled]


def wait_for(condition: object) -> None:
    assert callable(condition)
    end = time.perf_counter() + 60
    while not condition():
        assert time.perf_counter() < end, "nothing happened in a minute"
        time.sleep(0.02)


def test_interrupted_pull_of_an_older_commit_is_not_mixed_in(
    shared: Repository, hub: HubServer, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/journal.jsonl").touch()  # of an interrupted conversion, for instance
    with pytest.raises(OutputError, match=r"something else is being written to .*out.partial"):
        pull(REPO, tmp_path / "out")
    (tmp_path / "out.partial/journal.jsonl").unlink()
    hub.cut[remote_name("1.1")] = 10
    with pytest.raises(HubError):
        pull(REPO, tmp_path / "out")
    hub.cut.clear()
    (tmp_path / "out.partial/anchor").mkdir(exist_ok=True)
    (tmp_path / "out.partial/anchor/old.json").touch()
    shared.commit(dict(shared.head) | {"anchor/new.json": b"{}"})
    pull(REPO, tmp_path / "out")
    names = files_of(tmp_path / "out")
    assert "anchor/new.json" in names
    assert "anchor/old.json" not in names


@pytest.mark.parametrize("name", [remote_name("0.1"), "bank/tree.safetensors", "anchor/model.safetensors"])
def test_wrong_digest(shared: Repository, hub: HubServer, tmp_path: pathlib.Path, name: str) -> None:
    content = bytearray(shared.head[name])
    content[-1] ^= 1  # same size
    hub.instead[name] = bytes(content)
    with pytest.raises(HubError, match=f"{name} of me/tiny is not what the digests say"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert name not in files_of(tmp_path / "out.partial")
    hub.instead.clear()
    pull(REPO, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == shared.head[name]


def test_missing_file(shared: Repository, tmp_path: pathlib.Path) -> None:
    content = shared.head.pop(remote_name("0.1"))
    with pytest.raises(HubError, match="lacks a file that a memory model has"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shared.head[remote_name("0.1")] = content
    pull(REPO, tmp_path / "out")
    assert blocks_in(tmp_path / "out") == BLOCKS


def test_no_code_comes_and_no_name_leads_out(shared: Repository, tmp_path: pathlib.Path) -> None:
    unwanted = [
        "anchor/model.py",
        "anchor/model.pyc",
        "anchor/run.sh",
        "anchor/a.bin",
        "anchor/.profile",
        "README.py",
    ]
    shared.head.update(dict.fromkeys(unwanted, b"print('run me')"))
    shared.head.update({"anchor/more/chat.jinja": b"{}", "LICENSE": b"free"})
    pull(REPO, tmp_path / "out", only=["0"])
    came = files_of(tmp_path / "out").keys()
    assert not came & set(unwanted)
    assert came >= {"anchor/more/chat.jinja", "LICENSE", "anchor/config.json"}
    for name in ("anchor/../../x", "/etc/passwd"):
        with pytest.raises(HubError, match="leads out of its folder"):
            RemoteFile(name, 1)


def test_full_disk_is_said_before_anything_is_downloaded(
    shared: Repository, hub: HubServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OutputError, match=r"are to come.*0.00 GB free"):
        pull(REPO, tmp_path / "out")
    assert hub.downloads() == ["bank/bank.json"]
