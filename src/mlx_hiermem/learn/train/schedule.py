"""In which order everything is learnt: jobs, epochs, steps. The same for the same seed, whoever asks.

The anchor is frozen, so the subtrees of level 1 share nothing: each is a job of its own (the 16 asynchronous jobs
of arXiv:2510.02375, §3), and so is the generic block. A rank takes whole jobs; what a job learns does not depend on
who runs it or when.

Within a job a coarse block is shared by many leaves. Each epoch goes through the subtree's leaves in a random
depth-first order, cut into resident sets: runs of leaves whose blocks fit in memory together. Within one the groups
of all its leaves are shuffled, and a step takes several. So a coarse block's step sums gradients from several
leaves, and a fine block is read from disk and written back once an epoch, however large the bank.

A text whose loss was low when it was last learnt rests for an epoch; if it is known then too, for two, and so on:
spaced repetition, as with flash cards. The last epoch goes through everything once more.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train.batches import group_by_length
from mlx_hiermem.learn.train.dataset import TrainingSet

FEW = 1 << 15  # ways to divide jobs among ranks that are all tried
KNOWN = 0.1  # nats a token: a text of less is known; greedy decoding then says it as it was learnt
ROW = np.dtype([("epoch", "<i4"), ("place", "<i8"), ("loss", "<f4"), ("said", "?")])


@dataclass(frozen=True)
class Group:
    """Examples that have one memory in common for one step."""

    leaf: Path
    examples: np.ndarray  # int64 [n]: numbers


@dataclass(frozen=True)
class Job:
    """Leaves that are trained together, one of them perhaps GENERIC_NODE."""

    name: str
    leaves: tuple[Path, ...]

    @property
    def key(self) -> int:
        """What sets a job's random numbers apart from another's."""
        return int(self.name) if self.name.isdigit() else 1 << 20


def nodes_with_block(config: MemoryConfig, leaf: Path) -> list[Path]:
    """The nodes on a path that have a block, level 1 first; of GENERIC_NODE, itself."""
    if leaf == GENERIC_NODE:
        return [GENERIC_NODE]
    return [node for node in leaf.prefixes() if config.block_sizes[len(node) - 1]]


def list_jobs(examples: TrainingSet, config: MemoryConfig, settings: TrainingSettings) -> list[Job]:
    """All jobs: those of level 1 in order, then the generic block's. A leaf on whose path is no block is out."""
    leaves = [leaf for leaf in examples.leaves if nodes_with_block(config, leaf)]
    generic = (GENERIC_NODE,) if settings.generic and leaves else ()
    tops = sorted({leaf[0] for leaf in leaves})
    found = [Job(str(top), tuple(leaf for leaf in leaves if leaf[0] == top)) for top in tops]
    return [*found, Job("generic", generic)] if generic else found


def jobs_of_rank(all_jobs: Sequence[Job], cost: Callable[[Job], float], rank: int, ranks: int) -> list[Job]:
    """The jobs of one rank, in their order, so that the busiest rank has as little to do as possible.

    Where there are few ways to divide them all are tried; else the largest job goes first, each to the rank that
    has least to do. `cost` is in any unit.
    """
    costs = [cost(job) for job in all_jobs]

    def loads(owners: Sequence[int]) -> list[float]:
        return sorted(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(ranks))

    if ranks ** len(all_jobs) <= FEW:
        owners = min(itertools.product(range(ranks), repeat=len(all_jobs)), key=lambda owners: loads(owners)[::-1])
        return [job for job, owner in zip(all_jobs, owners, strict=True) if owner == rank]
    load, mine = [0.0] * ranks, set()
    for size, job in sorted(zip(costs, all_jobs, strict=True), key=lambda pair: (-pair[0], pair[1].name)):
        owner = load.index(min(load))
        load[owner] += size
        if owner == rank:
            mine.add(job)
    return [job for job in all_jobs if job in mine]


class Schedule:
    """One job's steps, epoch by epoch."""

    def __init__(
        self,
        job: Job,
        examples: TrainingSet,
        config: MemoryConfig,
        settings: TrainingSettings,
        nbytes: Callable[[Path], int],
    ) -> None:
        """`nbytes`: what a node's block takes in memory while it is trained."""
        self.job, self.examples, self.config, self.settings = job, examples, config, settings
        self._nbytes, self._lengths = nbytes, examples.lengths

    def steps(self, epoch: int, due: np.ndarray | None = None) -> list[list[Group]]:
        """The steps of one epoch, through the texts that are `due` (bool [assigned]; None: all).

        The generic block's do not rest: it meets other texts in each epoch.
        """
        rng = np.random.default_rng((self.settings.seed, self.job.key, epoch))
        sets = list(self._resident_sets(rng))
        generic = list(self._groups(GENERIC_NODE, rng, epoch)) if GENERIC_NODE in self.job.leaves else []
        found: list[list[Group]] = []
        for number, leaves in enumerate(sets):
            groups = [group for leaf in leaves for group in self._groups(leaf, rng, epoch, due)]
            groups += generic[number :: len(sets)]
            order = rng.permutation(len(groups))
            size = self.settings.groups
            found += [[groups[i] for i in order[s : s + size]] for s in range(0, len(groups), size)]
        return found

    @property
    def tokens(self) -> int:
        """Tokens of one epoch in which no text rests, about."""
        total = sum(map(self._tokens_of, self.job.leaves))
        if GENERIC_NODE in self.job.leaves:
            total += sum(map(self._tokens_of, self.examples.leaves)) // self.config.branching
        return total

    def _tokens_of(self, leaf: Path) -> int:
        ids = self.examples.ids(leaf)
        return round(float((self._lengths[ids] * self.examples.often[ids]).sum()))

    def numbers(self, leaf: Path, rng: np.random.Generator) -> np.ndarray:
        """[n] the examples of a leaf in an epoch; the generic block's are one of every k that the leaves have."""
        if leaf != GENERIC_NODE:
            return self.examples.ids(leaf)
        k, assigned = self.config.branching, self.examples.assigned
        strata = np.arange(0, max(1, len(assigned) - k + 1), k)  # [n]: of each k in a row one is drawn
        return assigned[strata + rng.integers(min(k, len(assigned)), size=len(strata))]

    def _groups(
        self, leaf: Path, rng: np.random.Generator, epoch: int, due: np.ndarray | None = None
    ) -> Iterator[Group]:
        numbers = self.numbers(leaf, rng)
        numbers = numbers[self.examples.turns(epoch)[numbers]]
        if due is not None:
            numbers = numbers[due[self.examples.places(leaf, numbers)]]
        lengths, beginnings = self._lengths[numbers], self.examples.beginnings[numbers]
        for part in group_by_length(numbers, lengths, self.settings.group_tokens, rng, beginnings):
            yield Group(leaf, part)

    def _resident_sets(self, rng: np.random.Generator) -> Iterator[list[Path]]:
        """Runs of leaves, neighbours in the tree, whose blocks fit in memory together."""
        leaves: list[Path] = []
        nodes: set[Path] = set()
        size = first = self._nbytes(GENERIC_NODE) if GENERIC_NODE in self.job.leaves else 0
        for leaf in _shuffled([leaf for leaf in self.job.leaves if leaf != GENERIC_NODE], rng):
            more = [node for node in nodes_with_block(self.config, leaf) if node not in nodes]
            if leaves and size + sum(map(self._nbytes, more)) > self.settings.blocks_bytes:
                yield leaves
                leaves, nodes, size, more = [], set(), first, nodes_with_block(self.config, leaf)
            leaves.append(leaf)
            nodes.update(more)
            size += sum(map(self._nbytes, more))
        yield leaves


def _shuffled(leaves: Sequence[Path], rng: np.random.Generator) -> Iterator[Path]:
    """A random depth-first order: siblings are shuffled at every node and their leaves stay together."""

    def visit(inside: list[Path], depth: int) -> Iterator[Path]:
        ends = [leaf for leaf in inside if len(leaf) == depth]
        yield from ends
        children = sorted({leaf[depth] for leaf in inside if len(leaf) > depth})
        for i in rng.permutation(len(children)):
            yield from visit(
                [leaf for leaf in inside if len(leaf) > depth and leaf[depth] == children[i]], depth + 1
            )

    yield from visit(list(leaves), 0)


# What is known already, so that an epoch goes through the rest


class Known:
    """What was seen of a job's texts, each by its place in `TrainingSet.assigned`: two leaves may learn it.

    The file's rows only grow in number; its size goes into a commit, and what a killed run wrote after it is cut.
    """

    def __init__(self, file: pathlib.Path, size: int, examples: TrainingSet) -> None:
        """Goes on with the first `size` bytes of the file."""
        self.file, self.size, self.examples = file, size, examples
        with file.open("ab") as out:
            out.truncate(size)
        self._new: list[np.ndarray] = []

    def add(self, epoch: int, places: np.ndarray, losses: np.ndarray, said: np.ndarray) -> None:
        """Texts at `places` [n] were learnt, at these losses a token [n]; `said` [n]: every token was likeliest."""
        rows = np.empty(len(places), ROW)
        rows["epoch"], rows["place"], rows["loss"], rows["said"] = epoch, places, losses, said
        self._new.append(rows)

    def flush(self) -> None:
        """Writes what was added; `size` is then the file's."""
        data = b"".join(rows.tobytes() for rows in self._new)
        with self.file.open("ab") as out:
            out.write(data)
        self.size += len(data)
        self._new.clear()

    def due(self, epoch: int) -> np.ndarray:
        """bool [assigned]: which texts an epoch goes through, by what was seen in those before it."""
        streak = np.zeros(len(self.examples.assigned), np.int64)  # how often in a row a text was known
        following = np.zeros_like(streak)  # the epoch in which it is due again
        for before, rows in self._epochs(epoch):
            known = rows["loss"] <= KNOWN
            streak[rows["place"]] = np.where(known, streak[rows["place"]] + 1, 0)
            following[rows["place"]] = before + 1 + streak[rows["place"]]
        return following <= epoch

    def fractions(self) -> tuple[float, float]:
        """(texts that are known, texts of which every token was likeliest), as parts of all that were learnt."""
        last = dict[int, tuple[bool, bool]]()
        for _, rows in self._epochs(1 << 30):
            last |= {int(r["place"]): (bool(r["loss"] <= KNOWN), bool(r["said"])) for r in rows}
        known, said = np.array(list(last.values()) or [(False, False)]).mean(0)
        return float(known), float(said)

    def _epochs(self, end: int) -> list[tuple[int, np.ndarray]]:
        """The rows of each epoch before `end`, in order."""
        self.flush()
        rows = np.fromfile(self.file, ROW)
        return [(int(e), rows[rows["epoch"] == e]) for e in np.unique(rows["epoch"]) if e < end]
