"""`hiermem sync`: the bank follows a folder that changes."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, notes, several
from mlx_hiermem.apps.cli.learn import GO_ON
from mlx_hiermem.apps.cli.learn_screen import screen_for
from mlx_hiermem.errors import HierMemError

if TYPE_CHECKING:
    from mlx_hiermem.learn.settings import SyncSettings
    from mlx_hiermem.learn.sync import SyncReceipt

SHOWN = 6  # names in a line


def sync(
    words: list[str] = typer.Argument(..., metavar="[MODEL] DIR", help="DIR: a folder that the model has learnt."),
    model: str = models.MODEL,
    dry_run: bool = typer.Option(False, "--dry-run", help="Only say what has changed."),
    yes: bool = typer.Option(False, "--yes", "-y", help="Forget deleted files without being asked."),
    watch: bool = typer.Option(False, "--watch", help="Look again and again, until Ctrl-C."),
    every: float = typer.Option(10.0, min=0.1, help="Seconds between two looks of --watch."),
    above: bool = typer.Option(
        False, "--above", help="Have the blocks above forget too: whole subtrees learn again, which takes longer."
    ),
    probes: int = typer.Option(6, min=0, help="Questions about each file that goes, asked before and after."),
    epochs: int | None = typer.Option(None, min=1, help="How often each text is learnt. Default: as before."),
    teacher: str = typer.Option("", help="Who writes questions about new texts. Default: the anchor."),
    teacher_url: str = typer.Option("", help="Or a server that speaks OpenAI's protocol."),
    teacher_model: str = typer.Option("", help="What the model is called there. Default: the first one."),
    self_study: bool | None = typer.Option(
        None, "--self-study/--no-self-study", help="Have questions written. Default: as before."
    ),
    prompts: pathlib.Path | None = typer.Option(
        None, help="Prompts of your own, as `hiermem learn` takes them; those about other files are passed over."
    ),
    any_language: bool = typer.Option(False, "--any-language", help="Learn what is not in English, too."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Bring a model up to date with a folder that it has learnt: new, changed and deleted files.

    Only the blocks that these files reach learn again. Blocks that have learnt a deleted file, or an old version,
    begin afresh without it. Interrupted, the same command goes on.

    Example: `hiermem sync my-model ./docs --dry-run`
    """
    from mlx_hiermem.learn.study.prompts import read_prompts

    name, folder = models.last_word(words, model, "DIR")
    run = _Run(models.folder_of(name), pathlib.Path(folder), yes, as_json)
    settings = _settings(
        run.model,
        epochs,
        any_language,
        self_study=self_study,
        teacher=teacher,
        teacher_url=teacher_url,
        teacher_model=teacher_model,
        prompts=read_prompts(prompts) if prompts else (),
    )
    settings = replace(settings, above=above, probes=probes)
    if dry_run:
        run.look()
        run.tell_json()
        return
    try:
        run.finish()
        if watch:
            run.watch(settings, every)
        elif run.look():
            run.sync(settings)
        else:
            run.tell_json()
    except KeyboardInterrupt as error:
        raise HierMemError("stopped", GO_ON) from error
    models.remember(name)


def _settings(model: pathlib.Path, epochs: int | None, any_language: bool, **given: Any) -> SyncSettings:
    """As the model was learnt, but for what was given."""
    from mlx_hiermem.learn.settings import SyncSettings
    from mlx_hiermem.learn.sync import settings_of

    before = settings_of(model)
    corpus = replace(before.corpus, any_language=before.corpus.any_language or any_language)
    training = replace(before.training, epochs=epochs or before.training.epochs)
    if given["self_study"] is None and (given["teacher"] or given["teacher_url"]):
        given["self_study"] = True  # who names a teacher wants it to write
    changed = {name: value for name, value in given.items() if value is not None}
    return SyncSettings(replace(before, corpus=corpus, training=training, **changed))


class _Run:
    """The steps of the command, and what it says of them."""

    def __init__(self, model: pathlib.Path, folder: pathlib.Path, yes: bool, as_json: bool) -> None:
        from mlx_hiermem.learn.record import Changes, Scan

        self.model, self.folder, self.yes, self.as_json = model, folder, yes, as_json
        self._scan = Scan()
        self.changes = Changes(str(folder), {}, {}, {}, 0)

    def finish(self) -> None:
        """Completes what an earlier run was killed in."""
        from mlx_hiermem.learn.sync import finish

        if receipt := finish(self.model):
            self._say("finished", "an earlier run, which had been interrupted at its end")
            self._show(receipt)

    def look(self) -> bool:
        """Whether something has changed; says what."""
        self._look()
        self.tell()
        return bool(self.changes)

    def tell(self) -> None:
        changes = self.changes
        for what in ("new", "changed", "deleted"):
            if files := changes.names(getattr(changes, what)):
                self._say(what, _some(files))
        where = f"{several(changes.same, 'file')} in {self.folder}"
        self._say("same", where if changes else f"{where}: nothing to do")

    def tell_json(self) -> None:
        changes, parts = self.changes, ("new", "changed", "deleted")
        if self.as_json:
            names = {what: changes.names(getattr(changes, what)) for what in parts}
            console.print_json(data={"folder": changes.folder} | names | {"same": changes.same})

    def _look(self) -> None:
        from mlx_hiermem.learn.sync import look

        self.changes = look(self.model, self.folder, self._scan)

    def sync(self, settings: SyncSettings) -> None:
        """Does it, once it was agreed to what is to be forgotten."""
        from mlx_hiermem.learn import sync

        self._agree()
        with screen_for(not self.as_json) as screen:
            self._show(sync.sync(self.model, self.changes, settings, screen))

    def _agree(self) -> None:
        """Asks before anything is forgotten for good. Raises HierMemError where nobody can be asked."""
        count = len(self.changes.deleted)
        if not count or self.yes:
            return
        what = f"Forget {several(count, 'deleted file')}"
        if self.changes.all_gone:
            what += f", which is all that was learnt of {self.folder}"
        if not sys.stdin.isatty():
            raise HierMemError(f"{what}? Nobody can be asked here", "Say --yes, or --dry-run to see which.")
        typer.confirm(f"{what}?", abort=True)

    def watch(self, settings: SyncSettings, every: float) -> None:
        """Looks every so many seconds. A change is taken up when two looks see the same: nobody is writing then."""
        self._say("watching", f"{self.folder}, every {every:g} s; Ctrl-C ends it")
        seen, failed = None, None
        self._look()  # what is wrong from the beginning ends it
        while True:
            if self.changes and self.changes == seen != failed:
                try:
                    self._take_up(settings)
                except HierMemError as error:
                    failed = self.changes
                    notes.print(f"{error} Looking on.", style="yellow", markup=False, soft_wrap=True)
            seen = self.changes
            if not _slept(every):
                return
            try:
                self._look()
            except HierMemError:  # a folder that is away for a moment
                seen = None

    def _take_up(self, settings: SyncSettings) -> None:
        if self.changes.all_gone:
            raise HierMemError(
                f"all files that were learnt of {self.folder} are gone, which may be a mistake",
                "A run without --watch forgets them.",
            )
        self.tell()
        self.sync(settings)

    def _show(self, receipt: SyncReceipt) -> None:
        """The receipt on a screen."""
        from mlx_hiermem.learn.recall import forgotten_lines
        from mlx_hiermem.learn.sync import RECEIPT

        if self.as_json:
            console.print_json(data=asdict(receipt))
            return
        for name, why in list(receipt.unread.items())[:SHOWN]:
            self._say("unread", f"{name}: {why}")
        blocks = (
            f"{several(len(receipt.blocks), 'block')}: {_some(receipt.blocks)}" if receipt.blocks else "no block"
        )
        afresh = f"; {_some(receipt.afresh)} afresh" if receipt.afresh else ""
        self._say("learnt", f"{several(receipt.texts, 'new text')} in {blocks}{afresh}")
        if receipt.afresh:
            self._say("forgotten", f"{several(receipt.forgotten, 'text')} of {_some(_going(receipt))}")
        for name, line in list(forgotten_lines(receipt.probes))[:SHOWN]:
            self._say("probed", f"{name}{' as it was' * (name in receipt.changed)}: {line}")
        if receipt.may_retain:
            holders = ", ".join(receipt.may_retain)
            self._say("left", f"{holders} may still hold something of it: they stay as they are")
        self._say("receipt", str(self.model / RECEIPT))

    def _say(self, what: str, line: str) -> None:
        if not self.as_json:
            console.print(f"{what:<10}{line}", markup=False, soft_wrap=True)


def _going(receipt: SyncReceipt) -> list[str]:
    return [*receipt.deleted, *(f"{name} as it was" for name in receipt.changed)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def _slept(seconds: float) -> bool:
    """Whether nobody pressed Ctrl-C meanwhile."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return False
    return True
