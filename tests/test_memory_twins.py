"""Every memory on every architecture, PyTorch against MLX: each layer's output, cached and uncached, float32."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from sources import KINDS as ARCHITECTURES
from sources import make_hf
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import KINDS, MemoryConfig
from mlx_hiermem.convert import reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.anchors.openlm_config import NORMS, POSITIONS
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.memory.ffn import feed_forward, projections
from mlx_hiermem.memory.lora import projection
from mlx_hiermem.memory.slot import sizes

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 14))  # longer than gemma's sliding window of 6
UNITS = (3, 2)
TOLERANCE = 1e-5  # of the largest value in a layer's output


class Twins:
    """One model twice, with the outputs of its layers and its logits."""

    def __init__(self, ours: nn.Module, theirs: torch.nn.Module) -> None:
        self.ours, self.theirs = ours, theirs
        self._seen: list[mx.array] = []
        seen = self._seen
        for layer in ours.layers:
            own = type(layer)

            def call(self: nn.Module, *args: Any, _own: type = own, **options: Any) -> mx.array:
                seen.append(_own.__call__(self, *args, **options))
                return seen[-1]

            layer.__class__ = type(f"Recorded{own.__name__}", (own,), {"__call__": call})

    def config(self, kind: str, layers: Sequence[int]) -> MemoryConfig:
        layer = self.ours.layers[0]
        gate, _, _ = projections(feed_forward(layer))
        hidden, ffn_width = sizes(gate)
        widths = {f"{name}_width": sizes(projection(layer, name[0]))[1] for name in ("q", "kv")}
        widths["kv_width"] = sizes(projection(layer, "k"))[1]
        return MemoryConfig(kind, 2, UNITS, tuple(layers), hidden, "float32", ffn_width=ffn_width, **widths)

    def mlx_outputs(self, pieces: Sequence[np.ndarray], cached: bool) -> list[np.ndarray]:
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.ours) if cached else None
        rows = []
        for piece in pieces:
            self._seen.clear()
            logits = self.ours(mx.array(piece), cache=cache)
            rows.append([np.array(t, copy=True) for t in (*self._seen, logits)])
        return [np.concatenate(parts, axis=1) for parts in zip(*rows, strict=True)]

    @torch.no_grad()
    def torch_outputs(self, tokens: np.ndarray) -> list[np.ndarray]:
        layers = self.theirs.layers if hasattr(self.theirs, "layers") else self.theirs.model.layers
        seen: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, args: Any, out: Any) -> None:
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        handles = [layer.register_forward_hook(keep) for layer in layers]
        out = self.theirs(torch.from_numpy(tokens))
        for handle in handles:
            handle.remove()
        return [t.numpy() for t in (*seen, out if isinstance(out, torch.Tensor) else out.logits)]


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
    assert len(found) == len(expected)
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < TOLERANCE, f"{what}: layer {layer} differs by {error:.1e}"


def check(twins: Twins, kind: str, layers: Sequence[int]) -> None:
    config = twins.config(kind, layers)
    ours, theirs = attach(twins.ours, config), reference_memory.attach(twins.theirs, config)
    plain = twins.torch_outputs(TOKENS)
    assert_equal(twins.mlx_outputs([TOKENS], cached=False), plain, "without memory")

    fresh = reference_memory.init_memory(config, 4, torch.Generator().manual_seed(0))
    ours.set(FetchedMemory(config, {name: mx.array(t.numpy()) for name, t in fresh.items()}))
    assert_equal(twins.mlx_outputs([TOKENS], cached=False), plain, "memory at initialisation")

    memory, tensors = joined(config, random_blocks(config))
    ours.set(memory)
    theirs.set(tensors)
    expected = twins.torch_outputs(TOKENS)
    first = layers[0]
    for before, after in zip(plain[first:], expected[first:], strict=True):
        assert np.abs(before - after).max() > 1e-3 * np.abs(before).max()
    assert_equal(twins.mlx_outputs([TOKENS], cached=False), expected, "with memory")
    pieces = [TOKENS[:, :5], *np.split(TOKENS[:, 5:], TOKENS.shape[1] - 5, axis=1)]
    assert_equal(twins.mlx_outputs(pieces, cached=True), expected, "with memory, cached")

    ours.set(None)
    theirs.clear()
    assert_equal(twins.mlx_outputs([TOKENS], cached=False), plain, "memory taken off")
    ours.detach()
    theirs.detach()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def huggingface(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    source = make_hf(folder / "source", request.param)
    convert_huggingface(source, folder / "anchor")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    yield Twins(load_anchor(folder / "anchor", mx.float32)[0], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface(huggingface: Twins, kind: str) -> None:
    check(huggingface, kind, layers=(1, 2))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
def test_openlm(norm: str, position: str, qk_norm: bool, tmp_path: pathlib.Path) -> None:
    """All five kinds on each of OpenLM's variants."""
    theirs = random_openlm(norm=norm, position=position, qk_norm=qk_norm, rope_base=100_000.0)
    convert_openlm(save_openlm(theirs, tmp_path), tmp_path / "anchor", warn=lambda line: None)
    twins = Twins(_load(tmp_path / "anchor"), theirs)
    for kind in KINDS:
        check(twins, kind, layers=(0, 2))


def _load(folder: pathlib.Path) -> nn.Module:
    from mlx_lm.utils import load_model

    from mlx_hiermem.anchor import model_classes

    model, _ = load_model(folder, get_model_classes=model_classes, model_config={"model_file": None})
    return model
