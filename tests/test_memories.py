"""Memory checkpoints to banks: every kind and shape of tree, bit for bit; bad input; full disks."""

import dataclasses
import errno
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_tree

from mlx_hiermem.bank import writer as bank_writer
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.config import AnchorIdentity, MemoryConfig, Path
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.convert.memories import AnchorDims, convert_memory
from mlx_hiermem.convert.memory_settings import MINILM
from mlx_hiermem.convert.readers import SafetensorsFile
from mlx_hiermem.errors import AnchorMismatchError, CheckpointError, HierMemError, OutputError

ANCHOR = AnchorIdentity("tiny", "c0ffee", "facade", 8, 3)
DIMS = AnchorDims(hidden=8, ffn_width=12, q_width=10, kv_width=6)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DOCUMENTED = {"gate": "w1", "up": "w2", "down": "w3"}
Tensors = dict[str, torch.Tensor]


def design(kind: str = "ffn", k: int = 2, sizes: tuple[int, ...] = (3, 2), layers: Any = (0, 2)) -> MemoryConfig:
    return MemoryConfig(kind, k, sizes, layers, *dataclasses.astuple(DIMS)[:1], "float32", 12, 10, 6)


def documented(part: str) -> str:
    projection, dot, side = part.partition(".")
    return DOCUMENTED.get(projection, projection) + dot + side


def make_tensors(config: MemoryConfig, generic: int = 0, absent: tuple[str, ...] = (), seed: int = 0) -> Tensors:
    """A random checkpoint of the documented layout, with a tree."""
    torch.manual_seed(seed)
    tensors = {}
    for level, units in enumerate(config.block_sizes, 1):
        for part, shape in config.shapes(units).items() if units else ():
            rows = torch.randn(config.branching**level, *shape)
            tensors[f"memory.level{level}.{documented(part)}"] = rows.to(DTYPES[config.dtype])
    for part, shape in config.shapes(generic).items() if generic else ():
        tensors[f"memory.generic.{documented(part)}"] = torch.randn(shape).to(DTYPES[config.dtype])
    tree = random_tree(config, seed, absent)
    for level, (centroids, present) in enumerate(zip(tree.centroids, tree.present, strict=True), 1):
        tensors[f"tree.level{level}.centroids"] = torch.from_numpy(centroids)
        if absent:
            tensors[f"tree.level{level}.present"] = torch.from_numpy(present)
    return tensors


def save(file: pathlib.Path, tensors: Tensors, settings: Mapping[str, Any] | None = None) -> pathlib.Path:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    if settings is not None:
        file.with_suffix(".json").write_text(json.dumps(settings))
    return file


def settings_of(config: MemoryConfig) -> dict[str, Any]:
    return {
        "kind": config.kind,
        "branching": config.branching,
        "block_sizes": list(config.block_sizes),
        "layers": list(config.layers),
        "anchor": {"name": "tiny", "hidden": 8, "layers": 3},
    }


def convert(checkpoint: pathlib.Path, out: pathlib.Path, **options: Any) -> BankManifest:
    return convert_memory(checkpoint, out, anchor=ANCHOR, anchor_dims=DIMS, **options)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same(bank_folder: pathlib.Path, tensors: Tensors, config: MemoryConfig) -> None:
    """Every block file holds exactly the bits of its rows; nothing else is there."""
    bank = MemoryBank.open(bank_folder)
    assert bank.config == config
    assert list(bank.problems()) == []
    expected = {node for level, r in enumerate(config.block_sizes, 1) if r for node in bank.tree.nodes(level)}
    assert set(bank.manifest.blocks) == expected
    files = {str(file.relative_to(bank_folder)) for file in bank_folder.rglob("*") if file.is_file()}
    assert files == {name for name, _, _ in bank.files()} | {MANIFEST}
    for node in expected:
        reader, level = SafetensorsFile(bank_folder / block_name(node)), len(node)
        assert list(reader.tensors) == list(config.widths)
        for part, (dtype, shape) in reader.tensors.items():
            source = tensors[f"memory.level{level}.{documented(part)}"][node.row(config.branching)]
            assert (dtype, shape) == (config.dtype, tuple(source.shape))
            assert reader.rows(part, 0, shape[0]).data.tobytes() == bits(source)
        reader.close()
        assert bank.read(node).tensors.keys() == config.widths.keys()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["ffn", "lora-qk", "lora-vo", "lora-ffn", "kv"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_kind_bit_for_bit(tmp_path: pathlib.Path, kind: str, dtype: str, suffix: str) -> None:
    config = dataclasses.replace(design(kind), dtype=dtype)
    tensors = make_tensors(config, generic=7)
    convert(save(tmp_path / f"m{suffix}", tensors, settings_of(config)), tmp_path / "bank")
    assert_same(tmp_path / "bank", tensors, config)
    generic = SafetensorsFile(tmp_path / "bank/generic.safetensors")
    for part, (_, shape) in generic.tensors.items():
        assert generic.rows(part, 0, shape[0]).data.tobytes() == bits(tensors[f"memory.generic.{documented(part)}"])
    generic.close()


@pytest.mark.parametrize(
    ("k", "sizes"), [(2, (3,)), (16, (2, 1)), (4, (0, 2, 1)), (2, (4, 3, 2, 1)), (3, (2, 0, 1, 0))]
)
def test_depths_and_branchings_are_inferred(tmp_path: pathlib.Path, k: int, sizes: tuple[int, ...]) -> None:
    config = design(k=k, sizes=sizes, layers=(0, 1, 2))
    tensors = make_tensors(config)
    convert(save(tmp_path / "m.safetensors", tensors), tmp_path / "bank")  # no settings at all
    assert_same(tmp_path / "bank", tensors, config)


def test_ragged_trees_leave_absent_rows_out(tmp_path: pathlib.Path) -> None:
    config = design(k=4, sizes=(2, 1, 1))
    tensors = make_tensors(config, absent=("0", "1.2", "3.3.1"))
    tensors["memory.level1.w1"][0] = float("nan")  # what is not there may hold anything
    tensors["tree.level2.centroids"][1, 2] = float("nan")
    manifest = convert(save(tmp_path / "m.safetensors", tensors, settings_of(config)), tmp_path / "bank")
    assert len(manifest.blocks) == 3 + 11 + (3 * 16 - 4 - 1)
    assert_same(tmp_path / "bank", tensors, config)


def test_shards_and_metadata(tmp_path: pathlib.Path) -> None:
    config = design()
    tensors = make_tensors(config)
    (tmp_path / "ckpt").mkdir()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[::2]}
    save_file(first, tmp_path / "ckpt/a.safetensors", metadata={"config": json.dumps(settings_of(config))})
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "ckpt/b.safetensors")
    convert(tmp_path / "ckpt", tmp_path / "bank")
    assert_same(tmp_path / "bank", tensors, config)


def test_flat_metadata_and_pt_config(tmp_path: pathlib.Path) -> None:
    config = design()
    tensors = make_tensors(config)
    flat = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in settings_of(config).items()
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata=flat | {"format": "pt"})
    convert(tmp_path / "m.safetensors", tmp_path / "bank1")
    torch.save({"state_dict": tensors, "epoch": 3, "config": settings_of(config)}, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "bank2")
    for bank in ("bank1", "bank2"):
        assert_same(tmp_path / bank, tensors, config)


def test_what_the_settings_say_reaches_the_manifest(tmp_path: pathlib.Path) -> None:
    config = design()
    said = settings_of(config) | {
        "labels": {"0": "metals", "0.1": "heavy metals"},
        "documents": {"0": 5},
        "tokens": {"0": 700},
        "sources": {"0.1": ["a.txt", "b.txt"]},
        "embedder": "sentence-transformers/all-MiniLM-L6-v2",
        "recipe": {"steps": 10},
        "seed": 4,
        "license": "CC-BY-4.0",
    }
    convert(save(tmp_path / "m.safetensors", make_tensors(config), said), tmp_path / "bank")
    manifest = MemoryBank.open(tmp_path / "bank").manifest
    assert (manifest.anchor, manifest.embedder, manifest.licence) == (ANCHOR, MINILM, "CC-BY-4.0")
    entry = manifest.blocks[Path((0,))]
    assert (entry.label, entry.documents, entry.tokens) == ("metals", 5, 700)
    assert manifest.blocks[Path((0, 1))].sources == ("a.txt", "b.txt")
    assert (manifest.recipe["steps"], manifest.recipe["settings"]) == (10, {"seed": 4})


def test_lora_b_may_be_stored_as_a_linear_layer_has_it(tmp_path: pathlib.Path) -> None:
    config = design("lora-qk")
    tensors = make_tensors(config, generic=4)
    turned = {n: t.transpose(-1, -2).contiguous() if n.endswith(".b") else t for n, t in tensors.items()}
    convert(save(tmp_path / "m.safetensors", turned, settings_of(config)), tmp_path / "bank")
    assert_same(tmp_path / "bank", tensors, config)


def test_kv_may_have_an_axis_for_the_heads(tmp_path: pathlib.Path) -> None:
    config = design("kv")
    tensors = make_tensors(config, generic=4)
    split = {n: t.unflatten(-1, (2, 5)) if n.startswith("memory") else t for n, t in tensors.items()}
    convert(save(tmp_path / "m.safetensors", split, settings_of(config)), tmp_path / "bank")
    assert_same(tmp_path / "bank", tensors, config)


def test_other_dtypes(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(design("lora-vo"), dtype="bfloat16")
    tensors = make_tensors(design("lora-vo"))
    save(tmp_path / "m.safetensors", tensors, settings_of(config))
    convert(tmp_path / "m.safetensors", tmp_path / "bank", dtype="bfloat16")
    rounded = {name: t.bfloat16() if name.startswith("memory") else t for name, t in tensors.items()}
    assert_same(tmp_path / "bank", rounded, config)
    double = {name: t.double() if name.startswith("memory") else t for name, t in tensors.items()}
    convert(save(tmp_path / "d.safetensors", double, settings_of(config)), tmp_path / "bank2")
    assert_same(tmp_path / "bank2", tensors, dataclasses.replace(config, dtype="float32"))
    tensors["memory.level2.v.a"][1] *= 1e6
    save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"memory\.level2\.v\.a has values too large for float16 in cluster 0\.1"
    ):
        convert(tmp_path / "m.safetensors", tmp_path / "bank3", dtype="float16")


def test_key_map(tmp_path: pathlib.Path) -> None:
    config = design()
    tensors = make_tensors(config)
    foreign = {"optimizer.step": torch.zeros(1)}
    for name, tensor in tensors.items():
        head, level, part = name.split(".")
        number, proj = level.removeprefix("level"), {"w1": "gate", "w2": "up", "w3": "out"}.get(part, part)
        foreign[f"_orig_mod.module.{head[:3]}/l{number}/{proj}"] = (
            tensor.mT.contiguous() if proj == "out" else tensor
        )
    table = tmp_path / "keys.toml"
    table.write_text(
        'transpose = ["memory.level{level}.w3"]\nignore = ["optimizer.*"]\n[keys]\n'
        '"mem/l{level}/gate" = "memory.level{level}.w1"\n"mem/l{level}/up" = "memory.level{level}.w2"\n'
        '"mem/l{level}/out" = "memory.level{level}.w3"\n"tre/l{level}/{what}" = "tree.level{level}.{what}"\n'
    )
    convert(save(tmp_path / "m.safetensors", foreign, settings_of(config)), tmp_path / "bank", key_map=table)
    assert_same(tmp_path / "bank", tensors, config)


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
