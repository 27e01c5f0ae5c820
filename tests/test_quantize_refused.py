"""What is not quantised: damaged banks, designs that do not fit, settings that cannot be."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest
from test_quantize import WIDE, run

from mlx_hiermem.bank.bank import EDIT, MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.quantize import design
from mlx_hiermem.config import MemoryConfig, Path, Quantization
from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.files import file_digest


def change_block(root: pathlib.Path, change: Callable[[mx.array], mx.array], noted: bool) -> None:
    """Changes a value of block 1.0; `noted` in the manifest too."""
    file = root / "blocks/1/0.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors | {"up": change(tensors["up"])})
    if noted:
        manifest = MemoryBank.open(root).manifest
        row = replace(manifest.blocks[Path((1, 0))], bytes=file.stat().st_size, sha256=file_digest(file))
        replace(manifest, blocks=manifest.blocks | {row.path: row}).write(root / MANIFEST)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: change_block(root, lambda t: t + 1, noted=False),
            r"1/0\.safetensors is not what its manifest",
        ),
        (
            lambda root: change_block(root, lambda t: t * mx.nan, noted=True),
            r"1/0\.safetensors has values that are not",
        ),
        (lambda root: change_block(root, lambda t: t[:, :1], noted=True), r"1/0\.safetensors holds up"),
        (lambda root: (root / "blocks/1/0.safetensors").unlink(), r"1 files of the bank are not here.*1/0\.safe"),
        (lambda root: (root / EDIT).mkdir(), "interrupted"),
        (lambda root: (root / TREE).write_bytes(b"abc"), "tree.safetensors is not the manifest's"),
        (lambda root: (root / "policy.json").write_text("{}"), "cannot read"),
    ],
)
def test_a_damaged_bank_is_not_quantised(
    root: pathlib.Path, damage: Callable[[pathlib.Path], object], message: str
) -> None:
    damage(root)
    with pytest.raises(BankError, match=message):
        run(root, root.parent / "out", 8)
    assert [file.name for file in root.parent.iterdir()] == ["bank"]


@pytest.mark.parametrize(
    ("bits", "group_size", "change", "message"),
    [
        ([8], 64, {"hidden": 96}, "gate is 96 wide, which groups of 64 do not divide. Groups of 32 fit"),
        ([8], None, {"hidden": 48}, "gate is 48 wide, which groups of 64 do not divide. This memory cannot"),
        ([8, 8, 8], None, {}, "for 3 levels, the bank has 2"),
        ([], None, {}, "for 0 levels"),
        ([16], None, {}, "nothing would change"),
        ([5], None, {}, "5 bits in groups of 64 are not possible"),
        ([8], 16, {}, "8 bits in groups of 16 are not possible"),
        ([4], None, {"quantization": (Quantization(8, 64),) * 2}, "quantised already: 8 bits in groups of 64"),
    ],
)
def test_impossible_designs(bits: list[int], group_size: int | None, change: dict, message: str) -> None:
    with pytest.raises(BankError, match=message):
        design(replace(WIDE, **change), bits, group_size)


def test_settings_that_cannot_be_are_refused() -> None:
    data = design(WIDE, [8, 4]).to_json()
    assert MemoryConfig.from_json(json.loads(json.dumps(data))) == design(WIDE, [8, 4])
    assert MemoryConfig.from_json(data | {"quantization": None}) == WIDE
    row = {"bits": 8, "group_size": 64}
    for levels in (
        [row],
        [row, row, row],
        [row, row | {"bits": 3}],
        [row, {"bits": 8}],
        [row, row | {"mode": "nf4"}],
        [8, 8],
        8,
    ):
        with pytest.raises(HierMemError):
            MemoryConfig.from_json(data | {"quantization": levels})
