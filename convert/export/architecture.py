"""An anchor as the exporter sees it: sizes, norms and matrices of every layer, whatever the architecture.

Read from the modules that mlx-lm builds from the anchor's folder, so that what a config key means is decided in
one place, and that place is mlx-lm. Arrays are numpy, float32.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.utils import dequantize_model

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.errors import AnchorError, HierMemError
from mlx_hiermem.memory.ffn import ACTIVATIONS, activation
from mlx_hiermem.openlm import NoPosition

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text", "openlm")
ACTIVATION_NAMES = dict(zip(ACTIVATIONS, ("silu", "gelu_tanh", "gelu"), strict=True))


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where `centred`; over the last `width` values."""

    width: int
    eps: float
    gain: np.ndarray | None
    bias: np.ndarray | None = None
    centred: bool = False


@dataclass(frozen=True, eq=False)
class Linear:
    """weight [out, in] and its place: rows from `start` of the module at `path`, in another `order` if given."""

    path: str
    weight: np.ndarray
    bias: np.ndarray | None = None
    order: np.ndarray | None = None
    part: int | None = None  # of a table that is split
    start: int = 0

    @property
    def name(self) -> str:
        """A name that a Core ML program may have."""
        return self.path.replace(".", "_") + ("" if self.part is None else f"_{self.part}")


@dataclass(frozen=True)
class Layer:
    """One transformer block. `frequencies` [head_dim / 2] in radians per token, None for no positions.

    `sliding_window`: how many tokens back attention reaches, itself included; 0 for all. q_norm and k_norm are over
    a head, or over all heads at once.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    gate: Linear
    up: Linear
    down: Linear
    before_attention: Norm
    after_attention: Norm | None
    before_ffn: Norm
    after_ffn: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    frequencies: np.ndarray | None
    sliding_window: int


@dataclass(frozen=True)
class Architecture:
    """`embeddings` [V, d]; `head` is None where it is tied to them. `longest`: the context it was trained for."""

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    longest: int
    scale: float  # of q·k
    activation: str  # silu, gelu or gelu_tanh
    embeddings: Linear
    embedding_scale: float
    embedding_norm: Norm | None
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear | None

    @classmethod
    def read(cls, folder: pathlib.Path) -> Architecture:
        """Opens an anchor's folder. Raises AnchorError where it cannot be opened, or is not one of these."""
        model, _, config = load_anchor(folder)
        return cls.of_model(model, config)

    @classmethod
    def of_model(cls, model: nn.Module, config: dict[str, Any]) -> Architecture:
        """From an mlx-lm model and its config."""
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise AnchorError(
                f"anchors of type {kind} cannot be exported to Core ML", f"Known: {', '.join(ARCHITECTURES)}."
            )
        model = dequantize_model(model)
        inner, attention = model.model, model.layers[0].self_attn
        tied = getattr(model, "tie_word_embeddings", None)
        tied = model.args.tie_word_embeddings if tied is None else tied
        vocabulary, hidden = inner.embed_tokens.weight.shape
        real = int(config.get("effective_vocab_size") or vocabulary)
        kv_heads = getattr(attention, "n_kv_heads", attention.n_heads)
        head_dim = attention.q_proj.weight.shape[0] // attention.n_heads
        scaled = kind == "gemma3_text"
        return cls(
            kind=kind,
            hidden=hidden,
            heads=attention.n_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=real,
            longest=int(config.get("max_position_embeddings") or 0),
            scale=float(attention.scale),
            activation=_activation(model.layers[0].mlp),
            embeddings=_linear("embed_tokens", inner.embed_tokens),
            # as mlx-lm has it: in the precision that Gemma was trained in
            embedding_scale=float(mx.array(hidden**0.5, mx.bfloat16).astype(mx.float32)) if scaled else 1.0,
            embedding_norm=_norm(inner.post_embed_norm, hidden) if "post_embed_norm" in inner else None,
            layers=tuple(
                _layer(kind, index, layer, model.args, head_dim) for index, layer in enumerate(model.layers)
            ),
            norm=_norm(inner.norm, hidden),
            head=None if tied else _linear("lm_head", model.lm_head),
        )


def _layer(kind: str, index: int, layer: nn.Module, args: Any, head_dim: int) -> Layer:
    attention, ffn, hidden = layer.self_attn, layer.mlp, args.hidden_size
    path = f"layers.{index}"
    q, k, v, o = (_linear(f"{path}.self_attn.{p}_proj", attention[f"{p}_proj"]) for p in "qkvo")
    q_norm, k_norm = (
        _norm(attention[p], head_dim if kind != "openlm" else q.weight.shape[0]) if p in attention else None
        for p in ("q_norm", "k_norm")
    )
    if getattr(attention.rope, "traditional", False):
        q, k = _halved(q, head_dim), _halved(k, head_dim)
        q_norm, k_norm = (_halved_norm(norm, head_dim) for norm in (q_norm, k_norm))
    gate, up, down = (_linear(f"{path}.mlp.{p}_proj", ffn[f"{p}_proj"]) for p in ("gate", "up", "down"))
    sandwich = kind == "gemma3_text"  # norms before and after both halves of a layer
    return Layer(
        *(q, k, v, o, gate, up, down),
        before_attention=_norm(layer.input_layernorm, hidden),
        after_attention=_norm(layer.post_attention_layernorm, hidden) if sandwich else None,
        before_ffn=_norm(layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm, hidden),
        after_ffn=_norm(layer.post_feedforward_layernorm, hidden) if sandwich else None,
        q_norm=q_norm,
        k_norm=k_norm,
        frequencies=_frequencies(attention.rope, head_dim),
        sliding_window=_sliding_window(layer, args),
    )


def _linear(path: str, module: nn.Module) -> Linear:
    bias = _array(module.bias) if "bias" in module else None
    return Linear(path, _array(module.weight), bias)


def _norm(module: nn.Module, width: int) -> Norm:
    gain = _array(module.weight) if "weight" in module else None
    if isinstance(module, nn.LayerNorm):
        bias = _array(module.bias) if "bias" in module else None
        return Norm(width, module.eps, gain, bias, centred=True)
    if type(module).__module__.endswith("gemma3_text"):
        assert gain is not None  # Gemma stores it less one
        gain = gain + 1.0
    return Norm(width, module.eps, gain)


def _array(value: mx.array) -> np.ndarray:
    return np.array(value.astype(mx.float32))


def _activation(ffn: nn.Module) -> str:
    return ACTIVATION_NAMES[activation(ffn)]


def _frequencies(rope: nn.Module, head_dim: int) -> np.ndarray | None:
    """The angles that a token's position turns each pair by. Raises AnchorError for encodings not known here."""
    if isinstance(rope, NoPosition):
        return None
    if isinstance(rope, nn.RoPE) and rope.dims == head_dim:
        return rope.scale * rope.base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(rope, Llama3RoPE) and rope.dims == head_dim:
        return 1.0 / np.array(rope._freqs, np.float64)
    raise AnchorError(
        f"positions of the kind {type(rope).__name__} cannot be exported to Core ML",
        "Plain, linearly scaled and Llama-3 rotary encodings can.",
    )


def _sliding_window(layer: nn.Module, args: Any) -> int:
    sliding = getattr(layer, "use_sliding", False) or getattr(layer.self_attn, "is_sliding", False)
    return int(args.sliding_window) if sliding else 0


def _halved(linear: Linear, head_dim: int) -> Linear:
    """Rotary pairs that are neighbours become halves apart; q·k is the same in any order of its terms."""
    order = _halved_order(linear.weight.shape[0], head_dim)
    bias = linear.bias[order] if linear.bias is not None else None
    return Linear(linear.path, linear.weight[order], bias, order)


def _halved_norm(norm: Norm | None, head_dim: int) -> Norm | None:
    if norm is None:
        return None
    order = _halved_order(norm.width, head_dim)
    gain, bias = (None if values is None else values[order] for values in (norm.gain, norm.bias))
    return Norm(norm.width, norm.eps, gain, bias, norm.centred)


def _halved_order(width: int, head_dim: int) -> np.ndarray:
    heads = np.arange(width).reshape(-1, head_dim // 2, 2)
    return heads.transpose(0, 2, 1).reshape(-1)


def check_memory(architecture: Architecture, config: Any) -> None:
    """Raises HierMemError for a memory that the exported anchor could not carry."""
    if config.kind != "ffn":
        raise HierMemError(
            f"memories of kind {config.kind} cannot be exported to Core ML", "Only ffn memories can so far."
        )
    if config.hidden != architecture.hidden or max(config.layers) >= len(architecture.layers):
        raise HierMemError(
            f"the memory is for {config.hidden} values in layer {max(config.layers)}, the anchor has "
            f"{architecture.hidden} in {len(architecture.layers)} layers"
        )
