"""What an exported anchor writes: memories swapped in and out, against its source, and token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.convert.checks import Check
from mlx_hiermem.convert.coreml.exported import Exported
from mlx_hiermem.convert.coreml.measure import Distance
from mlx_hiermem.convert.coreml.references import NONE, Reference, read_memory
from mlx_hiermem.convert.coreml.runner import MEMORY, Runner

GENERATED = 12  # tokens after each prompt


@dataclass(frozen=True)
class Bound:
    """Largest difference of a logit, mean KL, and the share of tokens where both choose the same."""

    logit: float
    kl: float
    agreement: float


# By the coarsest weights: float16 must write the same texts; the others are held to what their bits can keep.
BOUNDS = {
    "fp16": Bound(0.2, 5e-4, 1.0),
    "int8": Bound(2.0, 2e-2, 0.95),
    "int4": Bound(float("inf"), 0.2, 0.8),
    "lut4": Bound(float("inf"), 0.2, 0.8),
}
ALONE = 0.2  # |Δlogit| of decode alone: the same sums in another order
TRACE = 1e-3  # |Δlogit| after a memory came back
EFFECT = 1e-2  # |Δlogit| that a memory must make, for the checks to mean something
Texts = list[tuple[np.ndarray, np.ndarray]]  # ids [T] of a prompt with its continuation; logits [T, V]


def check_texts(exported: Exported, reference: Reference | None, count: int) -> Iterator[Check]:
    """Writes on with no memory, with one, another, the first again, and none again; caches are never cleared."""
    runner, prompts = exported.runner(), exported.prompts(count, GENERATED)
    memories = exported.memories()
    first: dict[str, Texts] = {}
    for memory in [NONE, *memories, *memories[:1] * (len(memories) > 1), *[NONE] * bool(memories)]:
        tensors = read_memory(exported.bank, memory) if exported.bank and memory != NONE else None
        runner.set_memory(tensors)
        texts = [_write_on(runner, prompt) for prompt in prompts]
        if memory in first:
            yield _same(f"memory {memory} again", texts, first[memory])
            continue
        first[memory] = texts
        if memory != NONE:
            yield _effect(memory, texts, first[NONE])
        if reference:
            yield from _parity(_bound(exported), reference, memory, texts)
    yield _decode_alone(exported, runner, first[NONE])
    if exported.anchor["load_block"] and memories:
        yield _load_block(exported, runner, memories[0])


def _bound(exported: Exported) -> Bound:
    formats = exported.anchor["compression"]
    return next(bound for form, bound in reversed(BOUNDS.items()) if formats.get(form))


def _write_on(runner: Runner, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation: (ids of the prompt and all but the last new token, their logits)."""
    runner.reset()
    ids, rows = list(prompt), [runner.feed(prompt)]
    for _ in range(GENERATED - 1):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(runner.feed(np.array(ids[-1:])))
    return np.array(ids), np.concatenate(rows)


def _parity(bound: Bound, reference: Reference, memory: str, texts: Texts) -> Iterator[Check]:
    """Logits on prompts and continuations; a text is the same if its tokens are the reference's choices."""
    theirs = [reference.logits(ids, memory)[:, : logits.shape[1]] for ids, logits in texts]
    distance = Distance.between(theirs, [logits for _, logits in texts])
    same = sum(
        bool((a.argmax(-1) == b.argmax(-1))[-GENERATED:].all()) for a, (_, b) in zip(theirs, texts, strict=True)
    )
    passed = distance.logit <= bound.logit and distance.kl <= bound.kl
    yield Check(
        f"logits, memory {memory}",
        f"|Δ| {distance.logit:.3f}, KL {distance.kl:.1e}",
        f"{bound.logit:g}, {bound.kl:g}",
        passed,
        distance.to_json(),
    )
    exact = bound.agreement == 1
    yield Check(
        f"choices, memory {memory}",
        f"{same} of {len(texts)} texts the same, {distance.agreement:.1%} of tokens",
        "all texts" if exact else f"{bound.agreement:.0%} of tokens",
        same == len(texts) if exact else distance.agreement >= bound.agreement,
    )


def _difference(texts: Texts, others: Texts) -> float:
    """Largest difference of a logit on the prompts; infinite where a continuation is another."""
    if any(not np.array_equal(a, b) for (a, _), (b, _) in zip(texts, others, strict=True)):
        return float("inf")
    return max(float(np.abs(a - b).max()) for (_, a), (_, b) in zip(texts, others, strict=True))


def _same(name: str, texts: Texts, others: Texts) -> Check:
    found = _difference(texts, others)
    return Check(name, f"|Δ| {found:.1e}", f"{TRACE:g}", found <= TRACE)


def _effect(memory: str, texts: Texts, plain: Texts) -> Check:
    found = _difference(texts, plain)
    changed = sum(not np.array_equal(a, b) for (a, _), (b, _) in zip(texts, plain, strict=True))
    figure = f"{changed} of {len(texts)} texts change" if changed else f"|Δ| {found:.3f}"
    return Check(f"effect of memory {memory}", figure, f"> {EFFECT:g}", found > EFFECT)


def _decode_alone(exported: Exported, runner: Runner, texts: Texts) -> Check:
    """The same tokens one by one."""
    shortest = min(exported.anchor["functions"], key=exported.anchor["functions"].__getitem__)
    found = []
    for ids, _ in texts[:2]:
        runner.reset()
        found.append(runner.feed(ids, only=shortest))
    distance = Distance.between([logits for _, logits in texts[:2]], found)
    passed = distance.logit <= ALONE
    return Check("decode alone", f"|Δ| {distance.logit:.3f}", f"{ALONE:g}", passed, distance.to_json())


def _load_block(exported: Exported, runner: Runner, memory: str) -> Check:
    """That the function writes what a caller would."""
    assert exported.bank is not None
    tensors, states = read_memory(exported.bank, memory), []
    for how in ("direct", "load_block"):
        runner.set_memory(None)
        runner.set_memory(tensors, how)
        states.append({name: np.array(runner.state[name]) for name in MEMORY})
    same = all(np.array_equal(states[0][name], states[1][name]) for name in MEMORY)
    moved = any(state.any() for state in states[1].values())
    return Check("load_block", "the same" if same and moved else "another memory", "as written", same and moved)
