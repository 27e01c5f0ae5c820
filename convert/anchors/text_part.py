"""The text part of a model that also sees or hears: its own config, and its own tensors under plain names.

Such a model is a language model (Gemma 3, Qwen 3, Mistral, Llama ..) beside a vision tower. Only the language model
becomes an anchor, as the text model that it is; a line says what was left out.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_hiermem.convert.checkpoint import TensorSource

TEXT_TYPES = {  # the language model's own model_type -> mlx-lm's class for it alone
    **{kind: kind for kind in ("gemma3_text", "llama", "ministral3", "mistral", "qwen2", "qwen3")},
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_5_text": "qwen3_5",
}
# where the language model's tensors are: as transformers 5 saves them, as version 4 did, as Idefics has them
TEXT = re.compile(r"^(?:model\.language_model\.(?:model\.)?|language_model\.model\.|model\.text_model\.)")
HEAD = re.compile(r"^(?:language_model\.|model\.language_model\.)?lm_head\.")
OTHER = re.compile(  # of a tower, or of what joins it to the text
    r"(^|\.)(visual|vision_\w+|multi_modal_projector|mm_projector|embed_vision|audio_\w+|embed_audio|connector)\."
)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model alone; as it is where there is no other part, or no class for it."""
    kind = config.get("model_type")
    if kind in TEXT_TYPES and "text_config" not in config:
        return config | {"model_type": TEXT_TYPES[kind]}
    text = config.get("text_config")
    if not isinstance(text, dict) or "quantization" in config or text.get("model_type") not in TEXT_TYPES:
        return config
    from transformers import AutoConfig

    full = AutoConfig.for_model(**text).to_dict()  # Gemma 3 leaves out what is its class's default
    merged = {key: value for key, value in (full | text).items() if value is not None}
    merged.pop("tie_word_embeddings", None)  # the whole model's decides, else its tensors
    above = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings")
    merged |= {key: config[key] for key in above if config.get(key) is not None}
    return merged | {"model_type": TEXT_TYPES[text["model_type"]]}


def text_name(name: str) -> str:
    """A tensor's name in the language model alone."""
    if HEAD.match(name):
        return HEAD.sub("lm_head.", name)
    return TEXT.sub("model.", name)


def is_other(name: str) -> bool:
    """Whether a tensor belongs to what sees or hears."""
    return bool(OTHER.search(name))


def left_out(weights: TensorSource) -> str:
    """A line that says what is left out; empty where nothing is."""
    others = [name for name in weights.names() if is_other(name)]
    if not others:
        return ""
    what = "audio" if all("audio" in name for name in others) else "vision"
    size = sum(weights.nbytes(name) for name in others) / 1e6
    return f"the {what} part ({len(others)} tensors, {size:,.1f} MB) is left out: the anchor reads text"
