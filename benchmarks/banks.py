"""Banks of random values in any shape, for measurements of what does not depend on the values.

A folder for them is given by `--folder`; they are removed at the end.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import common  # noqa: F401  # before MLX, for which it picks the BLAS
import numpy as np

from mlx_hiermem.bank.block import block_name
from mlx_hiermem.bank.manifest import BankManifest, BlockEntry
from mlx_hiermem.bank.writer import BankWriter
from mlx_hiermem.config import DTYPES, AnchorIdentity, EmbedderIdentity, MemoryConfig, Path
from mlx_hiermem.tree import ClusterTree

DIM = 384


@contextlib.contextmanager
def scratch(parent: pathlib.Path | None, need: float) -> Iterator[pathlib.Path]:
    """A folder below `parent` (default: the system's) that goes at the end; `need` bytes must be free."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        free = shutil.disk_usage(folder).free
        if need > free:
            raise SystemExit(f"needs {need / 1e9:.1f} GB in {folder}, there are {free / 1e9:.1f}; see --folder")
        yield pathlib.Path(folder)


def paper_160m() -> MemoryConfig:
    """(256, 64, 16, 0) for 35 layers of 512 in bfloat16: 4 368 blocks, 9.2 GB (arXiv:2510.02375, Table 1, A2)."""
    return MemoryConfig("ffn", 16, (256, 64, 16, 0), tuple(range(35)), 512, "bfloat16")


def random_tree(branching: int, depth: int, seed: int = 0) -> ClusterTree:
    """A full tree of unit centroids."""
    rng, centroids = np.random.default_rng(seed), []
    for level in range(depth):
        c = rng.standard_normal((branching**level, branching, DIM), dtype=np.float32)
        centroids.append(c / np.linalg.norm(c, axis=-1, keepdims=True))
    return ClusterTree(centroids, [np.ones(c.shape[:2], dtype=bool) for c in centroids])


def random_values(count: int, dtype: str, seed: int) -> memoryview:
    """Bytes of so many normal values, small enough to leave an anchor's answers finite."""
    values = np.random.default_rng(seed).standard_normal(count, dtype=np.float32) * 0.01
    if dtype == "bfloat16":
        return memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    return memoryview(values.astype(dtype)).cast("B")


def make_bank(
    folder: pathlib.Path, config: MemoryConfig, anchor: AnchorIdentity | None = None, seed: int = 0
) -> list[Path]:
    """Writes a bank with a block for every node of a full tree; returns the nodes that have one."""
    width = DTYPES[config.dtype]
    largest = max(config.parameters(units) for units in config.block_sizes) * width
    pool = random_values(2 * largest // width, config.dtype, seed)  # twice as many: each block starts elsewhere
    blocks = dict[Path, BlockEntry]()
    with BankWriter(folder, "benchmark") as writer:
        tree = writer.write_tree(random_tree(config.branching, config.depth, seed))
        for level, units in enumerate(config.block_sizes, 1):
            shapes = config.shapes(units)
            for row in range(config.branching**level if units else 0):
                node, tensors = Path.of_row(row, level, config.branching), {}
                start = width * len(blocks) % largest
                for name, shape in shapes.items():
                    end = start + int(np.prod(shape)) * width
                    tensors[name], start = (shape, pool[start:end]), end
                entry = writer.write(block_name(node), tensors, config.dtype)
                label = f"a topic of level {level}, number {row}"
                blocks[node] = BlockEntry(node, entry.bytes, entry.sha256, label, documents=row)
        anchor = anchor or AnchorIdentity("benchmark", "", "", config.hidden, max(config.layers) + 1)
        writer.finish(BankManifest(anchor, config, EmbedderIdentity("all-MiniLM-L6-v2", "", 256), blocks, tree))
    return list(blocks)


def demo_anchor(
    folder: pathlib.Path, sizes: tuple[int, ...] = (256, 64, 16), dtype: str = "float16"
) -> pathlib.Path:
    """A model in `folder`: the demo's anchor, SmolLM2-135M, with a bank of the paper's sizes in all its layers."""
    from mlx_hiermem.anchor import identify
    from mlx_hiermem.apps.demo.tour import model_folder

    folder.mkdir(parents=True)
    (folder / "anchor").symlink_to((model_folder() / "anchor").resolve(), target_is_directory=True)
    anchor = identify(folder / "anchor")
    config = MemoryConfig("ffn", 4, sizes, tuple(range(anchor.layers)), anchor.hidden, dtype)
    make_bank(folder / "bank", config, anchor)
    return folder
