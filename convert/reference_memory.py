"""The five kinds of memory in plain PyTorch, for the reference OpenLM and for Hugging Face models.

Every kind is a formula on the tensors [R, width] of one layer (arXiv:2510.02375, §2.2 and App. I). Hooks add it
to an unchanged model: OpenLM stacks its projections in fused tensors where Hugging Face has one layer each, so
a projection is a linear layer and the columns of its output that matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_hiermem.config import MemoryConfig, Path
from mlx_hiermem.errors import AnchorError, HierMemError

Tensors = Mapping[str, Tensor]


def ffn_memory(x: Tensor, m: Tensors, act: Callable[[Tensor], Tensor]) -> Tensor:
    """down^T (act(gate x) * (up x)): R more inner units of a gated FFN with the input x [B, T, d]."""
    return (act(x @ m["gate"].T) * (x @ m["up"].T)) @ m["down"]


def lora_memory(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """b^T (a x), with a [R, inputs] and b [R, outputs]; alpha / r is in b already."""
    return (x @ a.T) @ b


def kv_memory(queries: Tensor, m: Tensors, scale: float) -> Tensor:
    """Queries [B, T, H, D] attend to R learned keys and values of their head, all of them -> [B, T, H*D]."""
    keys, values = (m[name].unflatten(-1, queries.shape[-2:]) for name in ("k", "v"))
    scores = torch.einsum("bthd,rhd->bthr", queries, keys) * scale
    return torch.einsum("bthr,rhd->bthd", scores.softmax(-1), values).flatten(2)


def join(config: MemoryConfig, blocks: Sequence[Tensors]) -> dict[str, Tensor]:
    """A path's blocks along the units (Eq. 2.2); each LoRA block is scaled by alpha over its own rank."""
    blocks = [block for block in blocks if next(iter(block.values())).shape[-2]]
    joined = {}
    for name in config.widths:
        parts = [block[name] for block in blocks]
        if name.endswith(".b"):
            parts = [part * (config.alpha / part.shape[-2]) for part in parts]
        joined[name] = torch.cat(parts, dim=-2)
    return joined


def init_memory(config: MemoryConfig, units: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """A fresh block [L, units, width] per tensor, without effect on the anchor: one factor is zero.

    The paper names the distributions, not their scales: truncated normal here is at 3 standard deviations of
    1 / sqrt(inputs), as OpenLM's own layers have it, and Kaiming uniform is as LoRA's (a = sqrt 5).
    """
    zero = {"ffn": ("down",), "kv": ("v",)}.get(config.kind, tuple(n for n in config.widths if n.endswith(".b")))
    block = {}
    for name, shape in config.shapes(units).items():
        tensor = torch.zeros(shape)
        std = 1 / math.sqrt(shape[-1])
        if name.endswith(".a"):
            tensor.uniform_(-std, std, generator=generator)
        elif name not in zero:
            nn.init.trunc_normal_(tensor, std=std, a=-3 * std, b=3 * std, generator=generator)
        block[name] = tensor
    return block


class Bank(nn.Module):
    """A whole bank as a trainer holds it: per level, each tensor [k^l, L, r_l, width], one row per cluster."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.levels: Any = nn.ModuleList()
        for level, units in enumerate(config.block_sizes, 1):
            rows = config.branching**level
            self.levels.append(
                nn.ParameterDict(
                    {
                        name.replace(".", "_"): nn.Parameter(torch.empty(rows, *shape))
                        for name, shape in config.shapes(units).items()
                    }
                )
            )

    def fetch(self, path: Sequence[int]) -> dict[str, Tensor]:
        """The path's blocks, joined: each tensor [L, R, width]."""
        blocks = []
        for node, level in zip(Path(path).prefixes(), self.levels, strict=False):
            row = node.row(self.config.branching)
            blocks.append({name: level[name.replace(".", "_")][row] for name in self.config.widths})
        return join(self.config, blocks)


Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Projection:
    """A linear layer and the columns [start, stop) of its output that are this projection."""

    linear: nn.Module
    start: int
    stop: int


@dataclass(frozen=True)
class Sites:
    """The places of one layer that a memory touches. `queries` outputs them ready for the rotary encoding."""

    projections: dict[str, Projection]
    queries: nn.Module
    as_heads: Callable[[Tensor], Tensor]  # what `queries` outputs -> [B, T, H, D]
    scale: float


def openlm_sites(block: Any) -> Sites:
    config = block.attention.config
    a, f, d = config.attention_width, config.ffn_width, config.hidden
    fused, ffn = block.attention.in_proj, block.feed_forward
    projections = {name: Projection(fused, i * a, (i + 1) * a) for i, name in enumerate("qkv")}
    projections |= {"o": Projection(block.attention.out_proj, 0, d), "down": Projection(ffn.w3, 0, d)}
    projections |= {"gate": Projection(ffn.w12, 0, f), "up": Projection(ffn.w12, f, 2 * f)}

    def as_heads(queries: Tensor) -> Tensor:
        return queries.unflatten(-1, (config.heads, config.head_dim))

    return Sites(projections, block.attention.q_norm, as_heads, config.head_dim**-0.5)


def huggingface_sites(layer: Any) -> Sites:
    """A decoder layer of llama, qwen2, qwen3 or gemma3_text (and of others that are built alike)."""
    attn, mlp = layer.self_attn, layer.mlp
    linears = {name: getattr(attn, f"{name}_proj") for name in "qkvo"}
    linears |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    projections = {name: Projection(linear, 0, linear.out_features) for name, linear in linears.items()}
    queries = getattr(attn, "q_norm", None)

    def as_heads(out: Tensor) -> Tensor:
        if queries is None:
            return out.unflatten(-1, (-1, attn.head_dim))
        return out.transpose(1, 2) if type(attn).__name__ == "Gemma3Attention" else out  # normed head by head

    return Sites(projections, queries or attn.q_proj, as_heads, attn.scaling)


def ffn_site(layer: Any) -> tuple[nn.Module, Activation]:
    """The gated feed-forward layer and its activation, of OpenLM's blocks and of any Hugging Face layer."""
    ffn = getattr(layer, "mlp", None) or layer.feed_forward
    act = getattr(ffn, "act_fn", None) or getattr(ffn, "activation_fn", None) or F.silu  # OpenLM and LFM2: SwiGLU
    return ffn, act


class Attachment:
    """A memory's place in a model: nothing changes until `set`, nor after `clear`."""

    def __init__(self, config: MemoryConfig, layers: Sequence[nn.Module]) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {}
        self._handles = [handle for i, index in enumerate(config.layers) for handle in self._hook(i, layers[index])]

    def set(self, tensors: Tensors) -> None:
        """Attaches tensors [L, R, width] (a block's, or joined); gradients flow into them."""
        units = next(iter(tensors.values())).shape[-2]
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != self.config.shapes(units):
            raise HierMemError(f"the memory's tensors are {found}, expected {self.config.shapes(units)}")
        self.tensors = dict(tensors)

    def clear(self) -> None:
        self.tensors = {}

    def detach(self) -> None:
        """Takes the hooks out of the model."""
        for handle in self._handles:
            handle.remove()

    def _of(self, i: int, like: Tensor) -> dict[str, Tensor]:
        """The tensors [R, width] of the i-th layer that carries memory, in the model's dtype."""
        return {name: tensor[i].to(like) for name, tensor in self.tensors.items()}

    def _hook(self, i: int, layer: nn.Module) -> Iterator[Any]:
        """Yields the handles of the hooks that give one layer its memory."""
        if self.config.kind == "ffn":
            yield self._hook_ffn(i, *ffn_site(layer))
            return
        sites = openlm_sites(layer) if hasattr(layer, "attention") else huggingface_sites(layer)
        if self.config.kind == "kv":
            yield from self._hook_kv(i, sites)
        else:
            for name in dict.fromkeys(tensor.split(".")[0] for tensor in self.config.widths):
                yield self._hook_lora(i, name, sites.projections[name])

    def _hook_ffn(self, i: int, ffn: nn.Module, act: Activation) -> Any:
        def add(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            return y + ffn_memory(args[0], self._of(i, y), act) if self.tensors else y

        return ffn.register_forward_hook(add)

    def _hook_lora(self, i: int, name: str, at: Projection) -> Any:
        def add(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
            if not self.tensors:
                return y
            m = self._of(i, y)
            delta = lora_memory(args[0], m[f"{name}.a"], m[f"{name}.b"])
            return y + F.pad(delta, (at.start, y.shape[-1] - at.stop))

        return at.linear.register_forward_hook(add)

    def _hook_kv(self, i: int, sites: Sites) -> Iterator[Any]:
        kept: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor], queries: Tensor) -> None:
            kept[:] = [sites.as_heads(queries)]

        def add(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            heads = args[0]
            return (heads + kv_memory(kept.pop(), self._of(i, heads), sites.scale) if self.tensors else heads,)

        yield sites.queries.register_forward_hook(keep)
        yield sites.projections["o"].linear.register_forward_pre_hook(add)


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The layers of `OpenLM` or of a Hugging Face model, also of one that sees."""
    if hasattr(model, "layers"):
        return model.layers
    return getattr(model.model, "language_model", model.model).layers


def attach(model: Any, config: MemoryConfig) -> Attachment:
    """Gives `OpenLM` or a Hugging Face causal language model the places that `config` describes.

    Raises AnchorError where the model has no such layers.
    """
    layers = layers_of(model)
    if max(config.layers) >= len(layers):
        raise AnchorError(f"the memory is for layer {max(config.layers)}, the model has {len(layers)} layers")
    return Attachment(config, layers)
