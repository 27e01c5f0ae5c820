"""Pushing a memory model to the hub: anchor/, bank/ and a model card, checked before anything leaves.

Pushing again makes a new commit of the same repository; old ones stay reachable by their hash, and whoever
pulled one keeps it.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import EDIT, MANIFEST, MemoryBank
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.commit import FORGET
from mlx_hiermem.bank.hub import quiet, speaking
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.remote import FETCHED, REMOTE
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.errors import AnchorError, BankError, HubError
from mlx_hiermem.files import read_text, write_text
from mlx_hiermem.share import card

UPLOADED = ["anchor/*", "bank/*", "README.md", "LICENSE*"]
NOT_UPLOADED = [f"bank/{REMOTE}", f"bank/{FETCHED}", f"bank/{EDIT}/*", f"bank/{FORGET}", "*.partial", "*/.*"]
REPLACED = ["anchor/*", "bank/*"]  # what lies there and is not pushed goes
NO_TOKEN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."


@dataclass(frozen=True)
class Pushed:
    """The commit that a push made, and where it can be seen."""

    repo: str
    branch: str
    commit: str
    url: str
    blocks: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    folder: pathlib.Path,
    repo: str,
    branch: str = "main",
    private: bool = False,
    message: str = "",
    with_sources: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Uploads a whole model. `private` makes a new repository private, and refuses a public one.

    `with_sources` says whether the texts that the bank keeps go too; where it keeps some, it must be said.
    `progress` follows the check of the digests; huggingface_hub shows the upload on a terminal. Raises BankError
    where the model is damaged or not whole, HubError where the hub or its repository stands against it.
    """
    from huggingface_hub import HfApi, get_token

    if repo.count("/") != 1:
        raise HubError(f"'{repo}' is no repository id", "Write organisation/name.")
    if not get_token():
        raise HubError("no token for the hub is at hand", NO_TOKEN)
    bank = _checked(folder, with_sources, progress)
    totals = bank.manifest.totals()
    api = HfApi()
    manifest = bank.manifest if with_sources else replace(bank.manifest, sources=None)
    with speaking(repo, branch), quiet(bars=sys.stderr.isatty()):
        head = _make_ready(api, repo, branch, private)
        _write_card(folder, repo, manifest)
        with _shared(folder, bank, manifest) as shared:
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=shared,
                revision=branch,
                commit_message=message or f"{totals['blocks']} memory blocks for {bank.manifest.anchor.name}",
                parent_commit=head,
                allow_patterns=UPLOADED,
                ignore_patterns=list(NOT_UPLOADED),
                delete_patterns=REPLACED,
            )
    return Pushed(repo, branch, commit.oid, commit.commit_url, totals["blocks"], totals["bytes"])


def _checked(
    folder: pathlib.Path, with_sources: bool | None, progress: Callable[[int, int], None] | None
) -> MemoryBank:
    """The bank of a model that is whole and sound."""
    if not (folder / "anchor").is_dir():
        raise AnchorError(f"there is no anchor/ in {folder}", "Push a model folder, with anchor/ and bank/.")
    bank = MemoryBank.open(folder / "bank")
    bank.manifest.check_anchor(identify(folder / "anchor"))
    if bank.manifest.sources and with_sources is None:
        raise BankError(
            f"{folder} keeps the texts that it has learnt",
            "Say whether they go too: --with-sources or --no-sources.",
        )
    left = () if with_sources else (WINDOWS_FILE, INDEX_FILE)
    missing = [name for name, _, _ in bank.files() if name not in left and not (bank.root / name).is_file()]
    if missing and bank.remote:
        raise BankError(
            f"{len(missing)} of the bank's files are on the hub, not here (the first is {missing[0]})",
            f"`hiermem bank pull {bank.remote.origin.repo} {folder}` brings them.",
        )
    for problem in check(bank, progress):
        raise BankError(f"not pushed, {folder} is damaged: {problem}", "`hiermem bank verify` says what else is.")
    return bank


@contextlib.contextmanager
def _shared(folder: pathlib.Path, bank: MemoryBank, manifest: BankManifest) -> Iterator[pathlib.Path]:
    """The folder that is uploaded: the model's own, or one of links to it without sources, with that manifest."""
    if bank.manifest.sources == manifest.sources:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hiermem-push-") as name:
        shared = pathlib.Path(name)
        for file in [*folder.glob("*"), *folder.glob("anchor/**/*"), *folder.glob("bank/**/*")]:
            path = file.relative_to(folder)
            if file.is_file() and path.as_posix() not in (
                f"bank/{MANIFEST}",
                f"bank/{WINDOWS_FILE}",
                f"bank/{INDEX_FILE}",
            ):
                (shared / path).parent.mkdir(parents=True, exist_ok=True)
                (shared / path).symlink_to(file.resolve())
        manifest.write(shared / "bank" / MANIFEST)
        yield shared


def _make_ready(api: Any, repo: str, branch: str, private: bool) -> str:
    """Makes repository and branch where they are missing; returns the commit that the push is to follow."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        is_private = api.model_info(repo, expand=["private"], timeout=10.0).private
        if private and not is_private:
            raise HubError(f"{repo} exists and is public", "Push to another name, or make it private on the hub.")
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private)
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
    head = str(api.model_info(repo, revision=branch, expand=["sha"]).sha)
    names = set(api.list_repo_files(repo, revision=head)) - {".gitattributes", "README.md", "LICENSE"}
    if names and f"bank/{MANIFEST}" not in names:
        raise HubError(f"{repo} exists and holds something else ({min(names)})", "Push to another name.")
    return head


def _write_card(folder: pathlib.Path, repo: str, manifest: BankManifest) -> None:
    """Writes README.md, unless a person has written one."""
    file = folder / "README.md"
    if not file.is_file() or card.MARK in read_text(file):
        write_text(file, card.text(repo, manifest))
