"""All jobs of a bank, on one machine or on several: each rank trains whole subtrees, and none waits for another.

    training = Training(work, model, memory_config(model, "ffn", 4, (24, 8)), examples, settings, heldout)
    training.run(tick)                        # this rank's jobs, from where a killed run stopped
    for node, weights in training.blocks(): ...

`mlx.launch -n 16 ... hiermem learn` gives the ranks a work folder that they share. They exchange nothing but the
news that they are done, and their blocks are, bit for bit, what one rank alone would have made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import HierMemError, MissingDependencyError, OutputError
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.blocks import GO_ON, Tensors, TrainedBlocks, new_block
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.heldout import HeldOut, perplexities
from mlx_hiermem.learn.train.jobs import Job, Schedule, jobs, share
from mlx_hiermem.learn.train.learner import Learner
from mlx_hiermem.learn.train.progress import Progress, merge_logs, plot, read_log
from mlx_hiermem.learn.train.trainer import Trainer

LOG, PLOT = "log.jsonl", "loss.png"
Tick = Callable[[Progress], None]


class Training:
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
        self.learner = Learner(model, config, vocabulary)
        work.mkdir(parents=True, exist_ok=True)
        decides = {name: value for name, value in settings.to_json().items() if name != "states_bytes"}
        self._claim({"settings": decides, "memory": config.to_json(), "of": examples.digest, "in": identity})
        self.examples = examples
        self.jobs = jobs(examples, config, settings)
        if not self.jobs:
            raise HierMemError("there is nothing to learn", "No example is in a leaf whose path has a block.")
        self.mine = share(self.jobs, self._work, self.group.rank(), self.group.size())

    def run(self, tick: Tick = lambda progress: None) -> dict[str, float]:
        """Trains this rank's jobs and waits for the others'; returns held-out perplexities by memory.

        Rank 0 then joins the logs in `log.jsonl`, and draws `loss.png` if it can. Raises OutputError where the disk
        is full: what was committed stays, and the next call goes on from there.
        """
        ticker = _Ticker(tick, sum(self._tokens(job) * self.settings.epochs for job in self.mine))
        try:
            for job in self.mine:
                self._train(job, ticker)
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

    def trainer(self, job: Job) -> Trainer:
        """What trains a job, as far as it is."""
        return Trainer(self._folder(job), job, self.examples, self.learner, self.settings, self._first, self.learns)

    def _train(self, job: Job, ticker: _Ticker) -> None:
        trainer = self.trainer(job)
        ticker.begin(job.name, trainer.tokens)
        heldout = HeldOut(trainer, self.heldout) if self.heldout is not None else None

        def evaluate(trainer: Trainer) -> None:
            if heldout and (sums := heldout.measure()):
                trainer.note({"heldout": sums})
                ticker.measured({name: loss / tokens for name, (loss, tokens) in sums.items()})

        trainer.run(ticker, evaluate)

    def _first(self, node: Path) -> Tensors:
        """The weights that a block begins with, in float32."""
        given = self._start(node)
        if given is None:
            return new_block(self.config, node, self.settings.seed)
        return {name: value.astype(mx.float32) for name, value in given.items()}

    def _tokens(self, job: Job) -> int:
        return Schedule(job, self.examples, self.config, self.settings, lambda node: 0).tokens

    def _work(self, job: Job) -> float:
        """Layers that are run for a job's tokens, those that learn three times for the way back; the layers below
        are run once for all epochs where their states are kept, which for the generic block's they are not."""
        below, layers = self.learner.first_layer, len(self.learner.anchor.layers)
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
            beside = file.with_name(f"{file.name}.{self.group.rank()}.partial")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, file)
        elif file.read_text(encoding="utf-8") != text:
            raise HierMemError(
                f"{self.work} holds training of another corpus, anchor or other settings",
                "Remove that folder to start afresh, or go on with the same.",
            )


class _Ticker:
    """Adds up what the jobs report."""

    def __init__(self, tick: Tick, total: int) -> None:
        self._tick, self._total, self._tokens, self._job, self._loss = tick, total, 0, "", 0.0
        self._learnt, self._seconds, self._last = 0, 0.0, time.perf_counter()

    def begin(self, job: str, tokens: int) -> None:
        """A job starts, which has these tokens behind it."""
        self._job, self._loss, self._last = job, 0.0, time.perf_counter()
        self._tokens += tokens

    def measured(self, losses: dict[str, float]) -> None:
        """Mean losses on held-out texts, by memory."""
        self._last = time.perf_counter()
        self._tick(Progress("measured", self._job, self._tokens, self._total, 0.0, losses=losses))

    def states(self, done: int, total: int) -> None:
        self._last = time.perf_counter()
        self._tick(Progress("hidden states", self._job, done, total, 0.0))

    def learnt(self, tokens: int, loss: float) -> None:
        now = time.perf_counter()
        self._learnt, self._seconds, self._last = self._learnt + tokens, self._seconds + now - self._last, now
        self._tokens += tokens
        self._loss = 0.9 * self._loss + 0.1 * loss if self._loss else loss
        speed = self._learnt / self._seconds
        self._tick(Progress("learning", self._job, self._tokens, self._total, speed, self._loss))
