"""A Hugging Face config.json in the spelling that mlx-lm reads, and refused where mlx-lm would ignore a setting.

transformers 5 moved rope_theta, rope_scaling and partial_rotary_factor into rope_parameters, layer patterns into
layer_types, and leaves defaults out. Most of mlx-lm's classes know the older keys only: some refuse such a config,
others silently compute with their own defaults.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import mlx.nn as nn

from mlx_hiermem.anchor import model_classes
from mlx_hiermem.errors import AnchorError, CheckpointError
from mlx_hiermem.files import MALFORMED
from mlx_hiermem.memory.ffn import ACTIVATIONS, activation, feed_forward

CODE_KEYS = ("auto_map", "_name_or_path", "transformers_weights")  # point outside the folder, or at code
TIED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")  # may leave tie_word_embeddings to the checkpoint
SILU, TANH_GELU, GELU = range(len(ACTIVATIONS))  # as `memory.ffn` finds them
NAMES = {
    "silu": SILU,
    "swish": SILU,
    "gelu_pytorch_tanh": TANH_GELU,
    "gelu_tanh": TANH_GELU,
    "gelu_new": TANH_GELU,
    "gelu_fast": TANH_GELU,
    "gelu": GELU,
}
UNGATED = ("apertus", "falcon", "gpt2", "gpt_neox", "nemotron", "opt", "phi", "starcoder2")  # FFNs without a gate
LEFT_FACTORS = ("key_multiplier", "attention_in_multiplier")  # of Falcon-H1, see `left_factors`
# What transformers leaves out of config.json where it is the default, and mlx-lm's class demands.
DEFAULTS: dict[str, dict[str, Any]] = {
    "exaone4": {"rope_scaling": None, "sliding_window": None, "sliding_window_pattern": None},
    "lfm2": {
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "conv_L_cache": 3,
        "conv_bias": False,
    },
    "stablelm": {"partial_rotary_factor": 0.25},
    "glm4": {"partial_rotary_factor": 0.5},
}


def reject_foreign(config: dict[str, Any], where: pathlib.Path) -> None:
    """Refuses what is known by name not to become an anchor, before any weight is read."""
    kind = str(config.get("model_type", ""))
    if not kind:
        raise CheckpointError(f"{where / 'config.json'} names no model_type", "Is it a language model's folder?")
    if kind == "openlm":
        raise AnchorError(f"{where} is a converted OpenLM anchor", "Convert the original checkpoint.")
    if kind in UNGATED:
        raise AnchorError(
            f"{where} is a {kind} model, whose feed-forward layers have no gate",
            "Memories widen gated FFNs (SwiGLU, GeGLU), as Llama, Qwen, Gemma, Phi 3 and most others have.",
        )
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)]
    if experts or "moe" in kind or kind in ("mixtral", "dbrx"):
        raise AnchorError(
            f"{where} is a mixture of experts ({experts[0] if experts else 'model_type'}: "
            f"{config[experts[0]] if experts else kind})",
            "Memories widen one dense FFN per layer; use a dense model.",
        )
    foreign = config.get("quantization_config")
    if foreign and "quantization" not in config:
        method = foreign.get("quant_method", "unknown method") if isinstance(foreign, dict) else foreign
        raise AnchorError(
            f"{where} is quantised for other software ({method})",
            "Convert the original weights with --quantize 4 or 8.",
        )


def normalise(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """config.json in the spelling that mlx-lm reads. Raises AnchorError for settings that it would ignore, or that
    are no settings."""
    try:
        return _normalised(config, set(names))
    except MALFORMED as error:
        raise AnchorError(
            f"a setting of config.json cannot be read: {error!r}", "Copy it from the original again."
        ) from error


def _normalised(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in CODE_KEYS and key != "model_file"}
    kind = config["model_type"]
    rope = config.get("rope_parameters") or {}
    if kind == "gemma3_text":
        _normalise_gemma3(config, rope)
    else:
        if kind != "gemma4_text":  # whose class reads rope_parameters itself
            _unnest_rope(config, _one_rope(rope))
        _fill_in(config, kind)
    if kind in TIED or "lm_head.weight" in names:  # mlx-lm's class may tie where transformers does not
        config.setdefault("tie_word_embeddings", "lm_head.weight" not in names)
    _complete_scaling(config)
    _reject_ignored(config, kind)
    return config


def _one_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters, or what they say of layers with full attention where kinds of layers differ.

    Raises AnchorError where layers with a sliding window turn at another base: mlx-lm's classes have one.
    """
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if not isinstance(full, dict):
        return rope
    if isinstance(sliding, dict) and sliding.get("rope_theta") != full.get("rope_theta"):
        raise AnchorError("layers of different kinds have different rope_theta", "mlx-lm knows one for all.")
    return full


def _fill_in(config: dict[str, Any], kind: str) -> None:
    for key, value in DEFAULTS.get(kind, {}).items():
        config.setdefault(key, value)
    if kind == "exaone4":
        if isinstance(every := config["sliding_window_pattern"], int):
            config["sliding_window_pattern"] = "L" * (every - 1) + "G"
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if kind == "lfm2":
        config.setdefault("block_dim", config["hidden_size"])
    if kind in ("gemma2", "phi3"):  # mlx-lm's class attends to everything: equal within the window, wrong beyond it
        longest = config.get("max_position_embeddings", 8192 if kind == "gemma2" else 4096)
        config["max_position_embeddings"] = min(longest, config.get("sliding_window") or longest)


def _unnest_rope(config: dict[str, Any], rope: dict[str, Any]) -> None:
    """rope_parameters -> rope_theta, rope_scaling and so on, unless the config has them as well."""
    if "partial_rotary_factor" in rope:
        config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
    if "rope_theta" not in rope:
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default" and not config.get("rope_scaling"):
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}


def _complete_scaling(config: dict[str, Any]) -> None:
    """rope_scaling as transformers reads it: mlx-lm's classes have defaults of their own for what it leaves out."""
    if not (scaling := config.get("rope_scaling")):
        return
    scaling = dict(scaling)
    kind = scaling.get("rope_type") or scaling.get("type")
    scaling |= {name: kind for name in ("rope_type", "type") if name in scaling}
    if kind == "yarn":
        scaling.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        if not (scaling.get("mscale") and scaling.get("mscale_all_dim")):  # either alone counts for nothing
            scaling = {name: scaling[name] for name in scaling if not name.startswith("mscale")}
    config["rope_scaling"] = scaling


def _normalise_gemma3(config: dict[str, Any], rope: dict[str, Any]) -> None:
    _unnest_rope(config, rope.get("full_attention") or {})
    local = rope.get("sliding_attention") or {}
    if "rope_theta" in local:
        config.setdefault("rope_local_base_freq", local["rope_theta"])
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    expected = [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(config["num_hidden_layers"])
    ]
    if (config.get("layer_types") or expected) != expected:
        raise AnchorError(
            f"layer_types does not repeat every {pattern} layers", "mlx-lm's gemma3_text has no other pattern."
        )
    config["sliding_window_pattern"] = pattern


def _reject_ignored(config: dict[str, Any], kind: str) -> None:
    """Settings that mlx-lm's class for this model does not read: the anchor would answer differently."""
    ignored = []
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if kind == "gemma3_text" and config.get(key):
            ignored.append(f"{key} {config[key]}")
    windows = "sliding_attention" in (config.get("layer_types") or ()) or config.get("use_sliding_window")
    window, longest = config.get("sliding_window") or 0, config.get("max_position_embeddings", 0)
    fields = _fields(config)
    everywhere = kind == "mistral" or (kind == "ministral3" and not config.get("layer_types"))
    asks = kind in ("qwen2", "qwen3") or "use_sliding_window" in config  # and has no window unless it says so
    unread = not asks and fields and not {"sliding_window", "text_config"} & fields
    if (kind in ("qwen2", "qwen3") and windows) or ((everywhere or unread) and 0 < window < longest):
        ignored.append(f"sliding_window {window}")
    part = config.get("partial_rotary_factor", 1)
    if part != 1 and fields and not {"partial_rotary_factor", "rope_parameters", "text_config"} & fields:
        ignored.append(f"partial_rotary_factor {part}")
    ignored += _ignored_scaling(config.get("rope_scaling") or {})
    if ignored:
        raise AnchorError(f"mlx-lm's {kind} model ignores {', '.join(ignored)}", "It would answer differently.")


def _ignored_scaling(scaling: dict[str, Any]) -> list[str]:
    """Settings of scaled positions that mlx-lm's classes do not read."""
    kind = scaling.get("rope_type") or scaling.get("type")
    ignored = []
    if kind in ("longrope", "su") and scaling.get("short_factor") != scaling.get("long_factor"):
        ignored.append(f"rope_scaling {kind}'s short_factor")  # which texts of up to the original length have
    if kind == "yarn":
        if (given := scaling.get("attention_factor")) is not None:
            usual = 0.1 * math.log(scaling.get("factor", 1)) + 1
            if abs(given - usual) > 1e-6:
                ignored.append(f"rope_scaling yarn's attention_factor {given}")
        if scaling.get("truncate") is False:
            ignored.append("rope_scaling yarn's truncate false")
    return ignored


def left_factors(config: dict[str, Any]) -> dict[str, float]:
    """What mlx-lm leaves out when it folds Falcon-H1's multipliers into the weights: by the ends of names.

    Its code looks for `key_proj`, which is called `k_proj`, and passes the values over. So do anchors that mlx-lm
    has converted; an anchor of ours says 1.
    """
    if config.get("model_type") != "falcon_h1":
        return {}
    key, values = (config.get(name) or 1.0 for name in LEFT_FACTORS)
    factors = {".k_proj.weight": key, ".k_proj.bias": key, ".v_proj.weight": values}
    return {end: float(factor) for end, factor in factors.items() if factor != 1}


def check_positions(config: dict[str, Any], model: nn.Module) -> None:
    """AnchorError where positions are scaled by config.json, and no layer of mlx-lm's class does so."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "mrope") or (kind == "linear" and scaling.get("factor", 1) == 1):
        return
    ropes = [module for _, module in model.named_modules() if "rope" in type(module).__name__.lower()]
    if ropes and all(isinstance(rope, nn.RoPE) and rope.scale == 1 for rope in ropes):
        raise AnchorError(
            f"mlx-lm's {config.get('model_type')} model ignores rope_scaling {kind}", "It would answer differently."
        )


def _fields(config: dict[str, Any]) -> set[str]:
    """The settings that mlx-lm's class for this model reads; none where it has no class: loading says so."""
    try:
        return {field.name for field in dataclasses.fields(model_classes(config)[1])}
    except (ValueError, ImportError, SystemExit):
        return set()


def check_activation(config: dict[str, Any], model: nn.Module) -> None:
    """AnchorError where mlx-lm's class computes another activation than config.json names.

    GELU and its tanh form are 1e-3 apart. Gemma 1 is the known case: mlx-lm computes the exact one.
    """
    text = config.get("text_config") or config
    name = text.get("hidden_activation") or text.get("hidden_act")
    found = ACTIVATIONS.index(activation(feed_forward(model.layers[0])))
    named = NAMES.get(str(name))
    if name and (named is None or (named == SILU) != (found == SILU)):
        kind = config.get("model_type")
        raise AnchorError(f"mlx-lm's {kind} model ignores hidden_act {name}", "It would answer differently.")
