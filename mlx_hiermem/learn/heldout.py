"""How well held-out texts are predicted while the bank is learnt.

Without memory, with the generic block, and with the fetched ones level by level, which shows what each level adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.learn.examples import TrainingSet
from mlx_hiermem.learn.learner import Inputs
from mlx_hiermem.learn.packing import batch, cut
from mlx_hiermem.learn.schedule import GENERIC, Job, carriers
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.trainer import Trainer

EXAMPLES = 256  # of a job at most
Sums = dict[str, tuple[float, int]]  # name of a memory -> summed loss, tokens


def measure(trainer: Trainer, heldout: TrainingSet) -> Sums:
    """Losses of a job's held-out texts under its blocks as they are now.

    A subtree's job has `fetched` and `level 1` ... (the path cut off below); the generic block's has `none` and
    `generic`, over all texts.
    """
    found: Sums = {}
    for leaf, numbers in _texts(trainer.job, trainer.settings, heldout):
        path = [node for node in carriers(trainer.learner.config, leaf) if node in trainer.blocks]
        memories: dict[str, list[Path]] = {"fetched": path}
        memories |= {f"level {len(node)}": path[: i + 1] for i, node in enumerate(path)}
        if GENERIC in trainer.job.leaves:
            memories = {"none": [], "generic": [GENERIC]} | (memories if len(trainer.job.leaves) > 1 else {})
        trainer.blocks.use(frozenset(node for nodes in memories.values() for node in nodes))
        for group in cut(numbers, heldout.lengths[numbers], 1024, np.random.default_rng(0)):
            _add(found, _losses(trainer, heldout, group, memories))
    return found


def _texts(job: Job, settings: TrainingSettings, heldout: TrainingSet) -> Iterable[tuple[Path, np.ndarray]]:
    """Leaves and a sample of their examples: those below the job's top, or all for the generic block."""
    tops = {leaf[0] for leaf in job.leaves if leaf != GENERIC}
    leaves = [leaf for leaf in heldout.leaves if leaf[0] in tops or GENERIC in job.leaves]
    total = sum(len(heldout.ids(leaf)) for leaf in leaves)
    rng = np.random.default_rng(settings.seed)
    for leaf in leaves:
        numbers = heldout.ids(leaf)
        chosen = numbers[rng.random(len(numbers)) < EXAMPLES / max(1, total)]
        if len(chosen):
            yield leaf, np.asarray(chosen)


def _losses(
    trainer: Trainer, heldout: TrainingSet, numbers: np.ndarray, memories: Mapping[str, list[Path]]
) -> Sums:
    inputs = Inputs(batch([heldout.read(int(number)) for number in numbers]))
    learnt = int(heldout.learnts[numbers].sum())
    found: Sums = {}
    for name, nodes in memories.items():
        weights = [trainer.blocks[node].weights for node in nodes]
        found[name] = (float(trainer.learner.losses(weights, inputs).sum()), learnt)
    return found


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
