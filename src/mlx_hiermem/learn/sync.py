"""A folder that changes, and the bank that has learnt it: new, changed and deleted files, by digest.

    changes = look(model, folder)                  # nothing is changed
    receipt = sync(model, changes, SyncSettings(settings_of(model)), listener)

New texts are learnt as `add` learns them. The blocks that have learnt what is gone begin afresh and learn the rest
of their leaves' texts: a block that only goes on learning others forgets slowly, and nobody knows when. The blocks
above keep what they have learnt of it, unless `above` has them begin afresh too; a probe before and after says how
much is left. Of a changed file the old windows are gone and the new ones new.

The work lies in `MODEL.sync/`. A killed run goes on with the same changes; where the folder has changed since, it
begins anew. When the bank's edit stands, the texts, the record and the receipt follow from what was written down
before it, so `finish` completes that first.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from mlx_hiermem.bank.bank import EDIT, MANIFEST
from mlx_hiermem.bank.commit import LEARNING, editing
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError, CorpusError, NothingToLearnError
from mlx_hiermem.files import file_digest
from mlx_hiermem.learn.add import Adding, check_model
from mlx_hiermem.learn.corpus import readers
from mlx_hiermem.learn.publish import BANK
from mlx_hiermem.learn.recall import NONE, Probe, memories_of, probes_of, recall
from mlx_hiermem.learn.record import RECORD, Changes, Scan, compared, files_read, read_record
from mlx_hiermem.learn.relearn import AFTER, Gone, Lesson, NewTexts
from mlx_hiermem.learn.settings import AddSettings, SyncSettings, settings_from_dict
from mlx_hiermem.learn.stages import Listener, Silent
from mlx_hiermem.learn.work import (
    SYNC,
    Work,
    locked_work,
    remove_work,
    work_folder,
    write_text,
)
from mlx_hiermem.learn.written import drop_written
from mlx_hiermem.model_folder import load

RECEIPT = f"{LEARNING}/sync.json"
SILENT = Silent()
PLAN, PROBED, DRAFT = "plan.json", "probed.json", "draft.json"


@dataclass(frozen=True)
class SyncReceipt:
    """What was done. `may_retain` names what still saw the texts that are gone."""

    folder: str
    time: str
    new: list[str]
    changed: list[str]
    deleted: list[str]
    unread: dict[str, str]  # files of which nothing can be learnt, and why
    blocks: list[str]
    afresh: list[str]
    may_retain: list[str]
    texts: int
    rehearsed: int
    forgotten: int
    probes: list[dict[str, Any]] = field(default_factory=list)


def settings_of(model: pathlib.Path) -> AddSettings:
    """How a bank was learnt, for learning more in the same way. A teacher is to be named anew."""
    recipe = BankManifest.read(model / BANK / MANIFEST).recipe.get("settings", {})
    parts = ("corpus", "study", "tree", "training")
    learnt = settings_from_dict({name: recipe[name] for name in parts if name in recipe})
    return AddSettings(
        learnt.corpus,
        learnt.tree.leaves,
        self_study=recipe.get("teacher", "") is not None,
        study=learnt.study,
        training=learnt.training,
    )


def look(model: pathlib.Path, folder: pathlib.Path, scan: Scan | None = None) -> Changes:
    """What has changed in a folder since the bank has learnt it.

    Raises BankError where the bank does not know what it has learnt of which file, or has learnt nothing there;
    CorpusError where the folder is not there.
    """
    check_model(model)
    root, record = os.path.abspath(folder), read_record(model)
    if not record:
        raise BankError(
            f"{model} has no {RECORD}, which says what it has learnt of which file",
            "It was pulled from the hub, or an earlier version learnt it. Learn the folder again.",
        )
    learnt = {file: row for file, row in record.items() if pathlib.Path(root) in pathlib.Path(file).parents}
    if not learnt:
        others = sorted({os.path.dirname(file) for file in record})
        raise BankError(
            f"{model} has learnt nothing in {root}, but in {', '.join(others[:3])}" + ", …" * (len(others) > 3),
            "New documents are learnt by `hiermem bank add`.",
        )
    if not os.path.isdir(root):
        raise CorpusError(f"there is no folder {root}", "Nothing was changed.")
    return compared(root, learnt, (scan or Scan()).digests(root))


def sync(model: pathlib.Path, changes: Changes, settings: SyncSettings, listener: Listener = SILENT) -> SyncReceipt:
    """Learns what is new and forgets what is gone. Interrupted, the same call goes on.

    Where an earlier run only has to be completed, that is done, and its receipt is returned. Raises as `add` does.
    """
    if earlier := finish(model, listener):
        return earlier
    plan = json.loads(json.dumps({"changes": asdict(changes), "settings": asdict(settings)}))
    with locked_work(work_folder(model, SYNC)) as work:
        if not work.path(PLAN).exists() or json.loads(work.path(PLAN).read_text(encoding="utf-8")) != plan:
            work = _emptied(work.folder)
            write_text(work.path(PLAN), json.dumps(plan))
        receipt = _Syncing(work, model, changes, settings, listener).sync()
        remove_work(work.folder)
    return receipt


def finish(model: pathlib.Path, listener: Listener = SILENT) -> SyncReceipt | None:
    """Completes a run that was killed after it had changed the bank; None where there is none."""
    folder = work_folder(model, SYNC)
    if not all((folder / name).exists() for name in (PLAN, DRAFT, AFTER)):
        return None
    with locked_work(folder) as work:
        if (model / BANK / EDIT).is_dir():
            with editing(model / BANK):
                pass  # which carries it out to the end
        if file_digest(model / BANK / MANIFEST) != work.path(AFTER).read_text(encoding="utf-8"):
            return None
        changes = Changes(**json.loads(work.path(PLAN).read_text(encoding="utf-8"))["changes"])
        receipt = _Syncing(work, model, changes, SyncSettings(), listener).complete()
        remove_work(folder)
    return receipt


def _emptied(folder: pathlib.Path) -> Work:
    """A work folder without what was there for other changes."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Work(folder)


class _Syncing(Adding):
    """One run."""

    def __init__(
        self,
        work: Work,
        model: pathlib.Path,
        changes: Changes,
        settings: SyncSettings,
        listener: Listener,
    ) -> None:
        super().__init__(work, model, settings.learning, listener)
        self.changes, self.how = changes, settings

    @cached_property
    def gone(self) -> Gone:
        record, files = read_record(self.model), (*self.changes.changed, *self.changes.deleted)
        return Gone(tuple(record[file] for file in files if file in record), self.how.above)

    def sync(self) -> SyncReceipt:
        """Everything, from where an earlier run stopped."""
        if self.kept is None:
            raise BankError(
                f"the texts that {self.model} has learnt are not in its {LEARNING}/",
                "Without them nothing can be forgotten; learn the folder again.",
            )
        if self.gone.windows and self.how.probes:
            self._ask_before()
        new = self._learn_files()
        with self.stage("examples"):
            lesson = self.join(new, self.gone)
            self.listener.end(
                f"{lesson.new:,} texts, and {lesson.rehearsed:,} that their blocks have learnt before; "
                f"{lesson.forgotten:,} are dropped"
            )
        self._draft(lesson, new)
        weights = self.train(lesson)
        if weights or self.gone.texts:  # held-out windows are in no block, but among the sources
            self.write(weights, new, self.gone)
        return self.complete()

    def _learn_files(self) -> NewTexts | None:
        """Stages `corpus` to `examples` of new and changed files; None where nothing can be learnt of them."""
        files, folder = {*self.changes.new, *self.changes.changed}, self.changes.folder
        only = {name for path, name in readers.files_of([folder]) if readers.clean(str(path)) in files}
        if not only:
            return None
        embedder = Embedder.load()
        try:
            corpus, _ = self.read([folder], embedder.tokenizer, self.settings, only)
        except NothingToLearnError as error:
            self.listener.end(error.what)
            return None
        names = {name for window in corpus.windows() for name in (window.source, window.title)}
        prompts = tuple(one for one in self.settings.prompts if one.document in names)
        built, _ = self.place(corpus, embedder, prompts)
        return self.examples(built, embedder)

    # What is left of what is gone

    def _ask_before(self) -> None:
        """Asks about files that go, of the bank as it was; notes the answers for later."""

        def make() -> None:
            assert self.kept is not None
            probes = probes_of(self.kept, self.gone.files, self.loaded[1], self.how.probes)
            model, progress = load(self.model), self.progress("questions")
            memories = memories_of(model, probes)
            before = recall(model, probes, memories, progress)
            without = recall(model, probes, [NONE] * len(probes), progress)
            rows = [
                {"probe": asdict(probe), "memory": memory, "before": asdict(known), "without": asdict(unaided)}
                for probe, memory, known, unaided in zip(probes, memories, before, without, strict=True)
            ]
            write_text(self.work.path(PROBED), json.dumps(rows))

        with self.stage("probes"):
            self.work.stage("probed", [self.digest, self.how.probes], [], make)
            rows = self._probed()
            said = sum(row["before"]["said"] for row in rows)
            self.listener.end(f"{len(rows)} asked about what goes: {said} are said word for word")

    def _probed(self) -> list[dict[str, Any]]:
        file = self.work.path(PROBED)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    def _ask_after(self) -> list[dict[str, Any]]:
        """The same questions to the bank as it is now: the rows of the receipt."""
        rows = self._probed()
        if not rows:
            return []
        with self.stage("probes"):
            probes = [Probe(**row["probe"]) for row in rows]
            found = []
            again = recall(load(self.model), probes, [row["memory"] for row in rows])
            for row, known in zip(rows, again, strict=True):
                probe = {name: row["probe"][name] for name in ("document", "prompt", "answer")}
                told = {name: row[name] for name in ("memory", "before", "without")}
                found.append(probe | told | {"after": asdict(known)})
            said = sum(known.said for known in again)
            self.listener.end(f"{len(found)} asked again: {said} are said word for word")
        return found

    # The receipt

    def _draft(self, lesson: Lesson, new: NewTexts | None) -> None:
        """Writes down what the receipt will say, before the bank changes."""
        above = {up for node in lesson.afresh for up in node.prefixes()} - lesson.afresh
        learnt = {window.file for window in new.built.corpus.windows()} if new else set()
        unread = [row for row in files_read(self.work).values() if row.file not in learnt]
        others = ["generic"] * bool(self.bank.manifest.generic) + ["anchor"]
        receipt = SyncReceipt(
            folder=self.changes.folder,
            time="",
            new=self.changes.names(self.changes.new),
            changed=self.changes.names(self.changes.changed),
            deleted=self.changes.names(self.changes.deleted),
            unread={row.name: row.why for row in unread},
            blocks=_named(lesson.blocks),
            afresh=_named(lesson.afresh),
            may_retain=[*_named(filter(self.bank.manifest.has_block, above)), *others] if lesson.afresh else [],
            texts=lesson.new,
            rehearsed=lesson.rehearsed,
            forgotten=lesson.forgotten,
        )
        draft = {"receipt": asdict(receipt), "windows": sorted(self.gone.windows)}
        write_text(self.work.path(DRAFT), json.dumps(draft))

    def complete(self) -> SyncReceipt:
        """What follows the bank's edit: texts, record, probes, receipt."""
        draft = json.loads(self.work.path(DRAFT).read_text(encoding="utf-8"))
        self.finish()
        drop_written(self.model, set(draft["windows"]))
        probes, now = self._ask_after(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        receipt = SyncReceipt(**draft["receipt"] | {"time": now, "probes": probes})
        with self.work.writing():
            write_text(self.model / RECEIPT, json.dumps(asdict(receipt), ensure_ascii=False, indent=1) + "\n")
        return receipt


def _named(nodes: Iterable[Path]) -> list[str]:
    return [str(node) for node in sorted(nodes, key=lambda node: (len(node), node))]
