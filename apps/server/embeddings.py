"""/v1/embeddings: texts as vectors, by the embedder that routes them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_hiermem.apps.server.catalogue import Catalogue
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.apps.server.schema import EmbeddingRequest
from mlx_hiermem.model import MemoryModel


async def embed(engine: Engine, catalogue: Catalogue, asked: EmbeddingRequest) -> dict[str, Any]:
    """OpenAI's answer. Any model's name will do, and the embedder's own."""
    model = _model(engine, catalogue, asked.model)
    embedder = model.router.embedder
    vectors = await engine.call(lambda: embedder.embed(asked.input))
    if asked.dimensions not in (None, vectors.shape[1]):
        raise ApiError(400, f"the embedder has {vectors.shape[1]} dimensions, no others", "dimensions")
    tokens = sum(map(len, _ids(embedder, asked.input)))
    rows = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, asked.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    name = asked.model or next(iter(catalogue.models))
    return {
        "object": "list",
        "data": rows,
        "model": name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _model(engine: Engine, catalogue: Catalogue, name: str) -> MemoryModel:
    """The model whose embedder is meant. Raises ApiError."""
    for model in engine.models.values():
        if model.bank and name.lower() == model.bank.manifest.embedder.name.lower():
            return model
    model = catalogue.find(name).model
    if model.bank is None:
        raise ApiError(400, "this model has no bank, and so no embedder", "model")
    return model


def _ids(embedder: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens that count."""
    return [encoding.ids for encoding in embedder.tokenizer.encode_batch(list(texts))]


def _encoded(vector: np.ndarray, kind: str) -> str | list[float]:
    """OpenAI's client asks for base64, which is of little-endian float32."""
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
