"""Pulling a memory model from the hub, whole or in part.

Everything arrives in a sibling, `<name>.partial`, which is renamed when it is complete: an interrupted pull
leaves it, and the same pull goes on there. More of a model that is here already is added in place, a file at a
time; each file takes its place only after its digest was right.
"""

from __future__ import annotations

import fnmatch
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MANIFEST, TREE
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.hub import RemoteFile, commit_of, download, listing, quiet
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.policy import POLICY
from mlx_hiermem.bank.receipt import RECEIPT
from mlx_hiermem.bank.remote import REMOTE, Origin
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError, HubError, OutputError
from mlx_hiermem.files import partial_name, to_disk, writing
from mlx_hiermem.locks import locked
from mlx_hiermem.progress import Progress

WORKERS = 8  # downloads at a time: blocks are small, and most of a small download is waiting
INCOMING = ".incoming"
# What a pull may bring, beside the bank's own files. Nothing that Python, a shell or a browser would run.
ANCHOR = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE", "NOTICE")
TEXTS = ("README", "README.md", "README.txt", "LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class Pulled:
    """What a pull brought, and what it left on the hub."""

    repo: str
    revision: str
    folder: str
    files: int  # here now, the pulled ones
    bytes: int
    blocks: int
    remote_blocks: int
    remote_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pull(
    repo: str,
    out: pathlib.Path,
    revision: str | None = None,
    only: Sequence[str] = (),
    lazy: bool = False,
    tree_only: bool = False,
    disk_budget: int | None = None,
    sources: bool = True,
    progress: Progress | None = None,
) -> Pulled:
    """Pulls a model into `out`, or more of it where `out` was pulled from the same commit before.

    `only` names subtrees by path or by words of a label; their ancestors' blocks come too. `lazy` brings the
    anchor and level 1, `tree_only` just manifest and tree. Blocks that stay behind are fetched when a path
    first needs them, and take at most `disk_budget` bytes. `sources` are the texts that the bank
    keeps, all of them. Raises HubError, BankError or OutputError.
    """
    before = Origin.read(out / "bank")
    if out.exists() and (before is None or before.repo != repo):
        raise OutputError(f"{out} exists already and was not pulled from {repo}", "Choose another folder.")
    commit = commit_of(repo, revision or (before.revision if before else None))
    if before and commit != before.revision:
        raise OutputError(
            f"{out} holds revision {before.revision[:12]} of {repo}, not {commit[:12]}",
            "Pull that into another folder, or leave the revision out to add to this one.",
        )
    folder = out if before else partial_name(out)
    fresh = not folder.exists()
    with _alone_in(folder), quiet():
        if not before:
            _take_over(folder, Origin(repo, commit))
        origin = Origin(repo, commit, disk_budget_bytes=disk_budget)
        try:
            pulled = _fill(folder, origin, only, lazy, tree_only, sources, progress)
        except BankError:
            if fresh:  # no interruption: the same pull would fail again
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder / INCOMING, ignore_errors=True)
        if not before:
            to_disk(folder)
            os.rename(folder, out)
    return Pulled(repo, commit, str(out), *pulled)


def _fill(
    folder: pathlib.Path,
    origin: Origin,
    only: Sequence[str],
    lazy: bool,
    tree_only: bool,
    sources: bool,
    progress: Progress | None,
) -> tuple[int, int, int, int, int]:
    """Downloads what was asked for; returns Pulled's figures."""
    bank = folder / "bank"
    before = Origin.read(bank) or origin
    manifest = _manifest(folder, before)
    every = frozenset(range(1, manifest.memory.depth + 1))
    part = bool(only or lazy or tree_only)
    wanted = Origin(
        origin.repo,
        origin.revision,
        levels=every if not part else frozenset({1}) if lazy else frozenset(),
        subtrees=frozenset(find(manifest, only)),
        generic=not part,
        disk_budget_bytes=origin.disk_budget_bytes,
    )
    origin = before.with_more(wanted)
    files = [RemoteFile(f"bank/{TREE}", manifest.tree.bytes, manifest.tree.sha256)]
    if origin.generic and manifest.generic:
        files.append(RemoteFile(f"bank/{GENERIC_FILE}", manifest.generic.bytes, manifest.generic.sha256))
    blocks = [entry for node, entry in manifest.blocks.items() if origin.keeps(node)]
    files += [RemoteFile(f"bank/{block_name(entry.path)}", entry.bytes, entry.sha256) for entry in blocks]
    if sources and not tree_only and (kept := manifest.sources):
        files += [RemoteFile(f"bank/{WINDOWS_FILE}", kept.texts.bytes, kept.texts.sha256)]
        files += [RemoteFile(f"bank/{INDEX_FILE}", kept.index.bytes, kept.index.sha256)]
    if not tree_only:
        files += _beside_the_bank(origin)
    _download(folder, origin, files, progress)
    if not tree_only:
        manifest.check_anchor(identify(folder / "anchor"))
    origin.write(bank)
    left = sum(entry.bytes for entry in manifest.blocks.values()) - sum(entry.bytes for entry in blocks)
    return len(files), sum(file.bytes for file in files), len(blocks), len(manifest.blocks) - len(blocks), left


def _manifest(folder: pathlib.Path, origin: Origin) -> BankManifest:
    """The manifest that is here (it may have been edited since), else the hub's with what is beside it."""
    file = folder / "bank" / MANIFEST
    if not file.is_file():
        names = (f"bank/{POLICY}", f"bank/{MANIFEST}", f"bank/{RECEIPT}")
        wanted = [remote for remote in listing(origin.repo, origin.revision, "bank") if remote.name in names]
        if names[1] not in [remote.name for remote in wanted]:
            raise HubError(f"{origin.repo} is not a memory model: it has no {names[1]}", "Check the name.")
        _download(folder, origin, wanted)
    return BankManifest.read(file)


def _beside_the_bank(origin: Origin) -> list[RemoteFile]:
    """The anchor, the model card and the licence: files of the kinds that are read here, and no others."""
    anchor = listing(origin.repo, origin.revision, "anchor", recursive=True)
    if not anchor:
        raise HubError(f"{origin.repo} is not a memory model: it has no anchor/", "Check the name.")
    texts = [file for file in listing(origin.repo, origin.revision) if _is_one_of(file, TEXTS)]
    return texts + [file for file in anchor if _is_one_of(file, ANCHOR)]


def _is_one_of(file: RemoteFile, patterns: Iterable[str]) -> bool:
    name = pathlib.PurePosixPath(file.name).name
    return not name.startswith(".") and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def find(manifest: BankManifest, terms: Iterable[str]) -> list[Path]:
    """The topmost nodes that the terms name: a path such as 2.1, or words of a label in any case.

    Raises BankError for a term that names nothing.
    """
    labels = {prefix: "" for node in manifest.blocks for prefix in node.prefixes()}
    labels |= manifest.labels | {node: entry.label for node, entry in manifest.blocks.items()}
    found: list[Path] = []
    for term in terms:
        matches = [node for node in labels if _named(term, node, labels[node])]
        if not matches:
            some = ", ".join(f"“{label}”" for label in sorted({label for label in labels.values() if label})[:6])
            raise BankError(
                f"nothing in the bank is called '{term}'", f"Labels are, for instance: {some}." * bool(some)
            )
        found += matches
    return [node for node in found if not set(found).intersection(node.prefixes()[:-1])]


def _named(term: str, node: Path, label: str) -> bool:
    try:
        return Path.parse(term) == node
    except HierMemError:
        return bool(re.search(rf"(?<!\w){re.escape(term.strip())}(?!\w)", label, re.IGNORECASE))


def _download(
    folder: pathlib.Path, origin: Origin, files: Sequence[RemoteFile], progress: Progress | None = None
) -> None:
    """Brings the files that are not here, several at a time. The first that fails stops the others."""
    missing = [file for file in files if not file.is_at(folder / file.name)]
    need, free = sum(file.bytes for file in missing), shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            f"{need / 1e9:.2f} GB are to come, the disk of {folder} has {free / 1e9:.2f} GB free",
            "Free some space, or pull a part with --only or --lazy.",
        )
    total = sum(file.bytes for file in files)
    meter = _Meter(total - need, total, progress)

    def bring(file: RemoteFile) -> None:
        with meter.of(file.bytes) as count:
            came = download(origin.repo, origin.revision, file, folder / INCOMING, count)
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(came, target)

    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for done in as_completed([pool.submit(bring, file) for file in missing]):
                done.result()
        except BaseException:
            meter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _StoppedError(Exception):
    """Ends a download that nobody waits for any more."""


class _Meter:
    """Adds up what several downloads report. Their reports are not exact: retries, and Xet counts twice."""

    def __init__(self, done: int, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress, self.stopped = done, total, progress, False
        self._mutex = threading.Lock()

    @contextmanager
    def of(self, size: int) -> Iterator[Callable[[int], None]]:
        """A callback for one file of that size; when it is through, the file counts in full."""
        arrived = 0

        def count(more: int) -> None:
            nonlocal arrived
            if self.stopped:
                raise _StoppedError
            before, arrived = arrived, max(0, min(arrived + more, size))
            self._add(arrived - before)

        yield count
        self._add(size - arrived)

    def _add(self, more: int) -> None:
        with self._mutex:
            self.done += more
            if self.progress:
                self.progress(self.done, self.total)


def _take_over(folder: pathlib.Path, origin: Origin) -> None:
    """Goes on with an interrupted pull of the same commit; clears away one of another.

    Raises OutputError where the folder is something else's.
    """
    before = Origin.read(folder / "bank")
    # Killed before its first file had its name, a pull leaves a bank/ with at most a part of that file.
    begun = {"bank", f"bank/{REMOTE}", f"bank/{partial_name(pathlib.Path(REMOTE)).name}"}
    if not before and not {file.relative_to(folder).as_posix() for file in folder.rglob("*")} <= begun:
        raise OutputError(f"something else is being written to {folder}", "End it, or remove that folder.")
    if before and (before.repo, before.revision) != (origin.repo, origin.revision):
        for child in folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    (folder / "bank").mkdir(exist_ok=True)
    origin.write(folder / "bank")


@contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from pulling into the same folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "pulling into"):
            yield
