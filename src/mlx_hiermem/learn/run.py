"""All of `hiermem learn`: every stage in its turn, then the model folder. What is done is not done again.

    learnt = learn(["./docs"], pathlib.Path("my-model"), "anchor-folder", LearnSettings())

Of several ranks (`mlx.launch`) the first leads. They share the study, the embedding and the training.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import mlx.nn as nn

from mlx_hiermem import __version__
from mlx_hiermem.anchor import identify, load_anchor
from mlx_hiermem.bank.commit import LEARNING
from mlx_hiermem.bank.policy import POLICY, BankPolicy
from mlx_hiermem.config import EmbedderIdentity, MemoryConfig
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import AnchorError, ArgumentError, HierMemError, OutputError
from mlx_hiermem.files import path_of
from mlx_hiermem.learn import stages
from mlx_hiermem.learn.corpus.corpus import Corpus, check_asked
from mlx_hiermem.learn.corpus.readers import check_there
from mlx_hiermem.learn.publish import ANCHOR, BANK, About, Nodes, link, publish, write_bank
from mlx_hiermem.learn.record import RECORD, files_learnt, learnt_sources, passage_reach, write_record
from mlx_hiermem.learn.settings import ExampleSettings, LearnSettings, MemorySettings, epochs_for
from mlx_hiermem.learn.stages import Listener, Silent, forget_status
from mlx_hiermem.learn.study.stage import Teaching, help_study
from mlx_hiermem.learn.train.encoding import EXAMPLES, make_examples, open_examples
from mlx_hiermem.learn.train.jobs import LOG, PLOT, Trainer
from mlx_hiermem.learn.tree.build import CorpusTree, build_tree, given_agreement
from mlx_hiermem.learn.tree.kmeans import check_size
from mlx_hiermem.learn.tree.labels import describe_nodes
from mlx_hiermem.learn.tree.probes import help_embed
from mlx_hiermem.learn.work import (
    AGREEMENT,
    SKIPPED,
    TRAINING,
    TREE,
    WRITTEN,
    Ranks,
    Work,
    locked_work,
    remove_work,
    work_folder,
    write_text,
)
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.memory.design import default_size, memory_config
from mlx_hiermem.partial import PartialAnchor
from mlx_hiermem.tree import ClusterTree

BASE, MODEL = "base", "model"  # folders in the work folder: the anchor as it was given, and what becomes OUT
REPORT = "report.json"


@dataclass(frozen=True)
class AnchorSource:
    """Where the anchor comes from."""

    name: str
    made_of: Any  # JSON, by which an interrupted run knows the anchor again
    put: Callable[[pathlib.Path], None]  # makes a folder with `anchor/` in it, and perhaps `source.json`

    @classmethod
    def of(cls, model: pathlib.Path) -> AnchorSource:
        """A model folder's own anchor."""
        if not (model / ANCHOR).is_dir():
            raise AnchorError(f"{model} has no anchor/", "Name a model folder that `hiermem convert` has made.")
        identity = identify(model / ANCHOR, _name_in(model))

        def copy(target: pathlib.Path) -> None:
            shutil.copytree(model / ANCHOR, target / ANCHOR)
            if (model / "source.json").is_file():
                shutil.copy(model / "source.json", target)

        return cls(identity.name, identity.to_json(), copy)


def _name_in(model: pathlib.Path) -> str:
    """What the anchor of a model folder is called there."""
    for file, keys in ((model / BANK / "bank.json", ("anchor", "name")), (model / "source.json", ("name",))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(file.read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
            return str(found)
    return model.resolve().name


@dataclass(frozen=True)
class Prepared:
    """What there is before the training; `given` is the agreement on given questions."""

    documents: int
    windows: int
    skipped: int
    agreement: dict[str, Any]
    given: float | None
    nodes: Nodes
    embedder: EmbedderIdentity
    built: CorpusTree


@dataclass(frozen=True)
class Learnt:
    """What came of it. `seconds` are those of each stage, added up over interrupted runs."""

    documents: int
    windows: int
    skipped: int
    agreement: dict[str, Any]
    given_agreement: float | None
    memory: dict[str, Any]
    totals: dict[str, int]
    perplexity: dict[str, float]  # by memory: none, generic, level 1 ..., fetched
    perplexity_of: str  # held-out texts, or learnt ones
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


DEFAULT, SILENT = LearnSettings(), Silent()


def learn(
    sources: Sequence[str],
    out: str | pathlib.Path,
    anchor: Callable[[], AnchorSource] | pathlib.Path | str,
    settings: LearnSettings = DEFAULT,
    listener: Listener = SILENT,
) -> Learnt | None:
    """Learns documents into the model folder `out`. On other ranks than the first it returns None.

    `sources` are files, folders, and data sets of the hub ("hf://owner/name"). `anchor` is a model folder, or a
    function that finds one.

    Raises CorpusError, AnchorError and OutputError, each for what is wrong with what was given. What is done stays
    in `work_folder(out)`, and the same call goes on from there.
    """
    out = path_of(out, "folder")
    if not isinstance(settings, LearnSettings):
        raise ArgumentError(f"{settings!r} are no settings", "Give a LearnSettings.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists already", "Choose another folder, or remove it first.")
    ranks = Ranks(work_folder(out))
    if ranks.rank:
        _help(ranks, work_folder(out), settings, listener)
        _Run(Work(work_folder(out)), settings, listener, ranks).train()
        return None
    tidy = _tidy(work_folder(out)) if ranks.count == 1 else contextlib.nullcontext()  # others look into it
    with tidy, locked_work(work_folder(out)) as work:
        run = _Run(work, settings, listener, ranks)
        with ranks.leading():
            check_there(sources)  # before an anchor is fetched
            source = anchor() if callable(anchor) else AnchorSource.of(path_of(anchor, "model folder"))
            prepared = run.prepare(sources, source)
        learnt = run.write(source.name, prepared, *run.train())
        with work.writing():
            publish(work.path(MODEL), out)
        forget_status(work.folder)
    if not settings.keep:
        remove_work(work.folder)
    return learnt


def _help(ranks: Ranks, folder: pathlib.Path, settings: LearnSettings, listener: Listener) -> None:
    """What another rank than the first does until the training."""

    def studying(wanted: Callable[[], bool]) -> None:
        run = _Run(Work(folder), settings, listener, ranks)
        if run.teaching:
            help_study(run.work, Corpus.of(run.work), run.teaching, wanted)

    def embedding(wanted: Callable[[], bool]) -> None:
        help_embed(Work(folder), Embedder.load(), wanted)

    ranks.follow({"study": studying, "vectors": embedding})


@contextlib.contextmanager
def _tidy(folder: pathlib.Path) -> Iterator[None]:
    """A new work folder goes where it came to nothing: documents or anchor were wrong from the beginning."""
    new = not folder.exists()
    try:
        yield
    except HierMemError as error:
        if new and not isinstance(error, OutputError) and not Work(folder).has("corpus"):
            remove_work(folder)
        raise


class _Run(stages.StagedRun):
    """Learning a new model."""

    def __init__(self, work: Work, settings: LearnSettings, listener: Listener, ranks: Ranks | None = None) -> None:
        super().__init__(work, listener, ranks)
        self.settings, self.folder = settings, work.path(BASE) / ANCHOR

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any, dict[str, Any]]:
        """The anchor's model, tokenizer and configuration."""
        return load_anchor(self.folder)

    @cached_property
    def teaching(self) -> Teaching | None:
        digest = identify(self.folder).weights_digest
        return stages.teaching_of(self.settings, self.settings.study, self.loaded[:2], digest)

    def prepare(self, sources: Sequence[str], anchor: AnchorSource) -> Prepared:
        """Everything before the training."""
        with self.stage("anchor"):
            self.work.stage("anchor", anchor.made_of, (), lambda: self._put(anchor))
            self._check()
            self.listener.end(anchor.name)
        embedder, tokenizer = Embedder.load(), self.loaded[1]
        corpus, skipped = self.read(sources, embedder.tokenizer, self.settings)
        check_size(corpus.count)  # before anything that takes long, as is the next
        check_asked(corpus, self.settings.questions or ())
        self.study(corpus, self.settings.prompts, self.teaching)
        with self.stage("tree"):
            tree = self.settings.tree
            tree = replace(tree, depth=tree.depth or len(self.settings.memory.sizes))  # a size for each level
            built = build_tree(self.work, corpus, embedder, tree, self.progress("texts embedded"), self.ranks)
            asked = self.settings.questions
            given = given_agreement(built, embedder, asked) if asked else None
            self.listener.end(stages.tree_line(built.agreement, given))
        with self.stage("examples"):
            chosen = ExampleSettings(
                self.settings.heldout, self.settings.training.objective == "distillation", self.settings.sources
            )
            digest = identify(self.folder).weights_digest
            make_examples(self.work, built, embedder, tokenizer, chosen, self.progress("windows"), digest)
            learnt, _ = open_examples(self.work)
            nodes = describe_nodes(self.work, built, self._count, learnt)
            self.listener.end(f"{len(learnt):,} texts, {int(learnt.lengths.sum()):,} tokens")
        return Prepared(
            corpus.documents, corpus.count, skipped, built.agreement, given, nodes, embedder.identity, built
        )

    def train(self) -> tuple[Trainer, dict[str, float]]:
        """Trains this rank's share; returns the perplexities too."""
        model, _, config = self.loaded
        examples, heldout = open_examples(self.work)
        shape = ClusterTree.load(self.work.path(TREE))
        memory = _memory_for(self.settings.memory, model, shape.branching, shape.depth)
        settings = self.settings.training
        tokens = int(examples.lengths[examples.assigned].sum()) // max(
            1, len({leaf[0] for leaf in examples.leaves})
        )
        settings = replace(settings, epochs=settings.epochs or epochs_for(tokens))
        with self.stage("training"), self.work.writing():
            trainer = Trainer(
                self.work.path(TRAINING),
                model,
                memory,
                examples,
                settings,
                heldout,
                identity=identify(self.folder).weights_digest,
                vocabulary=config.get("effective_vocab_size"),
            )
            self.listener.end(f"{stages.memory_line(memory)}, {settings.epochs} epochs")
            self.listener.begin("training")
            perplexity = trainer.run(self.listener.training)
            self.listener.end(stages.perplexity_line(perplexity, self._measured))
        return trainer, perplexity

    def write(self, name: str, prepared: Prepared, trainer: Trainer, perplexity: dict[str, float]) -> Learnt:
        """Puts the model folder together in the work folder."""
        model, settings = self.work.path(MODEL), self.settings
        shutil.rmtree(model, ignore_errors=True)
        with self.stage("bank"), self.work.writing():
            link(self.work.path(BASE), model)
            recipe = {"name": "learn", "by": f"mlx-hiermem {__version__}", "documents": prepared.documents}
            training_settings = {"training": trainer.settings.to_json()}
            recipe |= {
                "windows": prepared.windows,
                "prompts": len(settings.prompts),
                "settings": settings.to_json() | training_settings,
            }
            about = About(
                identify(model / ANCHOR, name), prepared.embedder, prepared.nodes, recipe, settings.licence
            )
            sources = learnt_sources(prepared.built) if settings.sources else None
            manifest = write_bank(model / BANK, trainer, ClusterTree.load(self.work.path(TREE)), about, sources)
            policy = BankPolicy(reach=prepared.agreement["reach"])
            if settings.sources:
                policy = replace(policy, passage_reach=passage_reach(prepared.built))
            policy.write(model / BANK / POLICY)
            for file in (SKIPPED, AGREEMENT, EXAMPLES, WRITTEN, f"{TRAINING}/{LOG}", f"{TRAINING}/{PLOT}"):
                if (source := self.work.path(file)).exists():
                    link(source, model / LEARNING / source.name)
            write_record(model / RECORD, files_learnt(prepared.built, self._count))
        learnt = Learnt(
            prepared.documents,
            prepared.windows,
            prepared.skipped,
            prepared.agreement,
            prepared.given,
            manifest.memory.to_json(),
            manifest.totals(),
            perplexity,
            self._measured,
            self.times,
        )
        with self.work.writing():
            write_text(model / LEARNING / REPORT, json.dumps(learnt.to_json(), indent=1) + "\n")
        return learnt

    def _put(self, anchor: AnchorSource) -> None:
        shutil.rmtree(self.work.path(BASE), ignore_errors=True)
        anchor.put(self.work.path(BASE))

    def _count(self, text: str) -> int:
        """The anchor's tokens in a text."""
        return len(self.loaded[1].encode(text))

    def _check(self) -> None:
        """Raises AnchorError where this anchor cannot learn, before anything that takes long."""
        model, tokenizer, _ = self.loaded
        if tokenizer is None:
            raise AnchorError("this anchor has no tokenizer", "Convert it again with --tokenizer.")
        memory = self.settings.memory
        attach(model, _memory_for(memory, model, 2, max(1, len(memory.sizes)))).detach()
        PartialAnchor(model).check()

    @property
    def _measured(self) -> str:
        """What the perplexities are of."""
        held_out = self.settings.heldout or json.loads(self.work.path(AGREEMENT).read_text())["questions"]
        return "held-out texts" if held_out else "learnt texts"


def _memory_for(settings: MemorySettings, model: nn.Module, branching: int, depth: int) -> MemoryConfig:
    """The memory for a tree of this shape. A small corpus may have grown fewer levels than there are sizes."""
    sizes = settings.sizes[:depth] or (default_size(settings.placement, len(model.layers)),) * depth
    sizes += (0,) * (depth - len(sizes))
    return memory_config(model, settings.kind, branching, sizes, settings.placement, settings.dtype)
