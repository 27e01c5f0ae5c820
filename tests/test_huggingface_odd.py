"""Sources of an odd kind: settings, tensors and files that mlx-lm would read in another way, or not at all."""

import json
import pathlib
import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model
from safetensors.torch import load_file
from sources import BASE, make_hf, save_hf
from test_huggingface import IDS, NORM, error, tensors
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, Phi3Config

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.convert.anchors.hf_config import normalise
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.pipeline import convert
from mlx_hiermem.convert.verify import verify
from mlx_hiermem.memory.attach import attach
from mlx_hiermem.memory.design import memory_config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_hf(tmp_path_factory.mktemp("source") / "hf")


@pytest.mark.parametrize(("bits", "mode"), [(4, "mxfp4"), (6, "affine")])
def test_what_others_have_quantised(tmp_path: pathlib.Path, bits: int, mode: str) -> None:
    """mlx-lm can do what `hiermem convert` cannot, and the result takes a memory like any other."""
    convert_huggingface(make_hf(tmp_path / "hf"), tmp_path / "whole")
    model, settings = load_model(tmp_path / "whole")
    model, settings = quantize_model(model, settings, 32, bits, mode=mode)
    folder = tmp_path / "theirs"
    shutil.copytree(tmp_path / "whole", folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(settings))
    convert(str(folder), tmp_path / "model")
    anchor, _, config = load_anchor(tmp_path / "model" / "anchor")
    attach(anchor, memory_config(anchor, "ffn", 2, (4,), "uniform"))
    assert np.isfinite(np.array(anchor(mx.array(IDS)).astype(mx.float32))).all()
    assert config["quantization"]["bits"] == bits
    if bits == 6:
        (failed,) = [check for check in verify(tmp_path / "model", str(folder)).checks if not check.passed]
        assert "has 6 bits, for which no bound is known" in failed.figure


def test_a_window_that_mlx_lm_ignores_bounds_the_text(tmp_path: pathlib.Path) -> None:
    settings = BASE | {"pad_token_id": 0, "sliding_window": 700, "max_position_embeddings": 2048}
    folder = save_hf(AutoModelForCausalLM.from_config(Phi3Config(**settings)), tmp_path / "hf")
    convert_huggingface(folder, tmp_path / "anchor")
    assert json.loads((tmp_path / "anchor/config.json").read_text())["max_position_embeddings"] == 700


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "qwen2", "sliding_window": 4096, "max_position_embeddings": 32768},
        {
            "model_type": "qwen3",
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
        },
        {"model_type": "llama", "layer_types": None},
    ],
)
def test_settings_that_say_nothing(settings: dict[str, Any]) -> None:
    assert normalise(settings, []).items() >= settings.items()


def test_doubles_become_floats(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "hf"))
    tensors(lambda held: held.update({NORM: held[NORM].double()}))(folder)
    convert_huggingface(folder, tmp_path / "anchor")
    assert load_file(tmp_path / "anchor/model.safetensors")[NORM].dtype == torch.float32
    assert error(tmp_path / "anchor", source) < 1e-5


def test_a_given_tokenizer_is_all_there_is(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "hf"))
    (folder / "chat_template.jinja").write_text("SOURCE")
    (tmp_path / "given").mkdir()
    make_tokenizer(tmp_path / "given")
    convert_huggingface(folder, tmp_path / "anchor", tokenizer=tmp_path / "given")
    names = {file.name for file in (tmp_path / "anchor").iterdir()}
    assert {file.name for file in (tmp_path / "given").iterdir()} < names
    assert "chat_template.jinja" not in names
