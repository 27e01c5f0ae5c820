"""What every converted model is held to, source at hand or not: digests, shapes, finite values, identity."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name, read_block
from mlx_hiermem.convert.pipeline import ANCHOR, SOURCE
from mlx_hiermem.errors import AnchorError, HierMemError
from mlx_hiermem.files import file_digest, read_json


@dataclass(frozen=True)
class Check:
    """One line of the receipt. `figure` and `bound` are for people, `details` has the numbers."""

    name: str
    figure: str
    bound: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)


def recorded(model: pathlib.Path) -> dict[str, Any]:
    """source.json, or nothing where the model was put together by hand."""
    file = model / SOURCE
    return read_json(file, hint="Convert the model again.") if file.is_file() else {}


def check_anchor_files(model: pathlib.Path) -> Check:
    """Against the digests that `convert` noted."""
    noted = recorded(model).get("anchor")
    if noted is None:
        return Check("anchor digests", "none were recorded", "", True)
    wrong = [row["name"] for row in noted if not _unchanged(model / ANCHOR / row["name"], row["sha256"])]
    figure = f"{', '.join(wrong)} changed" if wrong else f"{len(noted)} files"
    return Check("anchor digests", figure, "all equal", not wrong, {"files": noted, "changed": wrong})


def _unchanged(file: pathlib.Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256


def check_anchor_tensors(model: pathlib.Path) -> tuple[Check, nn.Module | None]:
    """mlx-lm loads strictly, which compares names and shapes with the config; then every value is looked at.

    Returns the anchor too, in float32, unless it cannot be loaded.
    """
    try:
        anchor, _, _ = load_anchor(model / ANCHOR, mx.float32)
    except AnchorError as error:
        return Check("anchor tensors", error.what, "shapes fit, all finite", False), None
    tensors = [(name, value) for name, value in tree_flatten(anchor.parameters()) if value.dtype != mx.uint32]
    bad = [name for name, value in tensors if not mx.isfinite(value).all().item()]
    figure = f"not finite: {', '.join(bad[:4])}" if bad else f"{len(tensors)} tensors"
    return Check("anchor tensors", figure, "shapes fit, all finite", not bad, {"not finite": bad}), anchor


def check_bank_files(bank: MemoryBank) -> Check:
    """Sizes and sha256 of all the bank's files, against the manifest."""
    problems = list(bank.problems())
    figure = problems[0] if problems else f"{sum(1 for _ in bank.files())} files"
    return Check("bank digests", figure, "all equal", not problems, {"problems": problems})


def check_blocks(bank: MemoryBank) -> Check:
    """Every block's shapes, dtype and values, and that its cluster is in the tree."""
    files = {block_name(path): len(path) for path in bank.manifest.blocks}
    if bank.manifest.generic:
        files[GENERIC_FILE] = 0
    problems = []
    try:
        problems = [f"no cluster {path} in the tree" for path in bank.manifest.blocks if not bank.tree.has(path)]
    except HierMemError as error:
        problems.append(error.what)
    for name, level in files.items():
        problems += _block_problems(bank, name, level)
    figure = problems[0] if problems else f"{len(files)} blocks"
    return Check("block tensors", figure, "shapes fit, all finite", not problems, {"problems": problems})


def _block_problems(bank: MemoryBank, name: str, level: int) -> Iterator[str]:
    try:
        block = read_block(bank.root / name, bank.config, level)
    except HierMemError as error:
        yield error.what
        return
    for part in bank.config.widths:
        if not mx.isfinite(block.values(part)).all().item():
            yield f"{part} of {name} has non-finite values"


def check_identity(model: pathlib.Path, bank: MemoryBank) -> Check:
    """That the bank was made for this anchor."""
    try:
        bank.manifest.check_anchor(identify(model / ANCHOR))
    except HierMemError as error:
        return Check("bank's anchor", error.what, "this anchor", False)
    return Check("bank's anchor", bank.manifest.anchor.name, "this anchor", True)


def check_source(model: pathlib.Path, found: dict[str, Any]) -> Check:
    """Whether a source is the very one that was converted, by its weights' digests."""
    noted = {row["sha256"] for row in recorded(model).get("files", ())}
    if not noted:
        return Check("source", f"{found['name']}; none was recorded", "", True)
    same = noted == {row["sha256"] for row in found["files"]}
    figure = found["name"] if same else f"{found['name']} is another than the one converted"
    return Check("source", figure, "same digests", same)
