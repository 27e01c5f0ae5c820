"""All jobs of a bank, on one machine or on several: each rank trains whole subtrees, and none waits for another.

    trainer = Trainer(work, model, memory_config(model, "ffn", 4, (24, 8)), examples, settings, heldout)
    trainer.run(listener)                     # this rank's jobs, from where a killed run stopped
    for node, weights in trainer.blocks(): ...

`mlx.launch -n 16 ... hiermem learn` gives the ranks a work folder that they share. They exchange nothing but the
news that they are done, and their blocks are, bit for bit, what one rank alone would have made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import HierMemError, MissingDependencyError, OutputError
from mlx_hiermem.files import write_text
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.blocks import GO_ON, Tensors, TrainedBlocks, new_block
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.job import JobTrainer
from mlx_hiermem.learn.train.monitor import (
    HeldOut,
    Listener,
    ProgressMeter,
    merge_logs,
    perplexities,
    plot,
    read_log,
)
from mlx_hiermem.learn.train.schedule import Job, Schedule, jobs_of_rank, list_jobs
from mlx_hiermem.learn.train.step import MemoryLoss

LOG, PLOT = "log.jsonl", "loss.png"


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

    def run(self, listener: Listener = lambda progress: None) -> dict[str, float]:
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
            return new_block(self.config, node, self.settings.seed)
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
