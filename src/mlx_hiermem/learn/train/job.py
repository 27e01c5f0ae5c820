"""One job, a subtree or the generic block: its epochs, its steps, and the commits that a killed run goes on from.

trainer = JobTrainer(folder, job, examples, loss, settings, start)
trainer.run(meter)                        # from its last commit on; trainer.blocks has the result
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import DTYPES, GENERIC_NODE, Path
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.activations import JobStates
from mlx_hiermem.learn.train.blocks import Tensors, TrainedBlocks
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.monitor import Log, ProgressMeter
from mlx_hiermem.learn.train.schedule import Group, Job, Known, Schedule, nodes_with_block
from mlx_hiermem.learn.train.step import MemoryLoss, rate_factor, update
from mlx_hiermem.progress import Progress

COMMIT_SECONDS = 60.0  # between commits, at least
COMMIT_FACTOR = 20.0  # and at least so many times what the last one took
LOG_STEPS = 10
STATE_BYTES = 3 * DTYPES["float32"]  # of a parameter in training: weight and two moments


@dataclass(frozen=True)
class StepResult:
    """What one step was."""

    loss: float  # summed over the tokens learnt
    learnt: int
    tokens: int
    norm: float  # of the gradient, before it was clipped
    rate: float


class JobTrainer:
    """Trains one job to its end, from its last commit on; `blocks` has the result."""

    def __init__(
        self,
        folder: pathlib.Path,
        job: Job,
        examples: TrainingSet,
        loss: MemoryLoss,
        settings: TrainingSettings,
        start: Callable[[Path], Tensors],
        learns: Callable[[Path], bool] = lambda node: True,
    ) -> None:
        """`start` gives the weights that a node's block begins with, `learns` says whether they change."""
        self.folder, self.job, self.examples, self.loss, self.settings = folder, job, examples, loss, settings
        self.learns = learns
        self.blocks = TrainedBlocks(folder / "blocks", settings.blocks_bytes, start)
        self.schedule = Schedule(job, examples, loss.config, settings, self._nbytes)
        self.total = self.schedule.tokens * settings.epochs
        progress = self.blocks.progress
        self.epoch, self.step, self.tokens = (progress.get(name, 0) for name in ("epoch", "step", "tokens"))
        self.seconds: float = progress.get("seconds", 0.0)
        self.done: bool = progress.get("done", False)
        self.log = Log(folder / "log.jsonl", progress.get("log", 0))
        self.known = Known(folder / "known", progress.get("known", 0), examples)
        self.states = JobStates(folder, examples, loss, settings.objective == "distillation")

    def run(self, meter: ProgressMeter, at_epoch: Callable[[], None] = lambda: None) -> None:
        """Trains what is left; `at_epoch` is called before the first epoch and after each, for an evaluation.

        Raises OutputError where the disk is full; what was committed stays.
        """
        if self.done:
            return
        self._begun = self._committed = time.perf_counter()
        self.prepare(meter.states)
        if (self.epoch, self.step) == (0, 0):
            at_epoch()
        self._commit_took, recent = 0.0, list[StepResult]()
        while self.epoch < self.settings.epochs:
            steps = self.steps()
            while self.step < len(steps):
                recent.append(done := self.take(steps[self.step], self.step / len(steps)))
                self.step, self.tokens = self.step + 1, self.tokens + done.tokens
                if self.step % LOG_STEPS == 0 or self.step == len(steps):
                    mean = sum(one.loss for one in recent) / sum(one.learnt for one in recent)
                    self.note({"loss": mean, "norm": done.norm, "rate": done.rate})
                    recent.clear()
                meter.learnt(done.tokens, done.loss / done.learnt)
                self._commit_now_and_then()
            self.epoch, self.step = self.epoch + 1, 0
            self._note_known(meter)
            meter.rested(self.rested)
            at_epoch()
        self.done = True
        self._commit()
        self.states.remove()

    @property
    def rested(self) -> int:
        """Tokens of the epochs so far that were not learnt again, because they were known."""
        return max(0, self.schedule.tokens * self.epoch - self.tokens) if self.epoch else 0

    def prepare(self, progress: Progress) -> None:
        """Computes the hidden states that are worth keeping."""
        self.states.prepare(self.job, self.total, self.settings.states_bytes, progress)

    def steps(self) -> list[list[Group]]:
        """Those of the present epoch; the last one goes through everything."""
        rest = self.settings.rest and self.epoch + 1 < self.settings.epochs
        return self.schedule.steps(self.epoch, self.known.due(self.epoch) if rest else None)

    def take(self, step: Sequence[Group], part: float = 0.0) -> StepResult:
        """One step: the groups' gradients, summed block by block, and an update of the blocks they fetched.

        `part` of the present epoch is behind it.
        """
        numbers = np.concatenate([group.examples for group in step])
        learnt = int(self.examples.learnts[numbers].sum())
        self.blocks.use(
            frozenset(node for group in step for node in nodes_with_block(self.loss.config, group.leaf))
        )
        sums: dict[Path, Tensors] = {}
        loss = sum(self._add_gradients(group, 1 / learnt, sums) for group in step)
        rate = self.settings.rate * rate_factor((self.epoch + part) / self.settings.epochs, self.settings)
        moving = [node for node in sums if self.learns(node)]
        blocks, gradients = [self.blocks[node] for node in moving], [sums[node] for node in moving]
        norm = update(blocks, gradients, rate, self.settings.weight_decay, self.settings.clip)
        for node in moving:
            self.blocks.touch(node)
        tokens = int(self.examples.lengths[numbers].sum())
        return StepResult(loss, learnt, tokens, norm, rate)

    def _add_gradients(self, group: Group, scale: float, sums: dict[Path, Tensors]) -> float:
        """Adds one group's gradients to those of its nodes; returns its summed loss."""
        examples = [self.examples.read(int(number)) for number in group.examples]
        path = nodes_with_block(self.loss.config, group.leaf)
        weights = [self.blocks[node].weights for node in path]
        values, said, found = self.loss.gradients(weights, self.states.inputs(examples, group.examples), scale)
        if group.leaf != GENERIC_NODE:
            self._note(group, values, said)
        for node, gradient in zip(path, found, strict=True):
            before = sums.get(node)
            sums[node] = {name: before[name] + g for name, g in gradient.items()} if before else gradient
        return float(values.sum())

    def _note(self, group: Group, losses: np.ndarray, said: np.ndarray) -> None:
        """Keeps how well each of a group's texts was known; losses and said [M] are of its texts in order."""
        learnts = self.examples.learnts[group.examples]
        starts = np.concatenate(([0], np.cumsum(learnts)[:-1]))
        means = np.add.reduceat(losses[: learnts.sum()], starts) / learnts
        whole = np.logical_and.reduceat(said[: learnts.sum()], starts)
        self.known.add(self.epoch, self.examples.places(group.leaf, group.examples), means, whole)

    def _note_known(self, meter: ProgressMeter) -> None:
        """Tells after an epoch how much is known, and what is left to do if as many texts go on resting."""
        if GENERIC_NODE in self.job.leaves:
            return
        known, said = self.known.shares()
        self.note({"known": known, "said": said})
        meter.known(known, said)

    def _nbytes(self, node: Path) -> int:
        config = self.loss.config
        units = config.block_sizes[len(node) - 1] if node else config.fetched_size
        return config.parameters(units) * STATE_BYTES

    def note(self, row: dict[str, object]) -> None:
        """Adds a line to the job's log."""
        where = {"job": self.job.name, "epoch": self.epoch, "step": self.step, "tokens": self.tokens}
        self.log.add(where | {"seconds": round(self._elapsed(), 3)} | row)

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._begun

    def _commit_now_and_then(self) -> None:
        if time.perf_counter() - self._committed > max(COMMIT_SECONDS, COMMIT_FACTOR * self._commit_took):
            self._commit()

    def _commit(self) -> None:
        start = time.perf_counter()
        self.known.flush()
        names = ("epoch", "step", "tokens", "done")
        self.blocks.commit(
            {name: getattr(self, name) for name in names}
            | {"seconds": self._elapsed(), "log": self.log.size, "known": self.known.size}
        )
        self._committed = time.perf_counter()
        self._commit_took = self._committed - start
