"""New documents for a bank that is there: only the blocks of the leaves that they reach learn, all others stay.

    added = add(model_folder, ["./new"], AddSettings(), listener)

The documents go through the stages of `run`, in the bank's own tree, or with a leaf of their own. What learns is
the finest block on the path of each leaf; the blocks above serve other leaves too, and stand still. A block that
learns something new forgets the old, so it learns the texts of its leaves once more: `learn` keeps them as tokens
in the model's `learning/examples`. All is one edit of the bank in the end (`bank.commit`).
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.commit import editing
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.bank.remote import REMOTE, Origin
from mlx_hiermem.bank.sources import INDEX_FILE, write_sources
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.files import file_digest, new_folder, replace_folder
from mlx_hiermem.learn import publish, stages
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.publish import ANCHOR, BANK, MovedTexts, kept_texts
from mlx_hiermem.learn.settings import AddSettings, ExampleSettings
from mlx_hiermem.learn.sources import more_sources, passage_reach
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.encoding import EXAMPLES, make_examples
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.schedule import nodes_with_block
from mlx_hiermem.learn.tree.build import CorpusTree, added_node, place_in_tree, with_new_leaf
from mlx_hiermem.learn.tree.labels import SOURCES, describe_nodes
from mlx_hiermem.learn.work import GO_ON, TRAINING, Work, locked_work, work_folder, write_text
from mlx_hiermem.tree import ClusterTree

BEFORE, AFTER, JOINED, ALL, ROWS = "before", "after", "joined", "all", "rows.json"


@dataclass(frozen=True)
class Added:
    """What was learnt where. `rehearsed` are old texts that were learnt once more."""

    documents: int
    windows: int
    skipped: int
    blocks: tuple[str, ...]
    new_leaf: str
    texts: int
    rehearsed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEFAULT, SILENT = AddSettings(), stages.Silent()


def add(
    model: pathlib.Path, sources: Sequence[str], settings: AddSettings = DEFAULT, listener: stages.Listener = SILENT
) -> Added:
    """Learns documents into a model folder's bank. Interrupted, the same call goes on.

    Raises BankError where the model has no bank or no anchor, or its tree no room for a leaf that was asked for;
    CorpusError and OutputError as `run.learn`.
    """
    if not (model / ANCHOR).is_dir():
        raise BankError(f"{model} has no anchor/", "Documents are learnt into a whole model folder.")
    bank = MemoryBank.open(model / BANK)
    bank.manifest.check_anchor(identify(model / ANCHOR))
    with locked_work(work_folder(model)) as work:
        added = _Adding(work, model, settings, listener).run(sources)
    if not settings.keep:
        shutil.rmtree(work.folder, ignore_errors=True)
    return added


class _Adding(stages.StagedRun):
    """One command's work. What it computes is of the bank as it was `before`, however often it is interrupted."""

    def __init__(self, work: Work, model: pathlib.Path, settings: AddSettings, listener: stages.Listener) -> None:
        super().__init__(work, listener)
        self.model, self.root, self.settings = model, model / BANK, settings
        self.before = before = work.path(BEFORE)
        if before.is_dir() and not self._is_ours():
            shutil.rmtree(before)  # of a command that was given up: the bank is another by now
        if not before.is_dir():
            with new_folder(before, GO_ON) as beside:
                for name in (MANIFEST, TREE):
                    shutil.copyfile(self.root / name, beside / name)
        self.bank = MemoryBank(self.root, BankManifest.read(before / MANIFEST))
        self.tree, self.digest = ClusterTree.load(before / TREE), file_digest(before / MANIFEST)

    def run(self, sources: Sequence[str]) -> Added:
        """Everything, from where an earlier run stopped."""
        model, tokenizer, config = load_anchor(self.model / ANCHOR)
        embedder, settings = Embedder.load(), self.settings
        corpus, skipped = self.read(sources, embedder.tokenizer, settings)
        # The tree stands, and was not made to take reversed questions to the new documents.
        asked = replace(settings.study, reversed_questions=0, reversed_statements=0)
        digest = self.bank.manifest.anchor.weights_digest
        self.study(corpus, settings.prompts, stages.teaching_of(settings, asked, (model, tokenizer), digest))
        built, new_leaf = self._place(corpus, embedder)
        with self.stage("examples"):
            teachers = settings.training.objective == "distillation"
            digest = make_examples(
                self.work, built, embedder, tokenizer, ExampleSettings(0.0, teachers), self.progress("windows")
            )
            new = TrainingSet.open(self.work.path(EXAMPLES))
            nodes = describe_nodes(self.work, built, lambda text: len(tokenizer.encode(text)), new)
            blocks = {self._target(leaf) for leaf in new.leaves}
            moves = MovedTexts(built.tree, new_leaf, embedder, tokenizer) if new_leaf else None
            self.work.stage("joined", self.digest, [digest], lambda: self._join(new, blocks, moves))
            joined = TrainingSet.open(self.work.path(JOINED))
            self.listener.end(self._texts_line(len(new), len(joined) - len(new)))
        with self.stage("training"), self.work.writing():
            trainer = self._train(model, config, joined, blocks)
        with self.stage("bank"):
            self.work.stage(
                "rows", [self.digest, sorted(map(str, blocks))], [digest], lambda: self._note_rows(blocks, nodes)
            )
            self._write(dict(trainer.blocks()), built, new_leaf)
            self.listener.end(f"{len(blocks)} blocks have learnt, the others are what they were")
        return Added(
            corpus.documents,
            corpus.count,
            skipped,
            tuple(map(str, sorted(blocks))),
            str(new_leaf or ""),
            len(new),
            len(joined) - len(new),
        )

    def _place(self, corpus: Corpus, embedder: Embedder) -> tuple[CorpusTree, Path | None]:
        """Stage `tree`: the leaves in which the windows are learnt, and the one among them that is new."""
        with self.stage("tree"):
            built = place_in_tree(
                self.work,
                corpus,
                embedder,
                with_new_leaf(self.tree) if self.settings.new_leaf else lambda means: self.tree,
                f"{self.bank.manifest.tree.sha256} {self.settings.new_leaf}",
                self.settings.leaves,
                self.progress("texts embedded"),
            )
            new_leaf = added_node(built.tree, self.tree)
            leaves = sorted({leaf for placed in built.placed() for leaf in placed.leaves})
            self.listener.end(_leaves_line(leaves, new_leaf))
        return built, new_leaf

    @cached_property
    def _kept(self) -> TrainingSet | None:
        """What the bank has learnt so far, where that was kept."""
        folder = kept_texts(self.model)
        return TrainingSet.open(folder) if folder.is_dir() else None

    def _texts_line(self, new: int, old: int) -> str:
        line = f"{new:,} texts"
        if self._kept is None:
            return f"{line}; what their blocks knew may fade: {kept_texts(self.model)} is not there"
        return f"{line}, and {old:,} that their blocks have learnt before"

    def _target(self, leaf: Path) -> Path:
        """The node whose block learns what is learnt in a leaf: the finest on its path."""
        found = nodes_with_block(self.bank.config, leaf)
        if not found:
            raise BankError(f"no block is on the path {leaf}", "This bank has no memory for these documents.")
        return found[-1]

    def _join(self, new: TrainingSet, blocks: set[Path], moves: MovedTexts | None) -> None:
        """The new texts with the old ones of the blocks that learn them; and all texts, for the next time."""
        with (
            TrainingSetWriter(self.work.path(JOINED)) as joined,
            TrainingSetWriter(self.work.path(ALL)) as everything,
        ):
            windows = 0
            if (old := self._kept) is not None:
                moved = moves.windows(old) if moves else set()
                for number, leaves in publish.still_there(old, self.tree):
                    example = old.read(number)
                    windows = max(windows, example.window + 1)
                    if moves and example.window in moved:
                        leaves.append(moves.leaf)
                    everything.add(example, leaves)
                    if here := [leaf for leaf in leaves if self._target(leaf) in blocks]:
                        joined.add(example, here)
            for number, leaves in enumerate(new.leaves_of()):
                example = new.read(number)
                joined.add(example, leaves)
                everything.add(replace(example, window=windows + example.window), leaves)

    def _train(self, model: nn.Module, config: dict[str, Any], joined: TrainingSet, blocks: set[Path]) -> Trainer:
        trainer = Trainer(
            self.work.path(TRAINING),
            model,
            replace(self.bank.config, quantization=()),
            joined,
            replace(self.settings.training, generic=False),
            joined,
            identity=f"{identify(self.model / ANCHOR).weights_digest} {self.digest}",
            vocabulary=config.get("effective_vocab_size"),
            start=self._start,
            learns=blocks.__contains__,
        )
        perplexity = trainer.run(self.listener.training)
        self.listener.end(stages.perplexity_line(perplexity, "these texts"))
        return trainer

    def _start(self, node: Path) -> Tensors | None:
        """A block's weights as the bank has them; None for a new leaf's."""
        if node not in self.bank.manifest.blocks:
            return None
        block = self.bank.read(node)
        return {name: block.values(name).astype(mx.float32) for name in self.bank.config.widths}

    def _note_rows(self, blocks: set[Path], nodes: publish.Nodes) -> None:
        """The new rows of the block table, but for their files."""
        rows = []
        for node in sorted(blocks):
            row = publish.entry(node, FileEntry(0, ""), nodes)
            if old := self.bank.manifest.blocks.get(node):
                sources = tuple(dict.fromkeys((*old.sources, *row.sources)))[:SOURCES]
                documents, tokens = old.documents + row.documents, old.tokens + row.tokens
                row = replace(old, documents=documents, tokens=tokens, sources=sources)
            rows.append(row.to_json())
        write_text(self.work.path(ROWS), json.dumps(rows))

    def _write(self, weights: dict[Path, Tensors], built: CorpusTree, new_leaf: Path | None) -> None:
        """The bank's edit, and the texts for the next time."""
        tree, reach = built.tree, built.agreement["reach"]
        with editing(self.root) as edit:
            rows = map(BlockEntry.from_json, json.loads(self.work.path(ROWS).read_text(encoding="utf-8")))
            blocks = dict(self.bank.manifest.blocks)
            for row in rows:
                file = publish.write_as_stored(
                    edit.file(block_name(row.path)), row.path, weights[row.path], self.bank.config
                )
                blocks[row.path] = replace(row, bytes=file.bytes, sha256=file.sha256)
            labels = {node: label for node, label in self.bank.manifest.labels.items() if node not in blocks}
            manifest = replace(self.bank.manifest, blocks=publish.in_order(blocks), labels=labels)
            if new_leaf:
                tree.save(edit.file(TREE))
                size, digest = edit.file(TREE).stat().st_size, file_digest(edit.file(TREE))
                manifest = replace(manifest, tree=FileEntry(size, digest))
            if old := self.bank.sources:
                found = more_sources(old, built, new_leaf)
                entry = write_sources(edit.file(INDEX_FILE).parent.parent, found, tree.branching, tree.dim)
                manifest = replace(manifest, sources=entry)
            manifest.write(edit.file(MANIFEST))
            write_text(self.work.path(AFTER), file_digest(edit.file(MANIFEST)))
            if not self._is_ours():
                raise BankError(
                    f"the bank {self.root} has changed since these documents were begun with",
                    "Repeat the command: it begins anew.",
                )
            policy = BankPolicy.read(self.root / POLICY)
            wider = replace(policy, reach=max(policy.reach, reach))
            if self.bank.sources:
                wider = replace(wider, passage_reach=max(policy.passage_reach, passage_reach(built)))
            if wider != policy:
                wider.write(edit.file(POLICY))
            if origin := Origin.read(self.root):  # the hub does not have these blocks
                replace(origin, subtrees=origin.subtrees | weights.keys()).write(edit.file(REMOTE).parent)
        kept = kept_texts(self.model)
        if self.work.path(ALL).is_dir() and kept.is_dir():
            with self.work.writing():
                replace_folder(self.work.path(ALL), kept)

    def _is_ours(self) -> bool:
        """Whether the bank is what it was before, or what it is to become."""
        after, now = self.work.path(AFTER), file_digest(self.root / MANIFEST)
        return now == file_digest(self.before / MANIFEST) or (after.exists() and now == after.read_text())


def _leaves_line(leaves: Sequence[Path], new_leaf: Path | None) -> str:
    some = ", ".join(map(str, leaves[:8])) + ", …" * (len(leaves) > 8)
    return f"learnt in {len(leaves)} leaves: {some}" + (f"; {new_leaf} is new" if new_leaf else "")
