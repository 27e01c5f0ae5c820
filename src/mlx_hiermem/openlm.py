"""OpenLM transformers in MLX, for the variants that no architecture of mlx-lm computes exactly.

Norms are LayerNorm (with bias, gain only, or bare) or RMS; positions are rotary in two layouts or none; queries
and keys may be normed over all heads at once. Imports nothing of this project: a copy of this file lies in
each anchor folder that needs it, where `mlx_lm.load(path, trust_remote_code=True)` finds it.
"""

# No `from __future__ import annotations`: mlx-lm runs this file without registering it as a module, and
# dataclasses look up annotations that are strings in the registered one.
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention


@dataclass
class ModelArgs(BaseModelArgs):
    """`model_norm` and `positional_embedding_type` have OpenLM's own names."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    model_norm: str
    positional_embedding_type: str
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    post_embed_norm: bool = False
    tie_word_embeddings: bool = False


def norm(args: ModelArgs, width: int) -> nn.Module:
    """A norm layer of the model's kind; the "lp" kinds differ in training only."""
    match args.model_norm:
        case "rms_norm" | "fused_rms_norm":
            return nn.RMSNorm(width, eps=args.rms_norm_eps)
        case "default_layer_norm" | "lp_layer_norm":
            return nn.LayerNorm(width, eps=args.rms_norm_eps)
        case "gain_only_layer_norm" | "gain_only_lp_layer_norm":
            return nn.LayerNorm(width, eps=args.rms_norm_eps, bias=False)
        case "no_wb_layer_norm":
            return nn.LayerNorm(width, eps=args.rms_norm_eps, affine=False)
    raise ValueError(f"unknown model_norm '{args.model_norm}'")


class NoPosition(nn.Module):
    """Stands where the rotary encoding would."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return x


def position(args: ModelArgs) -> nn.Module:
    """`head_rotary` turns a head's query and key by the same angle, which cancels in their product."""
    match args.positional_embedding_type:
        case "rotary" | "llama_rotary" as kind:
            return nn.RoPE(args.head_dim, traditional=kind == "llama_rotary", base=args.rope_theta)
        case "head_rotary" | "none":
            return NoPosition()
    raise ValueError(f"unknown positional_embedding_type '{args.positional_embedding_type}'")


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads, self.head_dim = args.num_attention_heads, args.head_dim
        self.scale = args.head_dim**-0.5
        width = args.num_attention_heads * args.head_dim
        self.q_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, args.hidden_size, bias=False)
        if args.qk_norm:
            self.q_norm, self.k_norm = norm(args, width), norm(args, width)
        self.rope = position(args)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any = None) -> mx.array:
        B, L, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = (
            t.reshape(B, L, self.n_heads, self.head_dim).transpose(0, 2, 1, 3) for t in (queries, keys, values)
        )
        offset = cache.offset if cache is not None else 0
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        heads = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(heads.transpose(0, 2, 1, 3).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = norm(args, args.hidden_size)
        self.post_attention_layernorm = norm(args, args.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class OpenLMModel(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.post_embed_norm:
            self.post_embed_norm = norm(args, args.hidden_size)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm = norm(args, args.hidden_size)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if "post_embed_norm" in self:
            h = self.post_embed_norm(h)
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, mask, layer_cache)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = OpenLMModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Token ids [B, L] -> logits [B, L, vocab_size], padding ids included."""
        h = self.model(inputs, cache, input_embeddings)
        return self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers
