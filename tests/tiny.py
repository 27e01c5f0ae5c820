"""Tiny random anchors and banks for tests: real files, real formats, milliseconds to make."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_hiermem import load
from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MANIFEST, TREE, MemoryBank
from mlx_hiermem.bank.block import GENERIC_FILE, block_name, write_block
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry, FileEntry, order
from mlx_hiermem.bank.sources import LeafSources, SourceWindow, write_sources
from mlx_hiermem.config import EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.files import file_digest
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.tree import ClusterTree

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONFIG = MemoryConfig("ffn", 3, (4, 2), (1, 3), 32, dtype="float32", ffn_width=64, q_width=32, kv_width=16)


def make_anchor(folder: pathlib.Path, seed: int = 0, config: Mapping[str, Any] = LLAMA) -> pathlib.Path:
    """A random llama of 4 layers with a byte tokenizer and a chat template."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(seed)
    folder.mkdir(parents=True)
    model = Model(ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 259}))
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: pathlib.Path) -> None:
    """256 byte tokens, and <eos> as id 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {"<a>": 256, "<b>": 257, "<c>": 258}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def random_tree(config: MemoryConfig, seed: int = 0, absent: tuple[str, ...] = ()) -> ClusterTree:
    """A tree of 384-d unit centroids; `absent` nodes (and so what is below them) are missing."""
    rng, k = np.random.default_rng(seed), config.branching
    centroids, present = [], []
    for level in range(1, config.depth + 1):
        c = rng.standard_normal((k ** (level - 1), k, 384)).astype(np.float32)
        centroids.append(c / np.linalg.norm(c, axis=-1, keepdims=True))
        p = np.ones((k ** (level - 1), k), dtype=bool)
        for path in map(Path.parse, absent):
            if len(path) == level:
                p[Path(path[:-1]).row(k), path[-1]] = False
        present.append(p)
    return ClusterTree(centroids, present)


def make_bank(
    folder: pathlib.Path,
    anchor: pathlib.Path,
    config: MemoryConfig = CONFIG,
    absent: tuple[str, ...] = (),
    seed: int = 0,
) -> pathlib.Path:
    """A bank with a random block for every node of the tree, and a generic block of the fetched size."""
    rng = np.random.default_rng(seed)

    def block(file: pathlib.Path, units: int) -> tuple[int, str]:
        arrays = {
            name: rng.standard_normal(shape).astype(np.float32) * 0.3
            for name, shape in config.shapes(units).items()
        }
        return write_block(file, {name: (array.shape, array) for name, array in arrays.items()}, "float32")

    folder.mkdir(parents=True)
    tree = random_tree(config, seed, absent)
    tree.save(folder / TREE)
    blocks = {}
    for level, units in enumerate(config.block_sizes, 1):
        for path in tree.nodes(level) if units else ():
            blocks[path] = BlockEntry(path, *block(folder / block_name(path), units), label=f"topic {path}")
    generic = FileEntry(*block(folder / GENERIC_FILE, config.fetched_size))
    tree_entry = FileEntry((folder / TREE).stat().st_size, file_digest(folder / TREE))
    embedder = EmbedderIdentity("all-MiniLM-L6-v2", "", 256)
    manifest = BankManifest(
        identify(anchor), dataclasses.replace(config), embedder, blocks, tree_entry, generic, licence="CC0"
    )
    manifest.write(folder / MANIFEST)
    return folder


def make_model(folder: pathlib.Path, config: MemoryConfig = CONFIG, absent: tuple[str, ...] = ()) -> pathlib.Path:
    """A whole memory model: anchor/ and bank/."""
    make_bank(folder / "bank", make_anchor(folder / "anchor"), config, absent)
    return folder


def load_tiny(folder: pathlib.Path) -> MemoryModel:
    """The model of a folder, routed by HashEmbedder."""
    model = load(folder)
    if model.bank:
        model._router = Router(model.bank.tree, HashEmbedder(), model.bank.policy)
    return model


NAMES = {"neon": Path((0, 1)), "iron": Path((2, 0))}
REST = Path((2, 2))


def load_aimed(folder: pathlib.Path, names: dict[str, Path], rest: Path) -> MemoryModel:
    """The model of a folder, whose texts go to the leaves that they name; those that name none go to `rest`."""
    model = load(folder)
    assert model.bank
    model._router = Router(model.bank.tree, Aimed(model.bank.tree, names, rest))
    return model


def unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors [..., dim], each of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class Wordless:
    """Says of every text that none of its words is rare: passages are as near as their vectors say."""

    def rare_pieces(self, text: str) -> frozenset[int]:
        return frozenset()


class HashEmbedder(Wordless):
    """Stands in for MiniLM where a test is about what happens after embedding: a unit vector per text."""

    def embed(self, texts: list[str], batch_size: int = 32) -> np.ndarray:
        rows = [np.random.default_rng(list(text.encode())).standard_normal(384) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


class Aimed(Wordless):
    """An embedder of names: a text is the mean of the leaves it names; one that names none is near to nothing, and
    nearest to the leaf `rest`."""

    def __init__(self, tree: ClusterTree, names: dict[str, Path], rest: Path) -> None:
        self.names = {name: self._leaf(tree, path) for name, path in names.items()}
        self.faint = sum(c.reshape(-1, tree.dim).sum(0) for c in tree.centroids) / 9 + 0.06 * self._leaf(tree, rest)

    @staticmethod
    def _leaf(tree: ClusterTree, path: Path) -> np.ndarray:
        return tree.centroids[0][0, path[0]] + tree.centroids[1][path[0], path[1]]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = [sum((v for name, v in self.names.items() if name in text), self.faint) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def make_labelled_bank(root: pathlib.Path, anchor: pathlib.Path) -> pathlib.Path:
    """A bank without its node 2.0, whose rows have numbers of documents and the names of their sources."""
    make_bank(root, anchor, absent=("2.0",))
    manifest = MemoryBank.open(root).manifest
    rows = {
        path: dataclasses.replace(row, documents=len(path) * 7, tokens=5, sources=(f"doc {path}",))
        for path, row in manifest.blocks.items()
    }
    dataclasses.replace(manifest, blocks=rows).write(root / MANIFEST)
    return root


def give_sources(
    bank: pathlib.Path, texts: dict[str, list[tuple[str, str]]], embed: Callable[[list[str]], np.ndarray]
) -> None:
    """Gives a bank windows: leaf -> (title, text) of each. Documents are `TITLE.txt`, places `line 1`, `line 2`."""
    opened = MemoryBank.open(bank)
    found = []
    for leaf in sorted(map(Path.parse, texts), key=order):
        windows = [
            SourceWindow(f"{title}.txt", title, f"line {number}", text)
            for number, (title, text) in enumerate(texts[str(leaf)], 1)
        ]
        found.append(LeafSources(leaf, windows, embed([window.text for window in windows])))
    entry = write_sources(bank, found, opened.tree.branching, opened.tree.dim)
    dataclasses.replace(opened.manifest, sources=entry).write(bank / MANIFEST)
