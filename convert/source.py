"""What SRC is: a Hugging Face folder or hub id, an OpenLM checkpoint, or a GGUF file; and the record of it.

A checkpoint of other software is refused, with the tool that exports it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from mlx_hiermem.anchor import read_config
from mlx_hiermem.convert.anchors.adapters import adapter_files, refuse_alone
from mlx_hiermem.convert.anchors.huggingface import download, is_hub_id
from mlx_hiermem.convert.checkpoint import open_checkpoint
from mlx_hiermem.convert.dcp_reader import METADATA, find_dcp
from mlx_hiermem.convert.readers import TORCH_SUFFIXES
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.files import file_digest

HF_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # llama.cpp's names for the parts of a split file
TOOLS = (
    "mlx-hiermem",
    "mlx",
    "mlx-lm",
    "numpy",
    "coremltools",
    "coreai-core",
    "coreai-opt",
    "coreai-torch",
    "gguf",
    "torch",
    "transformers",
)


@dataclass(frozen=True)
class Source:
    """`path` is what the converter of this `kind` reads, `name` what a user calls it, `files` the weights."""

    kind: str  # huggingface, openlm or gguf
    path: pathlib.Path
    name: str
    files: tuple[pathlib.Path, ...]
    revision: str = ""  # of a hub repository

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def describe(self) -> dict[str, Any]:
        """The part of source.json by which the source is known again."""
        return {"kind": self.kind, "name": self.name, "revision": self.revision, "files": digests(self.files)}


def find_source(src: str) -> Source:
    """Finds out what SRC is, downloading it from the hub where it is a hub id.

    Raises CheckpointError where it is no checkpoint of a known kind, or could be several.
    """
    if is_hub_id(src):
        folder = download(src)
        return replace(_in_folder(folder), name=src, revision=folder.name)
    path = pathlib.Path(src)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {src}", "Hub ids have the form owner/name.")
    if path.is_dir():
        return _in_folder(path)
    refuse_foreign(str(path), [path.name])
    if path.suffix == ".distcp" or path.name == METADATA:
        raise CheckpointError(f"{path} is a part of a distributed checkpoint", f"Give its folder, {path.parent}.")
    if path.suffix == ".gguf":
        return Source("gguf", path, path.stem, tuple(parts_of(path)))
    if (path.parent / "config.json").is_file() and "model_type" in read_config(path.parent):
        raise CheckpointError(f"{path} is a part of a Hugging Face model", f"Give its folder, {path.parent}.")
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        return Source("openlm", path, path.stem, (path,))
    raise CheckpointError(
        f"{path} is not a checkpoint of a known kind",
        "Give a Hugging Face folder or hub id, an OpenLM .pt file, or a .gguf file.",
    )


def _in_folder(folder: pathlib.Path) -> Source:
    name, config = folder.resolve().name, {}
    if (folder / "config.json").is_file():
        config = read_config(folder)
    ggufs = tuple(sorted(folder.glob("*.gguf")))
    if not any(any(folder.glob(pattern)) for pattern in HF_WEIGHTS):
        refuse_foreign(str(folder), (entry.name for entry in folder.iterdir()))
    has_pt = any(file.suffix in (".pt", ".pth") for file in folder.iterdir())
    if _is_openlm(config) or (has_pt and "model_type" not in config):
        return Source("openlm", folder, name, _weights(folder))
    if config:
        return Source("huggingface", folder, name, (*_weights(folder), *adapter_files(folder)))
    refuse_alone(folder)
    if find_dcp(folder):
        return _distributed(folder)
    if ggufs and ggufs == tuple(parts_of(ggufs[0])):
        return Source("gguf", ggufs[0], ggufs[0].stem, ggufs)
    if ggufs:
        raise CheckpointError(f"{folder} holds {len(ggufs)} GGUF files", "Name the one to convert.")
    raise CheckpointError(
        f"{folder} is no model: it has no config.json, no .pt and no .gguf file",
        "Give the folder that holds config.json, the weights and the tokenizer.",
    )


def _distributed(folder: pathlib.Path) -> Source:
    """A distributed checkpoint without a config.json beside it: OpenLM's, or one whose config is a folder up."""
    if (folder.parent / "config.json").is_file() and find_dcp(folder.parent) == folder / METADATA:
        return _in_folder(folder.parent)
    with open_checkpoint(folder) as weights:
        if any(name.endswith("attention.in_proj.weight") for name in weights.names()):
            return Source("openlm", folder, folder.resolve().name, tuple(weights.files))
    raise CheckpointError(
        f"{folder} holds a distributed checkpoint, but no config.json",
        "Copy config.json and the tokenizer's files from the model that was trained into that folder.",
    )


def _is_openlm(config: dict[str, Any]) -> bool:
    """Whether a config.json is OpenLM's own, also in its Hugging Face forms; a converted anchor's is not."""
    own = "n_heads" in config or "params_args_dict" in config
    return own and config.get("model_type", "openlm") == "openlm" and "hidden_size" not in config


def _weights(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    with open_checkpoint(folder) as weights:
        return tuple(weights.files)


def find_tokenizer(tokenizer: str) -> pathlib.Path:
    """The folder of a tokenizer given as a folder, a file in it, or a hub id."""
    path = pathlib.Path(tokenizer)
    if is_hub_id(tokenizer):
        return download(tokenizer, weights=False)
    if not path.exists():
        raise CheckpointError(f"there is no tokenizer {tokenizer}", "Give a folder or a hub id (owner/name).")
    return path if path.is_dir() else path.parent


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """A file, or the files of a folder."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def digests(files: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file."""
    return [{"name": f.name, "bytes": f.stat().st_size, "sha256": file_digest(f)} for f in files]


def tool_versions() -> dict[str, str]:
    """The installed versions of what conversion and verification depend on."""
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions


def parts_of(file: pathlib.Path) -> list[pathlib.Path]:
    """All parts of a split GGUF file, in order, whichever one is given; else the file alone.

    Raises CheckpointError where a part is missing.
    """
    name = PART.fullmatch(file.name)
    if name is None:
        return [file]
    count = int(name[3])
    parts = [file.with_name(f"{name[1]}-{number:05}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointError(
            f"{file.name} is one of {count} parts; not in {file.parent}: {', '.join(missing[:3])}",
            "Put all parts into one folder.",
        )
    return parts or [file]


# Checkpoints of other software, which are refused with the tool that exports them


@dataclass(frozen=True)
class ForeignForm:
    """Another software's checkpoint: names of its files, what it is, and how to export it to Hugging Face's form.

    Its tensors have other names or orders than in that form, which is read here.
    """

    files: str
    what: str
    export: str


FOREIGN = (
    ForeignForm("consolidated.*.pth", "Meta's form of Llama", "transformers 4's convert_llama_weights_to_hf.py"),
    ForeignForm(
        "consolidated*.safetensors", "Mistral's own form", "transformers 4's convert_mistral_weights_to_hf.py"
    ),
    ForeignForm("lit_model.pth", "a LitGPT checkpoint", "`litgpt convert_from_litgpt`"),
    ForeignForm(
        "zero_to_fp32.py", "a DeepSpeed checkpoint", "`python zero_to_fp32.py . OUT --safe_serialization` in it"
    ),
    ForeignForm("*.nemo", "a NeMo checkpoint", "NeMo's `export_ckpt` with the target hf"),
    ForeignForm(
        "tf_model.h5", "a TensorFlow model", "transformers 4 (from_pretrained with from_tf, save_pretrained)"
    ),
    ForeignForm("flax_model.msgpack", "a Flax model", "transformers 4 (from_pretrained with from_flax)"),
)


def refuse_foreign(where: str, names: Iterable[str]) -> None:
    """Raises CheckpointError where one of the names gives away another software's checkpoint."""
    for name in sorted(names):
        for form in FOREIGN:
            if fnmatchcase(name, form.files):
                raise CheckpointError(
                    f"{where} is {form.what} ({name})",
                    f"Export it to Hugging Face's form with {form.export}, or take its repository there.",
                )
