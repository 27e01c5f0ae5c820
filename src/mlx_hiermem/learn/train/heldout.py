"""How well held-out texts are predicted while the bank is learnt.

Without memory, with the generic block, and with the fetched ones level by level, which shows what each level adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.learn.train.dataset import Example, TrainingSet
from mlx_hiermem.learn.train.jobs import carriers
from mlx_hiermem.learn.train.learner import Inputs
from mlx_hiermem.learn.train.packing import batch, cut
from mlx_hiermem.learn.train.trainer import Trainer

EXAMPLES = 256  # of all held-out texts, at most; the same ones for every memory
GROUP_TOKENS = 1024
Sums = dict[str, tuple[float, int]]  # name of a memory -> summed loss, tokens


@dataclass
class _Group:
    """Texts of one leaf, in one batch."""

    memories: dict[str, list[Path]]  # name -> the nodes whose blocks are attached
    inputs: Inputs
    learnt: int
    alone: float | None = None  # the loss without memory, once it is known: it stays what it is


class HeldOut:
    """A job's held-out texts. What training does not change is computed once, the first time they are measured."""

    def __init__(self, trainer: Trainer, texts: TrainingSet) -> None:
        self.trainer, self.texts = trainer, texts
        self._groups: list[_Group] | None = None

    def measure(self) -> Sums:
        """Losses under the job's blocks as they are now.

        A subtree's job has `none`, `level 1` ... (the path cut off there) and `fetched`; the generic block's has
        `generic`, over all texts, and the others for texts whose subtree nobody learns.
        """
        if self._groups is None:
            self._groups = list(self._read())
        found: Sums = {}
        for group in self._groups:
            self.trainer.use({node for nodes in group.memories.values() for node in nodes})
            _add(found, {name: (self._loss(group, n), group.learnt) for name, n in group.memories.items()})
        return found

    def _loss(self, group: _Group, nodes: list[Path]) -> float:
        if not nodes and group.alone is not None:
            return group.alone
        loss = float(self.trainer.losses(nodes, group.inputs).sum())
        if not nodes:
            group.alone = loss
        return loss

    def _read(self) -> Iterator[_Group]:
        own, known = _tops(self.trainer.job.leaves), _tops(self.trainer.examples.leaves)
        for leaf, numbers in _texts(self.trainer, self.texts):
            memories = dict[str, list[Path]]()
            if GENERIC_NODE in self.trainer.job.leaves:
                memories["generic"] = [GENERIC_NODE]
            if leaf[:1] in own or leaf[:1] not in known:
                memories |= _levels(self.trainer, leaf)
            for group in cut(numbers, self.texts.lengths[numbers], GROUP_TOKENS, np.random.default_rng(0)):
                texts = [self.texts.read(int(number)) for number in group]
                yield _Group(memories, _inputs(self.trainer, texts), int(self.texts.learnts[group].sum()))


def _inputs(trainer: Trainer, texts: Sequence[Example]) -> Inputs:
    """Texts as a batch, with the states that enter the first memory layer."""
    packed, layer = batch(texts), trainer.learner.first_layer
    if not layer:
        return Inputs(packed)
    documents = mx.array(packed.documents) if packed.packed else None
    states = trainer.learner.anchor.states(mx.array(packed.tokens), layer, documents)
    mx.eval(states)
    return Inputs(packed, states)


def _levels(trainer: Trainer, leaf: Path) -> dict[str, list[Path]]:
    """Name -> the nodes whose blocks are attached: none, those down to each level, all on the path."""
    path = carriers(trainer.learner.config, leaf)  # a block that nothing was learnt in changes nothing
    cut_off = {
        f"level {n}": [node for node in path if len(node) <= n] for n in range(1, trainer.learner.config.depth)
    }
    return {"none": []} | cut_off | {"fetched": path}


def _texts(trainer: Trainer, heldout: TrainingSet) -> Iterator[tuple[Path, np.ndarray]]:
    """Leaves and a sample of their texts: those below the job's top, or all for the generic block."""
    everything, own = GENERIC_NODE in trainer.job.leaves, _tops(trainer.job.leaves)
    sample = np.random.default_rng(trainer.settings.seed).random(len(heldout)) < EXAMPLES / max(1, len(heldout))
    for leaf in heldout.leaves:
        numbers = heldout.ids(leaf)
        chosen = numbers[sample[numbers]]
        if len(chosen) and (everything or leaf[:1] in own):
            yield leaf, chosen


def _tops(leaves: Iterable[Path]) -> set[tuple[int, ...]]:
    return {leaf[:1] for leaf in leaves}


def _add(sums: Sums, more: Sums) -> None:
    for name, (loss, tokens) in more.items():
        before = sums.get(name, (0.0, 0))
        sums[name] = (before[0] + loss, before[1] + tokens)


def perplexities(rows: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """exp(mean loss) per memory, over the sums of several jobs."""
    total: Sums = {}
    for row in rows:
        _add(total, dict(row))
    return {name: math.exp(loss / tokens) for name, (loss, tokens) in total.items()}
