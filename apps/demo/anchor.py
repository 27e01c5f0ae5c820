"""The frozen anchor in PyTorch: a llama forward pass that can start and stop at any layer.

The recipe needs two things that a packaged model does not offer: running the lower
layers once per text and the upper layers many times, and another memory for each
group of sequences in one batch. Both are short in plain functions over the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
Memory = tuple[Tensor, Tensor, Tensor]  # gate, up, down: [groups, memory layers, R, hidden]


@dataclass(frozen=True)
class Anchor:
    """Weights under their Hugging Face names, the settings that the forward pass reads, and the tokenizer."""

    weights: dict[str, Tensor]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    theta: float
    eps: float
    tokenizer: Any

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][tokens]

    def logits(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (self.hidden,), self.weights["model.norm.weight"], self.eps)
        return x @ self.weights["model.embed_tokens.weight"].T  # SmolLM2 ties the two


def load_anchor(folder: Path) -> Anchor:
    """Read an anchor folder (mlx-lm or Hugging Face form) as float32."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    weights = {n: w.float() for f in sorted(folder.glob("*.safetensors")) for n, w in load_file(f).items()}
    return Anchor(
        weights=weights,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        eps=config["rms_norm_eps"],
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


def run_layers(
    anchor: Anchor, x: Tensor, layers: range, past: list[KeyValue] | None = None, memory: Memory | None = None
) -> tuple[Tensor, list[KeyValue]]:
    """Hidden states [batch, length, hidden] through some layers.

    `past` holds keys and values of earlier positions, per layer; fewer rows than the batch are
    shared by equal runs of its sequences, as are the groups of `memory`, whose i-th layer joins
    the i-th of `layers`. Returns the keys and values of `past` and of x together.
    """
    start = past[0][0].shape[2] if past else 0
    rotation = _rotation(anchor, start, x.shape[1])
    mask = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool).tril(start)
    kept: list[KeyValue] = []
    for i, layer in enumerate(layers):
        w = {k: anchor.weights[f"model.layers.{layer}.{k}.weight"] for k in _NAMES}
        h = F.rms_norm(x, (anchor.hidden,), w["input_layernorm"], anchor.eps)
        attended, kv = _attention(anchor, h, w, rotation, mask, past[i] if past else None)
        kept.append(kv)
        x = x + attended
        h = F.rms_norm(x, (anchor.hidden,), w["post_attention_layernorm"], anchor.eps)
        x = x + (F.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
        if memory is not None:
            x = x + _memory_ffn(h, *(part[:, i] for part in memory))
    return x, kept


_NAMES = [
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
]


def _memory_ffn(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The memory's inner units on the anchor's normed input, a group of sequences per memory."""
    grouped = h.reshape(gate.shape[0], -1, h.shape[-1])
    inner = F.silu(grouped @ gate.mT) * (grouped @ up.mT)
    return (inner @ down).reshape(h.shape)


def _attention(
    anchor: Anchor, h: Tensor, w: dict[str, Tensor], rotation: KeyValue, mask: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    batch, length, _ = h.shape

    def heads(name: str, count: int) -> Tensor:
        return (h @ w[f"self_attn.{name}_proj"].T).view(batch, length, count, -1).transpose(1, 2)

    q = _rotate(heads("q", anchor.heads), rotation)
    k = _rotate(heads("k", anchor.kv_heads), rotation)
    v = heads("v", anchor.kv_heads)
    if past is not None:
        share = batch // past[0].shape[0]
        k = torch.cat([past[0].repeat_interleave(share, 0), k], 2)
        v = torch.cat([past[1].repeat_interleave(share, 0), v], 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, length, -1) @ w["self_attn.o_proj"].T, (k, v)


def _rotation(anchor: Anchor, start: int, length: int) -> KeyValue:
    width = anchor.weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // anchor.heads
    frequency = anchor.theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(start, start + length).float(), frequency)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def _rotate(x: Tensor, rotation: KeyValue) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotation[0] + torch.cat([-second, first], -1) * rotation[1]
