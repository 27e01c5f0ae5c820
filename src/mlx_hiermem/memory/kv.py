"""KV memory: R learned key/value vectors per layer that the layer's queries attend to.

No causal mask and no positional encoding on the learned keys, hence the queries are taken before the rotary
encoding (and after their norm, where the anchor has one). The result joins the heads' output in front of the
output projection (arXiv:2510.02375, §2.2). Two carriers a layer: the query projection, whose output is kept for
the same forward pass, and the output projection, whose input is added to. So no attention code is written twice.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.lora import attention, projection
from mlx_hiermem.memory.slot import Slot, carry, compute_dtype, sizes


def attach_kv(layer: nn.Module, config: MemoryConfig) -> list[tuple[nn.Module, Slot]]:
    """Gives one layer's attention a slot; returns [(carrier, slot)]."""
    attn = attention(layer)
    query, output = projection(layer, "q"), projection(layer, "o")
    if sizes(query)[1] != config.q_width:
        raise AnchorError(f"the anchor's queries have {sizes(query)[1]} values, the memory's {config.q_width}")
    head_dim = config.q_width // _heads(attn)
    slot = Slot(("k", "v"), compute_dtype(output))
    unused = Slot((), slot.dtype)
    kept: list[mx.array] = []

    def keep(_: nn.Module, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        queries = own(x)
        kept[:] = [queries] if slot.tensors else []
        return queries

    def add(_: nn.Module, own: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        if not slot.tensors:
            return own(x)
        keys, values = slot.tensors
        if slot.rows is None:
            return own(x + attend(attn, head_dim, kept.pop(), keys[None], values[None]))
        assert slot.real is not None  # a table has it
        keys, values, real = keys[slot.rows], values[slot.rows], slot.real[slot.rows]
        return own(x + attend(attn, head_dim, kept.pop(), keys, values, real[:, None, None]))

    carry(query, keep)
    carry(output, add)
    return [(query, unused), (output, slot)]


def _heads(attn: nn.Module) -> int:
    """Query heads; mlx-lm's attention classes have two names for them."""
    for name in ("n_heads", "num_heads"):
        if isinstance(heads := getattr(attn, name, None), int):
            return heads
    raise AnchorError(
        f"{type(attn).__module__}.{type(attn).__name__} does not tell its number of heads",
        "This architecture cannot carry KV memory; FFN memory needs no heads.",
    )


def attend(
    attn: nn.Module,
    head_dim: int,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    real: mx.array | None = None,
) -> mx.array:
    """queries [B, L, H*D] attend to keys and values [B or 1, R, H*D], head by head -> [B, L, H*D].

    `real` [B, 1, 1, R] is false for keys that are padding.
    """
    B, L, width = queries.shape
    H, D = width // head_dim, head_dim
    queries = _normed(attn, queries, D).reshape(B, L, H, D).transpose(0, 2, 1, 3)
    keys, values = (
        mx.broadcast_to(t.reshape(*t.shape[:2], H, D).transpose(0, 2, 1, 3), (B, H, t.shape[1], D))
        for t in (keys, values)
    )
    heads = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attn.scale, mask=real)
    return heads.transpose(0, 2, 1, 3).reshape(B, L, width)


def _normed(attn: nn.Module, queries: mx.array, head_dim: int) -> mx.array:
    """Applies the query norm, which is per head (Qwen 3, Gemma 3) or over all heads at once (OpenLM)."""
    norm = attn.get("q_norm")
    if norm is None:
        return queries
    if "weight" in norm and norm.weight.size == head_dim:
        return norm(queries.reshape(*queries.shape[:2], -1, head_dim))
    return norm(queries)
