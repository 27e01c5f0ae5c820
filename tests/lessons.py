"""Small random training sets for tiny anchors, and a whole training run as a script that can be killed.

python tests/lessons.py WORK ANCHOR EXAMPLES        commits after every step, and prints a line
"""

from __future__ import annotations

import contextlib
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import JobTrainer, Trainer
from mlx_hiermem.learn.train.step import Inputs
from mlx_hiermem.memory.design import memory_config

Bank = dict[Path, dict[str, np.ndarray]]
SIZES, BRANCHING = (4, 2), 2
LEAVES = [Path((0, 0)), Path((0, 1)), Path((1, 0)), Path((1, 1))]
QUICK = TrainingSettings(epochs=2, groups=2, group_tokens=64, rate=1e-2)


def example(length: int, learnt: int = 1, window: int = 0) -> TrainingExample:
    """Tokens that count upwards, of which the last `learnt` are learnt."""
    return TrainingExample(np.arange(length, dtype=np.int32), np.arange(length) >= length - learnt, window)


def make_set(folder: pathlib.Path, count: int = 40, seed: int = 0, teachers: bool = False) -> TrainingSet:
    """Texts that each begin with a sign of their leaf, half prompt, half answer; some are learnt in two leaves."""
    rng = np.random.default_rng(seed)
    with TrainingSetWriter(folder) as out:
        for number in range(count):
            leaves = [LEAVES[i] for i in rng.choice(4, 1 + number % 2, replace=False)]
            length = int(rng.integers(4, 20))
            tokens = rng.integers(10, 250, length).astype(np.int32)
            tokens[0] = leaves[0].row(2)
            learn = np.arange(length) >= length // 2
            context = rng.integers(10, 250, 6).astype(np.int32)
            teacher = np.concatenate([context, tokens]) if teachers and number % 3 else None
            out.add(TrainingExample(tokens, learn, number, teacher), leaves)
    return TrainingSet.open(folder)


def group_inputs(job_trainer: JobTrainer, numbers: np.ndarray) -> Inputs:
    """What the anchor takes for these examples, with the states that are kept."""
    return job_trainer.states.inputs([job_trainer.examples.read(int(n)) for n in numbers], numbers)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 2000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_config(model: nn.Module, kind: str = "ffn", placement: str = "late") -> MemoryConfig:
    return memory_config(model, kind, BRANCHING, SIZES, placement, dtype="float32")


def trained(
    work: pathlib.Path,
    anchor: pathlib.Path,
    examples: TrainingSet,
    settings: TrainingSettings = QUICK,
    kind: str = "ffn",
    placement: str = "late",
    heldout: TrainingSet | None = None,
) -> Bank:
    """Trains it all; the blocks as numpy has them."""
    model, _, _ = load_anchor(anchor, mx.float32)
    trainer = Trainer(work, model, tiny_config(model, kind, placement), examples, settings, heldout)
    trainer.run()
    return {node: {n: np.array(w) for n, w in block.items()} for node, block in trainer.blocks()}


def command(work: pathlib.Path, anchor: pathlib.Path, examples: TrainingSet) -> list[str]:
    """This script, in a process of its own: PyTorch in a test's brings another BLAS along."""
    return [sys.executable, __file__, str(work), str(anchor), str(examples.folder)]


def blocks_in(work: pathlib.Path, anchor: pathlib.Path, examples: TrainingSet) -> Bank:
    """What it has learnt."""
    model = load_anchor(anchor, mx.float32)[0]
    trainer = Trainer(work, model, tiny_config(model), examples, QUICK)
    return {node: {n: np.array(w) for n, w in block.items()} for node, block in trainer.blocks()}


def unbroken(work: pathlib.Path, anchor: pathlib.Path, examples: TrainingSet) -> Bank:
    """What that process learns when nothing stops it."""
    done = subprocess.run(command(work, anchor, examples), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return blocks_in(work, anchor, examples)


def main() -> None:
    work, anchor, examples = map(pathlib.Path, sys.argv[1:])
    model, _, _ = load_anchor(anchor, mx.float32)
    trainer = Trainer(work, model, tiny_config(model), TrainingSet.open(examples), QUICK)
    trainer.run(lambda progress: print(progress.job, progress.tokens, flush=True))


if __name__ == "__main__":
    from mlx_hiermem.learn.train import jobs

    jobs.COMMIT_SECONDS = jobs.COMMIT_FACTOR = 0.0
    main()
