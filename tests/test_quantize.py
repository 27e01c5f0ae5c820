"""Quantised banks: what the files hold, what is lost, and that everything that handles banks handles these."""

from __future__ import annotations

import json
import pathlib
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hub_server import serving, use_in_this_process
from safetensors import safe_open
from tiny import CONFIG, make_anchor, make_bank, make_model

from mlx_hiermem import load
from mlx_hiermem.bank import edit
from mlx_hiermem.bank import quantize as quantizing
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.manifest import FileEntry
from mlx_hiermem.bank.merge import merge
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.bank.quantize import LevelReport, design, quantize
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import KINDS, MemoryConfig, Path, Quantization
from mlx_hiermem.convert.rewrite import quantize_model
from mlx_hiermem.errors import BankError, OutputError
from mlx_hiermem.files import file_digest
from mlx_hiermem.share.pull import pull
from mlx_hiermem.share.push import push

# The widths differ, and 96 is no multiple of 64: lora-ffn has groups of 32.
WIDE = MemoryConfig("ffn", 2, (4, 2), (1, 3), 64, dtype="float32", ffn_width=96, q_width=128, kv_width=64)


@pytest.fixture(scope="module")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_anchor(tmp_path_factory.mktemp("anchor") / "anchor")


@pytest.fixture(scope="module")
def whole(anchor: pathlib.Path) -> pathlib.Path:
    """A plain bank that no test changes."""
    return make_bank(anchor.parent / "bank", anchor, WIDE)


@pytest.fixture
def root(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(whole, tmp_path / "bank"))


def run(root: pathlib.Path, out: pathlib.Path, *bits: int, resume: bool = False) -> list[LevelReport]:
    bank = MemoryBank.open(root)
    return quantize(bank, out, design(bank.config, bits), resume)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def unpacked(file: pathlib.Path, name: str, bits: int) -> np.ndarray:
    """A quantised tensor as docs/format.md says it is to be read, without MLX."""
    with safe_open(file, "numpy") as tensors:
        packed, scales, biases = (tensors.get_tensor(name + part) for part in ("", ".scales", ".biases"))
    assert packed.dtype == np.uint32
    integers = (packed[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    grouped = integers.reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(*packed.shape[:2], -1)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(anchor: pathlib.Path, tmp_path: pathlib.Path, kind: str, bits: int) -> None:
    """Every value is within a step of its group, (largest - smallest) / (2^bits - 1), and most within half of one.

    MLX moves the steps so that zero stays zero, which may cost one end of the range half a step.
    """
    old = MemoryBank.open(make_bank(tmp_path / "bank", anchor, replace(WIDE, kind=kind)))
    reports = run(old.root, tmp_path / "out", bits)
    new = MemoryBank.open(tmp_path / "out")
    group = 32 if kind == "lora-ffn" else 64
    assert new.config == replace(old.config, quantization=(Quantization(bits, group),) * 2)
    assert list(check(new)) == []
    largest, within, errors = 0.0, list[float](), list[float]()
    for node in old.manifest.blocks:
        before, after = old.read(node), new.read(node)
        assert after.nbytes < before.nbytes * (bits + 64 / group) / 32 + 1500  # and the header
        for name, tensor in before.tensors.items():
            exact, rounded = np.array(tensor), np.array(after.values(name))
            assert rounded == pytest.approx(unpacked(new.root / block_name(node), name, bits), abs=1e-6)
            grouped = exact.reshape(*exact.shape[:2], -1, group)
            step = np.ptp(grouped, axis=-1, keepdims=True) / (2**bits - 1)
            steps = np.abs(rounded.reshape(grouped.shape) - grouped) / step
            largest, within = max(largest, steps.max()), [*within, np.mean(steps < 0.55)]
            errors += list(np.linalg.norm(rounded - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2)))
    assert 0.5 < largest < 1.01  # finer than the bits allow would be wrong, too
    assert np.mean(within) > 0.95
    assert max(report.largest_error for report in reports[:2]) == pytest.approx(max(errors), rel=1e-4)
    assert max(errors) < {8: 0.01, 4: 0.15, 2: 0.6}[bits]
    counted = sum(report.mean_error * report.matrices for report in reports[:2])
    assert counted / len(errors) == pytest.approx(np.mean(errors), rel=1e-4)


def test_mixed_levels(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    old = MemoryBank.open(whole)
    reports = run(whole, tmp_path / "a", 8, 4)
    assert [(report.level, report.quantization, report.blocks) for report in reports] == [
        (1, Quantization(8, 64), 2),
        (2, Quantization(4, 64), 4),
        (0, Quantization(8, 64), 1),  # generic is never coarser than what it is compared with
    ]
    assert [report.largest_error < 0.01 for report in reports] == [True, False, True]
    new = MemoryBank.open(tmp_path / "a")
    assert sum(report.bytes_before for report in reports) == sum(
        size for name, size, _ in old.files() if name != TREE
    )
    assert sum(report.bytes_after for report in reports) == sum(
        size for name, size, _ in new.files() if name != TREE
    )
    reports = run(whole, tmp_path / "b", 16, 4)
    assert [(report.largest_error == 0, report.bytes_after == report.bytes_before) for report in reports] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    kept = ["blocks/0.safetensors", "blocks/1.safetensors", GENERIC_FILE, TREE]
    assert all(contents(tmp_path / "b")[name] == contents(whole)[name] for name in kept)
    memory = json.loads((tmp_path / "b" / MANIFEST).read_text())["memory"]
    assert memory["quantization"] == [None, {"bits": 4, "group_size": 64}]
    assert MemoryBank.open(tmp_path / "b").config.precision == "float32, then 4 bits in groups of 64"
    assert "quantization" not in json.loads((whole / MANIFEST).read_text())["memory"]  # readable as ever


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(anchor: pathlib.Path, tmp_path: pathlib.Path, dtype: str) -> None:
    """Scales have the bank's dtype, and so have the values that come out."""
    root, config = make_bank(tmp_path / "bank", anchor, WIDE), replace(WIDE, dtype=dtype)
    manifest = MemoryBank.open(root).manifest
    rows = dict[Path, FileEntry]()
    for node in manifest.blocks:
        file = root / block_name(node)
        mx.save_safetensors(str(file), {k: v.astype(getattr(mx, dtype)) for k, v in mx.load(str(file)).items()})
        rows[node] = replace(manifest.blocks[node], bytes=file.stat().st_size, sha256=file_digest(file))
    replace(manifest, memory=config, blocks=rows, generic=None).write(root / MANIFEST)
    reports = run(root, tmp_path / "out", 8)
    assert [report.level for report in reports] == [1, 2]
    assert max(report.largest_error for report in reports) < 0.015
    fetch = BlockCache(MemoryBank.open(tmp_path / "out")).fetch(Path((1, 0)))
    assert fetch.memory is not None
    assert fetch.memory.tensors["up"].dtype == getattr(mx, dtype)


def test_blocks_stay_quantised_in_the_cache(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run(whole, tmp_path / "out", 8, 4)
    bank = MemoryBank.open(tmp_path / "out")
    cache, path = BlockCache(bank), Path((1, 0))
    fetch = cache.fetch(path)
    blocks = [bank.read(node) for node in path.prefixes()]
    assert cache.bytes == fetch.bytes_read == sum(bank.manifest.blocks[node].bytes for node in path.prefixes())
    assert {tensor.dtype for tensor in blocks[0].tensors.values()} == {mx.uint32, mx.float32}
    assert fetch.memory is not None
    assert fetch.memory.nbytes > 2 * cache.bytes
    for name, tensor in fetch.memory.tensors.items():
        assert mx.array_equal(tensor, mx.concatenate([block.values(name) for block in blocks], axis=1))


def test_a_quantised_model_says_nearly_the_same(tmp_path: pathlib.Path) -> None:
    model = make_model(tmp_path / "model")
    edit.block(model / "bank", [Path((2,))], "parent")
    (model / "source.json").write_text("{}")
    logits = {}
    for bits in (None, 8, 4):
        folder = tmp_path / f"{bits}" if bits else model
        if bits:
            quantize_model(model, folder, design(CONFIG, [bits]))
            assert contents(folder / "anchor") == contents(model / "anchor")
            assert sorted(file.name for file in folder.iterdir()) == ["anchor", "bank", "source.json"]
            assert MemoryBank.open(folder / "bank").policy == BankPolicy(frozenset([Path((2,))]), "parent")
        loaded = load(folder)
        for memory in ("1.2", "generic"):
            loaded.select(memory, "")
            logits[bits, memory] = np.array(loaded.anchor(mx.array([loaded.tokens("What is neon?")])))
    for memory in ("1.2", "generic"):
        exact = logits[None, memory]
        lost = {bits: np.abs(logits[bits, memory] - exact).max() / np.abs(exact).max() for bits in (8, 4)}
        assert 0 < lost[8] < 0.1
        assert 4 * lost[8] < lost[4] < 0.5


def interrupt_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """The n-th block that is quantised is Ctrl-C's; returns the list of those that are quantised."""
    own, seen = quantizing.quantized, list[str]()

    def counted(*arguments: object) -> object:
        seen.append("")
        if len(seen) == count:
            raise KeyboardInterrupt
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(quantizing, "quantized", counted)
    return seen


def test_an_interrupted_run_goes_on(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = run(root, tmp_path / "at once", 8, 4)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(root, out, 8, 4)
    assert not out.exists()
    with pytest.raises(OutputError, match="--resume"):
        run(root, out, 8, 4)
    with pytest.raises(OutputError, match="other settings"):
        run(root, out, 8, resume=True)
    with monkeypatch.context() as patch:
        quantised = interrupt_at(patch, 0)
        assert run(root, out, 8, 4, resume=True) == at_once  # errors of the first three blocks included
    assert len(quantised) == 4  # of seven
    assert contents(out) == contents(tmp_path / "at once")
    assert not list(tmp_path.glob("*.partial"))


def test_an_interrupted_model_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    config = design(CONFIG, [4])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, out, config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.partial"]
    with pytest.raises(OutputError, match="--resume"):
        quantize_model(model, out, config)
    quantize_model(model, out, config, resume=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out"]
    assert list(check(MemoryBank.open(out / "bank"))) == []
    load(out).select("1.2", "")
    with pytest.raises(OutputError, match="exists already"):
        quantize_model(model, out, config)


def test_generic_is_stored_as_the_finest_level_that_has_blocks() -> None:
    sizes = replace(WIDE, block_sizes=(4, 0, 2))
    assert design(sizes, [4, 16, 8]).quantized(0) == Quantization(8, 64)
    assert design(sizes, [4, 8]).precision == "4 bits in groups of 64, then 8 bits in groups of 64"
    assert design(sizes, [16, 8]).quantized(0) is None


def test_a_plain_block_is_quantised_when_it_joins(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out, node = tmp_path / "out", Path((1, 0))
    run(whole, out, 8, 4)
    before = contents(out)
    entry = edit.add(out, whole / block_name(node), node, replacing=True)
    assert contents(out) == before
    assert edit.add(out, out / block_name(node), node, replacing=True) == entry  # as it is stored already
    assert contents(out) == before
    plain = pathlib.Path(shutil.copytree(whole, tmp_path / "plain"))
    with pytest.raises(
        BankError, match=r"1/0\.safetensors holds gate uint32 \[2, 2, 8\].*expected gate float32 \[2, 2, 64\]"
    ):
        edit.add(plain, out / block_name(node), node, replacing=True)


def test_halves_that_were_quantised_alike_merge(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run(whole, tmp_path / "whole", 8, 4)
    banks = {}
    for name, gone in (("first", "1"), ("second", "0")):
        half = pathlib.Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        edit.remove(half, [Path.parse(gone)])
        banks[name] = MemoryBank.open(half)
    merged = merge(banks["first"], banks["second"], tmp_path / "out")
    assert contents(merged.root) == contents(tmp_path / "whole")
    with pytest.raises(BankError, match="different memory settings: quantization"):
        merge(banks["first"], MemoryBank.open(whole), tmp_path / "again")


def test_to_the_hub_and_back(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    quantize_model(make_model(tmp_path / "plain"), model, design(CONFIG, [8, 4]))
    with serving() as server:
        use_in_this_process(monkeypatch, server.url, tmp_path)
        push(model, "me/small")
        assert "8 bits in groups of 32, then 4" in server.repo("me/small").head["README.md"].decode()
        assert pull("me/small", tmp_path / "lazy", lazy=True).remote_blocks == 9
        lazy, whole = load(tmp_path / "lazy"), load(model)
        assert (
            lazy.generate("abc", memory="1.2", max_tokens=5).text
            == whole.generate("abc", memory="1.2", max_tokens=5).text
        )
        assert lazy.cache is not None
        assert lazy.cache.stats.remote_bytes == whole.bank.manifest.blocks[Path((1, 2))].bytes
