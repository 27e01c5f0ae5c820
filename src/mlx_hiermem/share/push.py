"""Pushing a memory model to the hub: anchor/, bank/ and a model card, checked before anything leaves.

Pushing again makes a new commit of the same repository; old ones stay reachable by their hash, and whoever
pulled one keeps it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import EDIT, MANIFEST, MemoryBank
from mlx_hiermem.bank.check import check
from mlx_hiermem.bank.commit import FORGET, STAGING
from mlx_hiermem.bank.hub import quiet, speaking
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.bank.remote import FETCHED, REMOTE
from mlx_hiermem.bank.sources import INDEX_FILE, WINDOWS_FILE
from mlx_hiermem.errors import AnchorError, BankError, HubError
from mlx_hiermem.files import read_text, write_text

UPLOADED = ["anchor/*", "bank/*", "README.md", "LICENSE*"]
# What is this machine's business: where blocks came from, and changes half made.
NOT_UPLOADED = [f"bank/{name}" for name in (REMOTE, FETCHED, f"{EDIT}/*", f"{STAGING}/*", FORGET)]
NOT_UPLOADED += ["*.partial", "*.partial/*", "*/.*"]
REPLACED = ["anchor/*", "bank/*"]  # what lies there and is not pushed goes
NO_TOKEN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."
MARK = "<!-- written by `hiermem bank push`; without this line the next push leaves your text alone -->"
SOURCES_SHOWN = 12
# The hub's identifiers of the licences that a bank is likely to name; anything else is "other" with its name.
LICENCES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "odc-by")
ALIASES = {"cc0": "cc0-1.0", "apache 2.0": "apache-2.0", "cc by 4.0": "cc-by-4.0", "cc by-sa 4.0": "cc-by-sa-4.0"}

CARD = """\
---
{metadata}
---
{mark}

# {name}

A language model with hierarchical memories: a small anchor that is always in use, and a bank of memory blocks of
which each question fetches a few ([arXiv:2510.02375](https://arxiv.org/abs/2510.02375)). It runs with
[MLX](https://github.com/ml-explore/mlx) on Apple silicon, and on Linux.

```
pip install mlx-hiermem
hiermem chat {repo}
```

Blocks are downloaded when a question first needs them. `hiermem bank pull {repo} FOLDER` brings all of
them, `--only LABEL` a subtree with what is above it.

```python
from mlx_hiermem import load

model = load("{repo}")
print(model.chat("What is the capital of Laos?"))
```

## Design

| | |
|---|---|
| anchor | {anchor.name}: {anchor.layers} layers, hidden size {anchor.hidden}, weights {anchor.weights_digest:.12} |
| memory | {memory.kind}, in {carriers} layers, {units} units a block at levels 1–{memory.depth} |
| stored as | {memory.precision} |
| tree | {memory.branching} children a node, {memory.depth} levels, routed by {embedder} |
| bank | {blocks} blocks, {parameters:,} parameters, {bytes:,} bytes |
| fetched | {fetched:,} parameters for a question that reaches the deepest level |

## Sources

{sources}

## Limits

- A memory raises the chance of a right answer; it is no lookup. What is generated must be checked.
- Sources say which documents a block was trained on. They are no citation of an answer.
- Routing sees the question alone, by an English sentence embedder: another language or an unusual wording may
  fetch the wrong blocks.
- Removing a block removes its bytes; blocks above it, and the anchor, may still know what it knew.
- Licence of the memories: {licence}. The anchor has its own, see `anchor/` and its publisher.
"""


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
    if not file.is_file() or MARK in read_text(file):
        write_text(file, model_card(repo, manifest))


# The model card: what it is, how to use it, where its memories come from, its limits


def model_card(repo: str, manifest: BankManifest) -> str:
    """The whole README.md, metadata for the hub included."""
    memory, totals = manifest.memory, manifest.totals()
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in _metadata(manifest).items()),
        mark=MARK,
        name=repo.rpartition("/")[2],
        repo=repo,
        anchor=manifest.anchor,
        memory=memory,
        carriers=len(memory.layers),
        units=", ".join(map(str, memory.block_sizes)),
        embedder=manifest.embedder.name,
        blocks=totals["blocks"],
        parameters=totals["parameters"],
        bytes=totals["bytes"],
        fetched=totals["fetched_parameters"],
        sources=_sources(manifest),
        licence=manifest.licence or "not stated",
    )


def _metadata(manifest: BankManifest) -> dict[str, Any]:
    """The card's YAML head. Values are JSON, which YAML includes."""
    licence = manifest.licence.strip().lower()
    licence = ALIASES.get(licence, licence)
    data: dict[str, Any] = {"library_name": "mlx-hiermem", "pipeline_tag": "text-generation"}
    data["tags"] = ["mlx", "mlx-hiermem", "hierarchical-memory"]
    if licence in LICENCES:
        data["license"] = licence
    elif licence:
        data |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence).strip("-")}
    if manifest.anchor.name.count("/") == 1:
        data["base_model"] = manifest.anchor.name
    return data


def _sources(manifest: BankManifest) -> str:
    """Documents and tokens of level 1 (every document is in one of its blocks), and the commonest sources."""
    top = min((len(node) for node in manifest.blocks), default=0)
    entries = [entry for node, entry in manifest.blocks.items() if len(node) == top]
    documents, tokens = sum(e.documents for e in entries), sum(e.tokens for e in entries)
    lines = [f"{number:,} {what}." for number, what in ((documents, "documents"), (tokens, "tokens")) if number]
    counts = Counter(source for entry in manifest.blocks.values() for source in entry.sources)
    if counts:
        shown = ", ".join(source for source, _ in counts.most_common(SOURCES_SHOWN))
        more = ", …" if len(counts) > SOURCES_SHOWN else ""
        lines.append(f"{len(counts):,} sources, all of them in `bank/bank.json`: {shown}{more}")
    if kept := manifest.sources:
        lines.append(f"{kept.windows:,} passages of them are in `bank/sources/`, by which an answer is traced.")
    return "\n".join(lines) or "The bank does not name its sources."
