"""Which memory an example is tested with.

none       the anchor alone
generic    the control block: more parameters, but not the right ones
fetched    the path that the example's own text is routed to
source     retrieval: the best passage of that path's leaf before the prompt, and no block; fetched+source is both
oracle     the leaf that learnt the example's document: what fetched would be if routing never failed
blocked    fetched while the branch of level 1 that the text would enter is closed (arXiv:2510.02375, Fig. 6b)
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError, TaskError
from mlx_hiermem.evaluate.examples import Example
from mlx_hiermem.evaluate.results import MEMORIES
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.selection import Selection
from mlx_hiermem.tree import Route


@dataclass(frozen=True)
class Placed:
    """Where an example goes. `agrees`: its fetched leaf learnt its document; None where that is not known."""

    chosen: Selection
    key: str  # of the bytes that are attached: equal keys mean equal memories, in whichever bank
    agrees: bool | None = None


def place(model: MemoryModel, examples: Sequence[Example], memory: str) -> list[Placed]:
    """The memory of each example. Raises BankError, or TaskError where oracle has no document to go by."""
    if memory not in MEMORIES:
        raise HierMemError(f"unknown memory '{memory}'", f"Use {', '.join(MEMORIES)}.")
    bank = model.bank
    if memory == "none" or bank is None:
        return [Placed(model.choose(memory, ""), "none")] * len(examples)
    if memory == "generic":
        if bank.manifest.generic is None:
            raise BankError("the bank has no generic block", "Leave memory generic out.")
        return [Placed(model.choose(memory, ""), bank.manifest.generic.sha256[:12])] * len(examples)
    texts = [example.route for example in examples]
    vectors = model.router.embedder.embed(texts)
    paths = _route(model, texts, vectors)
    learnt = leaves_by_source(bank)
    if memory == "blocked":
        paths = _around(model, texts, vectors, paths)
    if memory == "oracle":
        paths = _oracle(bank, examples, vectors, paths, learnt)
    placed = [
        Placed(_chosen(path), _key(bank, path), _agrees(example, path, learnt))
        for example, path in zip(examples, paths, strict=True)
    ]
    return _with_passages(model, placed, vectors, memory) if memory.endswith("source") else placed


def _with_passages(model: MemoryModel, placed: Sequence[Placed], vectors: np.ndarray, memory: str) -> list[Placed]:
    """The same with a passage for each; for `source` without the blocks. Raises BankError without sources."""
    model.bank_for(MemoryChoice.SOURCE)
    assert model.search is not None
    found = []
    for one, vector in zip(placed, vectors, strict=True):
        chosen, key = replace(one.chosen, passage=model.search.nearest(one.chosen.path, vector)), one.key
        if memory == MemoryChoice.SOURCE:
            chosen, key = replace(chosen, memory=MemoryChoice.NONE), "none"
        if chosen.passage:
            key += "+" + hashlib.sha256(chosen.passage.text.encode()).hexdigest()[:12]
        found.append(replace(one, chosen=chosen, key=key))
    return found


def check(model: MemoryModel, examples: Sequence[Example], memory: str) -> None:
    """Raises as `place` does, but embeds no more than one text."""
    in_order = sorted(examples, key=lambda example: example.line)
    place(model, in_order[:1], memory)
    if memory == "oracle" and model.bank is not None:
        learnt = leaves_by_source(model.bank)
        for example in in_order:
            _leaves(example, learnt)


def leaves_by_source(bank: MemoryBank) -> dict[str, set[Path]]:
    """Document -> the leaves whose row of the manifest names it among its sources."""
    found = defaultdict[str, set[Path]](set)
    inner = {Path(path[:-1]) for path in bank.manifest.blocks}
    for path, entry in bank.manifest.blocks.items():
        if path not in inner:
            for source in entry.sources:
                found[source].add(path)
    return dict(found)


def _chosen(path: Path) -> Selection:
    return Selection(MemoryChoice(path), Route(path)) if path else Selection()


def _route(
    model: MemoryModel, texts: Sequence[str], vectors: np.ndarray, closed: frozenset[Path] = frozenset()
) -> list[Path]:
    return [route.path for route in model.router.route_vectors(texts, vectors, closed)]


def _around(model: MemoryModel, texts: Sequence[str], vectors: np.ndarray, paths: Sequence[Path]) -> list[Path]:
    """The paths when each one's branch of level 1 is closed to it."""
    found = list(paths)
    for top in sorted({path[:1] for path in paths if path}):
        rows = [row for row, path in enumerate(paths) if path[:1] == top]
        routed = _route(model, [texts[row] for row in rows], vectors[rows], frozenset([Path(top)]))
        for row, path in zip(rows, routed, strict=True):
            found[row] = path
    return found


def _oracle(
    bank: MemoryBank,
    examples: Sequence[Example],
    vectors: np.ndarray,
    paths: Sequence[Path],
    learnt: dict[str, set[Path]],
) -> list[Path]:
    """Where the document is in several leaves: the routed one if it is among them, else the nearest."""
    found = []
    for example, vector, path in zip(examples, vectors, paths, strict=True):
        leaves = _leaves(example, learnt)
        near = [(float(bank.tree.distances(vector, Path(leaf[:-1]))[leaf[-1]]), leaf) for leaf in leaves]
        found.append(path if path in leaves else min(near)[1])
    return found


def _leaves(example: Example, learnt: dict[str, set[Path]]) -> set[Path]:
    """The leaves that learnt an example's document."""
    leaves = learnt.get(example.tags.get("doc", ""))
    if not leaves:
        such = f", such as {min(learnt)}" if learnt else ""
        raise TaskError(
            f"line {example.line} has no document that the bank names among its sources",
            f"Memory oracle needs questions whose field doc is a source in the bank's manifest{such}.",
        )
    return leaves


def _agrees(example: Example, path: Path, learnt: dict[str, set[Path]]) -> bool | None:
    leaves = learnt.get(example.tags.get("doc", ""))
    return path in leaves if leaves else None


def _key(bank: MemoryBank, path: Path) -> str:
    """Of the path's blocks, by their digests."""
    digests = "".join(bank.manifest.blocks[node].sha256 for node in bank.nodes_on(path))
    return hashlib.sha256(digests.encode()).hexdigest()[:12] if digests else "none"


def by_memory(placed: Mapping[int, Placed]) -> dict[MemoryChoice, list[int]]:
    """Examples grouped by what is attached for them, so that each memory is fetched once."""
    groups = defaultdict[MemoryChoice, list[int]](list)
    for number, one in placed.items():
        groups[one.chosen.memory].append(number)
    return dict(groups)


def attach(model: MemoryModel, placed: Placed) -> None:
    """Attaches an example's memory to the model."""
    model.select(placed.chosen.memory, "")
