"""Embeddings by OpenAI's client, with the real embedder; their bounds with one that needs no weights."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from serving import Running, serving, tiny_model
from tiny import HashEmbedder, make_anchor, make_model

from mlx_hiermem import load
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router

TEXTS = ["Neon glows red.", "Gold is heavy.", "Which gas glows red in signs?"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, minilm: Embedder) -> Iterator[Running]:
    folder = make_model(tmp_path_factory.mktemp("embeddings") / "model")

    def made() -> MemoryModel:
        model = tiny_model(folder)
        assert model.bank
        model._router = Router(model.bank.tree, Embedder.load(), model.bank.policy)  # arrays are the thread's own
        return model

    with serving(made) as running:
        yield running


def test_vectors_are_the_embedders(server: Running, minilm: Embedder) -> None:
    expected = minilm.embed(TEXTS)
    for model in ("tiny", "tiny:none", "all-minilm-l6-v2"):
        reply = server.client.embeddings.create(model=model, input=TEXTS)
        assert np.allclose([row.embedding for row in reply.data], expected, atol=1e-5)
        assert [row.index for row in reply.data] == [0, 1, 2]
    single = server.client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float", dimensions=384)
    assert np.allclose(single.data[0].embedding, expected[0], atol=1e-5)
    assert single.usage.prompt_tokens == len(minilm.tokenizer.encode(TEXTS[0]).ids)


def test_what_is_refused(server: Running, tmp_path: pathlib.Path) -> None:
    create = server.client.embeddings.create
    for wrong in ({"input": ""}, {"input": []}, {"input": [[1, 2]]}, {"input": "x", "dimensions": 64}):
        with pytest.raises(openai.BadRequestError):
            create(model="tiny", **wrong)  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError):
        create(model="text-embedding-3-small", input="x")
    anchor = make_anchor(tmp_path / "anchor")
    with serving(lambda: load(anchor)) as running, pytest.raises(openai.BadRequestError, match="no embedder"):
        running.client.embeddings.create(model="tiny", input="x")


class Slow(HashEmbedder):
    """Says how many texts it was given at a time, and takes its time for them."""

    dim = 384

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.parts = seconds, list[int]()
        self.tokenizer = SimpleNamespace(encode_batch=lambda texts: [SimpleNamespace(ids=[1, 2])] * len(texts))

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> np.ndarray:
        self.parts.append(len(texts))
        time.sleep(self.seconds)
        return super().embed(list(texts))


def slowly(folder: pathlib.Path, embedder: Slow) -> MemoryModel:
    model = tiny_model(folder)
    assert model.bank
    model._router = Router(model.bank.tree, embedder, model.bank.policy)
    return model


def test_texts_are_embedded_a_part_at_a_time(folder: pathlib.Path) -> None:
    """Or nobody else would be answered before the last of them."""
    embedder, texts = Slow(), [f"text {number}" for number in range(70)]
    with serving(lambda: slowly(folder, embedder)) as running:
        reply: Any = running.json("POST", "/v1/embeddings", {"input": texts})[1]
        assert np.allclose([row["embedding"] for row in reply["data"]], HashEmbedder().embed(texts))
        assert reply["usage"]["prompt_tokens"] == 140
        assert embedder.parts == [32, 32, 6]
        for wrong, param in (({"input": ["x"] * 2049}, "input"), ({"input": "x", "dimensions": 64}, "dimensions")):
            status, answer = running.json("POST", "/v1/embeddings", wrong)
            assert (status, answer["error"]["param"]) == (400, param)
        assert len(embedder.parts) == 3  # what is wrong is not embedded first


def test_embeddings_have_their_time(folder: pathlib.Path) -> None:
    embedder = Slow(0.1)
    with serving(lambda: slowly(folder, embedder), timeout=0.2) as running:
        status, answer = running.json("POST", "/v1/embeddings", {"input": ["x"] * 320})
        assert (status, answer["error"]["code"]) == (503, "timeout")
        assert len(embedder.parts) < 10
