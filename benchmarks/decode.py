"""Tokens a second with memory and without, and three ways to attach one.

    python benchmarks/decode.py        # SmolLM2-135M in float32, 8 and 4 bits, R = 336 in 30 layers; some minutes

`side` is what the package does: a second small FFN beside the anchor's. `fused` multiplies its gate and up in one
product. `widened` has the memory's units behind the anchor's own in the same matrices, which only an anchor that is
not quantised allows. The bound is what the bytes say: 0.97 · anchor / (anchor + memory), as each token reads both.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

import banks
import common
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.memory.ffn import projections
from mlx_hiermem.model import MemoryModel

ANCHORS = {"float32": 0, "8 bits": 8, "4 bits": 4}
TOKENS = 8  # a turn
PATH = "1.2.3"


def decode(anchor: nn.Module) -> None:
    """A short prompt, and so many steps after it."""
    cache, token = make_prompt_cache(anchor), mx.array([[1, 2, 3, 4]])
    for _ in range(TOKENS):
        token = anchor(token, cache=cache)[:, -1:].argmax(-1)
        mx.eval(token)


class Subject:
    """An anchor, and its FFNs in several shapes; `use` puts one in place."""

    def __init__(self, folder: pathlib.Path, bits: int) -> None:
        anchor, tokenizer, config = load_anchor(folder / "anchor")
        if bits:
            nn.quantize(anchor, 64, bits)
        self.model = MemoryModel(anchor, tokenizer, config, MemoryBank.open(folder / "bank"))
        self.plain = [layer.mlp for layer in anchor.layers]
        self.bytes = sum(value.nbytes for _, value in tree_flatten(anchor.parameters()))
        self.model.select(PATH, "")
        self.memory = sum(t.nbytes for _, slot in self._slots() for t in slot.tensors)
        self.ways: dict[str, list[nn.Module]] = {"none": self.plain, "side": self.plain}
        self.ways["fused"] = [Fused(*pair) for pair in self._slots()]
        if not bits:
            self.ways["widened"] = [widened(*pair) for pair in self._slots()]
        mx.eval([module.parameters() for modules in self.ways.values() for module in modules])

    def _slots(self) -> list[Any]:
        assert self.model.attachment
        return [carrier for carriers in self.model.attachment.carriers for carrier in carriers]

    def use(self, way: str) -> None:
        self.model.select("none" if way != "side" else PATH, "")
        for layer, module in zip(self.model.anchor.layers, self.ways[way], strict=True):
            layer.mlp = module


class Fused(nn.Module):
    """The anchor's FFN and a side FFN whose gate and up are one matrix [2 R, d]."""

    def __init__(self, mlp: nn.Module, slot: Any) -> None:
        super().__init__()
        gate, up, self.back = slot.tensors
        self.mlp, self.into = type(mlp).__mro__[1].__call__.__get__(mlp), mx.concatenate([gate, up])

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(x @ self.into.T, 2, axis=-1)
        return self.mlp(x) + (nn.silu(gate) * up) @ self.back


def widened(mlp: nn.Module, slot: Any) -> nn.Module:
    """An FFN of the anchor's class with the memory's units in its matrices."""
    gate, up, down = slot.tensors
    wide = type(mlp).__mro__[1].__new__(type(mlp).__mro__[1])
    nn.Module.__init__(wide)
    for name, linear, more, axis in zip(
        ("gate_proj", "up_proj", "down_proj"), projections(mlp), (gate, up, down.T), (0, 0, 1), strict=True
    ):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = mx.concatenate([linear.weight, more], axis)
        wide[name] = layer
    return wide


def check(subject: Subject) -> None:
    """All ways with memory give the same logits."""
    tokens, logits = mx.array([[5, 6, 7, 8]]), {}
    for way in subject.ways:
        subject.use(way)
        logits[way] = subject.model.anchor(tokens)
        mx.eval(logits[way])
    difference = {way: float(mx.abs(logits[way] - logits["side"]).max()) for way in logits}
    for way in set(logits) - {"none"}:
        assert difference[way] <= 0.05 * difference["none"], difference


def measure(folder: pathlib.Path, bits: int, runs: int) -> dict[str, Any]:
    subject = Subject(folder, bits)
    check(subject)
    sides: dict[str, Callable[[], None]] = {}
    for way in subject.ways:

        def timed(way: str = way) -> None:
            decode(subject.model.anchor)

        sides[way] = timed
    times: dict[str, dict[str, list[float]]] = {way: {"wall": [], "cpu": []} for way in sides}
    for _ in range(runs):
        for way in sides:
            subject.use(way)
            one = common.turns({way: sides[way]}, 1)[way]
            for clock in ("wall", "cpu"):
                times[way][clock] += one[clock]
    found: dict[str, Any] = common.compared(times, "none")
    for side in found.values():
        side["tokens_per_second"] = common.spread(1e3 * TOKENS / ms for ms in side["wall_ms"]["values"])
        for clock in ("wall", "cpu"):  # of speeds, not of times
            side[f"{clock}_speed"] = common.spread(1 / ratio for ratio in side[f"{clock}_ratio"]["values"])
    bound = 0.97 * subject.bytes / (subject.bytes + subject.memory)
    return {"anchor_bytes": subject.bytes, "memory_bytes": subject.memory, "bound": bound, "ways": found}


def main() -> None:
    parser = common.options(__doc__, runs=7, quick=1)
    parser.add_argument("--folder", type=pathlib.Path, help="where to write; default: a temporary folder")
    asked, before = common.parsed(parser), os.getloadavg()[0]
    found = {}
    with banks.scratch(asked.folder, 1e9) as folder:
        model = banks.demo_anchor(folder / "model")
        for name, bits in list(ANCHORS.items())[: 1 if asked.quick else None]:
            found[name] = measure(model, bits, asked.runs)
    common.save(__file__, {"tokens": TOKENS, "anchors": found}, asked, before)
    rows = []
    for name, row in found.items():
        for way, side in row["ways"].items():
            cells = [common.around(side["tokens_per_second"], 1)]
            speeds = [common.around(side[key], 3) for key in ("wall_speed", "cpu_speed")]
            rows.append([name, way, *cells, *speeds, f"{row['bound']:.3f}"])
    common.table(("anchor", "memory", "tokens/s", "ratio", "by CPU time", "bound"), rows)


if __name__ == "__main__":
    main()
