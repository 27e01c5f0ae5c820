"""The third tier of a bank: blocks that are on the model hub until a path first needs them.

`remote.json` beside bank.json says where a bank came from (a repository and one commit of it) and which blocks
were asked for. Others are fetched on first use, noted in fetched.txt, and may be deleted again: least recently used
first, once they exceed the disk budget. When a block was last used is its file's modification time, which outlives
the process.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry
from mlx_hiermem.config import GENERIC_NODE, Path
from mlx_hiermem.errors import BankError, HubError
from mlx_hiermem.files import MALFORMED, read_json, reason, write_json

REMOTE = "remote.json"
FETCHED = "fetched.txt"  # a line for each block that was fetched on first use: sha256 and name


@dataclass(frozen=True)
class Origin:
    """What remote.json holds. `levels` and `subtrees` are the blocks that were pulled, and that stay."""

    repo: str
    revision: str  # always a commit
    levels: frozenset[int] = frozenset()
    subtrees: frozenset[Path] = frozenset()
    generic: bool = False
    disk_budget_bytes: int | None = None  # of the blocks fetched on first use; None: no bound

    def keeps(self, node: Path) -> bool:
        """Whether a block was pulled: by its level, or in a subtree or above one. The empty path is generic."""
        if not node:
            return self.generic
        nodes = self.subtrees
        return len(node) in self.levels or any(node[: len(s)] == s or s[: len(node)] == node for s in nodes)

    def with_more(self, other: Origin) -> Origin:
        """This one with what another pull of the same commit brings; its budget, where it sets one."""
        budget = self.disk_budget_bytes if other.disk_budget_bytes is None else other.disk_budget_bytes
        return replace(
            self,
            levels=self.levels | other.levels,
            subtrees=self.subtrees | other.subtrees,
            generic=self.generic or other.generic,
            disk_budget_bytes=budget,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "revision": self.revision,
            "levels": sorted(self.levels),
            "subtrees": [str(path) for path in sorted(self.subtrees)],
            "generic": self.generic,
            "disk_budget_bytes": self.disk_budget_bytes,
        }

    def write(self, bank: pathlib.Path) -> None:
        """Writes remote.json into a bank's folder, whole or not at all."""
        write_json(bank / REMOTE, self.to_json(), indent=1)

    @classmethod
    def read(cls, bank: pathlib.Path) -> Origin | None:
        """A bank's origin; None where it is not from the hub. Raises BankError for a damaged file."""
        file = bank / REMOTE
        if not file.is_file():
            return None
        data: Mapping[str, Any] = read_json(file, BankError, "Pull the bank again.")
        try:
            return cls(
                repo=str(data["repo"]),
                revision=str(data["revision"]),
                levels=frozenset(data["levels"]),
                subtrees=frozenset(map(Path.parse, data["subtrees"])),
                generic=bool(data["generic"]),
                disk_budget_bytes=data["disk_budget_bytes"],
            )
        except MALFORMED as error:
            raise BankError(f"cannot read {file}: {error!r}", "Pull the bank again.") from error


def node_of(name: str) -> Path:
    """The inverse of `block_name`: blocks/10/7.safetensors -> (10, 7). The generic block has its own."""
    path = name.removesuffix(".safetensors").removeprefix("blocks/")
    return Path(map(int, path.split("/"))) if name.startswith("blocks/") else GENERIC_NODE


class RemoteTier:
    """Brings the blocks of one bank. `fetches` and `bytes` count what it brought since it was made.

    Several threads may bring blocks at once; only the downloads themselves run side by side.
    """

    def __init__(self, bank: pathlib.Path, origin: Origin) -> None:
        self.bank, self.origin = bank, origin
        self.fetches, self.bytes = 0, 0
        self._mutex = threading.RLock()
        self._stamp = 0
        self._read: BankManifest | None = None  # bank.json as it was at that time stamp

    def bring(self, node: Path, name: str) -> None:
        """Returns once the file `name` of a node is there, downloaded and checked where it was not.

        Raises BankError where it is not here and cannot be had, or was removed since the bank was opened.
        """
        file = self.bank / name
        if os.path.isfile(file):
            self._touch(name)
            return
        try:
            entry = self._entry(node)
        except OSError as error:
            raise BankError(f"cannot read {self.bank}: {reason(error)}", "Is its drive there?") from error
        if entry is None:
            raise BankError(f"the bank has no {_called(node)} any more", "It was removed; open the bank again.")
        try:
            self._download(name, entry)
        except HubError as error:
            get = f"hiermem bank pull {self.origin.repo} {self.bank.parent}" + (f" --only {node}" if node else "")
            raise BankError(
                f"the {_called(node)} is not on this machine, and did not come: {error.what}",
                f"`{get}` brings it to stay, once the hub answers.",
            ) from error
        except OSError as error:
            raise BankError(f"cannot keep a fetched block in {self.bank}: {error.strerror}") from error
        if self._entry(node) is None:  # removed in the meantime: its bytes must not come back
            file.unlink(missing_ok=True)
            raise BankError(f"the bank has no {_called(node)} any more", "It was removed; open the bank again.")
        with self._mutex:
            self.fetches, self.bytes = self.fetches + 1, self.bytes + entry.bytes
            if self.origin.disk_budget_bytes is not None and not self.origin.keeps(node):
                self._make_room(name, entry.bytes, self.origin.disk_budget_bytes)

    def _download(self, name: str, entry: FileEntry | BlockEntry) -> None:
        from mlx_hiermem.bank.hub import RemoteFile, download, probe, quiet

        wanted = RemoteFile(f"bank/{name}", entry.bytes, entry.sha256)
        repo, commit, file = self.origin.repo, self.origin.revision, self.bank / name
        with quiet(), tempfile.TemporaryDirectory(dir=self.bank, prefix=".fetching-") as folder:
            probe(repo, commit, wanted.name)
            came = download(repo, commit, wanted, pathlib.Path(folder))
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(came, file)
        with (self.bank / FETCHED).open("a", encoding="utf-8") as log:
            log.write(f"{entry.sha256}  {name}\n")

    def _touch(self, name: str) -> None:
        """Notes that a block was used now, where the disk budget may ask for it."""
        if self.origin.disk_budget_bytes is None:
            return
        with self._mutex:
            if name in self._fetched:
                self._fetched[name] = self._fetched.pop(name)
                with contextlib.suppress(FileNotFoundError):  # another thread made room
                    os.utime(self.bank / name)

    def _make_room(self, name: str, size: int, budget: int) -> None:
        """Counts a block in, and deletes others until the budget is kept. It stays itself: it is needed now."""
        self._fetched.pop(name, None)
        self._fetched[name] = size
        for other in list(self._fetched)[:-1]:
            if sum(self._fetched.values()) <= budget:
                break
            (self.bank / other).unlink(missing_ok=True)
            del self._fetched[other]

    @cached_property
    def _fetched(self) -> dict[str, int]:
        """File name -> bytes of the blocks that may be deleted, least recently used first.

        They are the hub's still: a block that was added or changed here is nowhere else, and not among them.
        """
        try:
            lines = (self.bank / FETCHED).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        rows = set()
        for sha256, _, name in (line.partition("  ") for line in lines if line.endswith(".safetensors")):
            node, file = node_of(name), self.bank / name
            entry = self._entry(node)
            if entry and entry.sha256 == sha256 and file.is_file() and not self.origin.keeps(node):
                rows.add((file.stat().st_mtime_ns, name, entry.bytes))
        return {name: size for _, name, size in sorted(rows)}

    def _entry(self, node: Path) -> BlockEntry | FileEntry | None:
        """The node's row in bank.json as it is now, which another process may have edited."""
        file = self.bank / "bank.json"
        stamp = file.stat().st_mtime_ns
        with self._mutex:
            if self._read is None or stamp != self._stamp:
                self._read, self._stamp = BankManifest.read(file), stamp
            return self._read.blocks.get(node) if node else self._read.generic


def _called(node: Path) -> str:
    return f"block {node}" if node else "generic block"
