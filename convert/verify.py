"""`hiermem verify`: what a converted model is held to, and the receipt of it.

Always: every file's digest, every tensor's shape, finite values, and that anchor and bank belong together. With
the source at hand: parity with PyTorch. All figures go into receipt.json, passed or not.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_hiermem.anchor import identify, load_anchor, read_config
from mlx_hiermem.bank.bank import GENERIC, MemoryBank, file_digest
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.convert.checkpoint import is_finite, open_checkpoint
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.convert.memory_layout import read_layout
from mlx_hiermem.convert.memory_settings import read_settings
from mlx_hiermem.convert.pipeline import ANCHOR, BANK, SOURCE, anchor_dims
from mlx_hiermem.convert.source import Source, find_source, tool_versions
from mlx_hiermem.errors import AnchorError, BankError, HierMemError, MissingDependencyError

if TYPE_CHECKING:
    from mlx_hiermem.convert.parity import Figures

Progress = Callable[[int, int], None]

RECEIPT = "receipt.json"
PATHS = 3  # paths of the tree that are compared, beside the generic block

# Relative difference of hidden states and logits. Both sides compute in float32, so where the anchor holds the
# source's own values (also in float16 or bfloat16) only the order of sums differs. Where values were rounded, the
# bound is what that does to SmolLM2-135M, with room to spare; the source rounded alike must be EXACT again.
EXACT = 1e-4
ROUNDED = {"float16": 1e-2, "bfloat16": 1e-1}
QUANTISED = {8: 0.2, 4: 1.5}


@dataclass(frozen=True)
class Check:
    """One line of the receipt. `figure` and `bound` are for people, `details` has the numbers."""

    name: str
    figure: str
    bound: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
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


def verify(
    model: pathlib.Path,
    against: str | None = None,
    memory: pathlib.Path | None = None,
    *,
    config: pathlib.Path | None = None,
    key_map: pathlib.Path | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Checks a model folder and writes its receipt.json; `passed` says whether every bound was held.

    `against` is the source it was converted from, `memory` the memory checkpoint (with `config` and `key_map`
    as for `convert`). Raises HierMemError only where there is nothing to check: no such model, no such source,
    no PyTorch.
    """
    if not (model / ANCHOR / "config.json").is_file():
        raise AnchorError(
            f"{model} is not a model folder: it has no {ANCHOR}/config.json", "See `hiermem convert`."
        )
    bank = MemoryBank.open(model / BANK) if (model / BANK).is_dir() else None
    if memory and not (bank and against):
        why = "the model has no bank" if against else "the anchor's source is needed too (--against)"
        raise HierMemError(f"cannot compare with {memory}: {why}")
    source = find_source(against) if against else None
    found = source.describe() if source else {}
    checks: list[Check] = []
    total = 2 + 3 * bool(bank) + 2 * bool(source)

    def add(*new: Check) -> None:
        checks.extend(new)
        if progress:
            progress(min(len(checks), total), total)

    add(check_anchor_files(model))
    add(check_anchor_tensors(model))
    loads = checks[-1].passed
    if bank:
        add(check_bank_files(bank))
        add(check_blocks(bank))
        add(check_identity(model, bank))
    if source:
        add(check_source(model, found))
        if loads:
            add(*check_parity(model, source, bank, memory, config, key_map))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    receipt = Receipt(model.resolve().name, date, tool_versions(), found, tuple(checks))
    _write(model / RECEIPT, receipt)
    return receipt


def _write(file: pathlib.Path, receipt: Receipt) -> None:
    new = file.with_suffix(".new")
    new.write_text(json.dumps(receipt.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, file)


def _recorded(model: pathlib.Path) -> dict[str, Any]:
    """source.json, or nothing where the model was put together by hand."""
    file = model / SOURCE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def check_anchor_files(model: pathlib.Path) -> Check:
    """Against the digests that `convert` noted."""
    noted = _recorded(model).get("anchor")
    if noted is None:
        return Check("anchor digests", "none were recorded", "", True)
    wrong = [row["name"] for row in noted if not _unchanged(model / ANCHOR / row["name"], row["sha256"])]
    figure = f"{', '.join(wrong)} changed" if wrong else f"{len(noted)} files"
    return Check("anchor digests", figure, "all equal", not wrong, {"files": noted, "changed": wrong})


def _unchanged(file: pathlib.Path, sha256: str) -> bool:
    return file.is_file() and file_digest(file) == sha256


def check_anchor_tensors(model: pathlib.Path) -> Check:
    """mlx-lm loads strictly, which compares names and shapes with the config; then every value is looked at."""
    try:
        anchor, _, _ = load_anchor(model / ANCHOR)
    except AnchorError as error:
        return Check("anchor tensors", error.what, "load strictly", False)
    tensors = [(name, value) for name, value in tree_flatten(anchor.parameters()) if value.dtype != mx.uint32]
    bad = [name for name, value in tensors if not mx.isfinite(value).all().item()]
    figure = f"not finite: {', '.join(bad[:4])}" if bad else f"{len(tensors)} tensors"
    return Check("anchor tensors", figure, "shapes fit, all finite", not bad, {"not finite": bad})


def check_bank_files(bank: MemoryBank) -> Check:
    problems = list(bank.problems())
    figure = problems[0] if problems else f"{sum(1 for _ in bank.files())} files"
    return Check("bank digests", figure, "all equal", not problems, {"problems": problems})


def check_blocks(bank: MemoryBank) -> Check:
    """Every block's shapes, dtype and values, and that its cluster is in the tree."""
    files = {block_name(path): bank.config.block_sizes[len(path) - 1] for path in bank.manifest.blocks}
    if bank.manifest.generic:
        files[GENERIC] = -1  # whatever size it has
    problems = []
    try:
        problems = [f"no cluster {path} in the tree" for path in bank.manifest.blocks if not bank.tree.has(path)]
    except HierMemError as error:
        problems.append(error.what)
    for name, units in files.items():
        problems += _block_problems(bank, name, units)
    figure = problems[0] if problems else f"{len(files)} blocks"
    return Check("block tensors", figure, "shapes fit, all finite", not problems, {"problems": problems})


def _block_problems(bank: MemoryBank, name: str, units: int) -> Iterator[str]:
    try:
        with open_checkpoint(bank.root / name) as tensors:
            found = {part: tensors.shape(part) for part in tensors.names()}
            if units < 0:
                units = next(iter(found.values()), (0, 0, 0))[1]
            if found != bank.config.shapes(units):
                yield f"{name} has the shapes {found}, expected {bank.config.shapes(units)}"
            for part in found:
                if tensors.dtype(part) != bank.config.dtype:
                    yield f"{part} of {name} is {tensors.dtype(part)}, not {bank.config.dtype}"
                elif not is_finite(tensors.read(part)):
                    yield f"{part} of {name} has non-finite values"
    except HierMemError as error:
        yield error.what


def check_identity(model: pathlib.Path, bank: MemoryBank) -> Check:
    try:
        bank.manifest.check_anchor(identify(model / ANCHOR))
    except HierMemError as error:
        return Check("bank's anchor", error.what, "this anchor", False)
    return Check("bank's anchor", bank.manifest.anchor.name, "this anchor", True)


def check_source(model: pathlib.Path, found: dict[str, Any]) -> Check:
    """Whether `against` is the very source that was converted, by its weights' digests."""
    noted = {row["sha256"] for row in _recorded(model).get("files", ())}
    if not noted:
        return Check("source", f"{found['name']}; none was recorded", "", True)
    same = noted == {row["sha256"] for row in found["files"]}
    figure = found["name"] if same else f"{found['name']} is another than the one converted"
    return Check("source", figure, "same digests", same)


def check_parity(
    model: pathlib.Path,
    source: Source,
    bank: MemoryBank | None,
    memory: pathlib.Path | None,
    config: pathlib.Path | None,
    key_map: pathlib.Path | None,
) -> list[Check]:
    """Compares with PyTorch: one check of each kind per case."""
    try:
        from mlx_hiermem.convert import parity
    except ImportError as error:
        raise MissingDependencyError(
            "comparing with the source needs PyTorch", "pip install 'mlx-hiermem[torch]'"
        ) from error
    dtype, quantization, bound = stored_as(model, source)
    rounded = f"{quantization['bits']} bits" if quantization else dtype
    checks: list[Check] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_cpu())
        read, design, cache = None, None, None
        if memory and bank:
            tensors = stack.enter_context(open_checkpoint(memory))
            names = KeyMap.read(key_map) if key_map else KeyMap()
            anchor, dims = identify(model / ANCHOR), anchor_dims(read_config(model / ANCHOR))
            layout = read_layout(tensors, read_settings(memory, tensors), names, anchor, dims, bank.config.dtype)
            read, design, cache = parity.memory_reader(tensors, layout), layout.config, BlockCache(bank)
            checks.append(Check("memory design", bank.config.kind, "the checkpoint's", design == bank.config))
        theirs = parity.TorchSide(parity.load_source(source, config), design, read)
        try:
            ours = parity.MLXSide(load_anchor(model / ANCHOR, mx.float32)[0], cache)
            for memory_name, tokens in _cases(bank if memory else None):
                checks += _parity_checks(parity.compare(theirs, ours, memory_name, tokens), bound, rounded)
            if dtype:
                theirs.round(dtype, quantization)
                figures = parity.compare(theirs, ours, "none", parity.SHORT)
                checks += _parity_checks(figures, EXACT, f"the source rounded to {rounded} too")
        except (AnchorError, BankError) as error:  # what was converted is at fault, not the source
            checks.append(Check("parity", error.what, "", False))
    return checks


def stored_as(model: pathlib.Path, source: Source) -> tuple[str, dict[str, Any] | None, float]:
    """(dtype, quantisation, bound) of an anchor whose values are not the source's own; ("", None, EXACT) else."""
    weights: dict[str, mx.array] = mx.load(str(next((model / ANCHOR).glob("model*.safetensors"))))
    dtype = next(
        str(value.dtype).removeprefix("mlx.core.") for value in weights.values() if value.dtype != mx.uint32
    )
    if quantization := read_config(model / ANCHOR).get("quantization"):
        return dtype, quantization, QUANTISED[quantization["bits"]]
    if source.kind == "gguf" and dtype in ROUNDED:
        return dtype, None, ROUNDED[dtype]
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


def _cases(bank: MemoryBank | None) -> list[tuple[str, int]]:
    """(memory, tokens): none with a short and a long prompt; the first, middle and last leaf; and generic."""
    from mlx_hiermem.convert.parity import LONG, SHORT

    cases = [("none", SHORT), ("none", LONG)]
    if bank is None:
        return cases
    inner = {path[:-1] for path in bank.manifest.blocks}
    leaves = [path for path in bank.manifest.blocks if path not in inner]
    chosen = dict.fromkeys(leaves[i * (len(leaves) - 1) // (PATHS - 1)] for i in range(PATHS))
    return cases + [(str(path), SHORT) for path in chosen] + [("generic", SHORT)] * bool(bank.manifest.generic)


def _parity_checks(figures: Figures, bound: float, note: str) -> Iterator[Check]:
    where = f"{figures.tokens} tokens, memory {figures.memory}"
    rows = (
        ("layers", max(figures.layers), bound),
        ("logits", figures.logits, bound),
        ("cached decoding", figures.cached, EXACT),
    )
    for name, value, limit in rows:
        details = figures.to_json() if name == "logits" else {}
        reason = f" ({note})" if note and name != "cached decoding" else ""
        yield Check(f"{name}, {where}", f"{value:.1e}", f"{limit:.0e}{reason}", value <= limit, details)
