"""How training goes: figures for a progress bar, a line now and then in a log that survives a kill, a plot."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import MissingDependencyError
from mlx_hiermem.files import write_json_lines
from mlx_hiermem.learn.train.batches import collate, group_by_length
from mlx_hiermem.learn.train.blocks import TrainedBlocks
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet
from mlx_hiermem.learn.train.schedule import Job, nodes_with_block
from mlx_hiermem.learn.train.step import Inputs, MemoryLoss

HELDOUT_TEXTS = 256  # of all held-out texts, at most; the same ones for every memory
GROUP_TOKENS = 1024
Sums = dict[str, tuple[float, int]]  # name of a memory -> summed loss, tokens


@dataclass(frozen=True)
class TrainingProgress:
    """Where a rank's training is. `doing` is `hidden states` (of one job), `learning`, `measured` or `known`."""

    doing: str
    job: str
    tokens: int  # learnt in all this rank's jobs, those of earlier runs included
    total: int
    tokens_per_second: float  # since this run started
    loss: float | None = None  # mean of the latest steps
    losses: dict[str, float] | None = None  # of the job's held-out texts, by memory, where they were measured
    known: tuple[float, float] | None = None  # parts of the job's texts: known, and said right by greedy decoding

    @property
    def seconds_left(self) -> float | None:
        """None while the speed is not known."""
        return (self.total - self.tokens) / self.tokens_per_second if self.tokens_per_second else None


TrainingListener = Callable[[TrainingProgress], None]


class ProgressMeter:
    """Adds up what a rank's jobs report, and tells it as `TrainingProgress`."""

    def __init__(self, listener: TrainingListener, total: int) -> None:
        """`total`: tokens of all the rank's jobs, over all epochs."""
        self._listener, self._total, self._tokens, self._job, self._loss = listener, total, 0, "", 0.0
        self._learnt, self._seconds, self._last = 0, 0.0, time.perf_counter()
        self._rested = dict[str, int]()

    def begin(self, job: str, tokens: int) -> None:
        """A job starts, which has these tokens behind it."""
        self._job, self._loss, self._last = job, 0.0, time.perf_counter()
        self._tokens += tokens

    def rested(self, tokens: int) -> None:
        """So many tokens of the present job were known, and not learnt again: they count as no work."""
        self._total += self._rested.get(self._job, 0) - tokens
        self._rested[self._job] = tokens

    def measured(self, losses: dict[str, float]) -> None:
        """Mean losses on held-out texts, by memory."""
        self._last = time.perf_counter()
        self._listener(TrainingProgress("measured", self._job, self._tokens, self._total, 0.0, losses=losses))

    def known(self, known: float, said: float) -> None:
        """Of the job's texts these parts are known, and said right."""
        self._last = time.perf_counter()
        now = TrainingProgress("known", self._job, self._tokens, self._total, 0.0, known=(known, said))
        self._listener(now)

    def states(self, done: int, total: int) -> None:
        """Of the job's tokens `done` have their hidden states."""
        self._last = time.perf_counter()
        self._listener(TrainingProgress("hidden states", self._job, done, total, 0.0))

    def learnt(self, tokens: int, loss: float) -> None:
        """A step has learnt these tokens, at this mean loss."""
        now = time.perf_counter()
        self._learnt, self._seconds, self._last = self._learnt + tokens, self._seconds + now - self._last, now
        self._tokens += tokens
        self._loss = 0.9 * self._loss + 0.1 * loss if self._loss else loss
        speed = self._learnt / self._seconds
        self._listener(TrainingProgress("learning", self._job, self._tokens, self._total, speed, self._loss))


class Log:
    """One JSON object a line. `size` goes into a commit, and what a killed run wrote after it is cut off."""

    def __init__(self, file: pathlib.Path, size: int) -> None:
        self.file, self.size = file, size
        with file.open("ab") as out:
            out.truncate(size)

    def add(self, row: dict[str, Any]) -> None:
        line = (json.dumps(row) + "\n").encode()
        with self.file.open("ab") as out:
            out.write(line)
        self.size += len(line)


def read_log(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; none where there is no file."""
    if file.is_file():
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def merge_logs(files: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """One log of several, in the order given. Raises OutputError where it cannot be written."""
    write_json_lines(out, (row for file in files for row in read_log(file)))


def plot(log: pathlib.Path, image: pathlib.Path) -> None:
    """Loss over tokens as PNG: a line a job, and a point for each measurement on held-out texts.

    Raises MissingDependencyError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib", "pip install 'mlx-hiermem[plots]'") from error
    rows = list(read_log(log))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, job in enumerate(dict.fromkeys(row["job"] for row in rows)):
        steps = [row for row in rows if row["job"] == job and "loss" in row]
        held = [row for row in rows if row["job"] == job and "heldout" in row]
        colour = f"C{number % 10}"
        axes.plot([row["tokens"] for row in steps], [row["loss"] for row in steps], colour, lw=0.8, label=f"{job}")
        for name in ("none", "generic", "fetched"):
            points = [(row["tokens"], *row["heldout"][name]) for row in held if name in row["heldout"]]
            style = {"none": "x", "generic": "s", "fetched": "o"}[name]
            axes.plot([t for t, _, _ in points], [nll / n for _, nll, n in points], style, color=colour, ms=4)
    axes.set(
        xlabel="tokens of the job", ylabel="loss (nats a token); x none, ■ generic, ● fetched on held-out texts"
    )
    axes.legend(title="subtree", fontsize="small", ncols=2)
    figure.savefig(image, dpi=120, format="png")


# Held-out texts


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
        chosen = rng.random(len(self.texts)) < HELDOUT_TEXTS / max(1, len(self.texts))  # bool [N]
        for leaf in self.texts.leaves:
            numbers = self.texts.ids(leaf)
            numbers = numbers[chosen[numbers]]
            if len(numbers) and (everything or leaf[:1] in own):
                yield leaf, numbers


def _inputs(loss: MemoryLoss, texts: Sequence[TrainingExample]) -> Inputs:
    """Texts as a batch, with the states that enter the first memory layer."""
    batch, layer = collate(texts, share=False), loss.first_layer
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
