"""/v1/embeddings: texts as vectors, by the embedder that routes them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from mlx_hiermem.apps.server.catalogue import Catalogue
from mlx_hiermem.apps.server.engine import Engine
from mlx_hiermem.apps.server.refusal import ApiError, in_time
from mlx_hiermem.apps.server.schema import EmbeddingRequest
from mlx_hiermem.model import MemoryModel

AT_ONCE = 32  # texts; one batch of the embedder


async def embed(engine: Engine, catalogue: Catalogue, asked: EmbeddingRequest, timeout: float) -> dict[str, Any]:
    """OpenAI's answer. Any model's name will do, and the embedder's own."""
    model = _model(engine, catalogue, asked.model)
    embedder: Any = model.router.embedder
    if asked.dimensions not in (None, embedder.dim):
        raise ApiError(400, f"the embedder has {embedder.dim} dimensions, no others", "dimensions")
    async with in_time(timeout):
        vectors = await _vectors(engine, embedder, asked.input)
        tokens = await run_in_threadpool(lambda: sum(map(len, _ids(embedder, asked.input))))
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


async def _vectors(engine: Engine, embedder: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """A part of the texts at a time: between two parts the engine's thread goes on with others' replies."""
    vectors: list[np.ndarray] = []
    for start in range(0, len(texts), AT_ONCE):
        vectors.extend(await engine.call(partial(embedder.embed, texts[start : start + AT_ONCE])))
    return vectors


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
