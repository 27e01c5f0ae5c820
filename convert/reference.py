"""The plain PyTorch definition that everything is checked against: OpenLM, and the paper's parameter counts.

Written for reading, not for speed. `OpenLM` has exactly the state-dict names of OpenLM checkpoints; the memories
that join it (and Hugging Face models) are in `reference_memory.py`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.convert.anchors.openlm_checkpoint import load_openlm_tensors
from mlx_hiermem.convert.anchors.openlm_config import NORMS, OpenLMConfig
from mlx_hiermem.convert.readers import RawTensor
from mlx_hiermem.convert.reference_memory import Bank
from mlx_hiermem.errors import CheckpointError, HierMemError

Cache = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values so far, each [B, S, H, D]


class RMSNorm(nn.Module):
    """OpenLM's: computed in float32, cast back, then scaled."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def norm(config: OpenLMConfig, width: int) -> nn.Module:
    kind = NORMS[config.norm]
    if kind.rms:
        return RMSNorm(width, config.eps)
    return nn.LayerNorm(width, config.eps, elementwise_affine=kind.weight, bias=kind.bias)


def rotate(x: Tensor, positions: Tensor, base: float, interleaved: bool = False) -> Tensor:
    """Turns pairs of x [..., D] by positions * base^(-2i/D); pairs are halves apart, or neighbours.

    `positions` broadcasts against x's leading axes (arXiv:2104.09864, §3.2).
    """
    inverse = base ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    angles = positions[..., None].float() * inverse
    cos, sin = angles.cos().type_as(x), angles.sin().type_as(x)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


class Attention(nn.Module):
    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.attention_width
        self.in_proj = nn.Linear(config.hidden, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, config.hidden, bias=False)
        self.q_norm = norm(config, width) if config.qk_norm else nn.Identity()
        self.k_norm = norm(config, width) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        queries, keys, values = self.in_proj(x).chunk(3, dim=-1)
        queries, keys, values = (
            t.unflatten(-1, (self.config.heads, self.config.head_dim))
            for t in (self.q_norm(queries), self.k_norm(keys), values)
        )
        past = cache.get(self.layer) if cache is not None else None
        offset = past[0].shape[1] if past else 0
        queries, keys = self.encode(queries, offset), self.encode(keys, offset)
        if past:
            keys, values = torch.cat((past[0], keys), 1), torch.cat((past[1], values), 1)
        if cache is not None:
            cache[self.layer] = keys, values
        visible = torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool, device=x.device).tril(offset)
        heads = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible
        )
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def encode(self, x: Tensor, offset: int) -> Tensor:
        """Positions into x [B, T, H, D]. `head_rotary` counts heads instead of tokens, as the first OpenLM did."""
        kind, base = self.config.position, self.config.rope_base
        if kind == "none":
            return x
        if kind == "head_rotary":
            return rotate(x, torch.arange(x.shape[2], device=x.device), 10_000.0)
        tokens = torch.arange(offset, offset + x.shape[1], device=x.device)[:, None]
        return rotate(x, tokens, base, interleaved=kind == "llama_rotary")


class FeedForward(nn.Module):
    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden, 2 * config.ffn_width, bias=False)
        self.w3 = nn.Linear(config.ffn_width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = norm(config, config.hidden)
        self.ffn_norm = norm(config, config.hidden)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        h = x + self.attention(self.attention_norm(x), cache)
        return h + self.feed_forward(self.ffn_norm(h))


class OpenLM(nn.Module):
    """An OpenLM transformer. A tied model has one embedding matrix under two names."""

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden)
        self.post_embed_norm = norm(config, config.hidden) if config.post_embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = norm(config, config.hidden)
        self.output = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.tied:
            self.tok_embeddings.weight = self.output.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids [B, T] -> float32 logits [B, T, V]. An empty dict as `cache` starts cached decoding."""
        x = self.post_embed_norm(self.tok_embeddings(tokens))
        for layer in self.layers:
            x = layer(x, cache)
        logits: Tensor = self.output(self.norm(x))
        return logits.float()


def load_openlm(source: pathlib.Path, config: pathlib.Path | None = None) -> OpenLM:
    """The reference model with a checkpoint's weights, in the checkpoint's dtype. Raises as `convert_openlm`."""
    described, tensors = load_openlm_tensors(source, config)
    state = {name: to_torch(raw) for name, raw in tensors.items()}
    if described.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    with torch.device("meta"):
        model = OpenLM(described)
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_torch(raw: RawTensor) -> Tensor:
    """The same values in the same dtype, bfloat16 included."""
    if raw.dtype == "bfloat16":
        return torch.from_numpy(raw.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(raw.data)


# arXiv:2510.02375, Tables 4-6 and 8. With weight-only norms, also on queries and keys, the counts are exact.
_410M = OpenLMConfig(50_432, 1024, 24, 16, 64, 2816, "rms_norm", rope_base=100_000.0, qk_norm=True, seq_len=8192)
ANCHORS = {
    "160M": replace(_410M, layers=35, hidden=512, heads=12, head_dim=32, ffn_width=2048, tied=True),
    "260M": replace(_410M, layers=12),
    "320M": replace(_410M, layers=17),
    "350M": replace(_410M, layers=19),
    "370M": replace(_410M, layers=21),
    "385M": replace(_410M, layers=22),
    "410M": _410M,
    "1.4B": replace(_410M, hidden=2048, heads=16, head_dim=128, ffn_width=5632),
}


def count_parameters(
    anchor: str, block_sizes: Sequence[int], branching: int = 16, kind: str = "ffn"
) -> dict[str, int]:
    """Parameters of one of the paper's anchors, of a memory fetched for it, and of the whole bank.

    Counts the tensors of real modules on torch's meta device, which holds shapes without data.
    Raises HierMemError for an anchor or a kind that the paper does not have.
    """
    if anchor not in ANCHORS:
        raise HierMemError(f"the paper has no anchor '{anchor}'", f"It has {', '.join(ANCHORS)}.")
    config = ANCHORS[anchor]
    memory = MemoryConfig(
        kind=kind,
        branching=branching,
        block_sizes=tuple(block_sizes),
        layers=tuple(range(config.layers)),
        hidden=config.hidden,
        ffn_width=config.ffn_width,
        q_width=config.attention_width,
        kv_width=config.attention_width,
    )
    with torch.device("meta"):
        model, bank = OpenLM(config), Bank(memory)
        fetched = bank.fetch((0,) * memory.depth)
    return {
        "anchor": sum(parameter.numel() for parameter in model.parameters()),
        "fetched": sum(tensor.numel() for tensor in fetched.values()),
        "bank": sum(parameter.numel() for parameter in bank.parameters()),
    }


# Adapters: what PEFT and mlx-lm add to a model's weights when it runs with their LoRA. Shares no code with
# `anchors.adapters`, which merges them for a conversion.


def merge_adapter(model: Any, folder: pathlib.Path) -> Any:
    """The model with the adapter in `folder`, if there is one, in its weights."""
    file = folder / "adapter_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        with torch.no_grad():
            _peft(model, folder, settings) if "peft_type" in settings else _mlx(model, folder, settings)
    return model


def _peft(model: Any, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """W + s · B A for every pair, s = alpha / r (or / sqrt r); other tensors replace the model's."""
    tensors = {
        name.removeprefix("base_model.model."): value
        for name, value in _adapter_tensors(folder, "adapter_model").items()
    }
    for name, value in tensors.items():
        if name.endswith("lora_A.weight"):
            module, rank = name.removesuffix(".lora_A.weight"), value.shape[0]
            own = [a for key, a in (settings.get("alpha_pattern") or {}).items() if module.endswith(key)]
            scale = (own or [settings["lora_alpha"]])[0] / (rank**0.5 if settings.get("use_rslora") else rank)
            model.get_submodule(module).weight += scale * tensors[f"{module}.lora_B.weight"] @ value
        elif name.endswith("lora_embedding_A"):
            module, rank = name.removesuffix(".lora_embedding_A"), value.shape[0]
            embeddings = model.get_submodule(module)
            embeddings.weight += (settings["lora_alpha"] / rank * tensors[f"{module}.lora_embedding_B"] @ value).T
        elif "lora_" not in name:
            model.get_parameter(name).copy_(value)


def _mlx(model: Any, folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """W + s · (a b)^T, with a [inputs, r] and b [r, outputs]."""
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise CheckpointError(f"an anchor with mlx-lm's {kind} adapter cannot be compared with PyTorch")
    tensors = _adapter_tensors(folder, "adapters")
    for name, value in tensors.items():
        if kind == "full":
            model.get_parameter(name).copy_(value)
        elif name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            product = settings["lora_parameters"]["scale"] * value @ tensors[f"{module}.lora_b"]
            model.get_submodule(module).weight += product.T


def _adapter_tensors(folder: pathlib.Path, stem: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / f"{stem}.safetensors"
    tensors = load_file(file) if file.is_file() else torch.load(folder / f"{stem}.bin", weights_only=True)
    return {name: value.float() for name, value in tensors.items()}
