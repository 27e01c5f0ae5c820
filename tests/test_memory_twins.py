"""Every memory on every architecture, PyTorch against MLX: each layer's output, cached and uncached, float32."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import make_prompt_cache
from sources import KINDS as ARCHITECTURES
from sources import make_hf
from tiny import make_tokenizer
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import KINDS, MemoryConfig
from mlx_hiermem.convert import parity, reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.anchors.openlm_config import NORMS, POSITIONS
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.memory.lora import projection
from mlx_hiermem.memory.slot import sizes

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 14))  # longer than gemma's sliding window of 6
UNITS = (3, 2)
FUNCTIONS = list({kind: name for name, kind in NORMS.items()}.values())  # one name of each; test_openlm has all
TOLERANCE = 1e-5  # of the largest value in a layer's output


class Twins:
    """One model twice."""

    def __init__(self, ours: nn.Module, theirs: torch.nn.Module) -> None:
        self.ours, self.theirs = ours, theirs

    def config(self, kind: str, layers: Sequence[int]) -> MemoryConfig:
        layer = self.ours.layers[0]
        (hidden, ffn_width), q, k = (sizes(projection(layer, name)) for name in ("gate", "q", "k"))
        return MemoryConfig(kind, 2, UNITS, tuple(layers), hidden, "float32", ffn_width, q[1], k[1])

    def mlx_outputs(self, pieces: Sequence[np.ndarray] = (TOKENS,), cached: bool = False) -> list[np.ndarray]:
        """What each layer puts out, and the logits, of tokens given piece by piece."""
        cache = make_prompt_cache(self.ours) if cached else None
        rows = []
        for piece in pieces:
            with parity.recorded(self.ours.layers) as seen:
                logits = self.ours(mx.array(piece), cache=cache)
                rows.append([np.array(out) for out in (*seen, logits)])
        return [np.concatenate(parts, axis=1) for parts in zip(*rows, strict=True)]

    def torch_outputs(self) -> list[np.ndarray]:
        hidden, logits = parity.TorchSide(self.theirs).run(TOKENS, "none")
        return [*hidden, logits]


def random_blocks(config: MemoryConfig) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [
        {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in config.shapes(units).items()}
        for units in UNITS
    ]


def joined(
    config: MemoryConfig, blocks: list[dict[str, np.ndarray]]
) -> tuple[FetchedMemory, dict[str, torch.Tensor]]:
    """The same blocks, joined by either side's own code."""
    ours = [MemoryBlock({name: mx.array(a) for name, a in block.items()}, 0) for block in blocks]
    theirs = [{name: torch.from_numpy(a) for name, a in block.items()} for block in blocks]
    return FetchedMemory.join(config, ours), reference_memory.join(config, theirs)


def assert_equal(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], what: str) -> None:
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = parity.difference(ours, theirs)
        assert error < TOLERANCE, f"{what}: layer {layer} differs by {error:.1e}"


def check(twins: Twins, kind: str, layers: Sequence[int]) -> None:
    config = twins.config(kind, layers)
    ours, theirs = attach(twins.ours, config), reference_memory.attach(twins.theirs, config)
    plain = twins.torch_outputs()
    assert_equal(twins.mlx_outputs(), plain, "without memory")

    fresh = reference_memory.init_memory(config, 4, torch.Generator().manual_seed(0))
    ours.set(FetchedMemory(config, {name: mx.array(t.numpy()) for name, t in fresh.items()}))
    assert_equal(twins.mlx_outputs(), plain, "memory at initialisation")

    memory, tensors = joined(config, random_blocks(config))
    ours.set(memory)
    theirs.set(tensors)
    expected = twins.torch_outputs()
    first = layers[0]
    for before, after in zip(plain[first:], expected[first:], strict=True):
        assert np.abs(before - after).max() > 1e-3 * np.abs(before).max()
    assert_equal(twins.mlx_outputs(), expected, "with memory")
    pieces = np.split(TOKENS, (4, 11, 12, 13), axis=1)  # a prompt, more of it, then token by token
    assert_equal(twins.mlx_outputs(pieces, cached=True), expected, "with memory, cached")

    ours.set(None)
    theirs.clear()
    assert_equal(twins.mlx_outputs(), plain, "memory taken off")
    ours.detach()
    theirs.detach()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def huggingface(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    folder = tmp_path_factory.mktemp(request.param)
    source = make_hf(folder / "source", request.param)
    convert_huggingface(source, folder / "anchor")
    return Twins(load_anchor(folder / "anchor", mx.float32)[0], parity.load_source(find_source(str(source))))


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface(huggingface: Twins, kind: str) -> None:
    check(huggingface, kind, layers=(1, 2))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", FUNCTIONS)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_openlm(norm: str, position: str, qk_norm: bool, tmp_path: pathlib.Path) -> None:
    """All five kinds on each of OpenLM's variants."""
    theirs = random_openlm(norm=norm, position=position, qk_norm=qk_norm, rope_base=100_000.0)
    make_tokenizer(tmp_path)
    convert_openlm(save_openlm(theirs, tmp_path), tmp_path / "anchor")
    twins = Twins(load_anchor(tmp_path / "anchor", mx.float32)[0], theirs)
    for kind in KINDS:
        check(twins, kind, layers=(0, 2))
