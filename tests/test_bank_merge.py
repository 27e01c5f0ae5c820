"""Two halves of a bank become one."""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from test_bank_edit import assert_works, contents, paths
from tiny import CONFIG, make_anchor, make_bank

from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name, read_block
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.bank.merge import merge
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, OutputError
from mlx_hiermem.files import file_digest


def halves(whole: pathlib.Path, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The bank's left and right part, as two machines would have trained them."""
    first, second = (pathlib.Path(shutil.copytree(whole, folder / name)) for name in ("first", "second"))
    edit.remove(first, paths("1", "2.1"))
    edit.remove(second, paths("0", "2.2"))
    return first, second


def test_halves_merge_into_the_whole(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    seen = []
    merged = merge(
        MemoryBank.open(first), MemoryBank.open(second), tmp_path / "out", progress=lambda *at: seen.append(at)
    )
    assert contents(merged.root) == contents(whole)
    assert seen[-1][0] == seen[-1][1] == sum(size for name, size, _ in merged.files() if name != TREE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "out", "second"]


def test_an_interrupted_merge_goes_on(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = halves(whole, tmp_path)
    edit.block(second, [], "parent")  # is kept, though nothing is blocked
    banks, out, copy, copied = (
        (MemoryBank.open(first), MemoryBank.open(second)),
        tmp_path / "out",
        BankWriter.copy,
        [],
    )

    def until_the_fifth(self: BankWriter, name: str, source: pathlib.Path, entry: FileEntry) -> None:
        copied.append(name)
        if len(copied) == 5:
            raise KeyboardInterrupt
        copy(self, name, source, entry)

    monkeypatch.setattr(BankWriter, "copy", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        merge(*banks, out)
    assert not out.exists()
    with pytest.raises(OutputError, match="--resume"):
        merge(*banks, out)
    with pytest.raises(OutputError, match="other settings"):
        merge(*reversed(banks), out, resume=True)
    merged = merge(*banks, out, resume=True)
    assert contents(out).items() - contents(whole).items() == {(POLICY, (second / POLICY).read_bytes())}
    assert len(copied) == sum(1 for _ in merged.files())  # the fifth twice, and no tree
    assert list(check(merged)) == []


def test_conflicts_are_listed_and_need_a_word(
    whole: pathlib.Path, anchor: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first, second = halves(whole, tmp_path)
    shutil.copy(whole / "blocks/0/0.safetensors", tmp_path / "other.safetensors")
    row = edit.add(second, tmp_path / "other.safetensors", Path((2, 1)), label="mine", replacing=True)
    shutil.copy(second / "blocks/2.safetensors", tmp_path / "top.safetensors")
    edit.add(first, whole / "blocks/1.safetensors", Path((2,)), replacing=True)
    centroid = MemoryBank.open(second).tree.centroids[1][2, 1]
    edit.add(first, whole / "blocks/2/1.safetensors", Path((2, 1)), centroid=centroid)
    one, two = MemoryBank.open(first), MemoryBank.open(second)
    with pytest.raises(BankError, match=r"for 2, 2\.1\. Say whose"):
        merge(one, two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    preferred = merge(one, two, tmp_path / "out 2", prefer="second").manifest.blocks
    assert preferred[Path((2, 1))] == row
    assert preferred[Path((2,))].sha256 == two.manifest.blocks[Path((2,))].sha256
    preferred = merge(one, two, tmp_path / "out 1", prefer="first").manifest.blocks
    assert preferred[Path((2, 1))] == MemoryBank.open(whole).manifest.blocks[Path((2, 1))]
    for name in ("out 1", "out 2"):
        assert list(check(assert_works(tmp_path / name))) == []
    other = make_bank(tmp_path / "other", anchor / "anchor", seed=0)
    (other / GENERIC_FILE).write_bytes((whole / GENERIC_FILE).read_bytes()[:-1] + b"\0")
    manifest = MemoryBank.open(other).manifest
    assert manifest.generic is not None
    replace(manifest, generic=replace(manifest.generic, sha256=file_digest(other / GENERIC_FILE))).write(
        other / MANIFEST
    )
    with pytest.raises(BankError, match="generic"):
        merge(MemoryBank.open(whole), MemoryBank.open(other), tmp_path / "out")


def test_what_either_blocks_stays_blocked(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    edit.block(first, paths("0.1", "2.2"))
    edit.block(second, paths("1"), "parent")
    merged = merge(MemoryBank.open(first), MemoryBank.open(second), tmp_path / "out")
    assert merged.policy == BankPolicy(frozenset(paths("0.1", "2.2", "1")), "parent")


def test_recipes_and_licences_of_both_are_kept(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    manifest = MemoryBank.open(second).manifest
    replace(manifest, recipe={"seed": 1}, licence="MIT", generic=None).write(second / MANIFEST)
    merged = merge(MemoryBank.open(first), MemoryBank.open(second), tmp_path / "out").manifest
    assert (merged.recipe, merged.licence) == ({"merged": [{}, {"seed": 1}]}, "CC0; MIT")
    assert merged.generic == MemoryBank.open(whole).manifest.generic


def test_only_banks_that_belong_together_merge(
    whole: pathlib.Path, anchor: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    one = MemoryBank.open(whole)
    larger = replace(CONFIG, block_sizes=(4, 3))
    cases = {
        "was made for the anchor": make_bank(tmp_path / "a", make_anchor(tmp_path / "anchor", seed=1)),
        "different centroids at 0": make_bank(tmp_path / "b", anchor / "anchor", seed=1),
        "different memory settings": make_bank(tmp_path / "c", anchor / "anchor", larger),
    }
    for message, other in cases.items():
        with pytest.raises(BankError, match=message):
            merge(one, MemoryBank.open(other), tmp_path / "out", prefer="first")
    with pytest.raises(OutputError, match="exists already"):
        merge(one, one, tmp_path / "a")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "anchor", "b", "c"]


def test_nearly_equal_centroids_are_one_tree(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    bank = MemoryBank.open(second)
    moved = bank.tree.without([])
    moved.centroids[0][0, 2] += 1e-6
    moved.save(second / TREE)
    tree = FileEntry((second / TREE).stat().st_size, file_digest(second / TREE))
    replace(bank.manifest, tree=tree).write(second / MANIFEST)
    merged = merge(MemoryBank.open(first), MemoryBank.open(second), tmp_path / "out")
    assert np.array_equal(merged.tree.centroids[0], MemoryBank.open(whole).tree.centroids[0])


def test_a_damaged_or_missing_block_stops_a_merge(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    banks = MemoryBank.open(first), MemoryBank.open(second)
    file = second / "blocks/1/2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(BankError, match=r"1/2\.safetensors is not what its manifest says"):
        merge(*banks, tmp_path / "out")
    file.unlink()
    with pytest.raises(BankError, match=r"1 files of the bank are not here, such as .*1/2\.safetensors"):
        merge(*banks, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "second"]


def test_the_blocks_of_a_merge_are_read_back(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first, second = halves(whole, tmp_path)
    merged = merge(MemoryBank.open(first), MemoryBank.open(second), tmp_path / "out")
    for node in merged.manifest.blocks:
        expected = read_block(whole / block_name(node), merged.config).tensors
        for name, tensor in merged.read(node).tensors.items():
            assert mx.array_equal(tensor, expected[name])
