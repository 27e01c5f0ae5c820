"""Changing a bank in place: several files as one edit, which a crash cannot leave half made.

New versions of files are written into `edit.partial/`, with a list of the nodes whose blocks go. Renaming that
folder to `edit/` makes the edit: before it nothing has changed, after it the edit stands. Then it is carried
out: the new files are renamed into their places, the blocks unlinked, the folder removed. A process that dies
in between leaves `edit/`, and whoever changes the bank next carries it out to the end first.

Readers take no lock and see a bank that works at every moment. The tree comes before the manifest, so for a
moment there may be a node without a row in the block table, or a row whose node no text is routed to: the
first adds nothing to a path, the second is never asked for. Only digests tell (`MemoryBank.problems`), and
`interrupted` says whether that is why. One who opened the bank before an edit gets a BankError where it asks
for a block that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from safetensors import SafetensorError

from mlx_hiermem.bank.bank import EDIT, MANIFEST, TREE
from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.policy import POLICY
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError, OutputError
from mlx_hiermem.files import fsync, parse_json, reason
from mlx_hiermem.locks import locked

STAGING = f"{EDIT}.partial"
GONE = "gone.json"  # in the edit's folder: the nodes that are removed, each with all below it
LEARNING = "learning"  # the folder beside the bank where `hiermem learn` keeps the texts that the bank has learnt
FORGET = "forget.json"  # in the bank: nodes were removed, and their texts are still in learning/
LAST = (TREE, POLICY, MANIFEST, FORGET)  # after the blocks, in this order


class Edit:
    """What an edit will do. `finished` are the nodes that an interrupted edit, now made, has removed."""

    def __init__(self, root: pathlib.Path, finished: frozenset[Path]) -> None:
        self.root, self.finished = root, finished
        self._gone: list[Path] = []

    def file(self, name: str) -> pathlib.Path:
        """Where to write the new version of the bank's file `name`."""
        file = self.root / STAGING / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def remove(self, node: Path) -> None:
        """The node's block goes once the edit stands, and the blocks below it."""
        self._gone.append(node)

    def commit(self) -> None:
        """Makes the edit and carries it out. One that changes nothing writes nothing."""
        if not self._gone and not (self.root / STAGING).exists():
            return
        self.file(GONE).write_text(json.dumps([str(node) for node in self._gone]), encoding="utf-8")
        for file in (*(self.root / STAGING).rglob("*"), self.root / STAGING):
            fsync(file)
        os.rename(self.root / STAGING, self.root / EDIT)
        fsync(self.root)
        finish(self.root)


@contextlib.contextmanager
def editing(root: pathlib.Path) -> Iterator[Edit]:
    """Locks a bank, finishes an interrupted edit, and at the end of the block makes this one.

    An error in the block leaves the bank as it was. Raises BankError where there is no bank, OutputError where
    another process is changing it or files cannot be written.
    """
    if not (root / MANIFEST).is_file():
        raise BankError(f"there is no bank at {root}")
    try:
        with locked(root, "changing"):
            shutil.rmtree(root / STAGING, ignore_errors=True)  # of a process that died before its edit stood
            edit = Edit(root, finish(root))
            try:
                yield edit
                edit.commit()
            finally:
                shutil.rmtree(root / STAGING, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _failed(root, error) from error


def finish(root: pathlib.Path) -> frozenset[Path]:
    """Carries out the edit in `edit/`, from wherever it stopped; returns the nodes it removes."""
    edit = root / EDIT
    if not edit.is_dir():
        return frozenset()
    try:
        gone = [Path.parse(node) for node in parse_json((edit / GONE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError, HierMemError) as error:
        raise BankError(
            f"{edit} is damaged: {error}", "Remove that folder and run `hiermem bank verify`."
        ) from error
    names = [file.relative_to(edit).as_posix() for file in edit.rglob("*") if file.is_file()]
    names.sort(key=lambda name: LAST.index(name) if name in LAST else -1)
    for name in names:
        if name != GONE:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(edit / name, root / name)
            fsync((root / name).parent)
    for node in gone:
        file = root / block_name(node)
        file.unlink(missing_ok=True)
        if file.with_suffix("").is_dir():
            shutil.rmtree(file.with_suffix(""))
    os.rename(edit, root / STAGING)  # in one step, so that no half of it is taken for an edit
    shutil.rmtree(root / STAGING)
    return frozenset(gone)


def interrupted(root: pathlib.Path) -> str | None:
    """One line where an edit was interrupted, or is being made at this moment."""
    if (root / EDIT).exists():
        return f"a change was interrupted ({EDIT}/ is there): repeat it, or make another, and it is finished first"
    return None


def _failed(root: pathlib.Path, error: Exception) -> OutputError:
    stands = interrupted(root) is not None
    hint = "The change stands; the next one finishes it." if stands else "Nothing was changed."
    return OutputError(f"cannot change the bank {root}: {reason(error)}", hint)
