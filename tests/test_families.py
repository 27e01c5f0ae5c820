"""Families of anchors: each equal to transformers in float32, plain and with its FFN widened, or refused by name.

docs/families.md holds the table that is made here.
"""

from __future__ import annotations

import copy
import json
import pathlib
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers as hf
from mlx_lm.models.cache import make_prompt_cache
from sources import BASE, make_memory, save_hf

from mlx_hiermem.anchor import identify, load_anchor, read_config
from mlx_hiermem.convert import parity, reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.memories import convert_memory
from mlx_hiermem.convert.pipeline import anchor_dims, convert
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.convert.verify import verify
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.attach import FetchedMemory, attach
from mlx_hiermem.memory.design import memory_config

EXACT = 3e-5  # float32, in another order of sums: which one depends on the CPU and its BLAS
LINEAR = {  # Qwen 3.5: most layers have linear attention
    "head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attention_interval": 2,
}  # fmt: skip
GEMMA3 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6, "num_hidden_layers": 7}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
BARE_YARN = {name: YARN[name] for name in ("rope_type", "factor", "rope_theta")}
MULTIPLIERS = {
    "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9, "embedding_multiplier": 5.6,
    "key_multiplier": 0.4, "lm_head_multiplier": 0.04, "mlp_multipliers": [0.9, 0.3], "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.35], "ssm_out_multiplier": 0.23,
}  # fmt: skip
LONG = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
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
    "gemma3": (hf.Gemma3Config, {"text": GEMMA3, "vision": TOWER | {"image_size": 28, "patch_size": 14}}, EXACT),
    "gemma4_text": (hf.Gemma4TextConfig, {"vocab_size_per_layer_input": 260}, 1e-4),
    "glm4": (hf.Glm4Config, {"head_dim": 32, "pad_token_id": 0}, EXACT),
    "granite": (hf.GraniteConfig, {}, EXACT),
    "helium": (hf.HeliumConfig, {"head_dim": 16}, EXACT),
    "hunyuan_v1_dense": (hf.HunYuanDenseV1Config, {"head_dim": 32}, EXACT),
    "lfm2": (hf.Lfm2Config, {"layer_types": ["conv", "full_attention", "conv"]}, EXACT),
    "ministral3": (hf.Ministral3Config, {"head_dim": 16}, EXACT),
    "mistral3": (
        hf.Mistral3Config,
        {"text": {"model_type": "mistral", "head_dim": 16}, "vision": {"model_type": "pixtral", **TOWER}},
        EXACT,
    ),
    "olmo2": (hf.Olmo2Config, {}, EXACT),
    "olmo3": (hf.Olmo3Config, {"num_hidden_layers": 4, "sliding_window": 6}, EXACT),
    "phi3": (hf.Phi3Config, {"pad_token_id": 0}, EXACT),  # gate and up in one projection
    "qwen2_5_vl": (hf.Qwen2_5_VLConfig, {"text": {"rope_parameters": MROPE}, "vision": QWEN_TOWER}, 1e-4),
    "qwen3_5": (hf.Qwen3_5Config, {"text": LINEAR, "vision": QWEN_TOWER}, EXACT),
    "qwen3_5_text": (hf.Qwen3_5TextConfig, LINEAR, EXACT),
    "qwen3_vl": (hf.Qwen3VLConfig, {"text": {"head_dim": 32}, "vision": QWEN_TOWER}, EXACT),
    "seed_oss": (hf.SeedOssConfig, {"head_dim": 32}, EXACT),
    "smollm3": (hf.SmolLM3Config, {"pad_token_id": 0}, 1e-4),
    "stablelm": (hf.StableLmConfig, {}, EXACT),
}
VARIANTS: dict[str, tuple[Any, dict[str, Any], float]] = {  # settings by which a family may be read wrongly
    "falcon_h1 with its multipliers": (  # none of them is 1 in the published models
        hf.FalconH1Config,
        {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, **MULTIPLIERS},
        EXACT,
    ),
    "mistral3 of ministral3": (  # whose head is its own, as only the text's config says
        hf.Mistral3Config,
        {
            "text": {"model_type": "ministral3", "head_dim": 16, "tie_word_embeddings": False},
            "vision": {"model_type": "pixtral", **TOWER},
        },
        EXACT,
    ),
    "llama with yarn": (hf.LlamaConfig, {"rope_parameters": BARE_YARN}, EXACT),
    "llama with yarn and mscale": (hf.LlamaConfig, {"rope_parameters": YARN | {"mscale": 0.7}}, EXACT),
}
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "apertus": (hf.ApertusConfig, {}, "no gate"),
    "glm": (hf.GlmConfig, {"head_dim": 32, "pad_token_id": 0}, "ignores partial_rotary_factor 0.5"),
    "gpt_neox": (hf.GPTNeoXConfig, {}, "no gate"),
    "granite with another activation": (hf.GraniteConfig, {"hidden_act": "gelu"}, "ignores hidden_act gelu"),
    "nemotron": (hf.NemotronConfig, {}, "no gate"),
    "olmo_hybrid": (
        hf.OlmoHybridConfig,
        {key: value for key, value in LINEAR.items() if key != "full_attention_interval"},
        "does not fit its architecture: Received 5 parameters not in model: model.layers.0.attention_layer_norm",
    ),
    "olmo2 with another activation": (hf.Olmo2Config, {"hidden_act": "gelu"}, "ignores hidden_act gelu"),
    "llama with longrope": (
        hf.LlamaConfig,
        {"rope_parameters": LONG},
        "ignores rope_scaling longrope's short_factor",
    ),
    "llama with an attention factor": (
        hf.LlamaConfig,
        {"rope_parameters": YARN | {"attention_factor": 1.3}},
        "ignores rope_scaling yarn's attention_factor 1.3",
    ),
    "ministral3 with a window everywhere": (
        hf.Ministral3Config,
        {"head_dim": 16, "sliding_window": 6},
        "ignores sliding_window 6",
    ),
    "stablelm with yarn": (hf.StableLmConfig, {"rope_parameters": YARN}, "ignores rope_scaling yarn"),
    "starcoder2": (hf.Starcoder2Config, {}, "no gate"),
}
IDS = parity.prompt(40, 260)


def source(folder: pathlib.Path, config: Any, changes: dict[str, Any]) -> pathlib.Path:
    """A random model of the family, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    kind: Any = hf.AutoModelForCausalLM
    settings = {**BASE, **changes}
    if "vision" in changes:
        kind = hf.AutoModelForImageTextToText
        settings = {"text_config": {**BASE, **changes["text"]}, "vision_config": changes["vision"]}
    model = kind.from_config(config(**copy.deepcopy(settings)), attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_((value if "norm" in name else 0) + 0.1 * torch.randn_like(value))
            if (
                "q_norm" in name and config is hf.Gemma4TextConfig
            ):  # whose scores are not divided by sqrt(head size)
                value *= 0.25
    return save_hf(model.eval(), folder)


@pytest.mark.parametrize("family", FAMILIES | VARIANTS)
@pytest.mark.slow
def test_equals_transformers(family: str, tmp_path: pathlib.Path) -> None:
    config, changes, bound = (FAMILIES | VARIANTS)[family]
    folder = source(tmp_path / "source", config, changes)
    assert read_config(folder)["model_type"] == family.split(" ")[0]
    if " of ministral3" in family:
        edited = read_config(folder)
        edited.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(edited))
    said = convert(folder, tmp_path / "model").warnings
    assert [("vision part" in line) for line in said] == ["vision" in changes] * ("vision" in changes)
    anchor = tmp_path / "model/anchor"
    ours, _, _ = load_anchor(anchor, mx.float32)
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

    memory = make_memory(tmp_path / "memory.safetensors", design)
    dims = anchor_dims(read_config(anchor))
    convert_memory(memory, tmp_path / "model/bank", anchor=identify(anchor), anchor_dims=dims)
    receipt = verify(tmp_path / "model", str(folder), memory)
    assert receipt.passed, [check for check in receipt.checks if not check.passed]
    assert any("memory 1" in check.name for check in receipt.checks)


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


@pytest.mark.parametrize(
    "rope", [YARN, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}], ids=["yarn", "linear"]
)
def test_scaled_positions(tmp_path: pathlib.Path, rope: dict[str, Any]) -> None:
    folder = source(tmp_path / "source", hf.LlamaConfig, {"rope_parameters": rope})
    convert(folder, tmp_path / "model")
    assert verify(tmp_path / "model", str(folder)).passed


def test_dynamic_positions_beyond_the_length(tmp_path: pathlib.Path) -> None:
    """NTK scaling turns at a base that grows with the text once it is longer than the model was trained on.

    As in transformers: by the length of the whole text where it is read at once, and token by token where it grows.
    """
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    changes = {"max_position_embeddings": 24, "rope_parameters": rope}
    folder = source(tmp_path / "source", hf.LlamaConfig, changes)
    convert(folder, tmp_path / "model")
    ours, _, _ = load_anchor(tmp_path / "model/anchor", mx.float32)
    theirs = parity.load_source(find_source(str(folder)))
    for tokens in (20, 24, 25, 40, 200):
        ids = parity.prompt(tokens, 260)
        expected = parity.TorchSide(theirs).run(ids, "none")[1]
        assert parity.difference(np.array(ours(mx.array(ids))), expected) < EXACT
    unscaled = source(tmp_path / "unscaled", hf.LlamaConfig, {"max_position_embeddings": 24})
    other = parity.TorchSide(parity.load_source(find_source(str(unscaled)))).run(IDS, "none")[1]
    assert parity.difference(np.array(ours(mx.array(IDS))), other) > 1e-2

    cache, kept, seen, expected_rows = make_prompt_cache(ours), None, [], []
    for piece in np.split(IDS, range(20, 40), axis=1):
        seen.append(np.array(ours(mx.array(piece), cache=cache)))
        with torch.no_grad():
            out = theirs(torch.from_numpy(piece), past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        expected_rows.append(out.logits.numpy())
    assert parity.difference(np.concatenate(seen, axis=1), np.concatenate(expected_rows, axis=1)) < EXACT


def test_the_page_has_the_table() -> None:
    page = pathlib.Path(__file__).parent.parent / "docs" / "families.md"
    told: dict[str, str] = {}  # family -> the second column
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            _, names, second, *_ = line.split("|")
            told |= {name: second.strip() for name in re.findall(r"`(\w+)`", names) if name not in told}
    assert {family: float(told[family]) for family in FAMILIES} == {name: row[2] for name, row in FAMILIES.items()}
    assert told.keys() >= {name.split()[0] for name in REFUSED}
