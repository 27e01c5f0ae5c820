"""What a block begins with: the reference's zeros and random numbers, or units of the anchor's own."""

from __future__ import annotations

import dataclasses
import pathlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.config import KINDS, MemoryConfig, Path
from mlx_hiermem.convert import reference_memory
from mlx_hiermem.learn.train.start import new_block
from mlx_hiermem.memory.design import memory_config
from mlx_hiermem.memory.ffn import feed_forward, projections
from mlx_hiermem.memory.slot import Half, rows

CONFIG = MemoryConfig("ffn", 2, (4, 2), (2, 3), 32, dtype="float32", ffn_width=64, q_width=32, kv_width=16)


@pytest.mark.parametrize("kind", KINDS)
def test_new_blocks_are_the_references(kind: str) -> None:
    """Zero where the reference is zero, and elsewhere of its distribution; the same for the same node and seed."""
    config = dataclasses.replace(CONFIG, kind=kind, block_sizes=(64, 64))
    ours = new_block(config, Path((1, 0)), 3)
    theirs = reference_memory.init_memory(config, 64, torch.Generator().manual_seed(0))
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        expected = theirs[name].numpy()
        assert tensor.shape == expected.shape
        assert np.array(tensor).std() == pytest.approx(expected.std(), rel=0.05)
        assert np.abs(np.array(tensor)).max() == pytest.approx(np.abs(expected).max(), rel=0.1)
        assert mx.array_equal(tensor, new_block(config, Path((1, 0)), 3)[name])
    changing = next(name for name, tensor in ours.items() if mx.any(tensor != 0))
    assert not mx.array_equal(ours[changing], new_block(config, Path((1, 1)), 3)[changing])


@pytest.mark.parametrize("bits", [0, 4])
def test_new_units_read_what_the_anchors_do(anchor: pathlib.Path, bits: int) -> None:
    """Each of another unit, as that layer has it; and none writes anything yet."""
    model = load_anchor(anchor / "anchor", mx.float32)[0]
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    config = memory_config(model, "ffn", 3, (6, 4), [1, 3])
    block = new_block(config, Path((1,)), 0, model.layers)
    other = new_block(config, Path((2,)), 0, model.layers)
    for at, layer in enumerate(config.layers):
        gate, up, _ = projections(feed_forward(model.layers[layer]))
        eye = mx.eye(config.hidden)
        gates, ups = np.array(gate(eye).T), np.array(up(eye).T)  # [ffn_width, d] each
        found = [int(np.abs(gates - np.array(row)).max(-1).argmin()) for row in block["gate"][at]]
        assert len(set(found)) == 6
        np.testing.assert_allclose(block["gate"][at], gates[found], atol=1e-6)
        np.testing.assert_allclose(block["up"][at], ups[found], atol=1e-6)
    assert not block["down"].any()
    assert not mx.array_equal(block["gate"], other["gate"])


def test_more_units_than_the_anchor_has(anchor: pathlib.Path) -> None:
    model = load_anchor(anchor / "anchor", mx.float32)[0]
    config = memory_config(model, "ffn", 3, (200,), [1])
    assert config.ffn_width < 200
    gates = np.array(new_block(config, Path((1,)), 0, model.layers)["gate"][0])
    assert len(np.unique(gates, axis=0)) == 200


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("second", [False, True])
def test_rows_of_a_fused_layer(bits: int, second: bool) -> None:
    """Gate and up may be halves of one layer."""
    fused: nn.Module = nn.Linear(32, 16, bias=False)
    if bits:
        fused = nn.QuantizedLinear.from_linear(fused, group_size=32, bits=bits)
    half = Half(fused, second)
    numbers = mx.array([5, 0, 7])
    np.testing.assert_allclose(rows(half, numbers), half(mx.eye(32)).T[numbers], atol=1e-6)
