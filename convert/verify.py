"""`hiermem verify`: checks a converted model, compares it with its source, and writes the receipt.

The checks of `checks.py` always; with the source at hand, parity with PyTorch (`parity.py`). All figures go
into receipt.json, passed or not.
"""

from __future__ import annotations

import contextlib
import datetime
import pathlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.anchor import identify, read_config
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.convert.checkpoint import TensorSource, open_checkpoint
from mlx_hiermem.convert.checks import (
    Check,
    check_anchor_files,
    check_anchor_tensors,
    check_bank_files,
    check_blocks,
    check_identity,
    check_source,
)
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.convert.memory_layout import MemoryLayout, read_layout
from mlx_hiermem.convert.memory_settings import read_settings
from mlx_hiermem.convert.pipeline import ANCHOR, BANK, anchor_dims
from mlx_hiermem.convert.source import Source, find_source, tool_versions
from mlx_hiermem.errors import AnchorError, BankError, HierMemError, MissingDependencyError
from mlx_hiermem.files import write_json
from mlx_hiermem.progress import Progress

if TYPE_CHECKING:
    from mlx_hiermem.convert.parity import Figures


RECEIPT = "receipt.json"
PATHS = 3  # paths of the tree that are compared, beside the generic block

# Relative difference of hidden states and logits. Both sides compute in float32, so where the anchor holds the
# source's own values (also in float16 or bfloat16) only the order of sums differs. Where values were rounded, the
# bound is what that does to SmolLM2-135M, with room to spare; the source rounded alike must be EXACT again.
EXACT = 1e-4
EXACT_GELU = 2e-3  # Gemma 1: mlx-lm computes the exact GELU, the original its tanh form
ROUNDED = {"float16": 1e-2, "bfloat16": 1e-1}
QUANTISED = {8: 0.2, 4: 1.5}


@dataclass(frozen=True)
class VerifyReceipt:
    model: str
    date: str
    versions: dict[str, str]
    source: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed} | asdict(self)


@dataclass(frozen=True)
class Against:
    """What a model is compared with: its source, and the memory checkpoint with the options of `convert`."""

    source: Source
    memory: pathlib.Path | None = None
    config: pathlib.Path | None = None
    key_map: pathlib.Path | None = None


def verify(
    model: pathlib.Path,
    against: str | None = None,
    memory: pathlib.Path | None = None,
    *,
    config: pathlib.Path | None = None,
    key_map: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> VerifyReceipt:
    """Checks a model folder and writes its receipt.json; `passed` says whether every bound was held.

    `against` is the source it was converted from, `memory` the memory checkpoint (with `config` and `key_map`
    as for `convert`). Raises a HierMemError where there is nothing to check or to compare with: no such model
    or source, no PyTorch.
    """
    if not (model / ANCHOR / "config.json").is_file():
        raise AnchorError(f"{model} is no model folder: it has no {ANCHOR}/config.json", "See `hiermem convert`.")
    bank = MemoryBank.open(model / BANK) if (model / BANK).is_dir() else None
    if memory and not (bank and against):
        why = "the model has no bank" if against else "the anchor's source is needed too (--against)"
        raise HierMemError(f"cannot compare with {memory}: {why}")
    other = Against(find_source(against), memory, config, key_map) if against else None
    found = other.source.describe() if other else {}
    checks: list[Check] = []
    total = 2 + 3 * bool(bank) + 2 * bool(other)
    with _on_cpu():
        for check in _checks(model, bank, other, found):
            checks.append(check)
            if progress:
                progress(min(len(checks), total), total)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    receipt = VerifyReceipt(model.resolve().name, date, tool_versions(), found, tuple(checks))
    write_receipt(model / RECEIPT, receipt.to_json())
    return receipt


def _checks(
    model: pathlib.Path, bank: MemoryBank | None, against: Against | None, found: dict[str, Any]
) -> Iterator[Check]:
    yield check_anchor_files(model)
    check, anchor = check_anchor_tensors(model)
    yield check
    if bank:
        yield check_bank_files(bank)
        yield check_blocks(bank)
        yield check_identity(model, bank)
    if against:
        yield check_source(model, found)
        if anchor is not None:
            yield from check_parity(model, anchor, bank, against)


def check_parity(
    model: pathlib.Path, anchor: nn.Module, bank: MemoryBank | None, against: Against
) -> Iterator[Check]:
    """Compares with PyTorch, one prompt and memory at a time."""
    try:
        from mlx_hiermem.convert import parity
    except ImportError as error:
        raise MissingDependencyError(
            "comparing with the source needs PyTorch", "pip install 'mlx-hiermem[torch]'"
        ) from error
    bank = bank if against.memory else None
    with contextlib.ExitStack() as stack:
        try:
            dtype, quantization, bound = stored_as(model, against.source)
            rounded = f"{quantization['bits']} bits" if quantization else dtype
            design, read = None, None
            if against.memory and bank:
                tensors = stack.enter_context(open_checkpoint(against.memory))
                layout = _layout(tensors, model, bank, against)
                design, read = layout.config, parity.memory_reader(tensors, layout, bank.config)
                same = design == replace(bank.config, quantization=())
                figure = f"{bank.config.kind}, {bank.config.precision}"
                yield Check("memory design", figure, "the checkpoint's", same)
            theirs = parity.TorchSide(parity.load_source(against.source, against.config), design, read)
            ours = parity.MLXSide(anchor, BlockCache(bank) if bank else None)
            for tokens in (parity.SHORT, parity.LONG):
                yield from _lines(parity.compare(theirs, ours, "none", tokens), bound, rounded)
            if dtype:
                theirs.round(dtype, quantization)
            exact = EXACT if dtype else bound
            note = "source rounded alike" if dtype or (bank and bank.config.quantization) else ""
            for memory in ["none"] * bool(dtype) + _memories(bank):
                yield from _lines(parity.compare(theirs, ours, memory, parity.SHORT), exact, note)
        except (AnchorError, BankError) as error:  # what was converted is at fault, not the source
            yield Check("parity", error.what, "", False)


def _layout(tensors: TensorSource, model: pathlib.Path, bank: MemoryBank, against: Against) -> MemoryLayout:
    """Where the memory checkpoint has which tensor."""
    assert against.memory
    names = KeyMap.read(against.key_map) if against.key_map else KeyMap()
    identity, dims = identify(model / ANCHOR), anchor_dims(read_config(model / ANCHOR))
    return read_layout(tensors, read_settings(against.memory, tensors), names, identity, dims, bank.config.dtype)


def stored_as(model: pathlib.Path, source: Source) -> tuple[str, dict[str, Any] | None, float]:
    """(dtype, quantisation, bound) of an anchor whose values are not the source's own; else ("", None, EXACT)."""
    weights: Any = mx.load(str(next((model / ANCHOR).glob("model*.safetensors"))))
    dtype = next(
        str(value.dtype).removeprefix("mlx.core.") for value in weights.values() if value.dtype != mx.uint32
    )
    if quantization := read_config(model / ANCHOR).get("quantization"):
        if (bits := quantization["bits"]) not in QUANTISED:
            raise AnchorError(
                f"the anchor has {bits} bits, for which no bound is known",
                f"Known are {', '.join(map(str, QUANTISED))}.",
            )
        return dtype, quantization, QUANTISED[bits]
    if source.kind == "gguf" and dtype in ROUNDED:
        return dtype, None, ROUNDED[dtype]
    if read_config(model / ANCHOR).get("model_type") == "gemma":
        return "", None, EXACT_GELU
    return "", None, EXACT


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Metal's float32 products are not quite float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(device)


def _memories(bank: MemoryBank | None) -> list[str]:
    """The bank's first, middle and last leaf, and generic."""
    if bank is None:
        return []
    inner = {path[:-1] for path in bank.manifest.blocks}
    leaves = [path for path in bank.manifest.blocks if path not in inner]
    chosen = dict.fromkeys(leaves[i * (len(leaves) - 1) // (PATHS - 1)] for i in range(PATHS))
    return [str(path) for path in chosen] + ["generic"] * bool(bank.manifest.generic)


def _lines(figures: Figures, bound: float, note: str) -> Iterator[Check]:
    """The receipt's lines for one comparison; the line of the logits carries all its numbers."""
    where = f"{figures.tokens} tokens, memory {figures.memory}"
    suffix = f", {note}" if note else ""
    yield _line(f"layers, {where}", max(figures.layers), bound, suffix)
    yield _line(f"logits, {where}", figures.logits, bound, suffix, figures.to_json())
    yield _line(f"cached decoding, {where}", figures.cached, EXACT)


def _line(name: str, value: float, bound: float, suffix: str = "", details: dict[str, Any] | None = None) -> Check:
    return Check(name, f"{value:.1e}", f"{bound:g}{suffix}", value <= bound, details or {})


def write_receipt(file: pathlib.Path, content: dict[str, Any]) -> None:
    write_json(file, content, hint="A receipt lies beside what was checked.")
