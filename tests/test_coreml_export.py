"""`hiermem export coreml` on tiny models: the whole folder, what may be left out of it, and all that is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import CONFIG, HashEmbedder, give_sources, make_anchor, make_bank, make_model

from mlx_hiermem import plan
from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.apps.cli.main import main
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name, write_block
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import Origin
from mlx_hiermem.bank.sources import INDEX_FILE
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.coreml.export import CoreML, Options, export
from mlx_hiermem.convert.export import bundle, sizes
from mlx_hiermem.convert.export.architecture import Architecture
from mlx_hiermem.convert.export.exported import Exported
from mlx_hiermem.convert.export.references import read_memory
from mlx_hiermem.convert.export.shape import Export
from mlx_hiermem.convert.export.verify import check_files
from mlx_hiermem.errors import AnchorMismatchError, BankError, HierMemError
from mlx_hiermem.memory.attach import attach

CONTEXT, TOP = 32, Path((0,))
QUICK = Options(context=CONTEXT, weights="int8_channel", bound=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three nodes of level 1 with three below each, but 2.0, and sources; do not write into it."""
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny", absent=("2.0",))
    texts = {leaf: [(f"Topic {leaf}", f"What is known of {leaf}.")] for leaf in ("0.1", "0.2", "1.1", "2.1")}
    give_sources(folder / "bank", texts, HashEmbedder().embed)
    return folder


@pytest.fixture(scope="module")
def folder(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One export by the command itself; do not write into it."""
    out = tmp_path_factory.mktemp("out") / "Model"
    options = ["--context", str(CONTEXT), "--weights", "fp16", "--with-sources"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hiermem", "export", "coreml", str(model), str(out), *options])
        with pytest.raises(SystemExit) as stop:
            main()
    assert not stop.value.code
    return out


@pytest.fixture
def copy(model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(model, tmp_path / "tiny")


def read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_folder(folder: pathlib.Path) -> None:
    """All that an app needs, with digests; nothing beside it."""
    manifest = read(folder / "manifest.json")
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == set(manifest["files"]) | {"manifest.json", "receipt.json"}
    assert {"bank/bank.json", "bank/tree.safetensors", "bank/blocks/2/1.safetensors"} <= found
    assert {"tokenizer/tokenizer.json", "retriever/tokenizer.json"} <= found
    assert {"bank/sources/windows.jsonl", "bank/sources/index.safetensors"} <= found
    assert f"bank/{GENERIC_FILE}" not in found
    assert check_files(Exported(folder)).passed
    assert [path.name for path in folder.parent.iterdir()] == ["Model"]
    anchor = manifest["anchor"]
    assert (anchor["functions"], anchor["load_block"]) == ({"decode": 1, "prefill": 32}, "load_block")
    assert (anchor["context"], anchor["vocabulary"], anchor["compression"]) == (CONTEXT, 260, {"fp16": 29})
    assert anchor["states"]["k_cache"]["shape"] == [4, 2, CONTEXT, 32]
    assert anchor["states"]["down"]["shape"] == [2, 32, 32]
    assert manifest["memory"]["block_sizes"] == [4, 2]
    assert (manifest["eos"], manifest["sampling"]["temperature"]) == ([259], 0.0)
    assert manifest["chat"]["marks"]["start>user"] == "<user>"
    assert manifest["bank"] == {"folder": "bank/", "remote": None, "download": {}}


@pytest.mark.slow
def test_the_receipt(folder: pathlib.Path) -> None:
    receipt = read(folder / "receipt.json")
    assert receipt["measured"]["tokens"] > 300
    assert 0 < receipt["measured"]["kl"] <= receipt["weights"]["bound"] == 5e-4
    assert receipt["overflow"]["tensors"] > 200
    assert 0 < max(receipt["overflow"]["peaks"].values()) < 65_504
    assert {row["device"] for row in receipt["devices"]} == set(plan.devices())
    assert receipt["versions"]["coremltools"].startswith("9.")


def test_the_same_logits_as_in_mlx(folder: pathlib.Path, model: pathlib.Path) -> None:
    """With the memory that the bank in the folder gives, from the first call to the last token of the context."""
    exported, ids = Exported(folder), np.arange(CONTEXT) * 7 % 256
    ours, _, _ = load_anchor(model / "anchor", mx.float32)
    attachment, runner, found = attach(ours, exported.bank.config), exported.runner(), []
    for memory in ("0.1", "2.2"):
        tensors = read_memory(exported.bank, memory)
        runner.set_memory(tensors)
        found.append(runner.feed(ids))
        attachment.set(BlockCache(exported.bank).fetch(Path.parse(memory)).memory)
        expected = np.array(ours(mx.array(ids)[None]))[0]
        assert np.abs(found[-1] - expected).max() < 0.02 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 0.2 * np.abs(expected).max()


@pytest.mark.slow
def test_memory_as_an_input_and_a_part_of_the_bank(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = dataclasses.replace(QUICK, memory="input", only=("topic 1.2",), url="https://example.org/bank")
    steps: list[tuple[int, int]] = []
    report = export(model, tmp_path / "out", options, lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] >= 20
    manifest = report.manifest
    assert manifest["memory"]["mode"] == "input"
    assert manifest["anchor"]["inputs"]["gate"]["shape"] == [2, 6, 32]
    assert set(manifest["anchor"]["states"]) == {"k_cache", "v_cache"}
    blocks = {name for name in manifest["files"] if "blocks/" in name}
    assert blocks == {"bank/blocks/1.safetensors", "bank/blocks/1/2.safetensors"}
    assert manifest["bank"]["remote"] == {"url": "https://example.org/bank/"}
    assert len(manifest["bank"]["download"]) == 9
    exported = Exported(tmp_path / "out")
    assert exported.memories() == ["1.2"]
    runner, ids = exported.runner(), np.arange(20)
    plain = runner.feed(ids)
    runner.set_memory(read_memory(exported.bank, "1.2"))
    assert np.abs(runner.feed(ids) - plain).max() > 0.01


@pytest.mark.slow
def test_a_plain_model_that_is_quantised(tmp_path: pathlib.Path) -> None:
    convert_huggingface(make_anchor(tmp_path / "whole"), tmp_path / "four", quantize=4)
    report = export(tmp_path / "four", tmp_path / "out", dataclasses.replace(QUICK, weights="fp16"))
    assert report.manifest["memory"] is report.manifest["bank"] is report.manifest["retriever"] is None
    assert any("the anchor is quantised" in warning for warning in report.warnings)
    assert report.receipt["measured"]["kl"] < 1e-4  # from what its 4 bits stand for
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "anchor.mlpackage", "manifest.json", "receipt.json", "tokenizer",
    }  # fmt: skip


def names(choice: bundle.Choice) -> tuple[set[str], set[str]]:
    return {str(entry.path) for entry in choice.bundled}, {str(entry.path) for entry in choice.download}


def test_which_blocks(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    bank = MemoryBank.open(copy / "bank")
    every = {"0", "1", "2", "0.0", "0.1", "0.2", "1.0", "1.1", "1.2", "2.1", "2.2"}
    assert names(bundle.choose(bank)) == (every, set())
    assert names(bundle.choose(bank, only=("2", "0.1"))) == ({"2", "2.1", "2.2", "0", "0.1"}, set())
    with pytest.raises(BankError, match=r"8 blocks would be left .* from where is not known. Say with --url"):
        bundle.choose(bank, "level-1")
    with pytest.raises(BankError, match="nothing in the bank is called 'nobody'"):
        bundle.choose(bank, only=("nobody",))
    choice = bundle.choose(bank, "level-1", url="https://example.org/b/")
    assert names(choice) == ({"0", "1", "2"}, every - {"0", "1", "2"})
    (copy / "bank" / block_name(Path((1, 1)))).unlink()
    with pytest.raises(BankError, match=r"1 of the blocks to bundle are not in .*, 1\.1 for one"):
        bundle.choose(bank)
    Origin("me/tiny", "0" * 40).write(copy / "bank")
    BankPolicy(frozenset({Path((2,))})).write(copy / "bank" / POLICY)
    choice = bundle.choose(MemoryBank.open(copy / "bank"), only=("0",))
    assert names(choice) == ({"0", "0.0", "0.1", "0.2"}, {"1", "1.0", "1.1", "1.2"})  # nothing that is blocked
    assert choice.url == f"https://huggingface.co/me/tiny/resolve/{'0' * 40}/bank/"
    Origin("me/tiny", "0" * 40, subtrees=frozenset({Path((1, 2))})).write(copy / "bank")  # it was changed here
    ours = bundle.choose(MemoryBank.open(copy / "bank"), only=("0",))
    assert names(ours) == ({"0", "0.0", "0.1", "0.2", "1.2"}, {"1", "1.0", "1.1"})
    bundle.write_bank(choice, tmp_path / "bank", lambda: None)
    assert (tmp_path / "bank" / POLICY).is_file()
    assert len(BankManifest.read(tmp_path / "bank" / MANIFEST).blocks) == 8


def test_a_part_of_a_bank_still_routes(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What is left out has no block; its label and its place in the tree stay."""
    bundle.write_bank(bundle.choose(MemoryBank.open(model / "bank"), only=("0",)), tmp_path / "bank", lambda: None)
    bank = MemoryBank.open(tmp_path / "bank")
    assert not list(bank.problems())
    assert bank.nodes_on(Path((0, 2))) == [Path((0,)), Path((0, 2))]
    assert bank.nodes_on(Path((1, 2))) == []
    assert bank.manifest.label(Path((1, 2))) == "topic 1.2"


def test_sources_go_along_where_that_is_asked_for(copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Only those of leaves that the app gets."""

    def bundled(name: str, **asked: Any) -> tuple[MemoryBank, bundle.Choice]:
        choice = bundle.choose(MemoryBank.open(copy / "bank"), **asked)
        bundle.write_bank(choice, tmp_path / name, lambda: None)
        bank = MemoryBank.open(tmp_path / name)
        assert not [problem for problem in bank.problems() if "sources" in problem]
        return bank, choice

    def leaves(bank: MemoryBank) -> list[str]:
        assert bank.sources
        return [str(leaf) for leaf in bank.sources.leaves()]

    bank, choice = bundled("without")
    assert bank.sources is None
    assert not (tmp_path / "without/sources").exists()
    assert "--with-sources" in choice.warnings()[0]
    bank, choice = bundled("all", sources=True)
    assert leaves(bank) == ["0.1", "0.2", "1.1", "2.1"]
    assert not choice.warnings()
    assert (tmp_path / "all" / INDEX_FILE).read_bytes() == (copy / "bank" / INDEX_FILE).read_bytes()
    assert leaves(bundled("part", sources=True, only=("2", "0.1"))[0]) == ["0.1", "2.1"]
    assert len(leaves(bundled("later", sources=True, only=("2",), url="https://example.org/b")[0])) == 4
    BankPolicy(frozenset({Path((0,)), Path((2, 1))})).write(copy / "bank" / POLICY)
    bank, _ = bundled("open", sources=True)
    assert leaves(bank) == ["1.1"]
    assert bank.sources
    assert len(bank.sources) == 1
    without = dataclasses.replace(bank.manifest, sources=None)
    without.write(copy / "bank" / MANIFEST)
    with pytest.raises(BankError, match=r"has no sources\. Export it without --with-sources"):
        bundle.choose(MemoryBank.open(copy / "bank"), sources=True)


def spoil_digest(model: pathlib.Path) -> None:
    file = model / "bank/blocks/2/1.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")


def spoil_values(model: pathlib.Path) -> None:
    """A block in float32 that the manifest vouches for, with values that float16 does not hold."""
    manifest, shape = BankManifest.read(model / "bank" / MANIFEST), CONFIG.shapes(4)["gate"]
    tensors = {name: (shape, np.full(shape, 1e6, np.float32)) for name in CONFIG.widths}
    count, digest = write_block(model / "bank" / block_name(TOP), tensors, "float32")
    row = dataclasses.replace(manifest.blocks[TOP], bytes=count, sha256=digest)
    dataclasses.replace(manifest, blocks=manifest.blocks | {TOP: row}).write(model / "bank" / MANIFEST)


def spoil_weights(name: str, factor: float) -> Callable[[pathlib.Path], None]:
    def spoil(model: pathlib.Path) -> None:
        file = model / "anchor/model.safetensors"
        weights: Any = mx.load(str(file))
        mx.eval(weights)
        weights[name] *= factor
        mx.save_safetensors(str(file), weights)
        shutil.rmtree(model / "bank")

    return spoil


def another_anchor(model: pathlib.Path) -> None:
    shutil.rmtree(model / "anchor")
    make_anchor(model / "anchor", seed=5)


def lora(model: pathlib.Path) -> None:
    shutil.rmtree(model / "bank")
    make_bank(model / "bank", model / "anchor", dataclasses.replace(CONFIG, kind="lora-qk"))


def config(**changes: Any) -> Callable[[pathlib.Path], None]:
    def change(model: pathlib.Path) -> None:
        file = model / "anchor/config.json"
        file.write_text(json.dumps(read(file) | changes))
        shutil.rmtree(model / "bank")

    return change


UP = "model.layers.1.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Callable[[pathlib.Path], Any], dict[str, Any], str]] = {
    "architecture": (config(model_type="mistral"), {}, "anchors of type mistral cannot be exported to Core ML"),
    "long context": (config(max_position_embeddings=24), {}, r"made for 24 tokens, not 32\. Give a shorter"),
    "short context": (lambda _: None, {"context": 20}, r"a context of 20 tokens is too short\. A call takes 32"),
    "memory kind": (lora, {}, r"memories of kind lora-qk cannot be exported to Core ML\. Only ffn"),
    "other anchor": (another_anchor, {}, "the bank was made for the anchor"),
    "no model": (lambda model: shutil.rmtree(model), {}, "config.json"),
    "changed block": (spoil_digest, {}, r"blocks/2/1\.safetensors has changed"),
    "large block": (spoil_values, {}, "gate of the block 0 reaches 1e\\+06, the largest of float16 is 65504"),
    "large weight": (spoil_weights(UP, 1e7), {}, r"the weight layers_1_mlp_up_proj\w* has the value .* float16"),
    "overflow": (spoil_weights(UP, 2e5), {"weights": "fp16"}, "float16 would overflow: layers_1_mlp_up_proj_out"),
    "bound": (lambda _: None, {"bound": 0.0}, r"in float16 the KL is \S+ already"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, copy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One line that says what to do, and nothing left behind."""
    spoil, changes, message = REFUSED[name]
    spoil(copy)
    with pytest.raises(HierMemError, match=message) as caught:
        export(copy, tmp_path / "out", dataclasses.replace(QUICK, **changes))
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"tiny"}
    assert isinstance(caught.value, AnchorMismatchError) == (name == "other anchor")


def test_an_output_that_exists_is_left_alone(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(HierMemError, match="out exists already"):
        export(model, tmp_path / "out", QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_tables_of_four_bits_are_warned_of(model: pathlib.Path) -> None:
    sizes, shape = Architecture.read(model / "anchor"), Export(CONTEXT)
    assert "crash after 100 to 200 calls (coremltools #2716)" in CoreML().warnings(sizes, shape, {"a": "lut4"})[0]
    assert not CoreML().warnings(sizes, shape, {"a": "int4"})


def test_options_that_do_not_exist() -> None:
    for wrong, message in (
        ({"memory": "none"}, "--attach is 'none'"),
        ({"weights": "int2"}, "unknown weight format 'int2'"),
        ({"blocks": "some"}, "--blocks is 'some'"),
    ):
        with pytest.raises(HierMemError, match=message):
            Options(**wrong)  # type: ignore[arg-type]


def test_files_beyond_a_gigabyte_are_refused(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the anchor is built; and any other file when it is there."""
    monkeypatch.setattr(sizes, "LARGEST", 10_000)
    with pytest.raises(HierMemError, match=r"weights would be one file of 0\.00 GB\. Phones .* fewer bits"):
        export(model, tmp_path / "out", QUICK)
    assert not list(tmp_path.iterdir())
    (tmp_path / "large.bin").write_bytes(bytes(10_001))
    with pytest.raises(HierMemError, match=r"large\.bin has 0\.00 GB, more than the 1 GB"):
        sizes.check_files(tmp_path)


def test_a_full_disk(model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(HierMemError, match=r"the disk of .* has 0\.0 GB free"):
        export(model, tmp_path / "out", QUICK)


def test_the_plan_of_an_exported_folder(folder: pathlib.Path) -> None:
    """`hiermem plan OUT`: its packages, its bank, and the caches of its context."""
    measured = plan.measure(folder)
    package = sum(file.stat().st_size for file in (folder / "anchor.mlpackage").rglob("*") if file.is_file())
    assert measured.anchor_bytes == package
    assert (measured.max_context, measured.kv_bytes) == (CONTEXT, 2 * 4 * 2 * 32 * 2)
    assert [level.blocks for level in measured.levels] == [3, 8]
    assert 40e6 < measured.embedder_bytes < 50e6
    rows = sizes.on_devices(folder)
    assert all(row["fits"] and row["need"] > package for row in rows)
    small = [row | {"fits": False} if row["device"] == "iphone-15" else row for row in rows]
    assert "more than an app may have on iphone-15" in sizes.warnings(small)[0]
    assert "not been measured on a device" in sizes.warnings(rows)[-1]
