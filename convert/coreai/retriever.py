"""The sentence embedder (`embedder.py`) as a Core AI asset: token ids -> a unit vector, for routing on the device.

One function for each length that a call may have, `embed_16` and on; they share the weights. The caller fills up
with any id where the mask is 0. Products are 1×1 convolutions in float16, all else float32, as in the anchor.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_hiermem.convert.coreai import asset
from mlx_hiermem.convert.coreai.anchor import product
from mlx_hiermem.convert.export.architecture import Linear
from mlx_hiermem.convert.export.shape import lengths_of
from mlx_hiermem.embedder import Embedder

EPSILON = 1e-12  # BERT's
NAMES = ("input_ids", "attention_mask")


def function_of(length: int) -> str:
    return f"embed_{length}"


def export_retriever(embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
    """Writes the asset, and the tokenizer with the embedder's truncation; returns what the manifest says."""
    lengths = lengths_of(embedder)
    encoder = Encoder(embedder).eval()
    calls = {length: {name: torch.ones(1, length, dtype=torch.int32) for name in NAMES} for length in lengths}
    asset.save(
        {function_of(length): asset.Function(encoder, call, ["embedding"]) for length, call in calls.items()},
        package,
    )
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    embedder.tokenizer.save(str(tokenizer))
    return {
        "inputs": {name: {"shape": [1, -1], "dtype": "int32"} for name in NAMES},
        "outputs": {"embedding": {"shape": [1, embedder.dim], "dtype": "float32"}},
        "functions": {function_of(length): length for length in lengths},
        "lengths": list(lengths),
        "dim": embedder.dim,
    }


class Encoder(nn.Module):
    """BERT with mean pooling."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.layers, self.heads = (embedder.config[key] for key in ("num_hidden_layers", "num_attention_heads"))
        tensors = {name: np.array(value, np.float32) for name, value in embedder.weights.items()}
        self.products = nn.ModuleDict()
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            for part in (
                *(f"attention.self.{one}" for one in ("query", "key", "value")),
                *("attention.output.dense", "intermediate.dense", "output.dense"),
            ):
                name = f"{layer}.{part}"
                of = Linear(name, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
                self.products[of.name] = product(of, torch.float16)
        place = tensors["embeddings.position_embeddings.weight"]
        self.register_buffer("word", torch.from_numpy(tensors["embeddings.word_embeddings.weight"]).half())
        place = place + tensors["embeddings.token_type_embeddings.weight"][0]
        self.register_buffer("place", torch.from_numpy(place))
        for name, value in tensors.items():
            if ".LayerNorm." in name:
                self.register_buffer(name.replace(".", "_"), torch.from_numpy(value))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[1, T] ids and mask -> [1, dim]."""
        mask = attention_mask[0].float()
        x = F.embedding(input_ids[0], self.get_buffer("word")).float()
        x = self._norm(x + self.get_buffer("place")[: x.shape[0]], "embeddings")
        hidden = (1 - mask)[None] * -1e9
        for index in range(self.layers):
            layer = f"encoder.layer.{index}"
            x = self._norm(x + self._attend(x, hidden, f"{layer}.attention"), f"{layer}.attention.output")
            inner = F.gelu(self._product(x, f"{layer}.intermediate.dense"))
            x = self._norm(x + self._product(inner, f"{layer}.output.dense"), f"{layer}.output")
        pooled = (mask / mask.sum()) @ x
        return (pooled / pooled.norm())[None]

    def _attend(self, x: Tensor, hidden: Tensor, name: str) -> Tensor:
        q, k, v = (
            self._product(x, f"{name}.self.{part}").view(x.shape[0], self.heads, -1).transpose(0, 1)[None]
            for part in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
        return self._product(mixed[0].transpose(0, 1).reshape(x.shape[0], -1), f"{name}.output.dense")

    def _product(self, x: Tensor, name: str) -> Tensor:
        """[T, in] -> [T, out]."""
        columns = x.half().T[None, :, None]
        out: Tensor = self.products[name.replace(".", "_")](columns)[0, :, 0].T.float()
        return out

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias = (self.get_buffer(f"{name}.LayerNorm.{part}".replace(".", "_")) for part in ("weight", "bias"))
        return F.layer_norm(x, (x.shape[-1],), gain, bias, EPSILON)
