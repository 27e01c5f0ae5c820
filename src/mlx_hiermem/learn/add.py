"""New documents for a bank that is there: only the blocks of the leaves that they reach learn, all others stay.

    added = add(model_folder, ["./new"], AddSettings(), listener)

The documents go through the stages of `run`, in the bank's own tree, or with a leaf of their own. `relearn` does
the rest.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.commit import editing, interrupted
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError
from mlx_hiermem.learn import stages
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.publish import ANCHOR, BANK, MovedTexts, kept_texts
from mlx_hiermem.learn.relearn import BEFORE, Lesson, NewTexts, Relearning
from mlx_hiermem.learn.settings import AddSettings, ExampleSettings, PromptPair
from mlx_hiermem.learn.stages import Listener, Silent, forget_status
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.encoding import EXAMPLES, make_examples
from mlx_hiermem.learn.tree.build import CorpusTree, added_node, place_in_tree, with_new_leaf
from mlx_hiermem.learn.tree.labels import describe_nodes
from mlx_hiermem.learn.work import locked_work, remove_work, work_folder


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


DEFAULT, SILENT = AddSettings(), Silent()


def add(
    model: pathlib.Path, sources: Sequence[str], settings: AddSettings = DEFAULT, listener: Listener = SILENT
) -> Added:
    """Learns documents into a model folder's bank. Interrupted, the same call goes on.

    Raises BankError where the model has no bank or no anchor, or its tree no room for a leaf that was asked for;
    CorpusError and OutputError as `run.learn`.
    """
    check_model(model)
    if interrupted(model / BANK):  # carried out to its end before anything is read
        with editing(model / BANK):
            pass
    with locked_work(work_folder(model)) as work:
        added = Adding(work, model, settings, listener).run(sources)
        forget_status(work.folder)
        shutil.rmtree(work.path(BEFORE))  # what is added next is added to the bank as it is now
    if not settings.keep:
        remove_work(work.folder)
    return added


def check_model(model: pathlib.Path) -> None:
    """Raises BankError unless this is a whole model folder, whose bank belongs to its anchor."""
    if not (model / ANCHOR).is_dir():
        raise BankError(f"{model} has no anchor/", "Documents are learnt into a whole model folder.")
    MemoryBank.open(model / BANK).manifest.check_anchor(identify(model / ANCHOR))


class Adding(Relearning):
    """What goes through the stages before the training."""

    def run(self, sources: Sequence[str]) -> Added:
        """Everything, from where an earlier run stopped."""
        embedder = Embedder.load()
        corpus, skipped = self.read(sources, embedder.tokenizer, self.settings)
        built, new_leaf = self.place(corpus, embedder, self.settings.prompts)
        with self.stage("examples"):
            new = self.examples(built, embedder, new_leaf)
            lesson = self.join(new)
            self.listener.end(self._texts_line(lesson))
        self.write(self.train(lesson), new)
        return Added(
            corpus.documents,
            corpus.count,
            skipped,
            tuple(map(str, sorted(lesson.blocks))),
            str(new_leaf or ""),
            lesson.new,
            lesson.rehearsed,
        )

    def place(
        self, corpus: Corpus, embedder: Embedder, prompts: tuple[PromptPair, ...]
    ) -> tuple[CorpusTree, Path | None]:
        """Stages `study` to `tree`: the leaves in which windows are learnt, and the one among them that is new."""
        model, tokenizer, _ = self.loaded
        # The tree stands, and was not made to take reversed questions to the new documents.
        asked = replace(self.settings.study, reversed_questions=0, reversed_statements=0)
        digest = self.bank.manifest.anchor.weights_digest
        self.study(corpus, prompts, stages.teaching_of(self.settings, asked, (model, tokenizer), digest))
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

    def examples(self, built: CorpusTree, embedder: Embedder, new_leaf: Path | None = None) -> NewTexts:
        """Within stage `examples`."""
        tokenizer = self.loaded[1]
        distil = self.settings.training.objective == "distillation"
        settings = ExampleSettings(0.0, distil, self.bank.sources is not None)
        anchor = self.bank.manifest.anchor.weights_digest
        digest = make_examples(self.work, built, embedder, tokenizer, settings, self.progress("windows"), anchor)
        new = TrainingSet.open(self.work.path(EXAMPLES))
        nodes = describe_nodes(self.work, built, self.count, new)
        moves = MovedTexts(built.tree, new_leaf, embedder, tokenizer) if new_leaf else None
        return NewTexts(built, digest, new, nodes, new_leaf, moves)

    def _texts_line(self, lesson: Lesson) -> str:
        line = f"{lesson.new:,} texts"
        if self.kept is None:
            return f"{line}; what their blocks knew may fade: {kept_texts(self.model)} is not there"
        return f"{line}, and {lesson.rehearsed:,} that their blocks have learnt before"


def _leaves_line(leaves: Sequence[Path], new_leaf: Path | None) -> str:
    some = ", ".join(map(str, leaves[:8])) + ", …" * (len(leaves) > 8)
    return f"learnt in {len(leaves)} leaves: {some}" + (f"; {new_leaf} is new" if new_leaf else "")
