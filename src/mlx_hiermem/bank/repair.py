"""Mending a bank from another copy of it: a folder, or a repository of the hub.

Damaged are the manifest's files that are missing, have changed or cannot be read. Exactly those are copied, and
only with the digest that this bank's manifest has for them; the other copy need not be whole. They are one edit
(see `commit`): written beside, checked there, then renamed into their places.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mlx_hiermem.bank.bank import MANIFEST, MemoryBank, digest_in
from mlx_hiermem.bank.check import beside_the_digests
from mlx_hiermem.bank.commit import Edit, editing
from mlx_hiermem.bank.hub import RemoteFile, commit_of, download, listing, quiet
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.errors import HubError
from mlx_hiermem.files import file_digest, reason


@dataclass(frozen=True)
class Damaged:
    """A file that is not what the manifest says, and what it must be."""

    name: str
    what: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Repaired:
    """What a repair put in place (in a dry run: would), and one line for each thing that stays wrong."""

    mended: tuple[str, ...]
    bytes: int
    left: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class OtherCopy(Protocol):
    """Where whole files are to be had."""

    def refusal(self, file: Damaged) -> str:
        """Why it cannot have the file, as far as is seen without reading that; else empty."""

    def bring(self, file: Damaged, target: pathlib.Path) -> str:
        """Writes what it has to `target`, unchecked; says why where it cannot be read, else nothing."""


class FolderCopy:
    """The bank in another folder. What is in its manifest does not matter."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def refusal(self, file: Damaged) -> str:
        try:
            size = (self.root / file.name).stat().st_size
        except OSError as error:
            return f"it cannot be read there ({reason(error)})"
        return "" if size == file.bytes else f"it has {size} bytes there"

    def bring(self, file: Damaged, target: pathlib.Path) -> str:
        try:
            data = (self.root / file.name).read_bytes()
        except OSError as error:
            return f"it cannot be read there ({reason(error)})"
        target.write_bytes(data)
        return ""


class HubCopy:
    """The bank in a repository, at one commit. Its manifest says what it has before anything large comes."""

    def __init__(self, repo: str, revision: str | None = None) -> None:
        self.repo, self.commit = repo, commit_of(repo, revision)
        found = [file for file in listing(repo, self.commit, "bank") if file.name == f"bank/{MANIFEST}"]
        if not found:
            raise HubError(f"{repo} is not a memory model: it has no bank/{MANIFEST}", "Check the name.")
        with quiet(), tempfile.TemporaryDirectory() as folder:
            self.manifest = BankManifest.read(download(repo, self.commit, found[0], pathlib.Path(folder)))

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    def refusal(self, file: Damaged) -> str:
        return "" if digest_in(self.manifest, file.name) == file.sha256 else "it has another digest there"

    def bring(self, file: Damaged, target: pathlib.Path) -> str:
        wanted = RemoteFile(f"bank/{file.name}", file.bytes, file.sha256)
        with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
            os.replace(download(self.repo, self.commit, wanted, pathlib.Path(folder)), target)
        return ""


def repair(
    root: pathlib.Path,
    other: OtherCopy,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Mends what can be mended. A dry run changes nothing, and believes what the other copy says of itself.

    Where the other copy has none of the files, nothing is changed. Raises HubError or OutputError where a file
    cannot be had or written; nothing is changed then either. `progress` follows the check of this bank.
    """
    if dry_run:
        found = _damaged(MemoryBank.open(root), progress)
        return _result(root, found, {file: why for file in found if (why := other.refusal(file))}, other)
    with editing(root) as edit:
        found = _damaged(MemoryBank.open(root), progress)
        refused = {file: why for file in found if (why := other.refusal(file) or _stage(edit, file, other))}
    bank = MemoryBank.open(root)
    for file in found:
        if file not in refused and (what := bank.damage(file.name, file.bytes, file.sha256)):
            refused[file] = f"it {what} after it was mended"
    return _result(root, found, refused, other)


def _damaged(bank: MemoryBank, progress: Callable[[int, int], None] | None) -> list[Damaged]:
    rows = {name: (size, digest) for name, size, digest in bank.files()}
    return [Damaged(name, what, *rows[name]) for name, what in bank.damaged(progress)]


def _stage(edit: Edit, file: Damaged, other: OtherCopy) -> str:
    """Makes a file part of the edit; says why where the other copy does not have it, else nothing."""
    target = edit.file(file.name)
    why = other.bring(file, target)
    if not why and (target.stat().st_size, file_digest(target)) != (file.bytes, file.sha256):
        why = "it has another digest there"
    if why:
        target.unlink(missing_ok=True)
    return why


def _result(root: pathlib.Path, found: list[Damaged], refused: dict[Damaged, str], other: OtherCopy) -> Repaired:
    mended = [file for file in found if file not in refused]
    left = [f"{file.name} {file.what}; in {other} {why}" for file, why in refused.items()]
    left += beside_the_digests(MemoryBank.open(root))
    return Repaired(tuple(file.name for file in mended), sum(file.bytes for file in mended), tuple(left))
