"""Tiny random sources to convert from: Hugging Face folders made by transformers, GGUF files of the same weights
laid out as llama.cpp's converter does it, and memory checkpoints.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tiny import make_tokenizer, random_tree

from mlx_hiermem.config import MemoryConfig

BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 256, "eos_token_id": 259,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"rope_theta": 5e4, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "qwen2": (transformers.Qwen2Config, {"rope_theta": 1e6}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        # an odd width: sqrt(hidden) is then no exact number, as in Gemma 3 270M
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 6,
            "hidden_size": 96,
            "num_hidden_layers": 7,
        },
    ),
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def hf_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    """A random model whose norms, too, are not what they start as."""
    cls, own = KINDS[kind]
    config = cls(**{**BASE, **own, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn_like(value)
            value.copy_(value + 0.2 * noise if "norm" in name else 0.1 * noise)
            value.data = value.to(dtype)  # not model.to: the rotary frequencies stay float32
    return model.eval()


def save_hf(model: torch.nn.Module, folder: pathlib.Path) -> pathlib.Path:
    """A folder as `save_pretrained` writes it, with a byte tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_hf(folder: pathlib.Path, kind: str = "llama", **options: Any) -> pathlib.Path:
    return save_hf(hf_model(kind, **options), folder)


def byte_tokens() -> list[str]:
    """The 260 tokens of tiny's byte tokenizer, in id order."""
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<a>", "<b>", "<c>", "<eos>"]


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA3_NAMES = GGUF_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def make_gguf(
    file: pathlib.Path, model: torch.nn.Module, quant: str = "F32", extra: dict[str, np.ndarray] | None = None
) -> pathlib.Path:
    """Writes a transformers model as llama.cpp would: `quant` for the matrices, F32 for the norms and biases."""
    config = model.config
    arch = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, arch)
    add_metadata(writer, config, arch)
    add_tokenizer(writer)
    tensors = {name: value.detach().float().numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, value in {**{k: _llama_cpp(k, v, config) for k, v in tensors.items()}, **(extra or {})}.items():
        wanted = gguf.GGMLQuantizationType[quant] if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(value), wanted)
        writer.add_tensor(_gguf_name(name, arch), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE of the SmolLM kind: 256 bytes, two merges, a user-defined and a control token."""
    tokens = byte_tokens()
    tokens[256:258] = ["ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [4, 3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(259)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _gguf_name(name: str, arch: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight; other names as they are."""
    stem, _, suffix = name.rpartition(".")
    table = GEMMA3_NAMES if arch == "gemma3" else GGUF_NAMES
    if stem in table:
        return f"{table[stem]}.{suffix}"
    if not stem.startswith("model.layers."):
        return name
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{table[rest]}.{suffix}"


def _llama_cpp(name: str, value: np.ndarray, config: Any) -> np.ndarray:
    """The two things that llama.cpp's converter does to values."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return value + 1
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if config.model_type == "llama" and part in name:  # halves (i, i + D/2) become neighbours (2i, 2i+1)
            split = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            return split.swapaxes(1, 2).reshape(value.shape)
    return value


DOCUMENTED = {"gate": "w1", "up": "w2", "down": "w3"}


def make_memory(file: pathlib.Path, config: MemoryConfig, generic: int = 0, seed: int = 0) -> pathlib.Path:
    """A random memory checkpoint of the documented layout, its settings in the metadata."""
    torch.manual_seed(seed)
    tensors = {}
    for level, units in enumerate(config.block_sizes, 1):
        for part, shape in config.shapes(units).items():
            tensors[f"memory.level{level}.{_documented(part)}"] = 0.3 * torch.randn(config.branching**level, *shape)
    for part, shape in config.shapes(generic).items() if generic else ():
        tensors[f"memory.generic.{_documented(part)}"] = 0.3 * torch.randn(shape)
    for level, centroids in enumerate(random_tree(config, seed).centroids, 1):
        tensors[f"tree.level{level}.centroids"] = torch.from_numpy(centroids)
    settings = {key: json.dumps(config.to_json()[key]) for key in ("kind", "branching", "block_sizes", "layers")}
    save_file(tensors, file, metadata=settings)
    return file


def _documented(part: str) -> str:
    projection, dot, side = part.partition(".")
    return DOCUMENTED.get(projection, projection) + dot + side


def memory_config(hf: Any, kind: str = "ffn", layers: tuple[int, ...] = (0, 2)) -> MemoryConfig:
    """A memory of two levels for a transformers config."""
    heads, head_dim = (
        hf.num_attention_heads,
        getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
    )
    widths = {"ffn_width": hf.intermediate_size, "q_width": heads * head_dim}
    kv_width = hf.num_key_value_heads * head_dim
    return MemoryConfig(kind, 3, (4, 2), layers, hf.hidden_size, "float32", **widths, kv_width=kv_width)
