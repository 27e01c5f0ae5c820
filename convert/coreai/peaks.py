"""How near the anchor's values come to what float16 holds: the module of the export, run in float32 in PyTorch.

float16 are the products' inputs and outputs, and with them what the caches keep; all else is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_hiermem.convert.coreai.anchor import Anchor
from mlx_hiermem.convert.export.limits import WITH_MEMORY, Memories
from mlx_hiermem.convert.export.shape import CACHES


def peaks(anchor: Anchor, texts: Sequence[np.ndarray], memories: Memories) -> dict[str, float]:
    """The largest |x| by tensor, over all texts without memory and a few with each."""
    found: dict[str, float] = {}

    def watch(name: str) -> Any:
        def see(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            for what, value in (("in", given[0]), ("out", out)):
                found[f"{name}_{what}"] = max(found.get(f"{name}_{what}", 0.0), float(value.abs().max()))

        return see

    handles = [module.register_forward_hook(watch(name)) for name, module in anchor.products.items()]
    try:
        for ids in texts:
            _run(anchor, ids, {})
        for memory in memories.values():
            for ids in texts[:WITH_MEMORY]:
                _run(anchor, ids, memory)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(anchor: Anchor, ids: np.ndarray, memory: Mapping[str, np.ndarray]) -> None:
    given = anchor.arguments(len(ids)) | {"input_ids": torch.from_numpy(ids.astype(np.int32))[None]}
    for name, tensor in memory.items():
        given[name][:, : tensor.shape[1]] = torch.from_numpy(tensor)
    with torch.no_grad():
        anchor(*(given[name] for name in given if name not in CACHES), *(given[name] for name in CACHES))
