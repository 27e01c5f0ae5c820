"""`hiermem bank repair`: what is damaged in a bank comes from another copy."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

import typer

from mlx_hiermem.apps.cli import models
from mlx_hiermem.apps.cli.display import console, progress_bar, several, size
from mlx_hiermem.printable import printable

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.bank.repair import FolderCopy, HubCopy


def repair(
    first_word: str = models.FIRST_WORD,
    model: str = models.MODEL,
    source: str = typer.Option(
        "", "--from", help="Another copy: a model, a bank's folder or a hub id. Default: where it was pulled from."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would come, and change nothing."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Mend a bank from another copy: exactly the files that are missing, have changed or cannot be read.

    Only bytes with the digests of this bank's manifest are taken. Exits with 1 where something stays wrong.

    Example: `hiermem bank repair my-model --from /Volumes/backup/my-model`
    """
    from mlx_hiermem.bank.repair import repair as run
    from mlx_hiermem.errors import BankError

    bank = models.open_bank(models.chosen(first_word, model))
    other = _copy(source, bank)
    with progress_bar("checking", show=not as_json) as progress:
        repaired = run(bank.root, other, dry_run, progress)
    if as_json:
        console.print_json(json.dumps(repaired.to_json() | {"from": str(other), "dry_run": dry_run}))
    else:
        for name in repaired.mended:
            console.print(f"{'would mend' if dry_run else 'mended'}  {name}", markup=False, soft_wrap=True)
        for line in repaired.left:
            console.print(printable(line), style="red", markup=False, soft_wrap=True)
    if repaired.left:
        changed = "" if repaired.mended and not dry_run else " Nothing was changed."
        raise BankError(
            f"{several(len(repaired.left), 'problem')} left in {bank.root}.{changed}",
            "Name another copy with --from, or pull or convert the bank again.",
        )
    if not as_json:
        count = several(len(repaired.mended), "file")
        text = f"{count}, {size(repaired.bytes)}, from {other}" if repaired.mended else "nothing is damaged"
        console.print(text, markup=False, soft_wrap=True)


def _copy(source: str, bank: MemoryBank) -> FolderCopy | HubCopy:
    from mlx_hiermem.bank.repair import FolderCopy, HubCopy
    from mlx_hiermem.share.resolve import hub_id

    origin = bank.remote.origin if bank.remote else None
    if not source and not origin:
        raise typer.BadParameter("name another copy of the bank", param_hint="--from")
    folder = pathlib.Path(source)
    if source and folder.is_dir():
        return FolderCopy(models.bank_folder(folder))
    if origin and source in ("", origin.repo):
        return HubCopy(origin.repo, origin.revision)
    return HubCopy(*hub_id(source))
