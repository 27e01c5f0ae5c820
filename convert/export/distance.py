"""How far an export is from the anchor: Kullback-Leibler divergence, largest difference of a logit, agreement.

The anchor is what MLX computes in float32 from the same folder; that this is what PyTorch computes is the business
of `hiermem verify --against`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import dequantize_model

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.convert.export.architecture import Architecture, Linear
from mlx_hiermem.convert.export.exported import Runner
from mlx_hiermem.convert.export.sample_texts import token_ids


@dataclass(frozen=True)
class Distance:
    """Over so many tokens: KL(anchor || export) in nats, its mean and largest; |Δlogit|; share of equal choices."""

    tokens: int
    kl: float
    kl_max: float
    logit: float
    agreement: float

    @classmethod
    def between(cls, anchor: Sequence[np.ndarray], export: Iterable[np.ndarray]) -> Distance:
        """Of logits [T, V], text by text. What is not finite is infinitely far."""
        divergences, logit, equal = [], 0.0, 0
        for ours, theirs in zip(anchor, export, strict=True):
            divergences.append(divergence(ours, theirs))
            logit = max(logit, float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max()))
            equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        every = np.nan_to_num(np.concatenate(divergences), nan=np.inf)
        return cls(len(every), float(every.mean()), float(every.max()), logit, equal / len(every))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def divergence(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """KL(ours || theirs) of logits [T, V], per token, computed in float64."""
    with np.errstate(invalid="ignore"):
        p, q = (_log_softmax(logits.astype(np.float64)) for logits in (ours, theirs))
        return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Float32Anchor:
    """The anchor in float32, and its logits on the texts that exports are measured on."""

    def __init__(self, folder: pathlib.Path, longest: int) -> None:
        self.model, self.tokenizer, self.config = load_anchor(folder, mx.float32)
        self.notes = list[str]()  # what the user should know of it
        if self.config.get("quantization"):
            self.model = dequantize_model(self.model)
            self.notes.append("the anchor is quantised; it was exported from what its weights stand for")
        if self.tokenizer is None:
            self.notes.append("the anchor has no tokenizer: the app has to bring one")
        self.sizes = Architecture.of_model(self.model, self.config)
        self.ids = token_ids(self.tokenizer, self.sizes.vocabulary, longest)
        self.modules = {path.removeprefix("model."): module for path, module in self.model.named_modules()}
        self.logits = self.run()

    def run(self, texts: int | None = None) -> list[np.ndarray]:
        """Logits [T, V] of each text, or of the first, in one call.

        The texts are filled up at their ends, which changes nothing.
        """
        wanted = self.ids[:texts]
        batch = np.zeros((len(wanted), max(map(len, wanted))), np.int32)
        for row, ids in zip(batch, wanted, strict=True):
            row[: len(ids)] = ids
        logits = np.array(self.model(mx.array(batch)).astype(mx.float32))[..., : self.sizes.vocabulary]
        return [rows[: len(ids)] for rows, ids in zip(logits, wanted, strict=True)]

    def with_weights(self, changes: Iterable[tuple[Linear, np.ndarray]], texts: int | None = None) -> Distance:
        """How far the anchor is from itself with other values in some matrices; they are put back.

        On the first of the texts, or on all.
        """
        kept: dict[str, tuple[nn.Module, mx.array]] = {}
        try:
            for matrix, values in changes:
                module = self.modules[matrix.path]
                kept.setdefault(matrix.path, (module, module.weight))
                if matrix.order is not None:
                    values = values[np.argsort(matrix.order)]
                whole = mx.array(values)
                if len(values) < len(module.weight):
                    end = matrix.start + len(values)
                    whole = mx.concatenate([module.weight[: matrix.start], whole, module.weight[end:]])
                module.weight = whole
            return Distance.between(self.logits[:texts], self.run(texts))
        finally:
            for module, weight in kept.values():
                module.weight = weight

    def measure(self, runner: Runner, did: Callable[[], None] | None = None) -> Distance:
        """How far an exported program is, on the same texts. `did` is called after each."""

        def feed(ids: np.ndarray) -> np.ndarray:
            runner.reset()
            logits = runner.feed(ids)
            if did:
                did()
            return logits

        return Distance.between(self.logits, map(feed, self.ids))
