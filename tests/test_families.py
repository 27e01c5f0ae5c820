"""Families of anchors: each equal to transformers in float32, plain and with its FFN widened, or refused by name.

docs/families.md holds the table that is made here.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers as hf
from mlx_lm.models.cache import make_prompt_cache
from sources import BASE, save_hf

from mlx_hiermem.anchor import load_anchor, read_config
from mlx_hiermem.convert import parity, reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.attach import FetchedMemory, attach
from mlx_hiermem.memory.design import memory_config

EXACT = 1e-5
MAMBA = {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
# model_type: (a config of transformers, its changes, the bound on the relative difference of the logits)
FAMILIES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "cohere": (hf.CohereConfig, {}, EXACT),
    "ernie4_5": (hf.Ernie4_5Config, {}, EXACT),
    "exaone4": (hf.Exaone4Config, {"num_hidden_layers": 4, "sliding_window": 64}, EXACT),
    "falcon_h1": (
        hf.FalconH1Config,
        {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
        EXACT,
    ),
    "gemma": (hf.GemmaConfig, {"head_dim": 32}, 1e-3),  # mlx-lm computes the exact GELU, not its tanh form
    "gemma2": (hf.Gemma2Config, {"head_dim": 32}, EXACT),
    "gemma4_text": (hf.Gemma4TextConfig, {}, 1e-4),
    "glm4": (hf.Glm4Config, {"head_dim": 32, "pad_token_id": 0}, EXACT),
    "granite": (hf.GraniteConfig, {}, EXACT),
    "hunyuan_v1_dense": (hf.HunYuanDenseV1Config, {"head_dim": 32}, EXACT),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}, EXACT),
    "olmo2": (hf.Olmo2Config, {}, EXACT),
    "olmo3": (hf.Olmo3Config, {"num_hidden_layers": 4, "sliding_window": 6}, EXACT),
    "phi3": (hf.Phi3Config, {"pad_token_id": 0}, EXACT),  # gate and up in one projection
    "seed_oss": (hf.SeedOssConfig, {"head_dim": 32}, EXACT),
    "smollm3": (hf.SmolLM3Config, {"pad_token_id": 0}, 1e-4),
    "stablelm": (hf.StableLmConfig, {}, EXACT),
}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "apertus": (hf.ApertusConfig, {}, "no gate"),
    "glm": (hf.GlmConfig, {"head_dim": 32, "pad_token_id": 0}, "ignores partial_rotary_factor 0.5"),
    "gpt_neox": (hf.GPTNeoXConfig, {}, "no gate"),
    "granite with another activation": (hf.GraniteConfig, {"hidden_act": "gelu"}, "ignores hidden_act gelu"),
    "nemotron": (hf.NemotronConfig, {}, "no gate"),
    "olmo2 with another activation": (hf.Olmo2Config, {"hidden_act": "gelu"}, "ignores hidden_act gelu"),
    "starcoder2": (hf.Starcoder2Config, {}, "no gate"),
}
IDS = parity.prompt(40, 260)


def source(folder: pathlib.Path, config: Any, changes: dict[str, Any]) -> pathlib.Path:
    """A random model of the family, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**{**BASE, **changes}), attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_((value if "norm" in name else 0) + 0.1 * torch.randn_like(value))
    return save_hf(model.eval(), folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_equals_transformers(family: str, tmp_path: pathlib.Path) -> None:
    config, changes, bound = FAMILIES[family]
    folder = source(tmp_path / "source", config, changes)
    assert read_config(folder)["model_type"] == family
    convert_huggingface(folder, tmp_path / "anchor")
    ours, _, _ = load_anchor(tmp_path / "anchor", mx.float32)
    theirs = parity.load_source(find_source(str(folder)))
    design = memory_config(ours, "ffn", 2, (3,), "uniform", "float32")
    rng = np.random.default_rng(7)
    tensors = {name: rng.standard_normal(s).astype(np.float32) * 0.3 for name, s in design.shapes(3).items()}

    plain = parity.TorchSide(theirs).run(IDS, "none")[1]
    assert parity.difference(np.array(ours(mx.array(IDS))), plain) < bound
    attach(ours, design).set(FetchedMemory(design, {name: mx.array(value) for name, value in tensors.items()}))
    reference_memory.attach(theirs, design).set({name: torch.from_numpy(value) for name, value in tensors.items()})
    widened = parity.TorchSide(theirs).run(IDS, "none")[1]
    assert parity.difference(widened, plain) > 1e-2
    assert parity.difference(np.array(ours(mx.array(IDS))), widened) < bound
    cache = make_prompt_cache(ours)
    pieces = [np.array(ours(mx.array(piece), cache=cache)) for piece in np.split(IDS, (20, 39), axis=1)]
    assert parity.difference(np.concatenate(pieces, axis=1), widened) < bound


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str, tmp_path: pathlib.Path) -> None:
    config, changes, reason = REFUSED[family]
    with pytest.raises(AnchorError, match=reason):
        convert_huggingface(source(tmp_path / "source", config, changes), tmp_path / "anchor")
    assert not (tmp_path / "anchor").exists()


def test_gemma2_ends_where_its_window_does(tmp_path: pathlib.Path) -> None:
    """mlx-lm's class attends to everything: equal up to the sliding window, so the context is that long."""
    folder = source(tmp_path / "source", hf.Gemma2Config, {"head_dim": 32, "sliding_window": 48})
    convert_huggingface(folder, tmp_path / "anchor")
    assert read_config(folder)["max_position_embeddings"] == 256
    assert read_config(tmp_path / "anchor")["max_position_embeddings"] == 48


def test_the_page_has_the_table() -> None:
    page = pathlib.Path(__file__).parent.parent / "docs" / "families.md"
    told: dict[str, str] = {}  # family -> the second column
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            _, names, second, *_ = line.split("|")
            told |= {name: second.strip() for name in re.findall(r"`(\w+)`", names) if name not in told}
    assert {family: float(told[family]) for family in FAMILIES} == {name: row[2] for name, row in FAMILIES.items()}
    assert told.keys() >= {name.split()[0] for name in REFUSED}
