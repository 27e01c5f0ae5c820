"""How well held-out texts are predicted while the bank is learnt.

Without memory, with the generic block, and with the fetched ones level by level, which shows what each level adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn.examples import Example, TrainingSet
from mlx_hiermem.learn.learner import Inputs
from mlx_hiermem.learn.packing import batch, cut
from mlx_hiermem.learn.schedule import GENERIC, carriers
from mlx_hiermem.learn.trainer import Trainer

EXAMPLES = 256  # of all held-out texts, at most; the same ones for every memory
GROUP_TOKENS = 1024
Sums = dict[str, tuple[float, int]]  # name of a memory -> summed loss, tokens


def measure(trainer: Trainer, heldout: TrainingSet) -> Sums:
    """Losses of a job's held-out texts under its blocks as they are now.

    A subtree's job has `none`, `level 1` ... (the path cut off there) and `fetched`; the generic block's has
    `generic`, over all texts, and the others for texts whose subtree nobody learns.
    """
    found: Sums = {}
    own, known = _tops(trainer.job.leaves), _tops(trainer.examples.leaves)
    for leaf, numbers in _texts(trainer, heldout):
        memories: dict[str, list[Path]] = {"generic": [GENERIC]} if GENERIC in trainer.job.leaves else {}
        if leaf[:1] in own or leaf[:1] not in known:
            memories |= _levels(trainer, leaf)
        trainer.use({node for nodes in memories.values() for node in nodes})
        for group in cut(numbers, heldout.lengths[numbers], GROUP_TOKENS, np.random.default_rng(0)):
            inputs = _inputs(trainer, [heldout.read(int(number)) for number in group])
            learnt = int(heldout.learnts[group].sum())
            _add(found, {name: (float(trainer.losses(n, inputs).sum()), learnt) for name, n in memories.items()})
    return found


def _inputs(trainer: Trainer, texts: Sequence[Example]) -> Inputs:
    """Texts as a batch; what no memory changes is computed once for all memories."""
    packed, layer = batch(texts), trainer.learner.first_layer
    if trainer.settings.cotrain or not layer:
        return Inputs(packed)
    documents = mx.array(packed.documents) if packed.packed else None
    return Inputs(packed, trainer.learner.anchor.states(mx.array(packed.tokens), layer, documents))


def _levels(trainer: Trainer, leaf: Path) -> dict[str, list[Path]]:
    """Name -> the nodes whose blocks are attached: none, those down to each level, all on the path."""
    path = carriers(trainer.learner.config, leaf)  # a block that nothing was learnt in changes nothing
    cut_off = {
        f"level {n}": [node for node in path if len(node) <= n] for n in range(1, trainer.learner.config.depth)
    }
    return {"none": []} | cut_off | {"fetched": path}


def _texts(trainer: Trainer, heldout: TrainingSet) -> Iterator[tuple[Path, np.ndarray]]:
    """Leaves and a sample of their texts: those below the job's top, or all for the generic block."""
    everything, own = GENERIC in trainer.job.leaves, _tops(trainer.job.leaves)
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
