"""Whether an anchor can go on from a KV cache in few bits, mlx-lm's `kv_bits`.

mlx-lm does not look before it begins. An anchor whose layers keep a window or a state of another kind, whose
attention knows plain keys alone, or whose heads have a width that no group fits, would fail in the midst of a
reply.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_hiermem.errors import AnchorError

WITHOUT = "Leave kv_bits out."


def check_quantizable(anchor: nn.Module, bits: int, group_size: int) -> None:
    """Raises AnchorError where a reply would fail. MLX checks shapes as it builds a graph; nothing is computed."""
    cache = make_prompt_cache(anchor)
    if others := {type(entry).__name__ for entry in cache if type(entry) is not KVCache}:
        raise _refusal(f"mlx-lm can do that with no {' or '.join(sorted(others))}", WITHOUT)
    quantized = [entry.to_quantized(group_size, bits) for entry in cache]
    try:
        for count in (2, 1):  # a prompt, and a token after it
            anchor(mx.zeros((1, count), mx.int32), cache=quantized)
    except (AttributeError, TypeError) as error:  # it takes the keys for one array; they are three
        name = type(anchor).__module__.rpartition(".")[2]
        raise _refusal(f"mlx-lm's attention of {name} takes no such keys", WITHOUT) from error
    except ValueError as error:
        raise _refusal(str(error), "Try another kv_group_size (32, 64, 128), or leave kv_bits out.") from error


def _refusal(reason: str, hint: str) -> AnchorError:
    return AnchorError(f"this anchor's KV cache cannot be quantised: {reason}", hint)
