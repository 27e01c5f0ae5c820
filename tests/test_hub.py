"""Sharing a model: push, pull, the hub as third tier, and hub ids, against a hub of our own on 127.0.0.1."""

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
from hub_server import TOKEN, HubServer, Repository, environment, use_in_this_process
from tiny import HashEmbedder, give_sources, make_anchor, make_bank, make_model
from typer.testing import CliRunner

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import app, main
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.hub import RemoteFile
from mlx_hiermem.bank.remote import Origin, node_of
from mlx_hiermem.bank.sources import WINDOWS_FILE
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, AnchorMismatchError, BankError, HierMemError, HubError, OutputError
from mlx_hiermem.files import file_digest
from mlx_hiermem.plan import measure
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import model_card, push
from mlx_hiermem.share.resolve import peek, resolve

REPO = "me/tiny"
CLOSED = "http://127.0.0.1:9"  # nobody listens on the discard port
BLOCKS = {"0", "1", "2"} | {f"{a}.{b}" for a in range(3) for b in range(3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Labels are `topic 0` to `topic 2.2`."""
    return make_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def shared(hub: HubServer, model: pathlib.Path) -> Repository:
    """The model's repository on the hub."""
    repo = hub.repo(REPO)
    repo.commit({name: file.read_bytes() for name, file in files_of(model).items()})
    return repo


def files_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


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
def test_pushed_and_pulled_is_the_same_model(hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    steps: list[tuple[int, int]] = []
    source = copy(model, tmp_path / "source")
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
    assert answer == load(model).generate("abc", memory="1.2", max_tokens=5).text


def test_card_says_what_it_is_and_leaves_a_persons_text_alone(
    hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = copy(model, tmp_path / "source")
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
    hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = copy(model, tmp_path / "source")
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
    hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy(model, tmp_path / "source")
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


def test_card_names_sources_and_unusual_licences(model: pathlib.Path) -> None:
    manifest = MemoryBank.open(model / "bank").manifest
    rows = {
        node: dataclasses.replace(entry, documents=10, tokens=100, sources=(f"book {node}", "encyclopaedia"))
        for node, entry in manifest.blocks.items()
    }
    text = model_card("a/b", dataclasses.replace(manifest, blocks=rows, licence="Our Own (Licence)"))
    assert "30 documents.\n300 tokens.\n13 sources, all of them in `bank/bank.json`: encyclopaedia, book 0," in text
    assert "book 2.1, …" in text
    assert 'license: "other"\nlicense_name: "our-own-licence"' in text


def test_pushing_again_replaces_what_is_gone(hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = copy(model, tmp_path / "source")
    first = push(source, REPO)
    hub.repo(REPO).head["bank/blocks/7.safetensors"] = b"left over"
    second = push(source, REPO, branch="next")
    assert first.commit == hub.repo(REPO).branches["main"] != second.commit
    assert "bank/blocks/7.safetensors" not in hub.repo(REPO).commits[second.commit]
    assert "bank/blocks/2.safetensors" in hub.repo(REPO).commits[second.commit]


def test_push_refuses(
    hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, folder: pathlib.Path = model, repo: str = REPO, private: bool = False) -> None:
        with pytest.raises(HierMemError, match=match) as caught:
            push(folder, repo, private=private)
        assert len(str(caught.value)) < 300

    damaged = copy(model, tmp_path / "damaged")
    (damaged / "bank" / "generic.safetensors").write_bytes(b"?")
    refused("damaged: generic.safetensors has 1 bytes", damaged)
    refused("there is no anchor/", model / "bank")
    other = make_anchor(tmp_path / "other" / "anchor", seed=1).parent
    make_bank(other / "bank", model / "anchor")
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
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    use_in_this_process(monkeypatch, CLOSED, tmp_path)
    start = time.perf_counter()
    with pytest.raises(HubError, match=f"cannot reach the hub at {CLOSED}"):
        push(model, REPO)
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


# --- the third tier


@pytest.fixture
def lazy(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> pathlib.Path:
    pull(REPO, tmp_path / "lazy", lazy=True)
    hub.requests.clear()
    return tmp_path / "lazy"


def test_blocks_come_when_they_are_needed(lazy: pathlib.Path, hub: HubServer, model: pathlib.Path) -> None:
    opened = load(lazy)
    assert hub.requests == []
    answer = opened.generate("abc", memory="1.2", max_tokens=5).text
    assert answer == load(model).generate("abc", memory="1.2", max_tokens=5).text
    assert hub.downloads() == [remote_name("1.2")]
    assert opened.bank is not None
    assert opened.cache is not None
    entry = opened.bank.manifest.blocks[Path((1, 2))]
    assert (opened.cache.stats.remote_fetches, opened.cache.stats.remote_bytes) == (1, entry.bytes)
    assert opened.bank.state(Path((1, 2))) == "on disk"
    load(lazy).select("1.2", "")
    assert len(hub.downloads()) == 1  # it stayed
    opened.select("generic", "")
    assert hub.downloads()[1:] == ["bank/generic.safetensors"]
    assert not list(lazy.glob("bank/.fetching-*"))


def test_out_of_reach_the_error_says_which_block_and_how_to_get_it(
    lazy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    use_in_this_process(monkeypatch, CLOSED, tmp_path)
    opened = load(lazy)
    opened.select("1", "")
    start = time.perf_counter()
    with pytest.raises(BankError) as caught:
        opened.select("1.2", "")
    assert time.perf_counter() - start < 10
    text = str(caught.value)
    assert text.startswith(
        f"the block 1.2 is not on this machine, and did not come: cannot reach the hub at {CLOSED}"
    )
    assert f"`hiermem bank pull {REPO} {lazy} --only 1.2`" in text
    assert "\n" not in text
    with pytest.raises(BankError, match="the generic block is not on this machine"):
        opened.select("generic", "")


def test_damaged_remote_block_is_thrown_away(lazy: pathlib.Path, hub: HubServer, shared: Repository) -> None:
    hub.instead[remote_name("1.2")] = shared.head[remote_name("1.1")]  # of the same size, another block
    bank = MemoryBank.open(lazy / "bank")
    with pytest.raises(BankError, match=r"the block 1.2.*not what the digests say"):
        bank.read(Path((1, 2)))
    assert bank.state(Path((1, 2))) == "remote"
    hub.instead.clear()
    assert bank.read(Path((1, 2))).nbytes > 0


def test_disk_budget_evicts_what_was_used_longest_ago(lazy: pathlib.Path, hub: HubServer) -> None:
    leaf = MemoryBank.open(lazy / "bank").manifest.blocks[Path((0, 0))].bytes
    pull(REPO, lazy, only=["0.0"], disk_budget=2 * leaf)
    cache = BlockCache(MemoryBank.open(lazy / "bank"), budget=0)  # every fetch reads from disk
    for node in ("0.0", "1.0", "1.1", "1.0", "1.2"):
        cache.fetch(Path.parse(node))
    assert blocks_in(lazy) == {"0", "1", "2", "0.0", "1.0", "1.2"}  # 1.1 went; what was pulled does not count
    again = MemoryBank.open(lazy / "bank")
    again.read(Path.parse("1.0"))  # the order outlives the process
    again.read(Path.parse("2.0"))
    assert blocks_in(lazy) == {"0", "1", "2", "0.0", "1.0", "2.0"}
    assert cache.stats.remote_fetches == 3


def test_what_is_only_here_is_never_evicted(lazy: pathlib.Path, hub: HubServer) -> None:
    pull(REPO, lazy, lazy=True, disk_budget=1)
    bank = MemoryBank.open(lazy / "bank")
    bank.read(Path.parse("1.0"))
    file = lazy / remote_name("1.0")  # changed here since it came
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    entry = dataclasses.replace(bank.manifest.blocks[Path((1, 0))], sha256=file_digest(file))
    bank.manifest = dataclasses.replace(bank.manifest, blocks=bank.manifest.blocks | {Path((1, 0)): entry})
    bank.manifest.write(lazy / "bank/bank.json")
    again = MemoryBank.open(lazy / "bank")
    again.read(Path.parse("1.1"))
    again.read(Path.parse("1.2"))
    assert blocks_in(lazy) == {"0", "1", "2", "1.0", "1.2"}


def test_removed_block_does_not_come_back_to_who_opened_the_bank_before(
    lazy: pathlib.Path, hub: HubServer, shared: Repository
) -> None:
    before = MemoryBank.open(lazy / "bank")
    after = MemoryBank.open(lazy / "bank")
    blocks = {node: row for node, row in after.manifest.blocks.items() if node != (1, 0)}
    after.manifest = dataclasses.replace(after.manifest, blocks=blocks)

    def remove() -> None:
        after.manifest.write(lazy / "bank/bank.json")

    hub.sending[remote_name("1.0")] = remove  # while it is on its way
    for _ in range(2):
        with pytest.raises(BankError, match=r"no block 1.0 any more. It was removed"):
            before.read(Path.parse("1.0"))
        assert not (lazy / remote_name("1.0")).exists()
    assert len(hub.downloads()) == 1


def test_budget_smaller_than_a_block_keeps_the_one_in_use(lazy: pathlib.Path) -> None:
    pull(REPO, lazy, lazy=True, disk_budget=1)
    bank = MemoryBank.open(lazy / "bank")
    for node in ("1.0", "1.1"):
        assert bank.read(Path.parse(node)).nbytes > 1
    assert blocks_in(lazy) == {"0", "1", "2", "1.1"}


def test_pushing_a_bank_that_is_not_all_here(lazy: pathlib.Path) -> None:
    with pytest.raises(
        BankError, match=r"10 of the bank's files are on the hub, not here.*hiermem bank pull me/tiny"
    ):
        push(lazy, "me/other")


def test_damaged_remote_json(lazy: pathlib.Path) -> None:
    (lazy / "bank/remote.json").write_text("{}")
    with pytest.raises(BankError, match=r"cannot read .*remote.json"):
        load(lazy).select("1.2", "")


# --- hub ids


def test_load_by_hub_id(shared: Repository, hub: HubServer, tmp_path: pathlib.Path, model: pathlib.Path) -> None:
    opened = load(REPO)
    assert opened.bank is not None
    assert opened.bank.root == tmp_path / "cache/models/me/tiny/bank"
    assert blocks_in(tmp_path / "cache/models/me/tiny") == {"0", "1", "2"}
    assert (
        opened.generate("abc", memory="1.2", max_tokens=5).text
        == load(model).generate("abc", memory="1.2", max_tokens=5).text
    )
    hub.requests.clear()
    load(REPO).select("1.2", "")
    sizes = [dataclasses.replace(measure(name), name="") for name in (REPO, model)]
    assert sizes[0] == sizes[1]
    assert hub.requests == []
    assert resolve(f"{REPO}@{shared.branches['main']}") != resolve(REPO)
    assert resolve(model) == model


def test_hub_id_in_huggingface_hubs_cache(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> None:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(REPO)
    hub.requests.clear()
    assert resolve(REPO) == pathlib.Path(folder)
    load(REPO).select("1.2", "")
    assert hub.requests == []


def test_a_part_in_huggingface_hubs_cache_is_no_model(
    shared: Repository, hub: HubServer, tmp_path: pathlib.Path
) -> None:
    """Whoever looked at config.json or bank.json alone left a snapshot that holds nothing else."""
    from huggingface_hub import hf_hub_download

    plain = {name.removeprefix("anchor/"): c for name, c in shared.head.items() if name.startswith("anchor/")}
    hub.repo("me/plain").commit(plain)
    hf_hub_download("me/plain", "config.json")
    hf_hub_download(REPO, "bank/bank.json")
    assert load("me/plain").bank is None
    load(REPO).select("1.2", "")


def test_killed_before_the_first_file_had_its_name(shared: Repository, tmp_path: pathlib.Path) -> None:
    bank = tmp_path / "out.partial" / "bank"
    bank.mkdir(parents=True)
    (bank / "remote.json.partial").write_text("{")
    pull(REPO, tmp_path / "out")
    assert blocks_in(tmp_path / "out") == BLOCKS
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="something else is being written"):
        pull(REPO, tmp_path / "other")


def test_plain_model_by_hub_id(shared: Repository, hub: HubServer) -> None:
    plain = {name.removeprefix("anchor/"): c for name, c in shared.head.items() if name.startswith("anchor/")}
    hub.repo("me/plain").commit(plain | {"evil.py": b"", "pytorch_model.bin": b"large"})
    opened = load("me/plain")
    assert opened.bank is None
    assert set(hub.downloads()) == set(plain)
    hub.requests.clear()
    load("me/plain")
    assert hub.requests == []


def test_what_is_neither_a_folder_nor_on_the_hub(
    hub: HubServer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no folder me/none, and the hub has no repository me/none"):
        load("me/none")
    (tmp_path / "models").mkdir()
    for name in ("models/none", "none", "/a/b", "./a/b", "a/b/c"):
        with pytest.raises(AnchorError, match="there is no model at"):
            load(name)
    assert len(hub.requests) == 1
    use_in_this_process(monkeypatch, CLOSED, tmp_path)
    with pytest.raises(HubError, match=f"no folder me/none, and cannot reach the hub at {CLOSED}"):
        load("me/none")


def test_peek_downloads_no_weights(shared: Repository, hub: HubServer, model: pathlib.Path) -> None:
    config, manifest, size = peek(REPO)
    assert config["hidden_size"] == 32
    assert manifest == MemoryBank.open(model / "bank").manifest
    assert size == (model / "anchor/model.safetensors").stat().st_size
    assert sorted(hub.downloads()) == ["anchor/config.json", "bank/bank.json"]


# --- the commands


def hiermem(capsys: pytest.CaptureFixture[str], *arguments: str | pathlib.Path) -> tuple[int, str, str]:
    """Runs the command in this process: (exit code, standard output, standard error)."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hiermem", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    done = capsys.readouterr()
    return int(ended.value.code or 0), done.out, done.err


@pytest.mark.slow
def test_commands(
    hub: HubServer, model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copy(model, tmp_path / "source"), tmp_path / "out"
    code, text, errors = hiermem(capsys, "bank", "push", source, REPO, "--private", "--message", "first")
    assert (code, errors) == (0, "")
    commit = hub.repo(REPO).branches["main"]
    assert f"commit   {commit}" in text
    assert TOKEN not in text
    code, text, errors = hiermem(
        capsys, "bank", "pull", REPO, out, "--only", "topic 1", "--disk-budget", "2M", "--json"
    )
    assert (code, errors) == (0, "")
    assert json.loads(text)["revision"] == commit
    assert blocks_in(out) == {"1", "1.0", "1.1", "1.2"}
    origin = Origin.read(out / "bank")
    assert origin is not None
    assert origin.disk_budget_bytes == 2_000_000
    text = hiermem(capsys, "bank", "pull", REPO, out, "--lazy")[1]
    assert "remote   6 blocks, 10.5 kB: fetched when first needed" in text
    text = hiermem(capsys, "ask", "--plain", "-m", REPO, "abc", "--memory", "0.1", "-n", "3", "--json")[1]
    assert json.loads(text)["selection"]["blocks"] == ["0", "0.1"]


def test_commands_fail_in_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_in_this_process(monkeypatch, CLOSED, tmp_path)
    for arguments in (("pull", REPO, tmp_path / "out"), ("push", tmp_path, REPO)):
        code, text, errors = hiermem(capsys, "bank", *arguments)
        assert (code, text, errors.count("\n")) == (1, "", 1), errors
    assert list(tmp_path.iterdir()) == []
    for options in (("--disk-budget", "much"), ("--tree-only", "--lazy")):
        assert hiermem(capsys, "bank", "pull", REPO, tmp_path / "out", *options)[0] == 2


def test_command_in_a_process_of_its_own(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> None:
    code = "from mlx_hiermem.apps.cli.main import main; main()"
    command = [sys.executable, "-c", code, "bank", "pull", REPO, str(tmp_path / "out"), "--lazy"]
    done = subprocess.run(
        command, env=os.environ | environment(hub.url, tmp_path), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"commit   {shared.branches['main']}" in done.stdout
