"""Every architecture with a bank, exported for Core ML and for Core AI: `hiermem verify --against` passes whole."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from sources import KINDS, make_hf
from tiny_openlm import random_openlm, save_openlm

from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.coreml.export import CoreML
from mlx_hiermem.convert.export import verify
from mlx_hiermem.convert.export.architecture import Architecture
from mlx_hiermem.convert.export.exporter import Options, Target, export_for
from mlx_hiermem.embedder import Embedder

pytestmark = pytest.mark.slow
LAYERS = (0, 2)


@pytest.fixture(scope="module", params=[*KINDS, "openlm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With twelve blocks in two of its layers."""
    folder = tmp_path_factory.mktemp("models") / request.param
    anchor, source = folder / "anchor", folder / "source"
    source.mkdir(parents=True)
    if request.param == "openlm":
        tiny.make_tokenizer(source)
        made = random_openlm(norm="gain_only_lp_layer_norm", position="rotary", qk_norm=True)
        convert_openlm(save_openlm(made, source), anchor)
    else:
        convert_huggingface(make_hf(source, request.param), anchor)
    hidden = Architecture.read(anchor).hidden
    config = dataclasses.replace(tiny.CONFIG, hidden=hidden, layers=LAYERS, ffn_width=1, q_width=1, kv_width=1)
    tiny.make_bank(folder / "bank", anchor, config)
    return folder


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Target], Target]:
    """Makes a target write its retriever once: it is the same for every anchor."""
    kept: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}

    def once(target: Target) -> Target:
        save = target.save_retriever

        def copy(embedder: Embedder, package: pathlib.Path, tokenizer: pathlib.Path) -> dict[str, Any]:
            if target.format not in kept:
                folder = tmp_path_factory.mktemp("retriever")
                kept[target.format] = folder, save(embedder, folder / package.name, folder / tokenizer.name)
            folder, described = kept[target.format]
            shutil.copytree(folder / package.name, package)
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / tokenizer.name, tokenizer)
            return described

        target.save_retriever = copy  # type: ignore[method-assign]
        return target

    return once


def passes(target: Target, model: pathlib.Path, out: pathlib.Path, memory: str) -> None:
    report = export_for(target, model, out, Options(context=64, memory=memory, weights="fp16"))
    assert report.receipt["measured"]["kl"] < 1e-5
    receipt = verify.verify_export(out, verify.Options(against=str(model), prompts=1))
    assert not [check for check in receipt.checks if not check.passed]
    assert len(receipt.checks) >= 16


def test_core_ml(model: pathlib.Path, retriever: Callable[[Target], Target], tmp_path: pathlib.Path) -> None:
    passes(retriever(CoreML()), model, tmp_path / "app", "state")


def test_core_ai(model: pathlib.Path, retriever: Callable[[Target], Target], tmp_path: pathlib.Path) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    pytest.importorskip("coreai_opt", reason="needs the extra coreai")
    from mlx_hiermem.convert.coreai.export import CoreAI

    passes(retriever(CoreAI()), model, tmp_path / "app", "input")
