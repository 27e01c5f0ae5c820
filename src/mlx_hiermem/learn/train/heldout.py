"""How well held-out texts are predicted while the bank is learnt.

Without memory, with the generic block, and with the fetched ones level by level, which shows what each level adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.learn.train.batches import collate, group_by_length
from mlx_hiermem.learn.train.blocks import TrainedBlocks
from mlx_hiermem.learn.train.dataset import Example, TrainingSet
from mlx_hiermem.learn.train.schedule import Job, nodes_with_block
from mlx_hiermem.learn.train.step import Inputs, MemoryLoss

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

    def __init__(
        self,
        texts: TrainingSet,
        job: Job,
        blocks: TrainedBlocks,
        loss: MemoryLoss,
        leaves: Sequence[Path],
        seed: int = 0,
    ) -> None:
        """`blocks` are the job's. `leaves` are all that any job learns; `seed` decides which texts are measured."""
        self.texts, self.job, self.blocks, self.loss = texts, job, blocks, loss
        self._known, self._seed = _subtrees(leaves), seed
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
            self.blocks.use(frozenset(node for nodes in group.memories.values() for node in nodes))
            _add(found, {name: (self._loss(group, n), group.learnt) for name, n in group.memories.items()})
        return found

    def _loss(self, group: _Group, nodes: list[Path]) -> float:
        if not nodes and group.alone is not None:
            return group.alone
        loss = float(self.loss.per_token([self.blocks[node].weights for node in nodes], group.inputs).sum())
        if not nodes:
            group.alone = loss
        return loss

    def _read(self) -> Iterator[_Group]:
        own = _subtrees(self.job.leaves)
        for leaf, numbers in self._sample():
            memories = dict[str, list[Path]]()
            if GENERIC_NODE in self.job.leaves:
                memories["generic"] = [GENERIC_NODE]
            if leaf[:1] in own or leaf[:1] not in self._known:
                memories |= _levels(self.loss.config, leaf)
            for group in group_by_length(
                numbers, self.texts.lengths[numbers], GROUP_TOKENS, np.random.default_rng(0)
            ):
                texts = [self.texts.read(int(number)) for number in group]
                yield _Group(memories, _inputs(self.loss, texts), int(self.texts.learnts[group].sum()))

    def _sample(self) -> Iterator[tuple[Path, np.ndarray]]:
        """Leaves and a sample of their texts: those below the job's top, or all for the generic block."""
        everything, own = GENERIC_NODE in self.job.leaves, _subtrees(self.job.leaves)
        rng = np.random.default_rng(self._seed)
        chosen = rng.random(len(self.texts)) < EXAMPLES / max(1, len(self.texts))  # bool [N]
        for leaf in self.texts.leaves:
            numbers = self.texts.ids(leaf)
            numbers = numbers[chosen[numbers]]
            if len(numbers) and (everything or leaf[:1] in own):
                yield leaf, numbers


def _inputs(loss: MemoryLoss, texts: Sequence[Example]) -> Inputs:
    """Texts as a batch, with the states that enter the first memory layer."""
    batch, layer = collate(texts), loss.first_layer
    if not layer:
        return Inputs(batch)
    documents = mx.array(batch.documents) if batch.packed else None
    states = loss.anchor.states(mx.array(batch.tokens), layer, documents)
    mx.eval(states)
    return Inputs(batch, states)


def _levels(config: MemoryConfig, leaf: Path) -> dict[str, list[Path]]:
    """Name -> the nodes whose blocks are attached: none, those down to each level, all on the path."""
    path = nodes_with_block(config, leaf)  # a block that nothing was learnt in changes nothing
    cut_off = {f"level {n}": [node for node in path if len(node) <= n] for n in range(1, config.depth)}
    return {"none": []} | cut_off | {"fetched": path}


def _subtrees(leaves: Iterable[Path]) -> set[tuple[int, ...]]:
    """The nodes of level 1 above these leaves."""
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
