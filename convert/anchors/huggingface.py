"""Hugging Face model folders and hub ids -> plain mlx-lm anchor folders.

The work is mlx-lm's own: it loads the source strictly and saves it again. What is added here is what it lets
pass: settings that its model classes ignore and that would change the answers, non-finite values, damaged
shards, mixtures of experts. GGUF files come this way too (`gguf.py` writes a folder for `write_anchor`).
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hiermem.anchor import model_classes, read_config
from mlx_hiermem.convert.anchors.adapters import MLX_FILE, PeftAdapter, adapter_files, merge_mlx
from mlx_hiermem.convert.anchors.hf_config import (
    LEFT_FACTORS,
    check_activation,
    check_positions,
    left_factors,
    normalise,
    reject_foreign,
)
from mlx_hiermem.convert.anchors.shards import is_begun, save_weights, staging_folder, write_shards
from mlx_hiermem.convert.anchors.text_part import is_other, left_out, text_config, text_name
from mlx_hiermem.convert.checkpoint import RawTensor, TensorSource, open_checkpoint
from mlx_hiermem.convert.readers import plain_name
from mlx_hiermem.errors import AnchorError, CheckpointError
from mlx_hiermem.memory.ffn import activation, feed_forward, projections
from mlx_hiermem.progress import Progress
from mlx_hiermem.tokenizer import load_tokenizer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "tokenizer.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
OTHER_FILES = ("generation_config.json", "LICENSE*", "NOTICE*")  # that are copied beside the weights
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any of them makes a tokenizer


def is_hub_id(source: str) -> bool:
    """Whether `source` reads as owner/name and is not a file or folder here."""
    return bool(HUB_ID.fullmatch(source)) and not pathlib.Path(source).exists()


def download(hub_id: str, weights: bool = True) -> pathlib.Path:
    """A hub repository's folder in the hub's cache; .bin files only where there are no safetensors."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> pathlib.Path:
        ignored = ["*/*", "consolidated*"]  # the second: the same weights in Mistral's own form
        return pathlib.Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=ignored))

    try:
        folder = fetch(HUB_FILES + ["*.safetensors"] * weights)
        return fetch([*HUB_FILES, "*.bin"]) if weights and not any(folder.glob("*.safetensors")) else folder
    except Exception as error:  # the client's own errors, and those of the HTTP library below it
        raise CheckpointError(
            f"cannot download {hub_id} from the hub: {one_line(error)}",
            "Check the name and the connection, or give a local folder.",
        ) from error


def convert_huggingface(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    quantize: int | None = None,
    tokenizer: pathlib.Path | None = None,
    warn: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> None:
    """Writes the anchor of a Hugging Face folder to the new folder `out`, in the source's dtype.

    `quantize` is 4 or 8 bits; `tokenizer` is a folder to take the tokenizer from instead of the source; `warn` is
    called with what the user should know, `progress` with bytes done and in all. A LoRA adapter in the folder is
    merged.
    Raises CheckpointError where the source is damaged, AnchorError where mlx-lm or a memory cannot carry it.
    """
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} is not a Hugging Face model folder: it has no config.json",
            "Give the folder that holds config.json, the weights and the tokenizer.",
        )
    config = read_config(source)
    reject_foreign(config, source)
    with open_checkpoint(source) as weights, staging_folder(out) as staging:
        config = plain_names(weights, config, warn)
        reject_foreign(config, source)
        config = normalise(config, weights.names())
        check_tie(config, weights)
        (staging / "config.json").write_text(json.dumps(config), encoding="utf-8")
        copy_tokenizer(source, tokenizer or source, staging)
        tied = config.get("tie_word_embeddings", "lm_head.weight" not in weights.names())
        stage_weights(weights, source, staging, warn, bool(tied))
        is_mlx = MLX_FILE in [file.name for file in adapter_files(source)]
        factors = left_factors(config)
        write_anchor(staging, out, quantize, progress, source if is_mlx else None, factors)


def write_anchor(
    staging: pathlib.Path,
    out: pathlib.Path,
    quantize: int | None,
    progress: Progress | None = None,
    adapter: pathlib.Path | None = None,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Loads a complete Hugging Face style folder strictly with mlx-lm, checks it and saves it to `out`.

    `adapter` is a folder with an adapter of mlx-lm's, which is merged. `factors`, by the ends of names, multiply
    weights.
    """
    from mlx_lm.utils import load_model, save_config

    check_tokenizer(staging)
    try:
        model, config = load_model(staging, lazy=True, get_model_classes=model_classes)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError, ImportError) as error:
        raise AnchorError(
            f"the checkpoint does not fit its architecture: {one_line(error) or type(error).__name__}"
        ) from error
    except SystemExit as error:  # what mlx-lm's olmo does where a package is missing
        raise AnchorError("mlx-lm cannot load this architecture here: it needs another package") from error
    if adapter:
        model = merge_mlx(model, adapter)
    if factors:  # from now on they are in the weights
        config |= dict.fromkeys(LEFT_FACTORS, 1.0)
    for end, factor in (factors or {}).items():
        found = [(name, value) for name, value in tree_flatten(model.parameters()) if name.endswith(end)]
        model.update(tree_unflatten([(name, value * factor) for name, value in found]))
    if not is_begun(out):
        check_finite(tree_flatten(model.parameters()), progress)
    check_dense(model)
    check_activation(config, model)
    check_positions(config, model)
    if quantize is not None:
        model, config = quantized(model, config, quantize)
    out.mkdir(exist_ok=True)
    save_weights(out, model)
    save_config(config, out / "config.json")
    for file in sorted(staging.iterdir()):
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    mx.clear_cache()


def plain_names(weights: TensorSource, config: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Gives the tensors the names that a text model has; returns that model's config.

    What training puts into names goes, and so does what sees or hears (`text_part`).
    """
    if line := left_out(weights):
        warn(line)
    text = text_config(config)
    names = {plain_name(name): name for name in weights.names()}
    if len(names) != len(weights.names()):
        raise CheckpointError(f"{weights.files[0]} holds tensors twice, with and without `module.` or the like")
    if "text_config" in config and "text_config" not in text:
        names = {text_name(plain): name for plain, name in names.items() if not is_other(plain)}
    weights.rename(names)
    return text


def check_tie(config: dict[str, Any], weights: TensorSource) -> None:
    """A tied model's checkpoint may repeat the embeddings as lm_head, but not hold others there."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if config.get("tie_word_embeddings") and set(names) <= set(weights.names()):
        head, embeddings = (weights.read(name).data for name in names)
        if head.shape != embeddings.shape or (head != embeddings).any():
            raise CheckpointError(
                "lm_head.weight differs from the embeddings, but config.json says that they are tied",
                "Set tie_word_embeddings to false there, or remove the tensor.",
            )


def stage_weights(
    weights: TensorSource,
    source: pathlib.Path,
    staging: pathlib.Path,
    warn: Callable[[str], None],
    tied: bool = False,
) -> None:
    """Puts the tensors where mlx-lm finds them: safetensors as links, others rewritten, PEFT's adapter merged."""
    files = adapter_files(source)
    if files and files[1].name == MLX_FILE:
        warn(f"the adapter beside the model ({MLX_FILE}, by mlx-lm) is merged into it")
    elif files:
        with PeftAdapter(files[0], files[1], lambda name: text_name(plain_name(name))) as adapter:
            adapter.check(set(weights.names()), source, tied)
            warn(f"the adapter beside the model ({adapter}) is merged into it")
            sizes = {name: weights.nbytes(name) for name in weights.names()}
            write_shards(staging, sizes, lambda name: {name: adapter.merged(name, to_mlx(weights.read(name)))})
        return
    doubles = any(weights.dtype(name) == "float64" for name in weights.names())
    if weights.is_plain and not doubles and all(file.suffix == ".safetensors" for file in weights.files):
        for number, file in enumerate(weights.files):
            link = staging / f"model-{number:05d}.safetensors"
            link.unlink(missing_ok=True)  # of an interrupted run
            link.symlink_to(file.resolve())
        return
    sizes = {name: weights.nbytes(name) for name in weights.names()}
    write_shards(staging, sizes, lambda name: {name: to_mlx(weights.read(name))})


def to_mlx(raw: RawTensor) -> mx.array:
    """An MLX copy in the same dtype; float64 becomes float32, which is all that MLX computes in."""
    if raw.dtype == "bfloat16":
        return mx.array(raw.data).view(mx.bfloat16)
    return mx.array(raw.float32() if raw.dtype == "float64" else raw.data)


def check_finite(parameters: Sequence[tuple[str, mx.array]], progress: Progress | None = None) -> None:
    """Reads every tensor; CheckpointError names the first that holds an infinity or NaN."""
    total, done = sum(value.nbytes for _, value in parameters), 0
    for name, value in parameters:
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise CheckpointError(
                f"the tensor {name} has non-finite values", "The checkpoint is damaged or its training diverged."
            )
        done += value.nbytes
        if progress:
            progress(done, total)


def check_dense(model: nn.Module) -> None:
    """AnchorError unless every layer has a gated FFN that a memory can widen."""
    layers = [feed_forward(layer) for layer in model.layers]
    for layer in layers:
        projections(layer)
    activation(layers[0])


def quantized(model: nn.Module, config: dict[str, Any], bits: int) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's affine quantisation in groups of 64, or of 32 where a layer's inputs are no multiple of 64."""
    from mlx_lm.utils import quantize_model

    if "quantization" in config:
        raise AnchorError("the source is quantised already", "Convert it without --quantize.")
    inputs = [m.weight.shape[-1] for _, m in model.named_modules() if hasattr(m, "to_quantized")]
    group = 32 if any(n % 64 for n in inputs) else 64
    if any(n % group for n in inputs):
        raise AnchorError(f"layers of {min(inputs)} inputs cannot be quantised in groups of 32")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return quantize_model(model, config, group, bits)


def copy_tokenizer(source: pathlib.Path, tokenizer: pathlib.Path, staging: pathlib.Path) -> None:
    """Copies the tokenizer and the other small files that belong to the weights."""
    if not any((tokenizer / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{tokenizer} has no tokenizer ({', '.join(TOKENIZERS)})", "Give --tokenizer.")
    for file in (*files_like(tokenizer, TOKENIZER_FILES), *files_like(source, OTHER_FILES)):
        shutil.copyfile(file, staging / file.name)


def files_like(folder: pathlib.Path, patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files of a folder whose names are of one of the patterns."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def check_tokenizer(folder: pathlib.Path) -> None:
    """Raises CheckpointError where the tokenizer cannot be loaded, or chats need tokens without an embedding."""
    try:
        tokenizer = load_tokenizer(folder)
    except AnchorError as error:
        what = error.what.replace(str(folder), "the source")
        raise CheckpointError(what, "Copy the tokenizer's files again, or give --tokenizer.") from error
    config = read_config(folder)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if tokenizer is None or not size:
        return
    template = str(getattr(tokenizer, "chat_template", None))
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= size and token in template]
    if beyond:
        raise CheckpointError(
            f"the chat template has {', '.join(beyond[:4])}, for which the model has no embeddings (it has {size})",
            "Is it another model's tokenizer, or were the embeddings not resized?",
        )


def one_line(error: object, limit: int = 300) -> str:
    """An error's text on one line; mlx lists missing or left-over names on a line each."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " …"
