"""Banks on disk: what is refused, what is noticed, and that nothing is read before it is needed."""

import json
import os
import pathlib
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from tiny import CONFIG, make_anchor, make_bank, make_model

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank import commit, edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import MemoryBlock, block_name, is_finite
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.cache import BlockCache, read_ahead
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorError, AnchorMismatchError, BankError
from mlx_hiermem.files import file_digest
from mlx_hiermem.tree import ClusterTree


@pytest.fixture
def bank(tmp_path: pathlib.Path) -> MemoryBank:
    return MemoryBank.open(make_model(tmp_path / "model", absent=("2.0",)) / "bank")


def test_manifest_round_trip(bank: MemoryBank, tmp_path: pathlib.Path) -> None:
    bank.manifest.write(tmp_path / "copy.json")
    assert BankManifest.read(tmp_path / "copy.json") == bank.manifest
    totals = json.loads((tmp_path / "copy.json").read_text())["totals"]
    assert totals["blocks"] == 3 + 8
    assert totals["parameters"] == 3 * CONFIG.parameters(4) + 8 * CONFIG.parameters(2)


def test_blocks_join_along_the_units(bank: MemoryBank) -> None:
    fetch = BlockCache(bank).fetch(Path((1, 2)))
    first, second = bank.read(Path((1,))), bank.read(Path((1, 2)))
    assert fetch.memory is not None
    assert fetch.memory.units == 6
    for name, tensor in fetch.memory.tensors.items():
        assert mx.array_equal(tensor, mx.concatenate([first.tensors[name], second.tensors[name]], axis=1))


def test_ragged_path_fetches_what_there_is(bank: MemoryBank) -> None:
    assert [str(node) for node in bank.nodes_on(Path((2, 0)))] == ["2"]


def _bytes_read() -> int:
    """Bytes this process has read from files, by the kernel's own count."""
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts a process's reads")
def test_only_the_fetched_blocks_are_read(bank: MemoryBank) -> None:
    cache, path = BlockCache(bank), Path((1, 2))
    bank.nodes_on(path)
    idle = -_bytes_read() + _bytes_read()  # what counting itself reads
    before = _bytes_read()
    fetch = cache.fetch(path)
    read = _bytes_read() - before - idle
    files = [bank.root / block_name(node) for node in path.prefixes()]
    assert fetch.bytes_read == sum(file.stat().st_size for file in files)
    assert fetch.bytes_read <= read <= fetch.bytes_read + 64  # safetensors' header length is read twice
    before = _bytes_read()
    assert cache.fetch(path).bytes_read == 0
    assert _bytes_read() - before == idle


def test_a_path_is_read_ahead(bank: MemoryBank) -> None:
    cache, path = BlockCache(bank), Path((1, 2))
    files = [bank.root / block_name(node) for node in path.prefixes()]
    with pytest.MonkeyPatch.context() as patch:
        read, opened = list[pathlib.Path](), pathlib.Path.open
        patch.setattr(pathlib.Path, "open", lambda file, *a, **k: read.append(file) or opened(file, *a, **k))
        coming = cache.prefetch(path)
        assert coming
        coming.result(10)
        assert read == files
    assert (cache.blocks, cache.stats.misses) == (0, 0)
    cache.fetch(Path((1,)))
    assert cache.prefetch(Path((1,))) is None
    files[1].unlink()
    assert cache.prefetch(path) is None  # nothing is there to be read: the fetch will tell
    read_ahead([files[1], files[0]])


def test_cache_evicts_the_least_recently_used_and_keeps_level_1(bank: MemoryBank) -> None:
    small, large = bank.read(Path((0, 0))).nbytes, bank.read(Path((0,))).nbytes
    cache = BlockCache(bank, budget=2 * large + 2 * small)
    for path in ("0.0", "0.1", "0.0", "1.0"):  # 1 and 1.0 push out 0.1, the least recently used leaf
        cache.fetch(Path.parse(path))
    assert Path((0, 1)) not in cache
    assert all(Path.parse(node) in cache for node in ("0", "1", "0.0", "1.0"))
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (3, 5, 1)
    assert cache.bytes <= cache.budget


def test_cache_smaller_than_a_path_still_serves(bank: MemoryBank) -> None:
    cache = BlockCache(bank, budget=1)
    for path in ("0.0", "1.1", "2.1"):
        assert cache.fetch(Path.parse(path)).memory is not None
    assert cache.stats.evictions == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bank: (bank.root / "blocks/1.safetensors").unlink(), "cannot read the block"),
        (lambda bank: (bank.root / "blocks/1.safetensors").write_bytes(b"abc"), "cannot read the block"),
        (lambda bank: _truncate(bank.root / "blocks/1.safetensors"), "cannot read the block"),
        (
            lambda bank: (bank.root / "blocks/1.safetensors").write_bytes(
                (bank.root / "blocks/1/0.safetensors").read_bytes()
            ),
            "expected",
        ),
    ],
)
def test_damaged_blocks(bank: MemoryBank, damage, message: str) -> None:
    damage(bank)
    with pytest.raises(BankError, match=message):
        bank.read(Path((1,)))
    assert any("blocks/1.safetensors" in problem for problem in bank.problems())


def _truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_problems_sees_one_changed_bit(bank: MemoryBank) -> None:
    assert list(bank.problems()) == []
    file = bank.root / "blocks/0/1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert list(bank.problems()) == ["blocks/0/1.safetensors has changed: its sha256 is not the manifest's"]


def flip(file: pathlib.Path, at: int = -1, bits: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= bits
    file.write_bytes(data)


def test_a_changed_bit_is_seen_when_the_block_is_first_read(
    bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same size and shapes used to be taken as it was."""
    for name in ("blocks/1/0.safetensors", "generic.safetensors", "tree.safetensors"):
        flip(bank.root / name, at=-2)
    opened = MemoryBank.open(bank.root)
    for read in (lambda: opened.read(Path((1, 0))), opened.read_generic, lambda: opened.tree):
        with pytest.raises(BankError, match="has changed: its sha256 is not the manifest's"):
            read()
    opened.read(Path((1, 1)))
    flip(bank.root / "blocks/1/1.safetensors")
    opened.read(Path((1, 1)))  # it was right when it was first read
    with pytest.raises(BankError, match="has changed"):
        MemoryBank.open(bank.root).read(Path((1, 1)))
    unchecked = MemoryBank.open(bank.root, verify=False)
    assert unchecked.tree
    unchecked.read(Path((1, 0)))
    monkeypatch.setenv("HIERMEM_VERIFY", "0")
    MemoryBank.open(bank.root).read(Path((1, 0)))


def test_values_that_are_no_numbers_are_refused(bank: MemoryBank) -> None:
    node, file = Path((1, 0)), bank.root / "blocks/1/0.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.inf).tobytes()
    file.write_bytes(data)
    rows = {**bank.manifest.blocks, node: replace(bank.manifest.blocks[node], sha256=file_digest(file))}
    with pytest.raises(BankError, match="not finite"):
        MemoryBank(bank.root, replace(bank.manifest, blocks=rows)).read(node)
    centroids = [np.array(level) for level in bank.tree.centroids]
    centroids[1][2, 1, 7] = np.nan
    tree = ClusterTree(centroids, bank.tree.present)
    with pytest.raises(BankError, match="not finite"):
        tree.route(tree.centroids[0][0, 2])
    tree.route(tree.centroids[0][0, 1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_finite_numbers(dtype: str, value: float) -> None:
    numbers = mx.array([[0.0, -1.5], [3e4, 1e-30]]).astype(getattr(mx, dtype))
    packed = mx.array([0xFFFFFFFF], mx.uint32)
    assert is_finite(MemoryBlock({"gate": numbers, "up": packed}, 0))
    numbers[1, 0] = value
    assert not is_finite(MemoryBlock({"up": packed, "gate": numbers}, 0))


def test_a_block_of_an_edit_that_is_being_carried_out_is_no_damage(bank: MemoryBank) -> None:
    """Its new file is there before its new manifest, and a reader may still have the old one."""
    node = Path((1, 0))
    old, new = MemoryBank.open(bank.root), bank.root.parent / "new.safetensors"
    new.write_bytes((bank.root / "blocks/1/1.safetensors").read_bytes())
    names = list[str]()

    def dies(source: pathlib.Path, target: pathlib.Path) -> None:
        names.append(pathlib.Path(target).name)
        if pathlib.Path(target).name == "bank.json":
            raise KeyboardInterrupt
        os.rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            edit.add(bank.root, new, node, replacing=True)
    assert names[-1] == "bank.json"
    for reader in (old, MemoryBank.open(bank.root)):
        assert mx.array_equal(reader.read(node).tensors["up"], bank.read(Path((1, 1))).tensors["up"])
    commit.finish(bank.root)
    assert mx.array_equal(
        MemoryBank(bank.root, bank.manifest).read(node).tensors["up"], old.read(node).tensors["up"]
    )


def test_unknown_node(bank: MemoryBank) -> None:
    with pytest.raises(BankError, match=r"no block 2\.0"):
        bank.read(Path((2, 0)))


def test_no_bank(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BankError, match="no bank at"):
        MemoryBank.open(tmp_path / "nowhere")
    with pytest.raises(BankError, match=r"no bank\.json"):
        MemoryBank.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "not the manifest"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "mlx-hiermem-bank", "version": 2}', "format version 2"),
        ('{"format": "mlx-hiermem-bank", "version": 1}', "incomplete"),
    ],
)
def test_bad_manifest(bank: MemoryBank, content: str, message: str) -> None:
    (bank.root / MANIFEST).write_text(content)
    with pytest.raises(BankError, match=message):
        MemoryBank.open(bank.root)


def test_another_anchors_bank_is_refused(tmp_path: pathlib.Path) -> None:
    first, second = make_anchor(tmp_path / "first"), make_anchor(tmp_path / "second", seed=1)
    manifest = MemoryBank.open(make_bank(tmp_path / "bank", first)).manifest
    manifest.check_anchor(identify(first))
    with pytest.raises(AnchorMismatchError, match="weights_digest"):
        manifest.check_anchor(identify(second))


def test_identity_needs_an_anchor(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AnchorError, match=r"no config\.json"):
        identify(tmp_path)
    anchor = make_anchor(tmp_path / "anchor")
    (anchor / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AnchorError, match="damaged"):
        identify(anchor)
