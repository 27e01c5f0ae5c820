"""Every architecture that can be exported, tiny and random: the saved program against PyTorch, with memory too.

The programs run in float32 on weights that float16 holds exactly, so that only what the graph computes can differ.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from sources import KINDS, hf_model, save_hf
from tiny import make_tokenizer
from tiny_openlm import random_openlm, save_openlm
from transformers import LlamaConfig

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert import parity, reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.coreml import mil
from mlx_hiermem.convert.coreml.anchor import SMALLER, build
from mlx_hiermem.convert.coreml.compress import HALF_MAX
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.export import package
from mlx_hiermem.convert.export.architecture import Architecture
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.limits import Overflow
from mlx_hiermem.convert.export.shape import CACHES, MEMORY, STEP, Export
from mlx_hiermem.errors import AnchorError

TOKENS = np.random.default_rng(0).integers(0, 256, 45)  # two calls of prefill; longer than gemma's window of 6
LAYERS, UNITS, CONTEXT = (0, 2), 5, 60
ROUNDING = 1e-3  # of the largest logit: half a unit in the last place of float16, and what follows from it
EXACT, HALF = 8e-3, 3e-2  # of the largest logit; sines and cosines are float16 in either case


class Wide(Program):
    """Computes in float32 what the program says is float16."""

    def run(self, *given: Any, fp16: bool = False, **more: Any) -> dict[str, np.ndarray]:
        return super().run(*given, fp16=False, **more)


def halves(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.half().float())
    return model


def memory_of(hidden: int, seed: int) -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(seed), (len(LAYERS), UNITS, hidden)
    return {name: (rng.standard_normal(shape) * 0.3).astype(np.float16) for name in ("gate", "up", "down")}


def exported(anchor: pathlib.Path, folder: pathlib.Path, mode: str = "state") -> tuple[pathlib.Path, dict, dict]:
    """A saved package, and what the manifest says of it."""
    sizes = Architecture.read(anchor)
    shape = Export(CONTEXT, LAYERS, UNITS, mode, load_block=mode == "state", step=STEP)
    mil.save(build(sizes, shape), folder / f"{mode}.mlpackage")
    memory = {"mode": mode, "layers": LAYERS, "units": UNITS, "hidden": sizes.hidden}
    return folder / f"{mode}.mlpackage", package.describe_anchor(sizes, shape, {}), memory


class Twin:
    """The source in PyTorch, with the memory that was set last."""

    def __init__(self, model: torch.nn.Module, anchor: Mapping[str, Any], hidden: int) -> None:
        self.side, self.vocabulary = parity.TorchSide(model), anchor["vocabulary"]
        config = MemoryConfig("ffn", 2, (UNITS,), LAYERS, hidden, "float32", 1, 1, 1)
        self.memory = reference_memory.attach(model, config)

    def logits(self, tensors: Mapping[str, np.ndarray] | None) -> np.ndarray:
        if tensors is None:
            self.memory.clear()
        else:
            self.memory.set({name: torch.from_numpy(tensor).float() for name, tensor in tensors.items()})
        return self.side.run(TOKENS[None], "none")[1][0, :, : self.vocabulary]


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"differs by {error:.1e} of the largest logit"


def check(model: torch.nn.Module, anchor: pathlib.Path, folder: pathlib.Path) -> None:
    """Prefill and decode, three memories in turn, in float32 and as the device rounds."""
    saved, described, memory = exported(anchor, folder)
    twin = Twin(model, described, memory["hidden"])
    first, second = memory_of(memory["hidden"], 1), memory_of(memory["hidden"], 2)
    expected = {name: twin.logits(tensors) for name, tensors in (("", None), ("1", first), ("2", second))}
    assert np.abs(expected["1"] - expected["2"]).max() > 0.05 * np.abs(expected[""]).max()
    exact = Runner(Wide.load(saved), described, memory)
    for name, tensors in (("", None), ("1", first), ("2", second), ("1", first), ("", None)):
        exact.set_memory(tensors)
        close(exact.feed(TOKENS), expected[name], EXACT)
    exact.set_memory(first, "load_block")
    close(exact.feed(TOKENS[:10], only="decode"), expected["1"][:10], EXACT)  # token by token
    half = Runner(Program.load(saved), described, memory)
    close(half.feed(TOKENS), expected[""], HALF)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_huggingface(kind: str, tmp_path: pathlib.Path) -> None:
    model = halves(hf_model(kind))
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


@pytest.mark.slow
def test_axes_of_states_are_filled_up(tmp_path: pathlib.Path) -> None:
    """Heads of 10 values, a stream of 40, 5 units and a context of 60: all become multiples of 32, by zeros."""
    model = halves(hf_model("llama", hidden_size=40))
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)
    states = Program.load(tmp_path / "state.mlpackage").functions["decode"].states
    shapes = {name: spec.shape for name, spec in states.items()}
    caches, memory = dict.fromkeys(CACHES, (3, 2, 64, 32)), dict.fromkeys(MEMORY, (2, 32, 64))
    assert shapes == caches | memory


@pytest.mark.slow
def test_one_head_of_keys(tmp_path: pathlib.Path) -> None:
    """A norm over a head is then one over all heads, and is taken once."""
    model = halves(hf_model("gemma3_text", num_key_value_heads=1))
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


@pytest.mark.slow
def test_a_stream_that_float16_does_not_hold(tmp_path: pathlib.Path) -> None:
    """Gemma 3's grows as it was trained in bfloat16: that of 270M to 104 000. The program keeps a part of it."""
    model = hf_model("gemma3_text")
    with torch.no_grad():
        model.model.layers[0].post_feedforward_layernorm.weight.fill_(40_000.0)
    model = halves(model)
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    saved, described, memory = exported(tmp_path / "anchor", tmp_path)
    peaks: dict[str, float] = {}
    logits = Runner(Program.load(saved), described, memory, peaks).feed(TOKENS)
    assert SMALLER * peaks["layers_0"] > HALF_MAX
    Overflow.of(peaks).check()
    close(logits, Twin(model, described, memory["hidden"]).logits(None), HALF)


@pytest.mark.parametrize(("norm", "position"), [("gain_only_lp_layer_norm", "rotary"), ("rms_norm", "head_rotary")])
def test_openlm(norm: str, position: str, tmp_path: pathlib.Path) -> None:
    model = halves(random_openlm(norm=norm, position=position, qk_norm=position == "rotary", rope_base=100_000.0))
    make_tokenizer(tmp_path)
    convert_openlm(save_openlm(model, tmp_path), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


@pytest.mark.slow
def test_memory_as_an_input(tmp_path: pathlib.Path) -> None:
    """The same values by the other way in, to a rounding of float16: sums have another order there."""
    convert_huggingface(save_hf(hf_model("qwen3"), tmp_path / "source"), tmp_path / "anchor")
    runners = []
    for mode in ("state", "input"):
        saved, described, memory = exported(tmp_path / "anchor", tmp_path, mode)
        runners.append(Runner(Program.load(saved), described, memory))
    assert set(runners[1].state) == {"k_cache", "v_cache"}
    for tensors in (None, memory_of(64, 1), memory_of(64, 2), None):
        for runner in runners:
            runner.set_memory(tensors)
        close(runners[0].feed(TOKENS), runners[1].feed(TOKENS), ROUNDING)


@pytest.mark.slow
def test_the_rotary_encoding_of_llama_3(tmp_path: pathlib.Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    model = halves(hf_model("llama", rope_parameters=rope | {"original_max_position_embeddings": 32}))
    assert isinstance(model.config, LlamaConfig)
    convert_huggingface(save_hf(model, tmp_path / "source"), tmp_path / "anchor")
    check(model, tmp_path / "anchor", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "phi3", "rope_scaling": None}, "anchors of type phi3 cannot be exported to Core ML"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            "positions of the kind YarnRoPE cannot be exported to Core ML",
        ),
    ],
)
def test_what_cannot_be_exported(change: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    config = {**hf_model("llama").config.to_dict(), **change}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AnchorError, match=message):
        Architecture.read(tmp_path)
