"""Some blocks of a bank learn again: with texts that are new, without texts that go, and all others stay.

What learns is the finest block on the path of each leaf; the blocks above serve other leaves too, and stand still,
unless they are to forget as well. A block that learns something new forgets the old, so it learns the texts of its
leaves once more: `learn` keeps them as tokens in the model's `learning/examples`. A block that is to forget begins
afresh, as one that has never learnt, and learns what is left. All is one edit of the bank (`bank.commit`).

`add` learns new documents in this way, and `sync` a folder's changes.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.commit import Edit, editing
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry, in_order
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import REMOTE, Origin
from mlx_hiermem.bank.sources import INDEX_FILE, write_sources
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest, new_folder, replace_folder
from mlx_hiermem.learn import publish, stages
from mlx_hiermem.learn.publish import ANCHOR, BANK, MovedTexts, kept_texts
from mlx_hiermem.learn.record import (
    RECORD,
    LearntFile,
    files_learnt,
    files_read,
    more_sources,
    passage_reach,
    read_record,
    without,
    write_record,
)
from mlx_hiermem.learn.settings import AddSettings
from mlx_hiermem.learn.stages import Listener
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.schedule import nodes_with_block
from mlx_hiermem.learn.train.start import new_block
from mlx_hiermem.learn.tree.build import CorpusTree
from mlx_hiermem.learn.tree.labels import SOURCES
from mlx_hiermem.learn.work import FILES, GO_ON, TRAINING, Work, write_text
from mlx_hiermem.learn.written import join_written, number_written
from mlx_hiermem.tree import ClusterTree

BEFORE, AFTER, JOINED, ALL, ROWS = "before", "after", "joined", "all", "rows.json"
NEW_RECORD = f"new-{FILES}"


@dataclass(frozen=True)
class NewTexts:
    """Documents that have gone through the stages up to `examples`, whose digest this is."""

    built: CorpusTree
    digest: str
    texts: TrainingSet
    nodes: publish.Nodes
    leaf: Path | None = None  # the one among theirs that the bank does not have yet
    moves: MovedTexts | None = None  # old texts that it gets


@dataclass(frozen=True)
class Gone:
    """Files that are to be forgotten."""

    files: tuple[LearntFile, ...] = ()
    above: bool = False  # by the blocks above their leaves too

    @cached_property
    def windows(self) -> frozenset[int]:
        return frozenset(number for file in self.files for number in file.windows)

    @cached_property
    def texts(self) -> frozenset[str]:
        return frozenset(text for file in self.files for text in file.texts)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(file.name for file in self.files)

    def has(self, source: str) -> bool:
        """Whether a source is one of these files, or a line of one."""
        return source in self._names or source.rpartition(":")[0] in self._names

    def counted_below(self, node: Path) -> tuple[int, int]:
        """(documents, tokens) of these files that a node's row counts."""
        below = [
            counts
            for file in self.files
            for leaf, counts in file.homes.items()
            if node in Path.parse(leaf).prefixes()
        ]
        return sum(documents for documents, _ in below), sum(tokens for _, tokens in below)


NOTHING_GONE = Gone()


@dataclass(frozen=True)
class Lesson:
    """What is learnt again: the blocks, those of them that begin afresh, and the texts, old and new."""

    blocks: frozenset[Path]
    afresh: frozenset[Path]
    texts: TrainingSet
    new: int  # texts
    forgotten: int

    @property
    def rehearsed(self) -> int:
        return len(self.texts) - self.new


class Relearning(stages.StagedRun):
    """One command's work. What it computes is of the bank as it was `before`, however often it is interrupted."""

    def __init__(self, work: Work, model: pathlib.Path, settings: AddSettings, listener: Listener) -> None:
        super().__init__(work, listener)
        self.model, self.root, self.settings = model, model / BANK, settings
        self.before = before = work.path(BEFORE)
        if before.is_dir() and not self._is_ours():
            shutil.rmtree(before)  # of a command that was given up: the bank is another by now
        if not before.is_dir():
            shutil.rmtree(work.path(TRAINING), ignore_errors=True)  # of another command: that is not to go on
            work.path(AFTER).unlink(missing_ok=True)
            with new_folder(before, GO_ON) as beside:
                for name in (MANIFEST, TREE):
                    shutil.copyfile(self.root / name, beside / name)
        self.bank = MemoryBank(self.root, BankManifest.read(before / MANIFEST))
        self.tree, self.digest = ClusterTree.load(before / TREE), file_digest(before / MANIFEST)

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any, dict[str, Any]]:
        """The anchor's model, tokenizer and configuration."""
        return load_anchor(self.model / ANCHOR)

    @cached_property
    def kept(self) -> TrainingSet | None:
        """What the bank has learnt so far, where that was kept."""
        folder = kept_texts(self.model)
        return TrainingSet.open(folder) if folder.is_dir() else None

    def count(self, text: str) -> int:
        """The anchor's tokens in a text."""
        return len(self.loaded[1].encode(text))

    # Which texts

    def join(self, new: NewTexts | None, gone: Gone = NOTHING_GONE) -> Lesson:
        """Stage `joined`: the new texts with the old ones of the blocks that learn them, without what is gone."""
        afresh = self._blocks_of(gone)
        blocks = afresh | {self._target(leaf) for leaf in (new.texts.leaves if new else ())}
        made_of = [[file.file, file.sha256] for file in gone.files]
        after = [new.digest] if new else []
        self.work.stage("joined", [self.digest, made_of, gone.above], after, lambda: self._join(new, gone, blocks))
        count = len(new.texts) if new else 0
        forgotten = int(np.isin(self.kept.windows, list(gone.windows)).sum()) if self.kept else 0
        return Lesson(blocks, afresh, TrainingSet.open(self.work.path(JOINED)), count, forgotten)

    def _target(self, leaf: Path) -> Path:
        """The node whose block learns what is learnt in a leaf: the finest on its path."""
        found = nodes_with_block(self.bank.config, leaf)
        if not found:
            raise BankError(f"no block is on the path {leaf}", "This bank has no memory for these documents.")
        return found[-1]

    def _blocks_of(self, gone: Gone) -> frozenset[Path]:
        """The blocks that have learnt what is gone, as far as they are to forget it."""
        if self.kept is None or not gone.windows:
            return frozenset()
        leaves = {
            leaf
            for window, own in zip(self.kept.windows.tolist(), self.kept.leaves_of(), strict=True)
            if window in gone.windows
            for leaf in own
            if self.tree.has(leaf)
        }
        if not gone.above:
            return frozenset(map(self._target, leaves))
        tops = {leaf[0] for leaf in leaves}
        return frozenset(node for node in self.bank.manifest.blocks if node[0] in tops)

    def _join(self, new: NewTexts | None, gone: Gone, blocks: frozenset[Path]) -> None:
        """The texts of this lesson, all texts for the next time, and the record of files for the next time."""
        record = read_record(self.model)
        windows = 1 + max((window for row in record.values() for window in row.windows), default=-1)
        with (
            TrainingSetWriter(self.work.path(JOINED)) as joined,
            TrainingSetWriter(self.work.path(ALL)) as everything,
        ):
            if (old := self.kept) is not None:
                windows = max(windows, int(old.windows.max(initial=-1)) + 1)
                moved = new.moves.windows(old) if new and new.moves else set()
                for number, leaves in publish.still_there(old, self.tree):
                    example = old.read(number)
                    if example.window in gone.windows:
                        continue
                    if new and new.leaf and example.window in moved:
                        leaves.append(new.leaf)
                    everything.add(example, leaves)
                    if here := [leaf for leaf in leaves if self._target(leaf) in blocks]:
                        joined.add(example, here)
            if new:
                for number, leaves in enumerate(new.texts.leaves_of()):
                    example = new.texts.read(number)
                    joined.add(example, leaves)
                    everything.add(replace(example, window=windows + example.window), leaves)
        if new:
            number_written(self.work, windows)
        self._join_record(record, new, gone, windows)

    def _join_record(self, record: dict[str, LearntFile], new: NewTexts | None, gone: Gone, windows: int) -> None:
        left = without(record, gone.files)
        rows = files_learnt(new.built, self.count, windows) if new else files_read(self.work).values()
        for row in rows:
            left[row.file] = left[row.file].and_again(row) if row.file in left else row
        write_record(self.work.path(NEW_RECORD), left.values())

    # Training

    def train(self, lesson: Lesson) -> dict[Path, Tensors]:
        """Stage `training`; the weights of the blocks that have learnt. One that has no text left has no effect."""
        settings = replace(self.settings.training, generic=False)
        empty = {node: new_block(self.bank.config, node, settings.seed) for node in lesson.afresh}
        if not len(lesson.texts):
            return empty
        model, _, config = self.loaded
        with self.stage("training"), self.work.writing():
            trainer = Trainer(
                self.work.path(TRAINING),
                model,
                replace(self.bank.config, quantization=()),
                lesson.texts,
                settings,
                lesson.texts,
                identity=f"{identify(self.model / ANCHOR).weights_digest} {self.digest}",
                vocabulary=config.get("effective_vocab_size"),
                start=lambda node: None if node in lesson.afresh else self._start(node),
                learns=lesson.blocks.__contains__,
            )
            perplexity = trainer.run(self.listener.training)
            self.listener.end(stages.perplexity_line(perplexity, "these texts"))
        return empty | dict(trainer.blocks())

    def _start(self, node: Path) -> Tensors | None:
        """A block's weights as the bank has them; None for a new leaf's."""
        if node not in self.bank.manifest.blocks:
            return None
        block = self.bank.read(node)
        return {name: block.values(name).astype(mx.float32) for name in self.bank.config.widths}

    # The bank

    def write(self, weights: dict[Path, Tensors], new: NewTexts | None, gone: Gone = NOTHING_GONE) -> None:
        """Stage `bank`: its edit, and texts and record for the next time."""
        with self.stage("bank"):
            after = [new.digest] if new else []
            digest = [self.digest, sorted(map(str, weights)), [file.file for file in gone.files]]
            self.work.stage("rows", digest, after, lambda: self._note_rows(weights, new, gone))
            with editing(self.root) as edit:
                self._edit(edit, weights, new, gone)
            self.finish()
            self.listener.end(f"{len(weights)} blocks have learnt, the others are what they were")

    def _note_rows(self, nodes: Iterable[Path], new: NewTexts | None, gone: Gone) -> None:
        """The new rows of the block table, but for their files."""
        rows = []
        for node in sorted(nodes):
            row = publish.entry(node, FileEntry(0, ""), new.nodes if new else {})
            if old := self.bank.manifest.blocks.get(node):
                left = [source for source in old.sources if not gone.has(source)]
                documents, tokens = gone.counted_below(node)
                row = replace(
                    old,
                    documents=max(0, old.documents - documents) + row.documents,
                    tokens=max(0, old.tokens - tokens) + row.tokens,
                    sources=tuple(dict.fromkeys((*left, *row.sources)))[:SOURCES],
                )
            rows.append(row.to_json())
        write_text(self.work.path(ROWS), json.dumps(rows))

    def _edit(self, edit: Edit, weights: dict[Path, Tensors], new: NewTexts | None, gone: Gone) -> None:
        """Stages the bank as it is afterwards."""
        rows = map(BlockEntry.from_json, json.loads(self.work.path(ROWS).read_text(encoding="utf-8")))
        blocks = dict(self.bank.manifest.blocks)
        for row in rows:
            file = publish.write_as_stored(
                edit.file(block_name(row.path)), row.path, weights[row.path], self.bank.config
            )
            blocks[row.path] = replace(row, bytes=file.bytes, sha256=file.sha256)
        labels = {node: label for node, label in self.bank.manifest.labels.items() if node not in blocks}
        manifest = replace(self.bank.manifest, blocks=in_order(blocks), labels=labels)
        if new and new.leaf:
            new.built.tree.save(edit.file(TREE))
            size, digest = edit.file(TREE).stat().st_size, file_digest(edit.file(TREE))
            manifest = replace(manifest, tree=FileEntry(size, digest))
        if old := self.bank.sources:
            found = more_sources(old, new.built if new else None, new.leaf if new else None, gone.texts)
            entry = write_sources(edit.file(INDEX_FILE).parent.parent, found, self.tree.branching, self.tree.dim)
            manifest = replace(manifest, sources=entry)
        manifest.write(edit.file(MANIFEST))
        write_text(self.work.path(AFTER), file_digest(edit.file(MANIFEST)))
        if not self._is_ours():
            raise BankError(
                f"the bank {self.root} has changed since these documents were begun with",
                "Repeat the command: it begins anew.",
            )
        policy = wider = BankPolicy.read(self.root / POLICY)
        if new:
            wider = replace(policy, reach=max(policy.reach, new.built.agreement["reach"]))
            if self.bank.sources:
                wider = replace(wider, passage_reach=max(policy.passage_reach, passage_reach(new.built)))
        if wider != policy:
            wider.write(edit.file(POLICY))
        if origin := Origin.read(self.root):  # the hub does not have these blocks
            replace(origin, subtrees=origin.subtrees | weights.keys()).write(edit.file(REMOTE).parent)

    def finish(self) -> None:
        """The texts and the record of files for the next time, where the bank keeps texts."""
        kept = kept_texts(self.model)
        if not kept.is_dir():
            return
        with self.work.writing():
            if self.work.path(ALL).is_dir():
                replace_folder(self.work.path(ALL), kept)
            join_written(self.model, self.work)
            if self.work.path(NEW_RECORD).exists():
                write_text(self.model / RECORD, self.work.path(NEW_RECORD).read_text(encoding="utf-8"))

    def _is_ours(self) -> bool:
        """Whether the bank is what it was before, or what it is to become."""
        after, now = self.work.path(AFTER), file_digest(self.root / MANIFEST)
        return now == file_digest(self.before / MANIFEST) or (after.exists() and now == after.read_text())
