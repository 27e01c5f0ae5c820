"""Where a model is when it is named by its hub id: `org/name`, or `org/name@revision`.

A model that is used by its id is pulled lazily, once, into the cache folder; there it stays at the commit it was
pulled at, and is used without asking the hub again.
"""

from __future__ import annotations

import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_hiermem.anchor import read_config
from mlx_hiermem.assets import cache_folder
from mlx_hiermem.bank.bank import MANIFEST, TREE
from mlx_hiermem.bank.block import GENERIC_FILE, block_name
from mlx_hiermem.bank.hub import commit_of, download, listing, quiet, speaking
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.errors import AnchorError, HierMemError, HubError
from mlx_hiermem.files import read_json
from mlx_hiermem.share.pull import pull

HUB_ID = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*?)(?:@([\w./-]+))?")
PLAIN = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model"]  # what mlx-lm needs; no code


def resolve(name: str | pathlib.Path) -> pathlib.Path:
    """The folder of a model: `name` itself where it is one, else that of a hub id, downloaded if need be.

    Raises AnchorError where `name` is neither, HubError where the hub does not give it.
    """
    folder = pathlib.Path(name)
    if folder.is_dir():
        return folder
    repo, revision = hub_id(name)
    ours = home(name)
    if ours.is_dir():
        return ours
    if snapshot := _snapshot(repo, revision):
        return snapshot
    try:
        commit = commit_of(repo, revision)
    except HubError as error:
        raise HubError(f"there is no folder {name}, and {error.what}", error.hint) from error
    if not any(file.name == f"bank/{MANIFEST}" for file in listing(repo, commit, "bank")):
        return _plain(repo, revision)
    with _bar(repo) as progress:
        pull(repo, ours, commit, lazy=True, progress=progress)
    return ours


def hub_id(name: str | pathlib.Path) -> tuple[str, str | None]:
    """(repository, revision) of `org/name[@revision]`; AnchorError for anything else.

    A path into a folder that exists is a mistyped path, not a repository.
    """
    found = HUB_ID.fullmatch(str(name))
    if not found or pathlib.Path(found[1]).is_dir():
        raise AnchorError(
            f"there is no model at {name}", "`hiermem convert SRC OUT` makes one; org/name takes one from the hub."
        )
    return f"{found[1]}/{found[2]}", found[3]


def home(name: str | pathlib.Path) -> pathlib.Path:
    """Where a hub id's model is pulled to when it is used; the folder need not be there yet."""
    repo, revision = hub_id(name)
    return cache_folder() / "models" / (f"{repo}@{revision}" if revision else repo)


def peek(name: str) -> tuple[dict[str, Any], BankManifest | None, int]:
    """(anchor's config, manifest, anchor's bytes) of a model on the hub, which is not pulled for it."""
    repo, revision = hub_id(name)
    commit = commit_of(repo, revision)
    files = listing(repo, commit, "anchor", recursive=True) or listing(repo, commit)
    configs = [file for file in files if file.name in ("anchor/config.json", "config.json")]
    configs += [file for file in listing(repo, commit, "bank") if file.name == f"bank/{MANIFEST}"]
    weights = sum(f.bytes for f in files if re.fullmatch(r"(anchor/)?model[^/]*\.safetensors", f.name))
    with quiet(), tempfile.TemporaryDirectory() as temp:
        for file in configs:
            download(repo, commit, file, pathlib.Path(temp))
        folder = pathlib.Path(temp)
        bank = folder / "bank" / MANIFEST
        config = read_config(folder / "anchor" if (folder / "anchor").is_dir() else folder)
        return config, BankManifest.read(bank) if bank.is_file() else None, weights


def _snapshot(repo: str, revision: str | None) -> pathlib.Path | None:
    """A copy in huggingface_hub's own cache (`hf download`), if it is whole as far as one can tell."""
    from huggingface_hub import snapshot_download

    patterns = [*PLAIN, "anchor/*", "bank/*"]
    try:
        name = snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True)
        folder = pathlib.Path(name)
    except Exception:  # not there, or not whole: then the hub is asked, and says what is wrong
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a model's files are all there: config and weights, every shard of an index, every block of a bank.

    Somebody may have downloaded config.json alone, or bank.json.
    """
    anchor = folder / "anchor" if (folder / "anchor").is_dir() else folder
    index = anchor / "model.safetensors.index.json"
    try:
        if index.is_file():
            shards = set(read_json(index, AnchorError)["weight_map"].values())
            weights = bool(shards) and all((anchor / name).is_file() for name in shards)
        else:
            weights = any(anchor.glob("model*.safetensors"))
        if not (anchor / "config.json").is_file() or not weights:
            return False
        if not (folder / "bank").is_dir():
            return True
        manifest = BankManifest.read(folder / "bank" / MANIFEST)
    except (HierMemError, KeyError, TypeError, AttributeError):
        return False
    names = [TREE, *(block_name(node) for node in manifest.blocks), *([GENERIC_FILE] if manifest.generic else [])]
    return all((folder / "bank" / name).is_file() for name in names)


def _plain(repo: str, revision: str | None) -> pathlib.Path:
    """A model without a bank, in huggingface_hub's cache, where mlx-lm would keep it too."""
    from huggingface_hub import snapshot_download

    with speaking(repo, revision):
        return pathlib.Path(snapshot_download(repo, revision=revision, allow_patterns=PLAIN))


@contextmanager
def _bar(repo: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar where somebody sees it: loading by id may take minutes, the first time."""
    from huggingface_hub.utils import tqdm

    with tqdm(
        unit="B", unit_scale=True, desc=f"pulling {repo}", disable=not sys.stderr.isatty(), leave=False
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
