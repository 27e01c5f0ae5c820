"""What an export is held to, in float32: the anchor or its source in PyTorch, with the same memories.

PyTorch has nothing to do with the exporter, which reads the anchor through MLX; so it judges wherever it can read
what there is, and MLX in float32 where not (a quantised or OpenLM anchor, no PyTorch here).
"""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.utils import dequantize_model

from mlx_hiermem.anchor import load_anchor, read_config
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.cache import BlockCache
from mlx_hiermem.config import Path
from mlx_hiermem.convert.source import Source, find_source
from mlx_hiermem.errors import MissingDependencyError
from mlx_hiermem.memory.attach import attach

NONE = "none"


class Reference(Protocol):
    name: str

    def logits(self, ids: np.ndarray, memory: str) -> np.ndarray:
        """Token ids [T], under `none` or the memory of a path -> [T, V]."""


def open_reference(against: str, bank: MemoryBank | None) -> Reference:
    """A folder with `anchor/` is ours, anything else a source as `convert` reads it, for which PyTorch is needed.

    Memories are those of the exported `bank`.
    """
    model = pathlib.Path(against)
    if not (model / "anchor").is_dir():
        source = find_source(against)
        return InTorch(source, source.name, bank)
    name = model.resolve().name
    if _torch_reads(model / "anchor"):
        return InTorch(find_source(str(model / "anchor")), name, bank)
    return InMLX(model / "anchor", name, bank)


def _torch_reads(anchor: pathlib.Path) -> bool:
    config = read_config(anchor)
    if "quantization" in config or config.get("model_type") == "openlm":
        return False
    return all(importlib.util.find_spec(module) for module in ("torch", "transformers"))


def read_memory(bank: MemoryBank, memory: str) -> dict[str, np.ndarray]:
    """A path's blocks, joined along the units, in float32."""
    fetched = BlockCache(bank).fetch(Path.parse(memory)).memory
    tensors = fetched.tensors if fetched else {}
    return {name: np.array(tensor.astype(mx.float32)) for name, tensor in tensors.items()}


class InMLX:
    def __init__(self, anchor: pathlib.Path, name: str, bank: MemoryBank | None) -> None:
        model, _, _ = load_anchor(anchor, mx.float32)
        self.name, self.model = f"{name} in MLX, float32", dequantize_model(model)
        self.cache = BlockCache(bank) if bank else None
        self.attachment = attach(self.model, bank.config) if bank else None

    def logits(self, ids: np.ndarray, memory: str) -> np.ndarray:
        if self.attachment and self.cache:
            self.attachment.set(self.cache.fetch(Path.parse(memory)).memory if memory != NONE else None)
        return np.array(self.model(mx.array(ids)[None]))[0]


class InTorch:
    def __init__(self, source: Source, name: str, bank: MemoryBank | None) -> None:
        try:
            import torch

            from mlx_hiermem.convert import parity
        except ImportError as error:
            raise MissingDependencyError(
                "comparing with the source needs PyTorch", "pip install 'mlx-hiermem[torch]'"
            ) from error

        def read(memory: str) -> dict[str, Any]:
            assert bank is not None
            return {name: torch.from_numpy(tensor) for name, tensor in read_memory(bank, memory).items()}

        self.name = f"{name} in PyTorch, float32"
        self.side = parity.TorchSide(parity.load_source(source), bank.config if bank else None, read)

    def logits(self, ids: np.ndarray, memory: str) -> np.ndarray:
        return self.side.run(ids[None].astype(np.int64), memory)[1][0]
