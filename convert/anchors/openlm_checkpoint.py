"""What an OpenLM checkpoint holds: its description, and its tensors after every check that names can pass.

Nothing may be missing or left over. Checkpoints come as `epoch_N.pt`, as averages or as bare state dicts, with
the prefixes that `torch.compile` and distributed training leave, and tied embeddings once or twice.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_hiermem.convert.anchors.openlm_config import (
    NORMS,
    POSITIONS,
    OpenLMConfig,
    read_settings,
    reject_foreign,
)
from mlx_hiermem.convert.checkpoint import RawTensor, TensorSource, is_finite, open_checkpoint
from mlx_hiermem.convert.readers import plain_name, some
from mlx_hiermem.errors import AnchorError, CheckpointError

PREFIXES = re.compile(r"^(module\.|model\.)+")
INV_FREQ = re.compile(r"\.attention\.pos_embed\.inv_freq$")  # a buffer of both rotary kinds in stock OpenLM
EMBEDDINGS, OUTPUT = "tok_embeddings.weight", "output.weight"


def load_openlm_tensors(
    source: pathlib.Path, config: pathlib.Path | None = None
) -> tuple[OpenLMConfig, dict[str, RawTensor]]:
    """The model's description and its state dict under OpenLM's own names (tied: without `output`)."""
    with open_checkpoint(source) as tensors:
        model, names = describe(tensors, read_settings(source, config))
        return model, {name: read_finite(tensors, names[name]) for name in model.shapes()}


def describe(tensors: TensorSource, settings: Mapping[str, Any]) -> tuple[OpenLMConfig, dict[str, str]]:
    """(the model, OpenLM name -> name in the checkpoint), after checking that nothing is missing or left over."""
    reject_foreign(tensors.names(), settings)
    names: dict[str, str] = {}
    for name in tensors.names():
        plain = PREFIXES.sub("", plain_name(name))
        if plain in names:
            raise CheckpointError(f"the checkpoint holds {plain} twice, as {names[plain]} and {name}")
        names[plain] = name
    if EMBEDDINGS not in names and OUTPUT in names and settings.get("weight_tying") is not False:
        names[EMBEDDINGS] = names.pop(OUTPUT)  # tied, and saved under the other name only
    shapes = {plain: tensors.shape(name) for plain, name in names.items()}
    model = _sizes(shapes, settings)
    model = _kinds(model, shapes, settings)
    model = replace(model, tied=_tied(tensors, names, settings))
    buffers = [names.pop(plain) for plain in list(names) if INV_FREQ.search(plain)]
    if model.position in ("rotary", "llama_rotary"):
        model = replace(model, rope_base=_rope_base(tensors, buffers, model, settings))
    if model.tied:
        names.pop(OUTPUT, None)
    _check_complete(model, names, shapes)
    return model, names


def _sizes(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> OpenLMConfig:
    """Sizes by the tensors alone; the settings give the number of heads, and must not contradict the rest."""
    first = "layers.0.attention.out_proj.weight", "layers.0.feed_forward.w3.weight"
    missing = [name for name in (EMBEDDINGS, *first) if len(shapes.get(name, ())) != 2]
    if missing:
        raise CheckpointError(
            f"not an OpenLM checkpoint: it lacks {', '.join(missing)}",
            "Expected the state dict of an OpenLM transformer.",
        )
    (vocab, hidden), (_, width), (_, ffn) = (shapes[name] for name in (EMBEDDINGS, *first))
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name)))
    inv_freq = next((shape for name, shape in shapes.items() if INV_FREQ.search(name)), None)
    heads = settings.get("n_heads") or (width // (2 * inv_freq[0]) if inv_freq else 0)
    if not heads or width % heads or (inv_freq and 2 * inv_freq[0] * heads != width):
        raise CheckpointError(
            f"the number of heads is unknown or wrong ({heads or 'none given'} for {width} attention values)",
            "Give the run's model config (JSON with n_heads) by --config.",
        )
    for key, value in (("hidden_dim", hidden), ("n_layers", layers), ("vocab_size", vocab)):
        if settings.get(key) not in (None, -1, value):
            raise CheckpointError(
                f"the model config says {key} {settings[key]}, the checkpoint has {value}",
                "It is the config of another run: name the right one by --config.",
            )
    return OpenLMConfig(vocab, hidden, layers, heads, width // heads, ffn, seq_len=settings.get("seq_len") or 2048)


def _kinds(model: OpenLMConfig, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> OpenLMConfig:
    """Norm and position kinds by the settings, or OpenLM's own defaults where the tensors leave no doubt."""
    if not settings:
        raise CheckpointError(
            "no model config (JSON) and no params.txt beside the checkpoint: its norms and positions are unknown",
            "Name one by --config.",
        )
    norm = settings.get("model_norm")
    if norm is None:
        if "norm.weight" in shapes and "norm.bias" not in shapes:
            raise CheckpointError(
                "the tensors do not tell a gain-only LayerNorm from an RMS norm, and no model_norm is given",
                "Give the run's model config or params.txt by --config.",
            )
        norm = "default_layer_norm" if "norm.weight" in shapes else "no_wb_layer_norm"
    if norm not in NORMS:
        raise AnchorError(f"unknown model_norm '{norm}'", f"Known kinds: {', '.join(NORMS)}.")
    position = settings.get("positional_embedding_type") or "rotary"
    if position not in POSITIONS:
        raise AnchorError(f"unknown positional_embedding_type '{position}'", f"Known: {', '.join(POSITIONS)}.")
    given = settings.get("qk_norm")
    return replace(
        model,
        norm=norm,
        position=position,
        eps=float(settings.get("norm_eps") or model.eps),
        qk_norm=bool(given) if given is not None else "layers.0.attention.q_norm.weight" in shapes,
        post_embed_norm=bool(settings.get("post_embed_norm", "post_embed_norm.weight" in shapes)),
    )


def _tied(tensors: TensorSource, names: Mapping[str, str], settings: Mapping[str, Any]) -> bool:
    """Whether input and output embeddings are one: by the settings, else by comparing them."""
    given = settings.get("weight_tying")
    if OUTPUT not in names:
        return given is None or bool(given)
    if given is False or tensors.shape(names[OUTPUT]) != tensors.shape(names[EMBEDDINGS]):
        return False
    equal = np.array_equal(tensors.read(names[OUTPUT]).data, tensors.read(names[EMBEDDINGS]).data)
    if given and not equal:
        raise CheckpointError(
            "the settings say that the embeddings are tied, but tok_embeddings and output differ",
            "Set weight_tying to false in the model config, or name the right one by --config.",
        )
    return equal


def _rope_base(
    tensors: TensorSource, buffers: list[str], model: OpenLMConfig, settings: Mapping[str, Any]
) -> float:
    """The rotary base by the settings, checked against the buffer of inverse frequencies, else by that buffer.

    In half precision the buffer gives no more than two digits of the base: enough for 10 000 or 500 000, and
    anything else is an error rather than a guess.
    """
    given = settings.get("rope_base")
    if not buffers:
        return float(given or model.rope_base)
    raw = tensors.read(buffers[0])
    exponent = -np.arange(0, model.head_dim, 2) / model.head_dim
    inverse = raw.float32().astype(np.float64)
    digits, precision = (6, 1e-5) if raw.dtype == "float32" else (2, 5e-2 if given else 4e-3)
    guesses = [float(given or model.rope_base)]
    if not given and len(inverse) > 1:
        guesses.append(float(f"{inverse[-1] ** (1 / exponent[-1]):.{digits}g}"))
    for base in guesses:
        if np.allclose(inverse, base**exponent, rtol=precision, atol=0):
            return base
    raise CheckpointError(
        f"{buffers[0]} does not hold the frequencies of the rotary base {guesses[0]:g}",
        "Give the run's base frequency in the model config (rope_theta).",
    )


def _check_complete(model: OpenLMConfig, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = model.shapes()
    missing = [name for name in expected if name not in names]
    left_over = [names[name] for name in names if name not in expected]
    if missing or left_over:
        found = [f"lacks {some(missing)}"] if missing else []
        found += [f"has {some(left_over)} left over"] if left_over else []
        raise CheckpointError(
            f"the checkpoint {' and '.join(found)}",
            f"Its settings: {model.norm}, qk_norm {model.qk_norm}, post_embed_norm {model.post_embed_norm}.",
        )
    wrong = [f"{n} {shapes[n]}, expected {expected[n]}" for n in expected if shapes[n] != expected[n]]
    if wrong:
        raise CheckpointError(f"tensors of a wrong shape: {some(wrong)}", "Is it the config of another run?")


def read_finite(tensors: TensorSource, name: str) -> RawTensor:
    """A whole tensor; CheckpointError where it holds an infinity or NaN."""
    raw = tensors.read(name)
    if not is_finite(raw):
        raise CheckpointError(
            f"the tensor {name} has non-finite values", "The checkpoint is damaged or its training diverged."
        )
    return raw
