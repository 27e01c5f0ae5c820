"""What needs the hub while it is used: blocks that come late, models by hub id, the commands; a hub of our own."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from hub_server import (
    BLOCKS,
    CLOSED,
    REPO,
    TOKEN,
    HubServer,
    Repository,
    blocks_in,
    copy,
    environment,
    remote_name,
    use_in_this_process,
)

from mlx_hiermem import load
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, BankError, HubError, OutputError
from mlx_hiermem.files import file_digest
from mlx_hiermem.plan import measure
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import push
from mlx_hiermem.share.resolve import peek, resolve

# --- the third tier


@pytest.fixture
def lazy(shared: Repository, hub: HubServer, tmp_path: pathlib.Path) -> pathlib.Path:
    pull(REPO, tmp_path / "lazy", lazy=True)
    hub.requests.clear()
    return tmp_path / "lazy"


def test_blocks_come_when_they_are_needed(lazy: pathlib.Path, hub: HubServer, folder: pathlib.Path) -> None:
    opened = load(lazy)
    assert hub.requests == []
    answer = opened.generate("abc", memory="1.2", max_tokens=5).text
    assert answer == load(folder).generate("abc", memory="1.2", max_tokens=5).text
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


def test_load_by_hub_id(shared: Repository, hub: HubServer, tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    opened = load(REPO)
    assert opened.bank is not None
    assert opened.bank.root == tmp_path / "cache/models/me/tiny/bank"
    assert blocks_in(tmp_path / "cache/models/me/tiny") == {"0", "1", "2"}
    assert (
        opened.generate("abc", memory="1.2", max_tokens=5).text
        == load(folder).generate("abc", memory="1.2", max_tokens=5).text
    )
    hub.requests.clear()
    load(REPO).select("1.2", "")
    sizes = [dataclasses.replace(measure(name), name="") for name in (REPO, folder)]
    assert sizes[0] == sizes[1]
    assert hub.requests == []
    assert resolve(f"{REPO}@{shared.branches['main']}") != resolve(REPO)
    assert resolve(folder) == folder


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


def test_peek_downloads_no_weights(shared: Repository, hub: HubServer, folder: pathlib.Path) -> None:
    config, manifest, size = peek(REPO)
    assert config["hidden_size"] == 32
    assert manifest == MemoryBank.open(folder / "bank").manifest
    assert size == (folder / "anchor/model.safetensors").stat().st_size
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
    hub: HubServer, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = copy(folder, tmp_path / "source"), tmp_path / "out"
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
