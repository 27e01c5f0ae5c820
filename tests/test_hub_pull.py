"""Pulling a model, or part of it: broken connections, kills, wrong digests, full disks; on 127.0.0.1."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hub_server import (
    BLOCKS,
    REPO,
    HubServer,
    Repository,
    blocks_in,
    environment,
    files_of,
    remote_name,
)
from tiny import make_anchor

from mlx_hiermem import load
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.hub import RemoteFile
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, AnchorMismatchError, BankError, HubError, OutputError
from mlx_hiermem.share.pull import pull


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
