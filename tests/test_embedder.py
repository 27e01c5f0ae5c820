"""The MLX embedder against the original: transformers' BertModel on the same folder, mean-pooled."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from elements import DOCUMENTS
from transformers import AutoTokenizer, BertModel

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import AssetError

ODD = ["", " \n\t", "naïve Ångström 日本語のテキスト 🎉", "x" * 5000, "[CLS] [MASK] <s>\u0000"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Prompts, sentences, documents, texts far beyond 256 tokens, and odd ones."""
    rows = [json.loads(line) for line in DOCUMENTS.read_text(encoding="utf-8").splitlines()]
    prompts = [f"The atomic number of {row['name']} is" for row in rows[:20]]
    sentences = [row["facts_text"] for row in rows[20:30]]
    documents = [" ".join(row["facts_text"] for row in rows[i : i + 3]) for i in range(30, 45, 3)]
    return prompts + sentences + documents + [" ".join(row["facts_text"] for row in rows)] + ODD


@pytest.fixture(scope="module")
def vectors(minilm: Embedder, texts: list[str]) -> np.ndarray:
    return minilm.embed(texts)


def test_equals_the_original(minilm: Embedder, texts: list[str], vectors: np.ndarray) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder)
    model = BertModel.from_pretrained(minilm.folder).eval()
    lengths = []
    for text, vector in zip(texts, vectors, strict=True):
        inputs = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        lengths.append(inputs["input_ids"].shape[1])
        with torch.no_grad():
            pooled = model(**inputs).last_hidden_state.mean(1)[0]
        original = torch.nn.functional.normalize(pooled, dim=0).numpy()
        assert original @ vector >= 0.99999, text[:80]
        np.testing.assert_allclose(vector, original, atol=2e-6)
    assert (min(lengths), max(lengths)) == (2, 256)
    assert len(set(lengths)) > 10


def test_vectors_are_unit_float32(minilm: Embedder, vectors: np.ndarray, texts: list[str]) -> None:
    assert vectors.shape == (len(texts), minilm.dim) == (len(texts), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_order_and_batches_change_nothing(minilm: Embedder, texts: list[str], vectors: np.ndarray) -> None:
    few = list(range(0, len(texts), 4))
    backwards = minilm.embed([texts[i] for i in reversed(few)], batch_size=3)
    np.testing.assert_allclose(backwards[::-1], vectors[few], atol=2e-6)
    np.testing.assert_allclose(minilm.embed([texts[0]])[0], vectors[0], atol=2e-6)
    assert minilm.embed([]).shape == (0, 384)


def test_reads_the_first_256_tokens(minilm: Embedder) -> None:
    words = ["neon"] * 254  # and two special tokens
    full, longer, shorter = minilm.embed([" ".join(words), " ".join([*words, "gold", "gold"]), " ".join(words[1:])])
    np.testing.assert_allclose(full, longer, atol=2e-6)
    assert np.abs(full - shorter).max() > 1e-4


def test_identity(minilm: Embedder) -> None:
    weights = (minilm.folder / "model.safetensors").read_bytes()
    assert minilm.identity.to_json() == {
        "name": "all-minilm-l6-v2",
        "digest": hashlib.sha256(weights).hexdigest(),
        "max_tokens": 256,
    }
    assert Embedder.load(minilm.folder).identity == minilm.identity


def test_unusable_folders(minilm: Embedder, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssetError, match=r"cannot read the sentence embedder.*config\.json"):
        Embedder.load(tmp_path)
    for name in ("tokenizer.json", "sentence_bert_config.json"):
        shutil.copy(minilm.folder / name, tmp_path)
    config = json.loads((minilm.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with (minilm.folder / "model.safetensors").open("rb") as stream:
        (tmp_path / "model.safetensors").write_bytes(stream.read(1 << 20))
    with pytest.raises(AssetError, match="cannot read the sentence embedder"):
        Embedder.load(tmp_path)
    shutil.copy(minilm.folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "distilbert"}))
    with pytest.raises(AssetError, match="distilbert"):
        Embedder.load(tmp_path)
