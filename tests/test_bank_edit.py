"""Editing banks: what goes is gone, what is added fits, and a crash at any step leaves a bank that works."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import CONFIG, make_anchor, make_bank

from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import EDIT, MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.commit import STAGING, editing, interrupted
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.config import Path
from mlx_hiermem.errors import AnchorMismatchError, BankError, OutputError
from mlx_hiermem.files import file_digest


def paths(*texts: str) -> list[Path]:
    return [Path.parse(text) for text in texts]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder, without what an edit that died has only begun to write."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and STAGING not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def assert_works(root: pathlib.Path) -> MemoryBank:
    """Any text finds a path, and every block on it can be read."""
    bank = MemoryBank.open(root)
    for route in bank.tree.route(np.random.default_rng(0).standard_normal((40, 384)), bank.policy.blocked):
        for node in bank.nodes_on(route.path):
            bank.read(node)
    return bank


@pytest.mark.slow
def test_remove_takes_all_that_is_the_subtrees_own(root: pathlib.Path, whole: pathlib.Path) -> None:
    removed = edit.remove(root, paths("1", "2.1"))
    assert sorted(map(str, removed.nodes)) == ["1", "1.0", "1.1", "1.2", "2.1"]
    before, bank = MemoryBank.open(whole), assert_works(root)
    assert removed.bytes == sum(before.manifest.blocks[node].bytes for node in removed.nodes)
    assert sorted(map(str, bank.manifest.blocks)) == ["0", "0.0", "0.1", "0.2", "2", "2.2"]
    assert json.loads((root / MANIFEST).read_text())["totals"]["blocks"] == 6
    assert not (root / "blocks/1").exists()
    gone = {block_name(node) for node in removed.nodes}
    assert set(contents(whole)) - set(contents(root)) == gone
    text = (root / MANIFEST).read_text()
    assert "doc 1.2" not in text
    assert "doc 0.2" in text
    assert list(check(bank)) == []
    # not even the centroids, which were made from the data
    old, new = before.tree, bank.tree
    for node in removed.nodes:
        assert not new.has(node)
        level, row = len(node) - 1, node.row(3)
        assert old.centroids[level].reshape(-1, 384)[row].any()
        assert not new.centroids[level].reshape(-1, 384)[row].any()
    for node in bank.manifest.blocks:
        level, row = len(node) - 1, node.row(3)
        kept = (tree.centroids[level].reshape(-1, 384)[row] for tree in (old, new))
        assert np.array_equal(*kept)


def test_texts_of_a_removed_node_go_to_what_is_left(root: pathlib.Path) -> None:
    tree = MemoryBank.open(root).tree
    text = np.array(tree.centroids[0][0, 1])
    assert tree.route(text)[0].path[0] == 1
    edit.remove(root, paths("1"))
    assert MemoryBank.open(root).tree.route(text)[0].path[0] in (0, 2)
    edit.remove(root, paths("0", "2"))
    empty = MemoryBank.open(root)
    assert (empty.tree.route(text)[0].path, empty.manifest.blocks) == ((), {})
    assert list(check(empty)) == []


def test_a_policy_forgets_removed_nodes(root: pathlib.Path) -> None:
    edit.block(root, paths("1.1", "2", "0.2"), "parent")
    edit.remove(root, paths("1", "2.1"))
    assert MemoryBank.open(root).policy == BankPolicy(frozenset(paths("2", "0.2")), "parent")


def test_a_reader_from_before_keeps_what_is_left(root: pathlib.Path) -> None:
    bank = MemoryBank.open(root)
    tree = bank.tree
    edit.remove(root, paths("1"))
    assert tree.has(Path((1, 1)))
    bank.read(Path((0, 1)))
    with pytest.raises(BankError, match="cannot read the block"):
        bank.read(Path((1, 1)))


@pytest.mark.parametrize("nodes", [("7",), ("1", "2.0"), ("0.0.0",)])
def test_removing_what_is_not_there_changes_nothing(root: pathlib.Path, nodes: tuple[str, ...]) -> None:
    before = contents(root)
    with pytest.raises(BankError, match="has no node"):
        edit.remove(root, paths(*nodes))
    assert contents(root) == before


def test_a_changed_tree_is_not_given_a_new_digest(root: pathlib.Path) -> None:
    data = bytearray((root / TREE).read_bytes())
    data[-1] ^= 1
    (root / TREE).write_bytes(data)
    before = contents(root)
    with pytest.raises(BankError, match="not the manifest's"):
        edit.remove(root, paths("1"))
    assert contents(root) == before


def die_at(step: int, action: Callable[[], object]) -> bool:
    """Runs an edit in a child process that dies before its n-th change of a file's name; whether it died."""
    child = os.fork()
    if child == 0:
        left = [step]

        def count(event: str, _: tuple[Any, ...]) -> None:
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            action()
            os._exit(0)
        except BaseException:  # whatever it is, this process must not go on as a second pytest
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.slow
def test_a_crash_at_any_step_of_a_removal(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    start = pathlib.Path(shutil.copytree(whole, tmp_path / "start"))
    edit.block(start, paths("1.1", "0.2"))
    done = pathlib.Path(shutil.copytree(start, tmp_path / "done"))
    edit.remove(done, paths("1", "2.1"))
    states, step, died = set(), 0, True
    while died:
        step += 1
        root = pathlib.Path(shutil.copytree(start, tmp_path / str(step)))
        died = die_at(step, lambda root=root: edit.remove(root, paths("1", "2.1")))
        bank = assert_works(root)
        assert bank.policy.blocker(Path((0, 2)))  # what stays blocked is blocked at every moment
        half = interrupted(root) is not None
        states.add((half, Path((1,)) in bank.manifest.blocks))
        if half:
            assert any("interrupted" in line for line in check(bank))
            other = pathlib.Path(shutil.copytree(root, tmp_path / f"{step}, another edit"))
            edit.unblock(other, paths("0.2"))  # any change finishes it
            assert list(check(MemoryBank.open(other))) == []
            assert not MemoryBank.open(other).tree.has(Path((1,)))
        else:
            assert contents(root) in (contents(start), contents(done))
        if contents(root) != contents(done):
            edit.remove(root, paths("1", "2.1"))  # so does repeating
        assert contents(root) == contents(done)
    assert step > 10
    assert states == {(False, True), (True, True), (True, False), (False, False)}


def test_a_disk_that_fills_up_changes_nothing(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_hiermem.bank.commit.fsync", full)
    with pytest.raises(OutputError, match=r"the disk is full\. Nothing was changed"):
        edit.remove(root, paths("1"))
    assert contents(root) == before


def test_a_change_that_cannot_be_carried_out_stands(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(OutputError, match="The change stands"):
            edit.remove(root, paths("1"))
    assert Path((1,)) in assert_works(root).manifest.blocks
    edit.block(root, paths("0"))
    assert Path((1,)) not in assert_works(root).manifest.blocks
    assert list(check(MemoryBank.open(root))) == []


def test_damaged_remains_of_an_edit_are_said(root: pathlib.Path) -> None:
    (root / EDIT).mkdir()
    (root / EDIT / "gone.json").write_text('["../../somewhere"]')
    with pytest.raises(BankError, match="is damaged"):
        edit.remove(root, paths("1"))
    assert_works(root)


def test_one_change_at_a_time(root: pathlib.Path) -> None:
    with editing(root), pytest.raises(OutputError, match="another process is changing"):
        edit.block(root, paths("1"))
    edit.block(root, paths("1"))


def test_there_is_nothing_to_edit_where_there_is_no_bank(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BankError, match="there is no bank"):
        edit.remove(tmp_path, paths("1"))
    assert list(tmp_path.iterdir()) == []


def test_check_sees_what_digests_do_not(root: pathlib.Path) -> None:
    shutil.copy(root / "blocks/1/0.safetensors", root / "blocks/2/0.safetensors")
    (root / POLICY).write_text('{"blocked": ["7"]}')
    assert sorted(line.removeprefix(f"{root}/") for line in check(MemoryBank.open(root))) == [
        "blocks/2/0.safetensors is not in the manifest",
        "policy.json blocks 7, which the bank's tree does not have",
    ]
    (root / POLICY).unlink()
    bank = MemoryBank.open(root)
    bank.tree.without(paths("1.2")).save(root / TREE)
    assert "block 1.2 has no node in the tree" in list(check(MemoryBank.open(root)))


def test_what_was_removed_can_come_back(root: pathlib.Path, whole: pathlib.Path) -> None:
    old = MemoryBank.open(whole)
    edit.remove(root, paths("1"))
    for node in paths("1", "1.0", "1.1", "1.2"):
        centroid = old.tree.centroids[len(node) - 1].reshape(-1, 384)[node.row(3)]
        entry = edit.add(root, whole / block_name(node), node, centroid=centroid)
        assert entry == old.manifest.blocks[node]  # label, documents and sources came along
    assert contents(root) == contents(whole)


def test_a_new_node_gets_the_texts_near_its_centroid(root: pathlib.Path, whole: pathlib.Path) -> None:
    text = np.random.default_rng(5).standard_normal(384).astype(np.float32)
    shutil.copy(whole / "blocks/1/1.safetensors", root.parent / "new.safetensors")
    path = Path((2, 0))
    entry = edit.add(
        root, root.parent / "new.safetensors", path, centroid=text, label="new", documents=3, sources=["a", "b"]
    )
    assert (entry.label, entry.documents, entry.tokens, entry.sources) == ("new", 3, 0, ("a", "b"))
    bank = assert_works(root)
    assert bank.manifest.blocks[path] == entry
    assert list(bank.manifest.blocks) == sorted(bank.manifest.blocks, key=lambda node: (len(node), node))
    assert bank.tree.distances(text, Path((2,)))[0] == 0
    assert list(check(bank)) == []
    assert mx.array_equal(bank.read(path).tensors["up"], bank.read(Path((1, 1))).tensors["up"])


def test_replacing_keeps_the_label_and_the_place(root: pathlib.Path, whole: pathlib.Path) -> None:
    loose = root.parent / "loose.safetensors"
    shutil.copy(whole / "blocks/0/2.safetensors", loose)
    with pytest.raises(BankError, match="--replace"):
        edit.add(root, loose, Path((0, 1)))
    entry = edit.add(root, loose, Path((0, 1)), replacing=True)
    assert (entry.label, entry.documents, entry.sources) == ("topic 0.1", 0, ())
    assert file_digest(root / "blocks/0/1.safetensors") == file_digest(loose)
    assert (root / TREE).read_bytes() == (whole / TREE).read_bytes()
    assert list(check(MemoryBank.open(root))) == []


def save(file: pathlib.Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> pathlib.Path:
    tensors = {name: mx.ones(shape) for name, shape in CONFIG.shapes(2).items()}
    mx.save_safetensors(str(file), change(tensors))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "up": t["up"][:, :1]}, "holds"),
        (lambda t: {**t, "extra": t["up"]}, "holds"),
        (lambda t: {"up": t["up"]}, "holds"),
        (lambda t: {name: tensor[:, :1] for name, tensor in t.items()}, "holds"),
        (lambda t: {**t, "up": t["up"].astype(mx.float16)}, r"holds up float16 \[2, 2, 32\], expected up float32"),
        (lambda t: {**t, "down": t["down"] * mx.inf}, "down in .* not finite"),
    ],
)
def test_blocks_that_do_not_fit(
    root: pathlib.Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]], message: str
) -> None:
    before, file = contents(root), save(root.parent / "new.safetensors", change)
    with pytest.raises(BankError, match=message) as error:
        edit.add(root, file, Path((0, 1)), replacing=True)
    assert str(file) in str(error.value)
    assert contents(root) == before


@pytest.mark.parametrize(
    ("path", "centroid", "message"),
    [
        ("2.0", None, "--centroid"),
        ("3", None, "no place for 3"),
        ("3", np.zeros(384), "no place for 3"),
        ("0.0.0", np.zeros(384), "no place"),
        ("2.0.1", None, "no place"),
        ("2.0", np.zeros(383), "384 finite numbers"),
        ("2.0", np.full(384, np.nan), "384 finite numbers"),
        ("2.0", np.zeros(384, dtype=int), "384 finite numbers"),
        ("2.0", np.array("text"), "384 finite numbers"),
        ("2.0", np.zeros(384), "all zero"),
    ],
)
def test_places_that_do_not_exist(root: pathlib.Path, path: str, centroid: np.ndarray | None, message: str) -> None:
    before, file = contents(root), save(root.parent / "new.safetensors", lambda tensors: tensors)
    with pytest.raises(BankError, match=message):
        edit.add(root, file, Path.parse(path), centroid=centroid)
    assert contents(root) == before


def test_a_parent_comes_before_its_child(root: pathlib.Path) -> None:
    edit.remove(root, paths("1"))
    file = save(root.parent / "new.safetensors", lambda tensors: tensors)
    with pytest.raises(BankError, match="no node 1"):
        edit.add(root, file, Path((1, 0)), centroid=np.ones(384))


def test_a_damaged_file_or_none_is_not_added(root: pathlib.Path, whole: pathlib.Path) -> None:
    before, file = contents(root), root.parent / "new.safetensors"
    with pytest.raises(BankError, match="there is no block file"):
        edit.add(root, file, Path((0, 1)), replacing=True)
    file.write_bytes(b"abc")
    with pytest.raises(BankError, match=r"cannot read the block .*new\.safetensors"):
        edit.add(root, file, Path((0, 1)), replacing=True)
    assert contents(root) == before
    other = pathlib.Path(shutil.copytree(whole, root.parent / "other"))
    shutil.copy(other / "blocks/0/0.safetensors", other / "blocks/0/1.safetensors")
    with pytest.raises(BankError, match="not what its bank's manifest says"):
        edit.add(root, other / "blocks/0/1.safetensors", Path((0, 1)), replacing=True)
    assert contents(root) == before


def test_a_block_for_another_anchor_is_refused(root: pathlib.Path) -> None:
    other = make_bank(root.parent / "other", make_anchor(root.parent / "anchor", seed=1))
    with pytest.raises(AnchorMismatchError):
        edit.add(root, other / "blocks/0/1.safetensors", Path((0, 1)), replacing=True)


def test_an_added_block_is_never_taken_for_a_fetched_one(root: pathlib.Path) -> None:
    Origin("me/bank", "0" * 40, levels=frozenset({1}), disk_budget_bytes=1).write(root)
    edit.add(root, root / "blocks/0/2.safetensors", Path((0, 1)), replacing=True)
    origin = Origin.read(root)
    assert origin is not None
    assert origin.keeps(Path((0, 1)))
    assert not origin.keeps(Path((1, 1)))
