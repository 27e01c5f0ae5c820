"""All jobs of a bank, on one machine or on several: each rank trains whole subtrees, and none waits for another.

    trainer = Trainer(work, model, memory_config(model, "ffn", 4, (24, 8)), examples, settings, heldout)
    trainer.run(listener)                     # this rank's jobs, from where a killed run stopped
    for node, weights in trainer.blocks(): ...

A job is a subtree or the generic block: its epochs, its steps, and the commits that a killed run goes on from
(`JobTrainer`). `mlx.launch -n 16 ... hiermem learn` gives the ranks a work folder that they share. They exchange
nothing but the news that they are done, and their blocks are, bit for bit, what one rank alone would have made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.config import DTYPES, GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import HierMemError, MissingDependencyError, OutputError
from mlx_hiermem.files import write_text
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.activations import JobStates
from mlx_hiermem.learn.train.blocks import GO_ON, Tensors, TrainedBlocks
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.monitor import (
    HeldOut,
    Log,
    ProgressMeter,
    TrainingListener,
    merge_logs,
    perplexities,
    plot,
    read_log,
)
from mlx_hiermem.learn.train.schedule import Group, Job, Known, Schedule, jobs_of_rank, list_jobs, nodes_with_block
from mlx_hiermem.learn.train.start import new_block
from mlx_hiermem.learn.train.step import MemoryLoss, StepResult, rate_factor, update
from mlx_hiermem.progress import Progress

LOG, PLOT = "log.jsonl", "loss.png"
COMMIT_SECONDS = 60.0  # between commits, at least
COMMIT_FACTOR = 20.0  # and at least so many times what the last one took
LOG_STEPS = 10
STATE_BYTES = 3 * DTYPES["float32"]  # of a parameter in training: weight and two moments


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
        self.log = Log(folder / LOG, progress.get("log", 0))
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
        known, said = self.known.fractions()
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


class Trainer:
    """Everything that is trained from one set of examples, in the folder `work`."""

    def __init__(
        self,
        work: pathlib.Path,
        model: nn.Module,
        config: MemoryConfig,
        examples: TrainingSet,
        settings: TrainingSettings,
        heldout: TrainingSet | None = None,
        *,
        identity: str = "",
        vocabulary: int | None = None,
        start: Callable[[Path], Tensors | None] = lambda node: None,
        learns: Callable[[Path], bool] = lambda node: True,
    ) -> None:
        """`identity` is the anchor's weights digest, `vocabulary` its real token ids where it pads them.

        `start` gives weights [L, r, width] that a node's block has already (None: a new one), `learns` says which
        nodes change: so new documents are learnt in an old bank. Raises AnchorError where the anchor cannot carry
        the memory, and HierMemError where `work` is of other settings or another corpus.
        """
        self.work, self.config, self.settings, self.heldout = work, config, settings, heldout
        self.learns, self._start = learns, start
        self.group = mx.distributed.init()
        self.loss = MemoryLoss(model, config, vocabulary)
        work.mkdir(parents=True, exist_ok=True)
        decides = {name: value for name, value in settings.to_json().items() if name != "states_bytes"}
        self._claim({"settings": decides, "memory": config.to_json(), "of": examples.digest, "in": identity})
        self.examples = examples
        self.jobs = list_jobs(examples, config, settings)
        if not self.jobs:
            raise HierMemError("there is nothing to learn", "No example is in a leaf whose path has a block.")
        self.mine = jobs_of_rank(self.jobs, self._cost, self.group.rank(), self.group.size())

    def run(self, listener: TrainingListener = lambda progress: None) -> dict[str, float]:
        """Trains this rank's jobs and waits for the others'; returns held-out perplexities by memory.

        Rank 0 then joins the logs in `log.jsonl`, and draws `loss.png` if it can. Raises OutputError where the disk
        is full: what was committed stays, and the next call goes on from there.
        """
        meter = ProgressMeter(listener, sum(self._tokens(job) * self.settings.epochs for job in self.mine))
        try:
            for job in self.mine:
                self._train(job, meter)
        except OSError as error:
            raise OutputError(f"cannot write {error.filename or self.work}: {error.strerror}", GO_ON) from error
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # all ranks are done
        if missing := [job.name for job in self.jobs if not self._is_done(job)]:
            raise OutputError(
                f"subtree {missing[0]} of another rank is not in {self.work}",
                "The ranks must share their work folder.",
            )
        if self.group.rank() == 0:
            merge_logs([self._folder(job) / LOG for job in self.jobs], self.work / LOG)
            with contextlib.suppress(MissingDependencyError):  # a picture is not worth what was learnt
                plot(self.work / LOG, self.work / PLOT)
        return self.perplexities()

    def perplexities(self) -> dict[str, float]:
        """Of the held-out texts at the end: none, generic, fetched, and fetched down to each level."""
        last: dict[str, Any] = {}
        for job in self.jobs:
            for row in read_log(self._folder(job) / LOG):
                if "heldout" in row:
                    last[job.name] = row["heldout"]
        return perplexities(last.values())

    def blocks(self) -> Iterator[tuple[Path, Tensors]]:
        """Node and float32 weights of every trained block; the empty path is the generic one. After `run`."""
        for job in self.jobs:
            trained = self._blocks(job)
            for node in trained.nodes:
                if self.learns(node):
                    yield node, trained.read(node).weights

    def job_trainer(self, job: Job) -> JobTrainer:
        """What trains a job, from its last commit on."""
        return JobTrainer(self._folder(job), job, self.examples, self.loss, self.settings, self._first, self.learns)

    def _train(self, job: Job, meter: ProgressMeter) -> None:
        trainer = self.job_trainer(job)
        meter.begin(job.name, trainer.tokens)
        meter.rested(trainer.rested)
        heldout = None
        if self.heldout is not None:
            leaves, seed = self.examples.leaves, self.settings.seed
            heldout = HeldOut(self.heldout, job, trainer.blocks, self.loss, leaves, seed)

        def evaluate() -> None:
            if heldout and (sums := heldout.measure()):
                trainer.note({"heldout": sums})
                meter.measured({name: loss / tokens for name, (loss, tokens) in sums.items()})

        trainer.run(meter, evaluate)

    def _first(self, node: Path) -> Tensors:
        """The weights that a block begins with, in float32."""
        given = self._start(node)
        if given is None:
            return new_block(self.config, node, self.settings.seed, self.loss.anchor.layers)
        return {name: value.astype(mx.float32) for name, value in given.items()}

    def _tokens(self, job: Job) -> int:
        return Schedule(job, self.examples, self.config, self.settings, lambda node: 0).tokens

    def _cost(self, job: Job) -> float:
        """Layers that are run for a job's tokens, those that learn three times for the way back; the layers below
        are run once for all epochs where their states are kept, which for the generic block's they are not."""
        below, layers = self.loss.first_layer, len(self.loss.anchor.layers)
        often = 1.0 if GENERIC_NODE in job.leaves else 1 / self.settings.epochs
        return self._tokens(job) * (3 * (layers - below) + often * below)

    def _folder(self, job: Job) -> pathlib.Path:
        folder = self.work / f"subtree-{job.name}"
        folder.mkdir(exist_ok=True)
        return folder

    def _blocks(self, job: Job) -> TrainedBlocks:
        return TrainedBlocks(self._folder(job) / "blocks", self.settings.blocks_bytes, self._first)

    def _is_done(self, job: Job) -> bool:
        return bool(self._blocks(job).progress.get("done"))

    def _claim(self, made_of: dict[str, Any]) -> None:
        """Writes what this work folder is for, or checks it."""
        text, file = json.dumps(made_of, sort_keys=True), self.work / "training.json"
        if not file.is_file():
            # Ranks may write it at one time, so each has a name of its own beside it; the last one's stays.
            own = file.with_name(f"{file.name}.{self.group.rank()}")
            write_text(own, text)
            os.replace(own, file)
        elif file.read_text(encoding="utf-8") != text:
            raise HierMemError(
                f"{self.work} holds training of another corpus, anchor or other settings",
                "Remove that folder to start afresh, or go on with the same.",
            )
