"""Which weights take how many bits: found by measuring, since no rule about layers holds for all models.

A few matrices carry activations so large that four bits in them ruin the model (on SmolLM2 the down projection of
layer 11 alone does two thirds of the damage). So each matrix is coarsened alone first, and costs so much KL for
each megabyte it saves. Then the cheapest are coarsened together, as many as the bound allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.convert.coreml.architecture import Linear
from mlx_hiermem.convert.coreml.compress import rounded, size
from mlx_hiermem.convert.coreml.measure import Distance, Float32Anchor
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.progress import Progress

FINER = ("int8", "fp16")  # what is left in a search
RANKED = 5  # texts on which single matrices are compared; plans are measured on all
SHOWN = 10  # of the dearest matrices, in a receipt


@dataclass(frozen=True)
class Plan:
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
    reference: Float32Anchor, weights: Sequence[Linear], form: str, bound: float, progress: Progress | None = None
) -> Plan:
    """As many weights in `form` as keep the mean KL at most `bound`; the others in 8 bits, or else in 16.

    Raises HierMemError where not even float16 keeps the bound.
    """
    whole = _uniform(reference, weights, form)
    if whole.distance.kl <= bound:
        return whole
    for finer in FINER[FINER.index(form) + 1 if form in FINER else 0 :]:
        fine = _uniform(reference, weights, finer)
        if fine.distance.kl <= bound:
            return _search(reference, weights, fine, form, bound, progress)
        whole = fine
    raise HierMemError(f"in float16 the KL is {whole.distance.kl:.2g} already", f"The bound is {bound:g}.")


def uniform(weights: Sequence[Linear], form: str) -> dict[str, str]:
    """One format for all; but with int8 the head stays float16.

    On SmolLM2 the head in int8 makes nine tenths of the divergence, for a fifth of the weights.
    """
    return {weight.name: "fp16" if form == "int8" and weight.part is not None else form for weight in weights}


def _uniform(reference: Float32Anchor, weights: Sequence[Linear], form: str) -> Plan:
    formats = uniform(weights, form)
    return Plan(formats, _measure(reference, weights, formats))


def _measure(reference: Float32Anchor, weights: Sequence[Linear], formats: dict[str, str]) -> Distance:
    changes = ((weight, rounded(weight.weight, formats[weight.name])) for weight in weights)
    return reference.with_weights(changes)


def _search(
    reference: Float32Anchor,
    weights: Sequence[Linear],
    fine: Plan,
    form: str,
    bound: float,
    progress: Progress | None,
) -> Plan:
    """Coarsens the matrices that cost the least KL per megabyte; how many, by bisection."""
    costs = []
    for number, weight in enumerate(weights):
        alone = reference.with_weights([(weight, rounded(weight.weight, form))], RANKED).kl
        shape = (weight.weight.shape[0], weight.weight.shape[1])
        saved = (size(shape, fine.formats[weight.name]) - size(shape, form)) / 1e6
        costs.append((weight.name, alone, alone / saved))
        if progress:
            progress(number + 1, len(weights))
    costs.sort(key=lambda cost: cost[2])
    best, low, high = fine, 0, len(costs)
    while low < high:
        count = (low + high + 1) // 2
        formats = fine.formats | {name: form for name, _, _ in costs[:count]}
        tried = Plan(formats, _measure(reference, weights, formats))
        if tried.distance.kl <= bound:
            best, low = tried, count
        else:
            high = count - 1
    return Plan(best.formats, best.distance, tuple(reversed(costs[-SHOWN:])))
