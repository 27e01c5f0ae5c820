"""GGUF files -> plain mlx-lm anchor folders: weights dequantised, config and tokenizer rebuilt from metadata.

A GGUF file is llama.cpp's form of a model: other tensor names, query and key rows in another order (llama),
Gemma's norms stored as 1 + w, and the config under its own keys. All of that is undone here; the result goes
through the same strict loading as a Hugging Face folder. One dtype for the whole anchor: the matrices' own if
they are F32, F16 or BF16, and float16 where they are quantised.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hiermem.convert.anchors.gguf_tokenizer import described, end_tokens, write_tokenizer
from mlx_hiermem.convert.anchors.huggingface import copy_tokenizer, one_line, write_anchor
from mlx_hiermem.convert.anchors.shards import staging_folder, write_shards
from mlx_hiermem.convert.source import parts_of
from mlx_hiermem.errors import AnchorError, CheckpointError, MissingDependencyError
from mlx_hiermem.progress import Progress

ARCHITECTURES = {  # GGUF's name -> (mlx-lm's model type, the transformers class, the FFN's activation)
    "llama": ("llama", "LlamaForCausalLM", "silu"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "silu"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "silu"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"),
}
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_TENSORS = TENSORS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
PLAIN_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
FLOAT16_MAX = 65504.0
GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose attention scale does not come from the head size


def convert_gguf(
    file: pathlib.Path,
    out: pathlib.Path,
    *,
    quantize: int | None = None,
    tokenizer: pathlib.Path | None = None,
    warn: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Writes the anchor of a GGUF file to the new folder `out`.

    Options as for `convert_huggingface`; `warn` is called with what the user should know, `progress` with
    bytes of the file done and in all.
    """
    source = GGUF(file)
    if types := source.quantised_types():
        warn(f"the file's weights are {', '.join(types)}; the anchor has them dequantised, as float16")
    with staging_folder(out) as staging:
        config = source.config()
        if tokenizer:
            copy_tokenizer(tokenizer, tokenizer, staging)
        else:
            write_tokenizer(source.metadata, staging, config["max_position_embeddings"])
        (staging / "config.json").write_text(json.dumps(config), encoding="utf-8")
        ends = end_tokens(source.metadata)
        generation = json.dumps({"eos_token_id": ends} if ends else {}, indent=2)
        (staging / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
        source.write_weights(staging, config, progress or (lambda done, total: None))
        write_anchor(staging, out, quantize)


class GGUF:
    """An opened file: `metadata` by key, and `tensors` by name, still as stored."""

    def __init__(self, file: pathlib.Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise MissingDependencyError(
                "reading GGUF files needs the gguf package", "pip install 'mlx-hiermem[gguf]'"
            ) from error
        files = parts_of(file)
        self.file = files[0]
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Any] = {}
        for number, part in enumerate(files):
            try:
                reader = GGUFReader(part)
                metadata = {key: field.contents() for key, field in reader.fields.items()}
            except (ValueError, KeyError, IndexError, OSError, OverflowError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{part} is truncated or not a GGUF file: {one_line(error)}", "Copy or download it again."
                ) from error
            self._check_part(part, metadata, number, len(files))
            self.metadata |= metadata if not number else {}  # the first part's is the model's
            self.tensors |= {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise AnchorError(
                f"{file} holds a model of the architecture '{self.architecture}'",
                f"GGUF files can be converted for {', '.join(ARCHITECTURES)}; "
                "for others convert the original Hugging Face folder.",
            )
        if self.get("expert_count"):
            raise AnchorError(
                f"{file} is a mixture of experts (expert_count {self.get('expert_count')})",
                "Memories widen one dense FFN per layer; use a dense model.",
            )

    def _check_part(self, file: pathlib.Path, metadata: dict[str, Any], number: int, parts: int) -> None:
        told = int(metadata.get("split.no", 0)), int(metadata.get("split.count", 0)) or 1
        if told != (number, parts):
            raise CheckpointError(
                f"{file} is part {told[0] + 1} of {told[1]} of a split GGUF file, by its metadata",
                "Give the parts their names back (NAME-00001-of-0000N.gguf), all in one folder.",
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's own metadata: `get("block_count")` is `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file} lacks the metadata {self.architecture}.{key}")
        return value

    def config(self) -> dict[str, Any]:
        """config.json in mlx-lm's spelling."""
        model_type, hf_class, act = ARCHITECTURES[self.architecture]
        heads, hidden = self.need("attention.head_count"), self.need("embedding_length")
        head_dim = self.get("attention.key_length") or self.get("rope.dimension_count") or hidden // heads
        config = {
            "model_type": model_type,
            "architectures": [hf_class],
            "hidden_act": act,
            "hidden_size": hidden,
            "num_hidden_layers": self.need("block_count"),
            "intermediate_size": self.need("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _shortest(self.need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self.get("rope.freq_base", 10000.0)),
            "max_position_embeddings": self.need("context_length"),
            "vocab_size": int(self.tensor("token_embd.weight").shape[1]),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        for key, size in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
            if self.get(key, size) != size:
                raise AnchorError(f"{self.file}: {key} {self.get(key)} differs from the head size {size}")
        told = described(self.metadata)
        config |= {name: told[name] for name in ("bos_token_id", "eos_token_id") if name in told}
        if scaling := self.rope_scaling(config):
            config["rope_scaling"] = scaling
        if model_type == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        return config | (self.gemma3_config(config) if model_type == "gemma3_text" else {})

    def gemma3_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """What llama.cpp knows of Gemma 3 by heart and does not write into the file."""
        if self.get("final_logit_softcapping") or self.get("attn_logit_softcapping"):
            raise AnchorError(f"{self.file} caps its logits, which mlx-lm's gemma3_text does not")
        large = config["num_hidden_layers"] == GEMMA3_27B_LAYERS
        scale = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        pattern = self.get("attention.sliding_window_pattern", 6)
        if not isinstance(pattern, int):
            raise AnchorError(f"{self.file} has a sliding window pattern that mlx-lm's gemma3_text cannot have")
        return {
            "query_pre_attn_scalar": scale,
            "sliding_window": self.need("attention.sliding_window"),
            "sliding_window_pattern": pattern,
            "rope_theta": _shortest(self.get("rope.freq_base", 1e6)),
            "rope_local_base_freq": _shortest(self.get("rope.freq_base_swa", 1e4)),
        }

    def rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """mlx-lm's rope_scaling from the metadata, or from the factors that llama.cpp computed of Llama 3's."""
        if ROPE_FACTORS in self.tensors:
            return self.llama3_scaling(config)
        # Files of 2023 have another key; llama.cpp takes scaling without a type to be linear.
        factor = self.get("rope.scaling.factor") or self.get("rope.scale_linear") or 1.0
        kind = self.get("rope.scaling.type", "linear")
        if (attention := self.get("rope.scaling.attn_factor", 1.0)) != 1.0:
            raise AnchorError(
                f"{self.file} scales its attention by {attention:g}", "Convert the original Hugging Face folder."
            )
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": _shortest(factor)}
        if kind == "yarn":
            known = {"ext_factor": (None, 1.0, -1.0), "attn_factor": (None, 1.0), "log_multiplier": (None, 0.0)}
            if odd := [key for key, usual in known.items() if self.get(f"rope.scaling.yarn_{key}") not in usual]:
                raise AnchorError(
                    f"{self.file} scales its positions by yarn with {', '.join(odd)} of its own",
                    "Convert the original Hugging Face folder.",
                )
            betas = {name: self.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
            original = self.need("rope.scaling.original_context_length")
            return {
                "rope_type": "yarn",
                "factor": _shortest(factor),
                "original_max_position_embeddings": original,
                **{name: _shortest(value) for name, value in betas.items() if value is not None},
            }
        raise AnchorError(f"{self.file} scales its positions by '{kind}'", "Known: linear, yarn, Llama 3's.")

    def llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """Finds the Llama 3.1 or 3.2 settings whose frequency factors are the file's."""
        factors = self.dequantised(ROPE_FACTORS)
        settings = {
            "rope_type": "llama3",
            "factor": _shortest(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not np.allclose(llama3_factors(settings, config["rope_theta"], config["head_dim"]), factors, rtol=1e-4):
            raise AnchorError(
                f"{self.file} scales its rotary frequencies in a way that is not Llama 3's",
                "Convert the original Hugging Face folder.",
            )
        return settings

    def write_weights(self, folder: pathlib.Path, config: dict[str, Any], progress: Progress) -> None:
        """Writes all tensors under their Hugging Face names, in the anchor's one dtype."""
        names = {name: self.target(name) for name in self.tensors if name != ROPE_FACTORS}
        unknown = [name for name, target in names.items() if target is None]
        if unknown:
            raise CheckpointError(f"{self.file} holds tensors that no {self.architecture} has: {unknown[:8]}")
        dtype, total, done = self.dtype(), sum(t.n_bytes for t in self.tensors.values()), 0

        def read(name: str) -> dict[str, mx.array]:
            nonlocal done
            values = self.restored(name, config)
            if dtype == mx.float16 and FLOAT16_MAX < np.abs(values).max() < np.inf:
                raise CheckpointError(
                    f"{self.file}: {name} has values too large for float16",
                    "Convert a BF16 or F32 file of the model.",
                )
            done += self.tensors[name].n_bytes
            progress(done, total)
            return {str(names[name]): mx.array(values).astype(dtype)}

        write_shards(folder, {name: int(self.tensors[name].n_elements) * dtype.size for name in names}, read)

    def restored(self, name: str, config: dict[str, Any]) -> np.ndarray:
        """A tensor's float32 values as the original model has them."""
        values = self.dequantised(name)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            return values - 1  # mlx-lm and transformers compute with 1 + w
        if self.architecture == "llama" and re.search(r"\.attn_[qk]\.", name):
            heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            # llama.cpp turns neighbouring pairs (2i, 2i+1) where the original turns halves (i, i + D/2)
            return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return values

    def dequantised(self, name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = self.tensor(name)
        try:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.file}: {name} is {tensor.tensor_type.name}: {error}") from error

    def tensor(self, name: str) -> Any:
        if name not in self.tensors:
            raise CheckpointError(f"{self.file} lacks the tensor {name}", "Copy or download it again.")
        return self.tensors[name]

    def dtype(self) -> mx.Dtype:
        """The matrices' type if they have one plain type; float32 for several; float16 if any is quantised."""
        types = self.matrix_types()
        if self.quantised_types():
            return mx.float16
        return PLAIN_TYPES[types.pop()] if len(types) == 1 else mx.float32

    def matrix_types(self) -> set[str]:
        return {tensor.tensor_type.name for tensor in self.tensors.values() if len(tensor.shape) > 1}

    def quantised_types(self) -> list[str]:
        """The names of the file's quantised types: Q4_1, Q8_0 and so on."""
        return sorted(self.matrix_types() - set(PLAIN_TYPES))

    def target(self, name: str) -> str | None:
        """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; None where there is no such thing."""
        table = GEMMA3_TENSORS if self.architecture == "gemma3" else TENSORS
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in table:
            return None
        layer = f"model.layers.{match[1]}." if match[1] else ""
        return f"{layer}{table[match[2]]}.{match[3]}"


def llama3_factors(settings: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """[D/2] numbers that Llama 3's scaling divides the rotary frequencies by (as in transformers' llama3)."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = settings["original_max_position_embeddings"] / wavelength
    low, high, factor = settings["low_freq_factor"], settings["high_freq_factor"], settings["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _shortest(value: Any) -> float:
    """The shortest decimal that is this float32: GGUF's 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))
