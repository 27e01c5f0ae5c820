"""Whether an anchor can go on from a KV cache in few bits, mlx-lm's `kv_bits`.

mlx-lm does not look before it begins. An anchor whose layers keep a window or a state of another kind, or whose
heads have a width that no group fits, would fail in the midst of a reply.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_hiermem.errors import AnchorError


def check_quantizable(anchor: nn.Module, bits: int, group_size: int) -> None:
    """Raises AnchorError where a reply would fail. MLX checks shapes as it builds a graph; nothing is computed."""
    cache = make_prompt_cache(anchor)
    if others := {type(entry).__name__ for entry in cache if type(entry) is not KVCache}:
        raise _refusal(f"it is a {', '.join(sorted(others))}, which mlx-lm keeps as it is")
    quantized = [entry.to_quantized(group_size, bits) for entry in cache]
    try:
        for count in (2, 1):  # a prompt, and a token after it
            anchor(mx.zeros((1, count), mx.int32), cache=quantized)
    except (AttributeError, TypeError, ValueError) as error:
        raise _refusal(str(error)) from error


def _refusal(reason: str) -> AnchorError:
    return AnchorError(
        f"this anchor's KV cache cannot be quantised: {reason}",
        "Leave kv_bits out, or try another kv_group_size: 32, 64, 128.",
    )
