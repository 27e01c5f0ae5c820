"""Random memory checkpoints of the documented layout, and what is to become of them."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import random_tree

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.config import AnchorIdentity, MemoryConfig
from mlx_hiermem.convert.memories import AnchorDims, convert_memory
from mlx_hiermem.convert.readers import SafetensorsFile

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
