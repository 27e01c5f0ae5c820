"""One job, trained to its end: from its last commit on, whatever killed it."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import DTYPES, GENERIC_NODE, Path
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.activations import States, TeacherStates
from mlx_hiermem.learn.train.blocks import Tensors, TrainedBlocks
from mlx_hiermem.learn.train.dataset import Example, TrainingSet
from mlx_hiermem.learn.train.jobs import Group, Job, Schedule, carriers
from mlx_hiermem.learn.train.learner import Inputs, Learner
from mlx_hiermem.learn.train.optimizer import schedule, update
from mlx_hiermem.learn.train.packing import batch
from mlx_hiermem.learn.train.progress import Log

COMMIT_SECONDS = 60.0  # between commits, at least
COMMIT_FACTOR = 20.0  # and at least so many times what the last one took
LOG_STEPS = 10
STATE_BYTES = 3 * DTYPES["float32"]  # of a parameter in training: weight and two moments
WORTH_KEEPING = 1.5  # uses of an example's states from which on they are kept


class Reporter(Protocol):
    """Who wants to know how far a job is."""

    def states(self, done: int, total: int) -> None:
        """So many tokens of all have their hidden states."""

    def learnt(self, tokens: int, loss: float) -> None:
        """A step has learnt these tokens, at this mean loss."""


@dataclass(frozen=True)
class Taken:
    """What one step was."""

    loss: float  # summed over the tokens learnt
    learnt: int
    tokens: int
    norm: float  # of the gradient, before it was clipped
    rate: float


class Trainer:
    """`run` trains one job; `blocks` has the result."""

    def __init__(
        self,
        folder: pathlib.Path,
        job: Job,
        examples: TrainingSet,
        learner: Learner,
        settings: TrainingSettings,
        start: Callable[[Path], Tensors],
        learns: Callable[[Path], bool] = lambda node: True,
    ) -> None:
        """`start` gives the weights that a node's block begins with, `learns` says whether they change."""
        self.folder, self.job, self.examples, self.learner, self.settings = folder, job, examples, learner, settings
        self.learns = learns
        self.blocks = TrainedBlocks(folder / "blocks", settings.blocks_bytes, start)
        self.schedule = Schedule(job, examples, learner.config, settings, self._nbytes)
        self.total = self.schedule.tokens * settings.epochs
        progress = self.blocks.progress
        self.epoch, self.step, self.tokens = (progress.get(name, 0) for name in ("epoch", "step", "tokens"))
        self.seconds: float = progress.get("seconds", 0.0)
        self.done: bool = progress.get("done", False)
        self.log = Log(folder / "log.jsonl", progress.get("log", 0))
        self._states: States | None = None
        self._teachers: TeacherStates | None = None

    def run(self, reporter: Reporter, at_epoch: Callable[[Trainer], None] = lambda trainer: None) -> None:
        """Trains what is left; `at_epoch` is called before the first epoch and after each, for an evaluation.

        Raises OutputError where the disk is full; what was committed stays.
        """
        if self.done:
            return
        self._begun = self._committed = time.perf_counter()
        self.prepare(reporter)
        if (self.epoch, self.step) == (0, 0):
            at_epoch(self)
        self._commit_took, recent = 0.0, list[Taken]()
        while self.epoch < self.settings.epochs:
            steps = self.schedule.steps(self.epoch)
            while self.step < len(steps):
                recent.append(taken := self.take(steps[self.step]))
                self.step, self.tokens = self.step + 1, self.tokens + taken.tokens
                if self.step % LOG_STEPS == 0 or self.step == len(steps):
                    mean = sum(one.loss for one in recent) / sum(one.learnt for one in recent)
                    self.note({"loss": mean, "norm": taken.norm, "rate": taken.rate})
                    recent.clear()
                reporter.learnt(taken.tokens, taken.loss / taken.learnt)
                self._commit_now_and_then()
            self.epoch, self.step = self.epoch + 1, 0
            at_epoch(self)
        self.done = True
        self._commit()
        self.forget_states()

    def losses(self, nodes: Sequence[Path], inputs: Inputs) -> np.ndarray:
        """[M] losses under these nodes' blocks as they are now; `use` has brought them in."""
        return self.learner.losses([self.blocks[node].weights for node in nodes], inputs)

    def use(self, nodes: Iterable[Path]) -> None:
        """Brings blocks into memory."""
        self.blocks.use(frozenset(nodes))

    def forget_states(self) -> None:
        """Removes the hidden states from the disk: only this job needed them."""
        for file in self.folder.glob("*.states"):
            file.unlink()

    def inputs(self, examples: Sequence[Example], numbers: np.ndarray) -> Inputs:
        """A group's batch, with the hidden states that are kept for it."""
        packed = batch(examples)
        states = None
        kept = [self._states.find(int(n)) for n in numbers] if self._states else [None]
        if self._states and None not in kept:
            found = [self._states.read(place) for place in kept if place is not None]
            rows = np.zeros((*packed.tokens.shape, self._states.width), found[0].dtype)
            for (row, start), values in zip(packed.places, found, strict=True):
                rows[row, start : start + len(values)] = values
            states = self._states.array(rows)
        if self.settings.objective != "distillation" or all(example.teacher is None for example in examples):
            return Inputs(packed, states)
        assert self._teachers
        parts = self._teachers.of(numbers, examples)
        taught = [
            np.full(len(part), example.teacher is not None) for part, example in zip(parts, examples, strict=True)
        ]
        spare = len(packed.positions) - sum(map(len, parts))
        teacher = mx.pad(mx.concatenate(parts), [(0, spare), (0, 0)])
        return Inputs(packed, states, teacher, mx.array(np.concatenate([*taught, np.zeros(spare, bool)])))

    def prepare(self, reporter: Reporter) -> None:
        """Computes the hidden states that are worth keeping."""
        leaves = [self.examples.ids(leaf) for leaf in self.job.leaves if leaf != GENERIC_NODE]
        numbers = np.unique(np.concatenate(leaves)) if leaves else np.empty(0, np.int64)
        uses = self.total / max(1, int(self.examples.lengths[numbers].sum()))
        budget = self.settings.states_bytes
        # The generic block meets other texts in each epoch.
        if GENERIC_NODE in self.job.leaves or uses < WORTH_KEEPING:
            budget = 0
        layer, last = self.learner.first_layer, len(self.learner.anchor.layers)
        if budget and layer:
            self._states = States(
                self.folder / "first.states", self.learner.anchor, self.examples, numbers, budget, layer
            )
            budget -= self._states.nbytes
            self._states.complete(reporter.states)
        if self.settings.objective == "distillation":
            if GENERIC_NODE in self.job.leaves:  # whatever it meets: one reading serves all prompts of a window
                budget, numbers = self.settings.states_bytes, np.unique(self.examples.assigned)
            taught = numbers[self.examples.teachers[numbers] > 0]
            self._teachers = TeacherStates(
                self.folder / "teacher.states", self.learner.anchor, self.examples, taught, budget, last
            )
            self._teachers.complete(reporter.states)

    def take(self, step: Sequence[Group]) -> Taken:
        """One step: the groups' gradients, summed block by block, and an update of the blocks they fetched."""
        numbers = np.concatenate([group.examples for group in step])
        learnt = int(self.examples.learnts[numbers].sum())
        self.use({node for group in step for node in carriers(self.learner.config, group.leaf)})
        sums: dict[Path, Tensors] = {}
        loss = sum(self._add_gradients(group, 1 / learnt, sums) for group in step)
        rate = self.settings.rate * schedule(self.tokens / self.total, self.settings)
        moving = [node for node in sums if self.learns(node)]
        blocks, gradients = [self.blocks[node] for node in moving], [sums[node] for node in moving]
        norm = update(blocks, gradients, rate, self.settings.weight_decay, self.settings.clip)
        for node in moving:
            self.blocks.touch(node)
        tokens = int(self.examples.lengths[numbers].sum())
        return Taken(loss, learnt, tokens, norm, rate)

    def _add_gradients(self, group: Group, scale: float, sums: dict[Path, Tensors]) -> float:
        """Adds one group's gradients to those of its nodes; returns its summed loss."""
        examples = [self.examples.read(int(number)) for number in group.examples]
        path = carriers(self.learner.config, group.leaf)
        weights = [self.blocks[node].weights for node in path]
        loss, found = self.learner.gradients(weights, self.inputs(examples, group.examples), scale)
        for node, gradient in zip(path, found, strict=True):
            before = sums.get(node)
            sums[node] = {name: before[name] + g for name, g in gradient.items()} if before else gradient
        return loss

    def _nbytes(self, node: Path) -> int:
        config = self.learner.config
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
        names = ("epoch", "step", "tokens", "done")
        self.blocks.commit(
            {name: getattr(self, name) for name in names} | {"seconds": self._elapsed(), "log": self.log.size}
        )
        self._committed = time.perf_counter()
        self._commit_took = self._committed - start
