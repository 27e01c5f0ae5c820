"""The anchor: a plain mlx-lm model folder, opened for this machine, and the identity a bank knows it by."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from mlx_hiermem.config import AnchorIdentity
from mlx_hiermem.cpu import report_slow_blas
from mlx_hiermem.errors import AnchorError, HierMemError, first_line
from mlx_hiermem.files import read_json, reason
from mlx_hiermem.printable import printable
from mlx_hiermem.safetensors_file import read_header
from mlx_hiermem.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

MEMORY = pathlib.Path("/proc/meminfo")
SAMPLE = 1 << 16  # bytes of each tensor that enter the weights digest
OPENLM_FILE = "openlm.py"  # the copy of our own class that `hiermem convert` puts beside the weights
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SIZES = ("hidden_size", "vocab_size", "effective_vocab_size", "max_position_embeddings", *LAYERS)
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "eos_token_id"}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The folder's config.json; AnchorError where there is none, or the sizes in it are none."""
    file = folder / "config.json"
    if not file.exists():
        raise AnchorError(
            f"no config.json in {folder}", "Give the folder of a converted anchor (see `hiermem convert`)."
        )
    config = read_json(file, AnchorError)
    if not isinstance(config, dict):
        raise AnchorError(f"{file} is not a model configuration")
    text = config.get("text_config")
    if not isinstance(text, dict | None):
        raise AnchorError(f"{file} has a text_config that is no table of settings")
    for part in (config, text or {}):
        for name in SIZES:
            if (value := part.get(name)) is not None and (type(value) is not int or value < 1):
                raise AnchorError(f"{file} has {name} {value!r}, which is no whole number above 0")
    return config


def identify(folder: pathlib.Path, name: str = "") -> AnchorIdentity:
    """Which anchor this is, in milliseconds whatever its size.

    The config digest covers config.json without what no result depends on. The weights digest covers every
    tensor's name, dtype, shape and first 64 KiB: any training or other quantisation changes it. The digest of
    whole files is `hiermem verify`'s business.
    """
    config = read_config(folder)
    text = config.get("text_config") or {}
    stable = {key: value for key, value in config.items() if key not in VOLATILE}
    config_digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()
    return AnchorIdentity(
        name=printable(str(name or config.get("_name_or_path") or folder.resolve().name)),
        config_digest=config_digest,
        weights_digest=_weights_digest(folder),
        hidden=config.get("hidden_size") or text.get("hidden_size") or 0,
        layers=config.get("num_hidden_layers") or text.get("num_hidden_layers") or 0,
    )


def _weights_digest(folder: pathlib.Path) -> str:
    rows: list[tuple[str, bytes]] = []
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise AnchorError(f"no model*.safetensors in {folder}", "The anchor's folder is incomplete.")
    for file in files:
        header = read_header(file, AnchorError, "Convert the anchor again.")
        try:
            with file.open("rb") as stream:
                for name, tensor in header.tensors.items():
                    stream.seek(tensor.begin)
                    digest = hashlib.sha256(stream.read(min(tensor.end - tensor.begin, SAMPLE)))
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                    rows.append((name, digest.digest()))
        except OSError as error:
            raise AnchorError(f"cannot read {file}: {reason(error)}") from error
    return hashlib.sha256(b"".join(digest for _, digest in sorted(rows))).hexdigest()


def refuse_layers(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises AnchorError where a config has more layers than tensors: they would be made in memory first."""
    tensors = sum(len(read_header(file, AnchorError).tensors) for file in folder.glob("model*.safetensors"))
    for part in (config, config.get("text_config") or {}):
        layers = max(part.get(name) or 0 for name in LAYERS)
        if layers > tensors:
            raise AnchorError(f"{folder} has {tensors} tensors for the {layers} layers of its config.json")


def refuse_size(folder: pathlib.Path) -> None:
    """Raises AnchorError where the weights alone are more than the memory that is free; the system would end us."""
    needed, free = sum(file.stat().st_size for file in folder.glob("model*.safetensors")), free_memory()
    if free is not None and needed > free:
        raise AnchorError(
            f"{folder} needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            "End other programs, or take a smaller model or one in fewer bits.",
        )


def free_memory() -> int | None:
    """Bytes that a program may still take. On a Mac, which can make any of it free, all that there are."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(MEMORY.read_text().split("MemAvailable:")[1].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def refuse_code(folder: pathlib.Path, config: dict[str, Any]) -> None:
    """Raises AnchorError where a config names a file of code to build the model by.

    An OpenLM that `hiermem convert` wrote names one for plain mlx-lm; it is accepted, and the class is our own.
    """
    named = config.get("model_file")
    if named is None or (config.get("model_type"), named) == ("openlm", OPENLM_FILE):
        return
    raise AnchorError(
        f"{folder / 'config.json'} wants code to be run from its folder (model_file {named!r})",
        "No code of a model is ever run here. Use a model whose architecture mlx-lm has itself.",
    )


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """mlx-lm's classes for this config; our own for OpenLM, so that no code from the folder is run."""
    if config["model_type"] == "openlm":
        from mlx_hiermem.openlm import Model, ModelArgs

        return Model, ModelArgs
    from mlx_lm.utils import _get_classes  # private: tests/test_mlx_lm_canary.py watches it

    return _get_classes(config)


def load_anchor(folder: pathlib.Path, dtype: mx.Dtype | None = None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """(model, tokenizer, config) of a model folder; the tokenizer is None where the folder has none.

    `dtype` None means what the machine is fast at: as stored on Metal and CUDA, float32 on a CPU, whose half
    precision products are many times slower.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    report_slow_blas()
    config = read_config(folder)
    refuse_code(folder, config)
    refuse_layers(folder, config)
    refuse_size(folder)
    own_class = {"model_file": None}  # of an OpenLM; mlx-lm is not told of the file beside its weights
    try:
        model, _ = load_model(folder, lazy=True, get_model_classes=model_classes, model_config=own_class)
    except HierMemError:
        raise
    except Exception as error:  # a config of anything raises anything in mlx-lm's classes
        raise AnchorError(f"cannot load the anchor {folder}: {first_line(error)}") from error
    if dtype is None and mx.default_device().type == mx.DeviceType.cpu:
        dtype = mx.float32
    if dtype is not None:
        model.set_dtype(dtype)
    try:
        mx.eval([value for _, value in tree_flatten(model.parameters())])
    except RuntimeError as error:
        raise AnchorError(f"the weights of {folder} are damaged: {error}", "Convert it again.") from error
    return model, load_tokenizer(folder), config
