"""Memory checkpoints that cannot be converted: one line that says why, and nothing left behind."""

import errno
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory_checkpoints import Tensors, assert_same, convert, design, make_tensors, save, settings_of

from mlx_hiermem.bank import writer as bank_writer
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.errors import AnchorMismatchError, CheckpointError, HierMemError, OutputError


def assert_refused(
    folder: pathlib.Path, message: str, error: type[HierMemError], name: str = "m.safetensors", **options: Any
) -> None:
    """One line that says what is wrong, and nothing left on disk."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error) as caught:
        convert(folder / name, folder / "bank", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def _drop(*names: str) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, settings: [tensors.pop(name) for name in names]


def _replace(
    name: str, *shape: int, dtype: torch.dtype = torch.float32
) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, settings: tensors.update({name: torch.ones(shape, dtype=dtype)})


def _say(**values: Any) -> Callable[[Tensors, dict[str, Any]], Any]:
    return lambda tensors, settings: settings.update(values)


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        (_drop("memory.level2.w3", "tree.level1.centroids"), "2 tensors missing: memory.level2.w3, tree.le", None),
        (_replace("lm_head.weight", 2), "1 tensors left over: lm_head.weight", None),
        (_replace("memory.level1.w4", 2), "left over: memory.level1.w4", None),
        (_replace("memory.level1.q.a", 2), "left over: memory.level1.q.a", None),
        (
            _replace("memory.level3.w1", 8, 2, 1, 8),
            "missing: memory.level3.w2, memory.level3.w3, tree.level3",
            None,
        ),
        (_replace("memory.level1.gate", 2, 2, 3, 8), "the same tensor by two names", None),
        (_replace("memory.level1.w2", 2, 2, 4, 8), "memory.level1.w2 is (2, 2, 4, 8), expected (2, 2, 3, 8)", None),
        (_replace("memory.level1.w1", 2, 2, 3), "expected [clusters, layers, units, width]", None),
        (_replace("memory.level2.w1", 3, 2, 2, 8), "memory.level2.w1 is (3, 2, 2, 8), expected (4,", None),
        (_replace("memory.level2.w1", 4, 2, 2, 9), "9 wide where the anchor has 8", AnchorMismatchError),
        (_replace("memory.level2.w1", 4, 2, 2, 8, dtype=torch.int8), "memory tensors of", None),
        (
            _replace("tree.level2.centroids", 2, 3, 384),
            "tree.level2.centroids is (2, 3, 384), expected (2, 2,",
            None,
        ),
        (_replace("tree.level1.centroids", 1, 2, 99), "centroids have 99 values, those of all-MiniLM", None),
        (_replace("tree.level1.present", 2), "tree.level1.present is (2,), expected (1, 2)", None),
        (lambda t, s: t.update({"tree.level1.present": torch.zeros(1, 2)}), "no cluster that is present", None),
        (lambda t, s: t["tree.level2.centroids"].fill_(torch.inf), "level2.centroids has values that are no", None),
        (lambda t, s: t["memory.level2.w2"][2, 1].fill_(torch.nan), "memory.level2.w2 has values that are", None),
        (lambda t, s: t["memory.level2.w2"][2, 1].fill_(-torch.inf), "not finite in cluster 1.0", None),
        (_say(kind="lora-qk"), "memory.level1.q.a, memory.level1.q.b", None),
        (_say(kind="moe"), "unknown memory kind 'moe'", HierMemError),
        (_say(branching=4), "the settings say branching 4, the tree's is 2", None),
        (_say(block_sizes=[3, 1]), "the settings say 1 units for level 2, the tensors have 2", None),
        (_say(block_sizes=[3, 2, 1]), "missing: memory.level3.w1", None),
        (_say(block_sizes="many"), "do not fit", None),
        (_say(layers=None), "the memory is for 2 of 3 layers", None),
        (_say(layers=[0, 1, 2]), "the settings name 3 layers, the tensors have 2", None),
        (_say(layers=[0, 5]), "layers up to 5, tiny has 3 layers", AnchorMismatchError),
        (
            _say(anchor={"name": "other", "hidden": 16}),
            "another anchor, other: its hidden is 16",
            AnchorMismatchError,
        ),
        (_say(anchor={"name": "other", "layers": 9}), "its layers is 9", AnchorMismatchError),
        (_say(labels={"1.7": "x"}), "clusters that the tree does not have: 1.7", None),
        (_say(labels={"first": "x"}), "'first' is not a path", None),
    ],
)
def test_bad_checkpoints(
    tmp_path: pathlib.Path,
    change: Callable[[Tensors, dict[str, Any]], Any],
    message: str,
    error: type[HierMemError] | None,
) -> None:
    tensors, settings = make_tensors(design()), settings_of(design())
    change(tensors, settings)
    save(tmp_path / "m.safetensors", tensors, settings)
    assert_refused(tmp_path, message, error or CheckpointError)


def test_bad_settings_files_and_foreign_checkpoints(tmp_path: pathlib.Path) -> None:
    file = save(tmp_path / "m.safetensors", make_tensors(design()))
    for text in ("{", "[]"):
        file.with_suffix(".json").write_text(text)
        assert_refused(tmp_path, "the settings", CheckpointError)
    file.with_suffix(".json").unlink()
    save(file, {"model.embed_tokens.weight": torch.ones(2)})
    assert_refused(tmp_path, "is not a memory checkpoint of a known kind: has model.embed", CheckpointError)
    save(file, {f"memory.level1.{part}": torch.ones(2) for part in ("k", "w1")})
    assert_refused(tmp_path, "the tensors gate, k fit no one kind", CheckpointError)


def test_too_many_layers_for_the_anchor(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "m.safetensors", make_tensors(design(layers=(0, 1, 2, 3))))
    assert_refused(tmp_path, "the memory is for 4 layers, tiny has 3", AnchorMismatchError)


def test_existing_output_is_left_alone(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "m.safetensors", make_tensors(design()), settings_of(design()))
    (tmp_path / "bank").mkdir()
    assert_refused(tmp_path, "exists already", OutputError)
    (tmp_path / "bank").rename(tmp_path / "bank.partial")
    assert_refused(tmp_path, "an interrupted run left", OutputError)


def test_no_room_on_the_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "m.safetensors", make_tensors(design()), settings_of(design()))
    usage = bank_writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(bank_writer.shutil, "disk_usage", lambda _: usage._replace(free=5000))
    for resume in (False, True):
        assert_refused(tmp_path, "MB free", OutputError, resume=resume)


def test_disk_full_while_writing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, writes = design(k=4), []
    tensors = make_tensors(config)
    save(tmp_path / "m.safetensors", tensors, settings_of(config))

    def full(*arguments: Any) -> tuple[int, str]:
        writes.append(arguments)
        if len(writes) > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_block(*arguments)

    write_block = bank_writer.write_block
    monkeypatch.setattr(bank_writer, "write_block", full)
    assert_refused(tmp_path, "the disk is full", OutputError)
    writes.clear()
    with pytest.raises(OutputError, match=r"disk is full.*stays in bank\.partial for --resume"):
        convert(tmp_path / "m.safetensors", tmp_path / "bank", resume=True)
    monkeypatch.setattr(bank_writer, "write_block", write_block)
    convert(tmp_path / "m.safetensors", tmp_path / "bank", resume=True)
    assert_same(tmp_path / "bank", tensors, config)
    assert not (tmp_path / "bank.partial").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[keys", "cannot read the key map"),
        ('[keys]\n"a" = 3', "every entry must be a text"),
        ('[other]\n"a" = "b"', "unknown entries other"),
        ('[keys]\n"a{x}" = "b{level}"', "uses {level} on the right only"),
        ('[keys]\n"memory.level1.{x}" = "memory.level1.w1"', "would be memory.level1.w1"),
    ],
)
def test_bad_key_maps(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    save(tmp_path / "m.safetensors", make_tensors(design()), settings_of(design()))
    assert_refused(tmp_path, message, CheckpointError, key_map=tmp_path / "keys.toml")


def test_key_map_missing_file() -> None:
    with pytest.raises(CheckpointError, match="cannot read the key map"):
        KeyMap.read(pathlib.Path("nowhere.toml"))
