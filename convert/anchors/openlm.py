"""OpenLM checkpoints (`epoch_N.pt`, averages, bare state dicts) -> plain mlx-lm anchor folders.

Where mlx-lm's `llama` computes exactly the same (RMS norms, rotary positions, no query/key norms) the anchor is
a llama. Every other variant gets the model type `openlm` and brings its architecture as a file of its own,
which `mlx_lm.load(path, trust_remote_code=True)` runs; this project uses its own copy instead.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_hiermem.anchor import OPENLM_FILE
from mlx_hiermem.convert.anchors.huggingface import TOKENIZERS, copy_tokenizer, to_mlx, write_anchor
from mlx_hiermem.convert.anchors.openlm_checkpoint import EMBEDDINGS, OUTPUT, describe, read_finite
from mlx_hiermem.convert.anchors.openlm_config import NORMS, OpenLMConfig, read_settings
from mlx_hiermem.convert.anchors.shards import staging_folder, write_shards
from mlx_hiermem.convert.checkpoint import TensorSource, open_checkpoint
from mlx_hiermem.errors import CheckpointError

NAMES = {  # OpenLM -> mlx-lm, within a layer
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w3": "mlp.down_proj",
}
FUSED = {  # one OpenLM tensor -> the layers whose rows it stacks
    "attention.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.w12": ("mlp.gate_proj", "mlp.up_proj"),
}


def convert_openlm(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    config: pathlib.Path | None = None,
    tokenizer: pathlib.Path | None = None,
    quantize: int | None = None,
    warn: Callable[[str], None] = print,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the anchor of an OpenLM checkpoint to the new folder `out`, in the source's dtype.

    `config` is the model config JSON (or a params.txt) where it is not beside the checkpoint, `tokenizer` a
    folder with tokenizer files, `quantize` 4 or 8 bits; `warn` is called with what the user should know,
    `progress` with bytes done and in all.
    Raises CheckpointError where the source is damaged or incomplete, AnchorError where it is no dense OpenLM.
    """
    beside = source if source.is_dir() else source.parent
    with open_checkpoint(source) as tensors, staging_folder(out) as staging:
        model, names = describe(tensors, read_settings(source, config))
        if tokenizer or any((beside / name).is_file() for name in TOKENIZERS):
            copy_tokenizer(beside, tokenizer or beside, staging)
        else:
            warn("the anchor has no tokenizer: give one by --tokenizer (the paper's is EleutherAI/gpt-neox-20b)")
        settings = anchor_config(model) | _effective_vocabulary(staging, model)
        (staging / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        sizes = {name: tensors.nbytes(stored) for name, stored in names.items()}
        write_shards(staging, sizes, lambda name: anchor_weights(tensors, name, names[name]))
        write_anchor(staging, out, quantize, progress)
    if settings["model_type"] == "openlm":
        _add_model_file(out)


def anchor_weights(tensors: TensorSource, name: str, stored: str) -> dict[str, mx.array]:
    """An OpenLM tensor under mlx-lm's names, a fused one split into its projections."""
    value = to_mlx(read_finite(tensors, stored))
    targets = mlx_names(name)
    return dict(zip(targets, mx.split(value, len(targets)), strict=True))


def mlx_names(name: str) -> list[str]:
    """mlx-lm's names of an OpenLM tensor, in the order in which its rows are stacked."""
    if name == EMBEDDINGS:
        return ["model.embed_tokens.weight"]
    if name == OUTPUT:
        return ["lm_head.weight"]
    layer, (module, _, part) = "", name.rpartition(".")
    if name.startswith("layers."):
        _, index, module = module.split(".", 2)
        layer = f"layers.{index}."
    modules = FUSED.get(module, (NAMES.get(module, module),))
    return [f"model.{layer}{target}.{part}" for target in modules]


def anchor_config(model: OpenLMConfig) -> dict[str, Any]:
    """config.json of the anchor: mlx-lm's llama where that is exact, else our own model type."""
    shared = {
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "intermediate_size": model.ffn_width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.eps,
        "rope_theta": model.rope_base,
        "max_position_embeddings": model.seq_len,
        "tie_word_embeddings": model.tied,
    }
    rotary = model.position in ("rotary", "llama_rotary")
    if NORMS[model.norm].rms and rotary and not model.qk_norm and not model.post_embed_norm:
        return {
            **shared,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "rope_traditional": model.position == "llama_rotary",
        }
    return {
        **shared,
        "model_type": "openlm",
        "model_norm": model.norm,
        "positional_embedding_type": model.position,
        "qk_norm": model.qk_norm,
        "post_embed_norm": model.post_embed_norm,
    }


def _effective_vocabulary(folder: pathlib.Path, model: OpenLMConfig) -> dict[str, int]:
    """The tokenizer's real size, where the embeddings are padded beyond it: those ids are never sampled."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"cannot read the tokenizer {file.name}: {error}", "Give --tokenizer.") from error
    size = max(ids, default=-1) + 1
    if size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {size} tokens, the model only {model.vocab_size}",
            "It is not this model's tokenizer; give the right one by --tokenizer.",
        )
    return {"effective_vocab_size": size} if size < model.vocab_size else {}


def _add_model_file(folder: pathlib.Path) -> None:
    """Puts the architecture beside the weights and names it in config.json, as mlx-lm wants it."""
    from mlx_hiermem import openlm

    shutil.copyfile(openlm.__file__, folder / OPENLM_FILE)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"model_file": OPENLM_FILE}
    file.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
