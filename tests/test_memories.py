"""Memory checkpoints to banks: every kind and shape of tree, bit for bit."""

import dataclasses
import json
import pathlib

import pytest
import torch
from memory_checkpoints import (
    ANCHOR,
    assert_same,
    bits,
    convert,
    design,
    documented,
    make_tensors,
    save,
    settings_of,
)
from safetensors.torch import save_file

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.convert.memory_settings import MINILM
from mlx_hiermem.convert.readers import SafetensorsFile
from mlx_hiermem.errors import CheckpointError


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
