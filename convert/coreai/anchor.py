"""The anchor in PyTorch, as Core AI gets it: `decode` (one token) and `prefill` (32) are two traces of one module.

    input_ids [1, T], position [1], gate, up, down [L, R, d]  ->  logits [1, T, V];  states k_cache, v_cache

What multiplies with a weight is a 1×1 convolution in float16, over the stream as [1, d, 1, T]; all else is float32
(docs/coreai.md says why). A memory (arXiv:2510.02375, §2.2) is an input: a buffer that no call writes would
become a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_hiermem.convert.export.architecture import Architecture, Layer, Linear
from mlx_hiermem.convert.export.architecture import Norm as NormSizes
from mlx_hiermem.convert.export.shape import CACHES, Export

HEAD = "head"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Anchor(nn.Module):
    """`precision` of weights and caches: float16, or float32 for tests of what the graph computes."""

    places: Tensor

    def __init__(self, sizes: Architecture, export: Export, precision: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.sizes, self.export, self.precision = sizes, export, precision
        self.products = nn.ModuleDict()
        for layer in sizes.layers:
            for of in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down):
                self.products[of.name] = product(of, precision)
        if sizes.head:
            self.products[HEAD] = product(sizes.head, precision)
        table = torch.from_numpy(sizes.embeddings.weight).to(precision)
        self.table = nn.Parameter(table, requires_grad=False)
        self.norms = nn.ModuleDict(
            {f"{i}_{name}": Norm(of) for i, layer in enumerate(sizes.layers) for name, of in _norms(layer)}
        )
        self.norms["last"] = Norm(sizes.norm)
        if sizes.embedding_norm:
            self.norms["embedding"] = Norm(sizes.embedding_norm)
        self.act = ACTIVATIONS[sizes.activation]
        self.register_buffer("places", torch.arange(export.context, dtype=torch.int32))
        self._rotations: dict[bytes, str] = {}
        for layer in sizes.layers:
            if layer.frequencies is not None and layer.frequencies.tobytes() not in self._rotations:
                self._add_rotation(layer.frequencies)

    def arguments(self, tokens: int) -> dict[str, Tensor]:
        """Zeros of the shapes of a call."""
        memory, cache = self.export.memory_shape(self.sizes), self.export.cache_shape(self.sizes)
        given = {name: torch.zeros(memory, dtype=self.precision) for name in self.export.memory_inputs}
        given |= {name: torch.zeros(cache, dtype=self.precision) for name in CACHES}
        return {
            "input_ids": torch.zeros(1, tokens, dtype=torch.int32),
            "position": torch.zeros(1, dtype=torch.int32),
        } | given

    def forward(self, input_ids: Tensor, position: Tensor, *rest: Tensor) -> Tensor:
        """`rest`: gate, up, down where there is a memory; k_cache and v_cache, which are written."""
        *memory, k_cache, v_cache = rest
        rows = position + torch.arange(input_ids.shape[1], dtype=torch.int32)
        x = self._embed(input_ids[0])
        written: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index, layer in enumerate(self.sizes.layers):
            caches = (k_cache[index], v_cache[index])
            y = self._attend(index, layer, self._norm(f"{index}_before_attention", x), rows, caches, written)
            x = x + self._norm(f"{index}_after_attention", y)
            y = self._feed_forward(index, layer, self._norm(f"{index}_before_ffn", x), memory)
            x = x + self._norm(f"{index}_after_ffn", y)
        # Whole caches, each written once: an update of a slice whose place is an input crashes devices.
        k_cache.copy_(torch.stack(written[0]))
        v_cache.copy_(torch.stack(written[1]))
        y = self._norm("last", x).to(self.precision)
        logits = self.products[HEAD](y) if self.sizes.head else F.conv2d(y, self.table[:, :, None, None])
        return logits[:, :, 0].transpose(1, 2)

    def _add_rotation(self, frequencies: np.ndarray) -> None:
        name = f"rotation_{len(self._rotations)}"
        angles = np.arange(self.export.context)[:, None] * frequencies
        table = np.concatenate([np.cos(angles), np.cos(angles), -np.sin(angles), np.sin(angles)], axis=1)
        self.register_buffer(name, torch.from_numpy(table.astype(np.float32)))
        self._rotations[frequencies.tobytes()] = name

    def _embed(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.table).float() * self.sizes.embedding_scale
        return self._norm("embedding", _columns(x))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """What has no norm of that name stays as it is."""
        return self.norms[name](x) if name in self.norms else x

    def _product(self, of: Linear, x: Tensor) -> Tensor:
        return self.products[of.name](x.to(self.precision)).float()

    def _attend(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        rows: Tensor,
        caches: tuple[Tensor, Tensor],
        written: tuple[list[Tensor], list[Tensor]],
    ) -> Tensor:
        """[1, d, 1, T] -> the same; `written` gets the layer's caches as they are afterwards."""
        sizes, tokens, width = self.sizes, x.shape[-1], self.sizes.head_dim
        group = sizes.heads // sizes.kv_heads
        q = self._heads(index, "q_norm", layer, self._product(layer.q, x), sizes.heads, rows) * sizes.scale
        k = self._heads(index, "k_norm", layer, self._product(layer.k, x), sizes.kv_heads, rows)
        v = self._product(layer.v, x).view(sizes.kv_heads, width, tokens).transpose(1, 2)
        k, v = (self._remember(new, cache, rows) for new, cache in zip((k, v), caches, strict=True))
        written[0].append(k)
        written[1].append(v)
        # The queries that share keys become rows of one head; repeating the keys would copy the cache.
        q = q.reshape(1, sizes.kv_heads, group * tokens, width)
        seen = self._seen(rows, layer.sliding_window).repeat(group, 1)
        heads = F.scaled_dot_product_attention(q, k.float()[None], v.float()[None], attn_mask=seen, scale=1.0)
        heads = heads.reshape(sizes.heads, tokens, width).transpose(1, 2)
        return self._product(layer.o, heads.reshape(1, sizes.heads * width, 1, tokens))

    def _seen(self, rows: Tensor, window: int) -> Tensor:
        """[T, C]: whether a token sees a place."""
        seen = self.places[None] <= rows[:, None]
        return seen & (self.places[None] > rows[:, None] - window) if window else seen

    def _remember(self, new: Tensor, cache: Tensor, rows: Tensor) -> Tensor:
        """The cache [H, C, D] with new [H, T, D] at its places: by a mask, so that no index is written to."""
        at = self.places - rows[0]
        source = new.to(self.precision).index_select(1, at.clamp(0, new.shape[1] - 1))
        return torch.where(((at >= 0) & (at < new.shape[1]))[None, :, None], source, cache)

    def _heads(self, index: int, norm: str, layer: Layer, x: Tensor, count: int, rows: Tensor) -> Tensor:
        """Queries or keys [1, heads · D, 1, T] -> [heads, T, D], normed over a head or over all, and turned."""
        of, tokens = getattr(layer, norm), x.shape[-1]
        over_all = of is not None and of.width == x.shape[1]  # with one head it is both
        if over_all:
            x = self._norm(f"{index}_{norm}", x)
        x = x.view(count, -1, 1, tokens)
        if not over_all:
            x = self._norm(f"{index}_{norm}", x)
        x = x[:, :, 0].transpose(1, 2)
        if layer.frequencies is None:
            return x
        table = self.get_buffer(self._rotations[layer.frequencies.tobytes()])
        cos, sin = table.index_select(0, rows).chunk(2, -1)
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat((other, one), -1) * sin

    def _feed_forward(self, index: int, layer: Layer, x: Tensor, memory: Sequence[Tensor]) -> Tensor:
        y = self._product(layer.down, self.act(self._product(layer.gate, x)) * self._product(layer.up, x))
        if not memory or index not in self.export.memory_layers:
            return y
        gate, up, down = (tensor[self.export.memory_layers.index(index)].float() for tensor in memory)
        columns = x[0, :, 0]
        inner = self.act(gate @ columns) * (up @ columns)
        return y + (down.T @ inner)[None, :, None]


class Norm(nn.Module):
    """RMSNorm or LayerNorm of float32 values [N, width, 1, T]."""

    gain: Tensor | None
    bias: Tensor | None

    def __init__(self, of: NormSizes) -> None:
        super().__init__()
        self.eps, self.centred = of.eps, of.centred
        for name, values in (("gain", of.gain), ("bias", of.bias)):
            self.register_buffer(name, None if values is None else torch.from_numpy(values).float()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        if self.gain is not None:
            x = x * self.gain
        return x if self.bias is None else x + self.bias


def product(of: Linear, precision: torch.dtype) -> nn.Conv2d:
    """A matrix [out, in] as a 1×1 convolution."""
    out, width = of.weight.shape
    with torch.device("meta"):
        made = nn.Conv2d(width, out, 1, bias=of.bias is not None)
    made.weight = nn.Parameter(torch.from_numpy(of.weight).to(precision)[:, :, None, None], requires_grad=False)
    if of.bias is not None:
        made.bias = nn.Parameter(torch.from_numpy(of.bias).to(precision), requires_grad=False)
    return made


def _columns(x: Tensor) -> Tensor:
    """[T, d] -> [1, d, 1, T]."""
    return x.T[None, :, None]


def _norms(layer: Layer) -> list[tuple[str, NormSizes]]:
    names = ("before_attention", "after_attention", "before_ffn", "after_ffn", "q_norm", "k_norm")
    return [(name, getattr(layer, name)) for name in names if getattr(layer, name) is not None]
