"""all-MiniLM-L6-v2 in MLX: text -> a unit vector of 384 values, by which the router finds a text's cluster.

A BERT encoder (arXiv:1810.04805; post-norm, learned positions, exact GELU) whose last hidden states are
averaged over the real tokens and scaled to length 1, in float32 as its authors publish it. Truncation and
pooling are theirs too: another tokenisation would send a text to another cluster than in training.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.assets import ASSETS, Say, fetch
from mlx_hiermem.config import EmbedderIdentity
from mlx_hiermem.cpu import report_slow_blas
from mlx_hiermem.cpu.vector import attention, gelu
from mlx_hiermem.errors import AssetError
from mlx_hiermem.files import file_digest
from mlx_hiermem.printable import require_unicode

ASSET, WEIGHTS = "all-minilm-l6-v2", "model.safetensors"
RARE = 5000  # token ids from here on: the vocabulary is sorted by how often a piece was seen
# What this encoder implements; a folder that says otherwise is another model.
EXPECTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


class Embedder:
    """`identity` says which weights these are, by the sha256 of their file."""

    def __init__(
        self,
        folder: pathlib.Path,
        identity: EmbedderIdentity,
        config: dict[str, Any],
        weights: dict[str, mx.array],
        tokenizer: Tokenizer,
    ) -> None:
        self.folder, self.identity = folder, identity
        self.config, self.weights, self.tokenizer = config, weights, tokenizer

    @classmethod
    def load(cls, folder: pathlib.Path | str | None = None, progress: Say | None = None) -> Embedder:
        """Opens a sentence-transformers folder of a BERT encoder, by default all-MiniLM-L6-v2 (see `assets`).

        Raises AssetError if a file is missing, damaged, or of an architecture that this is not.
        """
        report_slow_blas()
        known = ASSETS[ASSET].files[WEIGHTS] if folder is None else None  # `fetch` has checked it
        folder = pathlib.Path(folder) if folder is not None else fetch(ASSET, progress)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            max_tokens = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            identity = EmbedderIdentity(folder.name, known or file_digest(folder / WEIGHTS), max_tokens)
            weights = mx.load(str(folder / WEIGHTS))
            assert isinstance(weights, dict)
            mx.eval(weights)
        except Exception as error:  # tokenizers raises plain Exception
            raise AssetError(
                f"cannot read the sentence embedder in {folder}: {error}",
                "Leave the folder out to have all-MiniLM-L6-v2 fetched.",
            ) from error
        found = {key: config.get(key, value) for key, value in EXPECTED.items()}
        if found != EXPECTED:
            raise AssetError(f"the embedder in {folder} is {found}", f"Supported is {EXPECTED}.")
        # The file comes with its authors' training settings: 128 tokens, padded to 128.
        tokenizer.enable_truncation(max_tokens)
        tokenizer.no_padding()
        return cls(folder, identity, config, weights, tokenizer)

    @property
    def dim(self) -> int:
        return int(self.config["hidden_size"])

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """n texts -> [n, dim] float32 of length 1; of a long text the first `identity.max_tokens` tokens count."""
        for text in texts:
            require_unicode(text)
        encodings = self.tokenizer.encode_batch(list(texts))
        vectors = np.empty((len(encodings), self.dim), dtype=np.float32)
        # Texts of like length share a batch, so that little of it is padding; the longest come first.
        order = np.argsort([-len(encoding) for encoding in encodings], kind="stable")
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            vectors[batch] = self._embed_batch([encodings[i].ids for i in batch])
        return vectors

    def rare_pieces(self, text: str) -> frozenset[int]:
        """The token ids of a text that belong to rare words; see `bank.passages.lacking`."""
        require_unicode(text)
        return frozenset(one for one in self.tokenizer.encode(text).ids if one >= RARE)

    def _embed_batch(self, ids: list[list[int]]) -> np.ndarray:
        lengths = [len(row) for row in ids]
        tokens = mx.array([row + [0] * (max(lengths) - len(row)) for row in ids])
        real = mx.arange(max(lengths)) < mx.array(lengths)[:, None]  # [B, T]
        hidden = self._encode(tokens, lengths)
        pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdims=True)
        return np.array(pooled / mx.linalg.norm(pooled, axis=-1, keepdims=True))

    def _encode(self, tokens: mx.array, lengths: list[int]) -> mx.array:
        """[B, T] token ids, of which so many are real -> [B, T, dim] hidden states of the last layer."""
        embedding = {
            name: self.weights[f"embeddings.{name}_embeddings.weight"]
            for name in ("word", "position", "token_type")
        }
        x = embedding["word"][tokens] + embedding["position"][: tokens.shape[1]] + embedding["token_type"][0]
        x = self._norm(x, "embeddings")
        for index in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{index}"
            x = self._norm(x + self._attention(x, lengths, f"{layer}.attention"), f"{layer}.attention.output")
            inner = self._linear(x, f"{layer}.intermediate.dense")
            inner = gelu(inner) if _on_cpu() else nn.gelu(inner)
            x = self._norm(x + self._linear(inner, f"{layer}.output.dense"), f"{layer}.output")
        return x

    def _attention(self, x: mx.array, lengths: list[int], name: str) -> mx.array:
        B, T, d = x.shape
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(x, f"{name}.self.{part}").reshape(B, T, heads, -1).swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        scale = (d // heads) ** -0.5
        if _on_cpu():
            mixed = attention(scale * q, k, v, lengths)
        else:
            mask = (mx.arange(T) < mx.array(lengths)[:, None])[:, None, None, :]
            mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return self._linear(mixed.swapaxes(1, 2).reshape(B, T, d), f"{name}.output.dense")

    def _linear(self, x: mx.array, name: str) -> mx.array:
        return mx.addmm(self.weights[f"{name}.bias"], x, self.weights[f"{name}.weight"].T)

    def _norm(self, x: mx.array, name: str) -> mx.array:
        weight, bias = (self.weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return mx.fast.layer_norm(x, weight, bias, self.config["layer_norm_eps"])


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu
