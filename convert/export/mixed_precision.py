"""Which weights take how many bits: found by measuring, since no rule about layers holds for all models.

A few matrices carry activations so large that four bits in them ruin the model (on SmolLM2 the down projection of
layer 11 alone does two thirds of the damage). So each matrix is coarsened alone first, and costs so much KL for
each megabyte it saves. Then the cheapest are coarsened together, as many as the bound allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.convert.export.architecture import Linear
from mlx_hiermem.convert.export.distance import Distance, Float32Anchor
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.progress import Progress

FINER = ("int8", "fp16")  # what is left in a search
RANKED = 5  # texts on which single matrices are compared; plans are measured on all
SHOWN = 10  # of the dearest matrices, in a receipt
MOST = 512  # matrices that are compared, the largest; the others stay as they are


@dataclass(frozen=True)
class Codec:
    """What a format leaves of a matrix, and how many bytes it takes."""

    rounded: Callable[[np.ndarray, str], np.ndarray]
    size: Callable[[tuple[int, ...], str], int]


@dataclass(frozen=True)
class PrecisionPlan:
    """Formats by the weights' names, what they were measured to cost, and the dearest weights of the search."""

    formats: dict[str, str]
    distance: Distance
    dearest: tuple[tuple[str, float, float], ...] = ()  # name, KL alone, KL per megabyte

    def to_json(self) -> dict[str, Any]:
        counts: dict[str, int] = {}
        for form in self.formats.values():
            counts[form] = counts.get(form, 0) + 1
        dearest = [dict(zip(("weight", "kl", "kl_per_mb"), row, strict=True)) for row in self.dearest]
        return {"formats": counts, "distance": self.distance.to_json(), "dearest": dearest}


def find_plan(
    reference: Float32Anchor,
    weights: Sequence[Linear],
    form: str,
    bound: float,
    codec: Codec,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> PrecisionPlan:
    """As many weights in `form` as keep the mean KL at most `bound`; the others in 8 bits, or else in 16.

    Raises HierMemError where not even float16 keeps the bound.
    """
    say(f"measuring all weights in {form}")
    whole = _uniform(reference, weights, form, codec)
    if whole.distance.kl <= bound:
        return whole
    for finer in FINER[FINER.index(form) + 1 if form in FINER else 0 :]:
        say(f"that makes a KL of {whole.distance.kl:.1e}, allowed is {bound:g}: measuring all weights in {finer}")
        fine = _uniform(reference, weights, finer, codec)
        if fine.distance.kl <= bound:
            return _Search(reference, fine, form, bound, codec, say).run(weights, progress)
        whole = fine
    raise HierMemError(f"in float16 the KL is {whole.distance.kl:.2g} already", f"The bound is {bound:g}.")


def uniform(weights: Sequence[Linear], form: str) -> dict[str, str]:
    """One format for all; but with int8 the head stays float16.

    On SmolLM2 the head in int8 makes nine tenths of the divergence, for a fifth of the weights.
    """
    return {weight.name: "fp16" if form == "int8" and weight.part is not None else form for weight in weights}


def _uniform(reference: Float32Anchor, weights: Sequence[Linear], form: str, codec: Codec) -> PrecisionPlan:
    formats = uniform(weights, form)
    return PrecisionPlan(formats, _measure(reference, weights, formats, codec))


def _measure(
    reference: Float32Anchor, weights: Sequence[Linear], formats: dict[str, str], codec: Codec
) -> Distance:
    changes = ((weight, codec.rounded(weight.weight, formats[weight.name])) for weight in weights)
    return reference.with_weights(changes)


@dataclass(frozen=True)
class _Search:
    """From a plan `fine` that keeps the bound to one with as many matrices in `form` as still do."""

    reference: Float32Anchor
    fine: PrecisionPlan
    form: str
    bound: float
    codec: Codec
    say: Callable[[str], None]

    def run(self, weights: Sequence[Linear], progress: Progress | None) -> PrecisionPlan:
        """Coarsens the matrices that cost the least KL per megabyte; how many, by bisection."""
        largest = sorted(weights, key=lambda weight: -weight.weight.size)[:MOST]
        rounds = len(largest).bit_length()
        self.say(f"comparing {len(largest)} matrices in {self.form}, then at most {rounds} mixtures")
        costs = self._costs(largest, rounds, progress)
        best, low, high = self.fine, 0, len(costs)
        for number in range(rounds):
            if low >= high:
                break
            count = (low + high + 1) // 2
            formats = self.fine.formats | {name: self.form for name, _, _ in costs[:count]}
            tried = PrecisionPlan(formats, _measure(self.reference, weights, formats, self.codec))
            self.say(f"{count} of {len(costs)} matrices in {self.form}: KL {tried.distance.kl:.1e}")
            if tried.distance.kl <= self.bound:
                best, low = tried, count
            else:
                high = count - 1
            if progress:
                progress(len(costs) + number + 1, len(costs) + rounds)
        return PrecisionPlan(best.formats, best.distance, tuple(reversed(costs[-SHOWN:])))

    def _costs(
        self, weights: Sequence[Linear], rounds: int, progress: Progress | None
    ) -> list[tuple[str, float, float]]:
        """Name, KL alone and KL per megabyte that is saved; the cheapest first."""
        costs = []
        for number, weight in enumerate(weights):
            changed = [(weight, self.codec.rounded(weight.weight, self.form))]
            alone = self.reference.with_weights(changed, RANKED).kl
            sizes = [
                self.codec.size(weight.weight.shape, form) for form in (self.fine.formats[weight.name], self.form)
            ]
            costs.append((weight.name, alone, alone / ((sizes[0] - sizes[1]) / 1e6)))
            if progress:
                progress(number + 1, len(weights) + rounds)
        return sorted(costs, key=lambda cost: cost[2])
