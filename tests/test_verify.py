"""Verification: every kind of source and memory passes, and whatever is changed afterwards fails."""

import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import BASE, KINDS, hf_model, make_gguf, make_hf, make_memory, memory_config
from tiny_openlm import SIZES, random_openlm, save_openlm

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.quantize import design
from mlx_hiermem.config import KINDS as MEMORY_KINDS
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert import parity
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.rewrite import quantize_model
from mlx_hiermem.convert.verify import EXACT, VerifyReceipt, verify
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError, MissingDependencyError, OutputError
from mlx_hiermem.files import file_digest


def failed(receipt: VerifyReceipt) -> list[str]:
    """The names of the checks that failed, without their particulars."""
    return sorted({check.name.partition(",")[0] for check in receipt.checks if not check.passed})


def worst(receipt: VerifyReceipt) -> float:
    """The largest relative difference of logits."""
    return max(check.details["logits"] for check in receipt.checks if check.name.startswith("logits"))


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes importing the module that needs PyTorch fail."""
    monkeypatch.setitem(sys.modules, "mlx_hiermem.convert.parity", None)
    monkeypatch.delattr("mlx_hiermem.convert.parity")


@pytest.fixture(autouse=True)
def shorter_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny gemma's window is 6 tokens, so a long prompt need not be as long as for the real one."""
    monkeypatch.setattr(parity, "LONG", 96)


def config(kind: str = "ffn", anchor: str = "llama") -> MemoryConfig:
    cls, own = KINDS[anchor]
    return memory_config(cls(**{**BASE, **own}), kind)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_memory(tmp_path_factory.mktemp("memory") / "memory.safetensors", config(), generic=6)


@pytest.fixture(scope="module")
def converted(hf: pathlib.Path, memory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(str(hf), out, memory=memory)
    return out


@pytest.fixture
def model(converted: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy to spoil."""
    return pathlib.Path(shutil.copytree(converted, tmp_path / "model"))


def test_the_receipt(model: pathlib.Path, hf: pathlib.Path, memory: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    receipt = verify(model, str(hf), memory, progress=lambda *now: seen.append(now))
    assert receipt.passed, failed(receipt)
    assert worst(receipt) < 1e-5
    assert seen[-1][0] == seen[-1][1]
    written = json.loads((model / "receipt.json").read_text())
    assert written == json.loads(json.dumps(receipt.to_json()))
    assert written["source"]["files"][0]["sha256"] == file_digest(hf / "model.safetensors")
    assert {"mlx", "torch", "transformers"} <= set(written["versions"])
    figures = [check["details"] for check in written["checks"] if check["name"].startswith("logits")]
    assert [(row["memory"], row["tokens"]) for row in figures] == [
        ("none", parity.SHORT), ("none", parity.LONG),
        *((name, parity.SHORT) for name in ("0.0", "1.1", "2.2", "generic")),
    ]  # fmt: skip
    assert all(len(row["layers"]) == 3 for row in figures)
    assert [row["effect"] > 0.1 for row in figures] == [row["memory"] != "none" for row in figures]
    assert not (model / "receipt.new").exists()


def test_without_the_source(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch(monkeypatch)
    receipt = verify(model)
    assert receipt.passed
    assert [check.name for check in receipt.checks] == [
        "anchor digests", "anchor tensors", "bank digests", "block tensors", "bank's anchor",
    ]  # fmt: skip


def test_a_receipt_that_cannot_be_written(model: pathlib.Path) -> None:
    (model / "receipt.json.partial").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*receipt.json: Is a directory"):
        verify(model)


@pytest.mark.parametrize(
    ("anchor", "kind"),
    list(zip(("qwen3", "gemma3_text", "qwen2", "qwen3", "gemma3_text"), MEMORY_KINDS, strict=True)),
)
def test_every_memory_on_other_anchors(tmp_path: pathlib.Path, anchor: str, kind: str) -> None:
    source = make_hf(tmp_path / "hf", anchor, dtype=torch.bfloat16)
    memory = make_memory(tmp_path / "memory.safetensors", config(kind, anchor))
    convert(str(source), tmp_path / "model", memory=memory)
    receipt = verify(tmp_path / "model", str(source), memory)
    assert receipt.passed, failed(receipt)
    assert worst(receipt) < EXACT


@pytest.mark.parametrize("kind", ["ffn", "kv"])
def test_openlm(tmp_path: pathlib.Path, kind: str) -> None:
    source = save_openlm(random_openlm(qk_norm=True), tmp_path / "run")
    width = SIZES["heads"] * SIZES["head_dim"]
    design = MemoryConfig(kind, 3, (4, 2), (1, 2), SIZES["hidden"], "float32", SIZES["ffn_width"], width, width)
    memory = make_memory(tmp_path / "memory.safetensors", design)
    convert(str(source), tmp_path / "model", memory=memory)
    receipt = verify(tmp_path / "model", str(source), memory)
    assert receipt.passed, failed(receipt)


@pytest.mark.parametrize(
    ("quant", "bits"), [("F32", None), ("Q8_0", None), ("BF16", None), ("F32", 8), ("Q8_0", 4)]
)
def test_gguf_and_quantised_anchors(
    tmp_path: pathlib.Path, memory: pathlib.Path, quant: str, bits: int | None
) -> None:
    """What was rounded is held to a wide bound, and to the narrow one against a source that is rounded alike."""
    source = make_gguf(tmp_path / "tiny.gguf", hf_model("llama"), quant)
    convert(str(source), tmp_path / "model", quantize=bits)
    receipt = verify(tmp_path / "model", str(source))
    assert receipt.passed, [(check.name, check.figure) for check in receipt.checks]
    logits = [check for check in receipt.checks if check.name.startswith("logits")]
    exact = quant == "F32" and bits is None
    assert len(logits) == (2 if exact else 3)
    assert logits[-1].details["logits"] < EXACT
    assert exact or logits[0].details["logits"] > EXACT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ffn", "kv", "lora-qk"])
def test_quantised_memories(
    tmp_path: pathlib.Path, hf: pathlib.Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared with the checkpoint's values rounded alike; without that rounding they differ."""
    memory = make_memory(tmp_path / "memory.safetensors", config(kind), generic=6)
    convert(str(hf), tmp_path / "plain", memory=memory)
    design_of = MemoryBank.open(tmp_path / "plain" / "bank").config
    quantize_model(tmp_path / "plain", tmp_path / "model", design(design_of, [8, 4]))
    receipt = verify(tmp_path / "model", str(hf), memory)
    assert receipt.passed, failed(receipt)
    assert worst(receipt) < EXACT
    monkeypatch.setattr(parity, "rounded", lambda tensor, *_: tensor)
    assert "logits" in failed(verify(tmp_path / "model", str(hf), memory))


# Verification must be able to fail.


def change(file: pathlib.Path, name: str, value: float | None = None) -> None:
    """Overwrites one number of a tensor, or turns the tensor's sign."""
    tensors = load_file(file)
    if value is None:
        tensors[name] = -tensors[name]
    else:
        tensors[name].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "mlx"})


def bless(model: pathlib.Path) -> None:
    """Makes digests and identity agree with what is there, so that nothing but parity can tell."""
    from mlx_hiermem.anchor import identify

    source = json.loads((model / "source.json").read_text())
    for row in source["anchor"]:
        row["sha256"] = file_digest(model / "anchor" / row["name"])
    (model / "source.json").write_text(json.dumps(source))
    manifest = json.loads((model / "bank/bank.json").read_text())
    manifest["anchor"] = identify(model / "anchor", manifest["anchor"]["name"]).to_json()
    for row in manifest["blocks"]:
        file = model / "bank/blocks" / (row["path"].replace(".", "/") + ".safetensors")
        row |= {"sha256": file_digest(file), "bytes": file.stat().st_size}
    (model / "bank/bank.json").write_text(json.dumps(manifest))


def test_a_turned_tensor_in_the_anchor(model: pathlib.Path, hf: pathlib.Path, memory: pathlib.Path) -> None:
    change(model / "anchor/model.safetensors", "model.layers.1.mlp.up_proj.weight")
    assert failed(verify(model)) == ["anchor digests", "bank's anchor"]
    bless(model)
    assert verify(model).passed
    receipt = verify(model, str(hf), memory)
    assert failed(receipt) == ["layers", "logits"]
    layers = next(check.details for check in receipt.checks if check.name.startswith("logits"))["layers"]
    assert layers[0] < EXACT < layers[1]  # the figures show where
    assert json.loads((model / "receipt.json").read_text())["passed"] is False


def test_a_turned_tensor_in_a_block(model: pathlib.Path, hf: pathlib.Path, memory: pathlib.Path) -> None:
    change(model / "bank/blocks/2/2.safetensors", "gate")
    assert failed(verify(model)) == ["bank digests"]
    bless(model)
    assert verify(model).passed
    receipt = verify(model, str(hf), memory)
    assert failed(receipt) == ["layers", "logits"]
    assert all("memory 2.2" in check.name for check in receipt.checks if not check.passed)


def test_a_changed_config(model: pathlib.Path, hf: pathlib.Path) -> None:
    """Same weights, another rotary base: shows in the long prompt if in nothing else."""
    file = model / "anchor/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.1e4}))
    bless(model)
    assert failed(verify(model, str(hf))) == ["layers", "logits"]


def test_damage_that_needs_no_source(model: pathlib.Path) -> None:
    change(model / "anchor/model.safetensors", "model.norm.weight", float("nan"))
    change(model / "bank/blocks/0.safetensors", "up", float("inf"))
    (model / "bank/blocks/1/1.safetensors").unlink()
    receipt = verify(model)
    assert failed(receipt) == ["anchor digests", "anchor tensors", "bank digests", "bank's anchor", "block tensors"]
    figures = {check.name: check for check in receipt.checks}
    assert "model.norm.weight" in figures["anchor tensors"].figure
    assert len(figures["block tensors"].details["problems"]) == 2


def test_an_anchor_that_does_not_load(model: pathlib.Path, hf: pathlib.Path) -> None:
    tensors = load_file(model / "anchor/model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, model / "anchor/model.safetensors", metadata={"format": "mlx"})
    assert failed(verify(model, str(hf))) == ["anchor digests", "anchor tensors", "bank's anchor"]


def test_another_source(model: pathlib.Path, memory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = make_hf(tmp_path / "other", seed=1)
    assert failed(verify(model, str(other))) == ["layers", "logits", "source"]


def test_another_memory(model: pathlib.Path, hf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = make_memory(tmp_path / "other.safetensors", config(), generic=6, seed=1)
    receipt = verify(model, str(hf), other)
    assert failed(receipt) == ["layers", "logits"]
    assert all("memory none" not in check.name for check in receipt.checks if not check.passed)


def test_cached_decoding_is_compared(
    model: pathlib.Path, hf: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = parity.MLXSide.run_cached

    def late(self: Any, ids: np.ndarray, memory: str) -> np.ndarray:
        return own(self, np.roll(ids, 1, axis=1), memory)

    monkeypatch.setattr(parity.MLXSide, "run_cached", late)
    assert failed(verify(model, str(hf))) == ["cached decoding"]


def test_what_cannot_be_checked(
    model: pathlib.Path,
    hf: pathlib.Path,
    memory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(AnchorError, match="is no model folder"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="no file or folder"):
        verify(model, str(tmp_path / "absent"))
    with pytest.raises(HierMemError, match="the anchor's source is needed too"):
        verify(model, memory=memory)
    without_torch(monkeypatch)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-hiermem\[torch\]'"):
        verify(model, str(hf))
    assert not (model / "receipt.json").exists()


def test_relative_differences() -> None:
    theirs = np.array([1.0, -4.0])
    assert parity.difference(theirs, theirs) == 0
    assert parity.difference(theirs + np.array([0, 0.4]), theirs) == pytest.approx(0.1)
    assert parity.difference(np.array([1.0, np.nan]), theirs) == float("inf")
    assert parity.difference(np.ones(3), theirs) == float("inf")
