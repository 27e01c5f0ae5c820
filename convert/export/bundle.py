"""What an app bundles beside the models: the bank, or a part of it, and the tokenizer.

Every block that is bundled is read and checked: on a phone it becomes float16, which does not hold all that float32
and bfloat16 do. The generic block stays behind, it is a control for experiments; so do blocks that are blocked. The
texts that the bank has learnt go along where that is asked for, but for those of leaves that stay behind.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import block_name, read_block
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, SourcesEntry
from mlx_hiermem.bank.policy import POLICY
from mlx_hiermem.bank.sources import write_sources
from mlx_hiermem.config import Path
from mlx_hiermem.convert.coreml.compress import HALF_MAX
from mlx_hiermem.errors import AnchorError, BankError, OutputError
from mlx_hiermem.files import file_digest
from mlx_hiermem.share.pull import find

BLOCKS = ("all", "level-1")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Choice:
    """Which blocks are bundled, which are listed for download, and where those lie (`url` ends with a slash).

    `sources`: whether the texts that their leaves have learnt are bundled, too.
    """

    bank: MemoryBank
    bundled: tuple[BlockEntry, ...]
    download: tuple[BlockEntry, ...]
    url: str = ""
    sources: bool = False

    @property
    def bytes(self) -> int:
        """Of the bundled blocks."""
        return sum(entry.bytes for entry in self.bundled)

    def warnings(self) -> list[str]:
        """What the user should know of what is left out."""
        if self.sources or not self.bank.manifest.sources:
            return []
        return [
            "the texts that the bank has learnt stay behind: the app routes by centroids, and names no sources "
            "(--with-sources takes them along)"
        ]

    def to_json(self) -> dict[str, Any]:
        """The manifest's `bank`."""
        return {
            "folder": "bank/",
            "remote": {"url": self.url} if self.url else None,
            "download": {
                block_name(entry.path): {"bytes": entry.bytes, "sha256": entry.sha256} for entry in self.download
            },
        }


def choose(
    bank: MemoryBank, blocks: str = "all", only: tuple[str, ...] = (), url: str = "", sources: bool = False
) -> Choice:
    """Bundles all blocks, those of level 1, or with `only` those of subtrees and above them.

    The others are for the app to download from `url`, or from where on the hub the bank came from. Where there is
    neither, `only` leaves them out, and a text that is routed there gets the memory of the levels above. What was
    changed or pulled by itself since it came from the hub is bundled in any case. Raises
    BankError for a subtree that does not exist, for blocks or sources that are not here, and where level 1 would be
    all there ever is.
    """
    origin = bank.remote.origin if bank.remote else None
    own = frozenset[Path]()
    if not url and origin:
        own = origin.subtrees  # what was changed here is noted among them, and the hub does not have it
        url = f"https://huggingface.co/{origin.repo}/resolve/{origin.revision}/bank/"
    url = url if not url or url.endswith("/") else f"{url}/"
    tops = find(bank.manifest, only)
    opened = [entry for node, entry in bank.manifest.blocks.items() if not bank.policy.blocker(node)]
    bundled = tuple(entry for entry in opened if entry.path in own or _wanted(entry.path, blocks, tops))
    paths = {entry.path for entry in bundled}
    rest = tuple(entry for entry in opened if entry.path not in paths)
    if rest and not url and not only:
        raise BankError(
            f"{len(rest)} blocks would be left to be downloaded, but from where is not known",
            "Say with --url where the bank's folder will lie.",
        )
    absent = [entry.path for entry in bundled if not (bank.root / block_name(entry.path)).is_file()]
    if absent:
        raise BankError(
            f"{len(absent)} of the blocks to bundle are not in {bank.root}, {absent[0]} for one",
            "Bring them with `hiermem bank pull`, or bundle fewer: --only, --blocks level-1.",
        )
    if sources and bank.sources is None:
        raise BankError(f"{bank.root} has no sources", "Export it without --with-sources.")
    return Choice(bank, bundled, rest if url else (), url, sources)


def _wanted(node: Path, blocks: str, tops: list[Path]) -> bool:
    if tops:
        return any(node[: len(top)] == top or top[: len(node)] == node for top in tops)
    return blocks == "all" or len(node) == 1


def write_bank(choice: Choice, folder: pathlib.Path, did: Callable[[], None]) -> None:
    """Copies the tree, the policy, the chosen blocks and sources; writes the manifest of what is left.

    `did` is called after each block. Raises BankError for a file that is not what the manifest says,
    and for values that float16 does not hold.
    """
    bank = choice.bank
    folder.mkdir(parents=True)
    _copy(bank, TREE, asdict(bank.manifest.tree), folder)
    if (bank.root / POLICY).is_file():
        shutil.copyfile(bank.root / POLICY, folder / POLICY)
    for entry in choice.bundled:
        name = block_name(entry.path)
        _copy(bank, name, {"bytes": entry.bytes, "sha256": entry.sha256}, folder)
        _check(bank, folder / name, entry.path)
        did()
    kept = {entry.path for entry in choice.bundled + choice.download}
    left = {node: entry for node, entry in bank.manifest.blocks.items() if node in kept}
    labels = {node: entry.label for node, entry in bank.manifest.blocks.items() if node not in left and entry.label}
    sources = _write_sources(bank, kept, folder) if choice.sources else None
    labels = bank.manifest.labels | labels
    manifest = replace(bank.manifest, blocks=left, labels=labels, generic=None, sources=sources)
    manifest.write(folder / MANIFEST)
    BankManifest.read(folder / MANIFEST)  # what an app's reader meets


def _write_sources(bank: MemoryBank, kept: set[Path], folder: pathlib.Path) -> SourcesEntry | None:
    """The windows of the leaves whose finest block is kept."""

    def stays(leaf: Path) -> bool:
        nodes = bank.nodes_on(leaf)
        return bool(nodes) and nodes[-1] in kept and not bank.policy.blocker(leaf)

    if bank.sources is None:
        return None
    found = (one for one in bank.sources.all() if stays(one.leaf))
    return write_sources(folder, found, bank.tree.branching, bank.tree.dim)


def _copy(bank: MemoryBank, name: str, row: Mapping[str, Any], folder: pathlib.Path) -> None:
    source, target = bank.root / name, folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError as error:
        raise BankError(f"{source} is missing", "Pull or convert the bank again.") from error
    if target.stat().st_size != row["bytes"] or file_digest(target) != row["sha256"]:
        raise BankError(
            f"{source} has changed: it is not what the manifest says", "`hiermem bank verify` tells more."
        )


def _check(bank: MemoryBank, file: pathlib.Path, node: Path) -> None:
    block = read_block(file, bank.config, len(node))
    for part in bank.config.widths:
        peak = float(np.abs(np.array(block.values(part).astype(mx.float32))).max())
        if not peak <= HALF_MAX:
            raise BankError(
                f"{part} of the block {node} reaches {peak:g}, the largest of float16 is {HALF_MAX:.0f}"
            )


def write_tokenizer(anchor: pathlib.Path, tokenizer: Any, folder: pathlib.Path) -> None:
    """The anchor's tokenizer, whose tokenizer.json apps read. Nothing where the anchor has none.

    Raises AnchorError for a tokenizer that cannot be written as tokenizer.json.
    """
    if tokenizer is None:
        return
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (anchor / name).is_file():
            shutil.copyfile(anchor / name, folder / name)
    if (folder / "tokenizer.json").is_file():
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise AnchorError(
            f"the tokenizer of {anchor} cannot be written as tokenizer.json", "Give the anchor a fast tokenizer."
        )
    backend.save(str(folder / "tokenizer.json"))


def check_out(out: pathlib.Path) -> None:
    """Raises OutputError where there is something at `out` already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists already", "Choose another folder, or remove it.")
