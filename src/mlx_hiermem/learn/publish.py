"""The model folder: the anchor, the bank with its labels and sources, and the texts that the bank has learnt.

Everything is put together in the work folder and renamed to OUT in the end, so OUT is never half a model. Files
are linked there rather than copied; the work folder goes afterwards. The texts are kept, as tokens, for documents
that are added later: a block that learns something new forgets the old unless it learns that once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.block import MemoryBlock, block_name, write_block
from mlx_hiermem.bank.commit import FORGET, LEARNING, editing, interrupted
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry, in_order
from mlx_hiermem.bank.quantize import quantized
from mlx_hiermem.bank.sources import LeafSources
from mlx_hiermem.bank.writer import BankWriter, to_disk
from mlx_hiermem.config import GENERIC_NODE, AnchorIdentity, EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.errors import HierMemError, OutputError
from mlx_hiermem.files import replace_folder, restore_folder
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.encoding import EXAMPLES, TOGETHER
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.tree.build import descend
from mlx_hiermem.locks import locked
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree

ANCHOR, BANK = "anchor", "bank"  # folders of a model, beside LEARNING
Nodes = Mapping[str, Mapping[str, Any]]  # as nodes.json has them


@dataclass(frozen=True)
class About:
    """What a bank's manifest says beside its blocks."""

    anchor: AnchorIdentity
    embedder: EmbedderIdentity
    nodes: Nodes
    recipe: dict[str, Any] = field(default_factory=dict)
    licence: str = ""


def write_bank(
    folder: pathlib.Path,
    trainer: Trainer,
    tree: ClusterTree,
    about: About,
    sources: Iterable[LeafSources] | None = None,
) -> BankManifest:
    """Writes the trained blocks as the bank `folder`, and the windows that they were made of where there are any.

    Raises OutputError where the disk is full.
    """
    config, blocks, generic = trainer.config, dict[Path, BlockEntry](), None
    made_of = json.dumps([config.to_json(), about.recipe, about.anchor.to_json()], sort_keys=True)
    with BankWriter(folder, hashlib.sha256(made_of.encode()).hexdigest()) as writer:
        for node, weights in trainer.blocks():
            file = writer.write(block_name(node), stored(weights, config, str(node) or "generic"), config.dtype)
            if node != GENERIC_NODE:
                blocks[node] = entry(node, file, about.nodes)
            else:
                generic = file
        manifest = BankManifest(
            about.anchor,
            config,
            about.embedder,
            in_order(blocks),
            writer.write_tree(tree),
            generic,
            labels={
                node: about.nodes[str(node)]["label"]
                for level in range(1, tree.depth + 1)
                for node in tree.nodes(level)
                if node not in blocks and str(node) in about.nodes
            },
            recipe=about.recipe,
            licence=about.licence,
            sources=writer.write_sources(sources, tree) if sources is not None else None,
        )
        writer.finish(manifest)
    return manifest


def entry(node: Path, file: FileEntry, nodes: Nodes) -> BlockEntry:
    """A block's row of the table."""
    about = nodes.get(str(node), {})
    return BlockEntry(
        node,
        file.bytes,
        file.sha256,
        about.get("label", ""),
        about.get("documents", 0),
        about.get("tokens", 0),
        tuple(about.get("sources", ())),
    )


def stored(weights: Tensors, config: MemoryConfig, name: str) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """A block's tensors in the bank's dtype, as `write_block` takes them."""
    found = {}
    for part in config.widths:
        value = weights[part].astype(getattr(mx, config.dtype))
        if not mx.isfinite(value).all().item():
            raise HierMemError(
                f"block {name} has values that {config.dtype} cannot hold",
                "Learn with a lower training.rate.",
            )
        raw = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
        found[part] = (tuple(weights[part].shape), raw)
    return found


def write_as_stored(file: pathlib.Path, node: Path, weights: Tensors, config: MemoryConfig) -> FileEntry:
    """Writes a block as a bank stores those of its level, quantised where these are."""
    plain, how = stored(weights, config, str(node)), config.quantized(len(node))
    if how is None:
        return FileEntry(*write_block(file, plain, config.dtype))
    values = {name: weights[name].astype(getattr(mx, config.dtype)) for name in plain}
    return FileEntry(*write_block(file, *quantized(MemoryBlock(values, 0), how)))


def link(source: pathlib.Path, target: pathlib.Path) -> None:
    """A file or folder under a second name; a copy where the disk knows no links."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(source, target)


def _link_file(source: Any, target: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def publish(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Brings a whole model to disk and gives it its name."""
    to_disk(folder)
    os.rename(folder, out)


# The kept texts


def forget(root: pathlib.Path) -> int:
    """Drops the kept texts of leaves that were removed from a bank, unless another leaf has learnt them.

    Returns how many. The bank's note that this is to be done goes last: a process that dies leaves it. A removal
    that was killed when the note was there, but blocks were too, is carried out to its end first.
    """
    model, count = root.absolute().parent, 0
    if interrupted(root):
        with editing(root):
            pass
    kept = kept_texts(model)
    try:
        if kept.is_dir():
            with locked(model / LEARNING, "changing"):
                count = _drop(kept, MemoryBank.open(root).tree)
        (root / FORGET).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {kept}: {error.strerror or error}", "It still has texts of what was removed: delete it."
        ) from error
    return count


def _drop(kept: pathlib.Path, tree: ClusterTree) -> int:
    old, fewer = TrainingSet.open(kept), kept.with_name(f"{EXAMPLES}.fewer")
    with TrainingSetWriter(fewer) as out:
        for number, leaves in still_there(old, tree):
            out.add(old.read(number), leaves)
    count = len(old) - len(TrainingSet.open(fewer))
    replace_folder(fewer, kept)
    return count


def kept_texts(model: pathlib.Path) -> pathlib.Path:
    """The folder of the kept texts, which may not be there. Brings it back where a kill left it put aside."""
    kept = model / LEARNING / EXAMPLES
    restore_folder(kept)
    return kept


def still_there(old: TrainingSet, tree: ClusterTree) -> Iterator[tuple[int, list[Path]]]:
    """(number, leaves) of the kept texts whose leaves the tree has: what was removed is not to come back."""
    for number, leaves in enumerate(old.leaves_of()):
        if present := [leaf for leaf in leaves if tree.has(leaf)]:
            yield number, present


@dataclass(frozen=True)
class MovedTexts:
    """Which old texts go to a new leaf from now on, and so must be learnt there too."""

    tree: ClusterTree
    leaf: Path
    embedder: TextEmbedder
    tokenizer: Any

    def windows(self, old: TrainingSet) -> set[int]:
        """The windows of which some text goes there, by its prompt, or as a whole where all of it is learnt."""
        found = set[int]()
        for start in range(0, len(old), TOGETHER):
            examples = [old.read(number) for number in range(start, min(start + TOGETHER, len(old)))]
            firsts = [int(example.learn.argmax()) for example in examples]
            tokens = [
                e.tokens if first <= 1 else e.tokens[:first] for e, first in zip(examples, firsts, strict=True)
            ]
            texts = [self.tokenizer.decode(some.tolist(), skip_special_tokens=True) for some in tokens]
            levels, rows = descend(self.tree, self.embedder.embed(texts))
            for example, level, row in zip(examples, levels.tolist(), rows.tolist(), strict=True):
                if Path.of_row(row, level, self.tree.branching) == self.leaf:
                    found.add(example.window)
        return found
