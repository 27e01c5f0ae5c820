"""`hiermem convert`: an anchor and its memories, from their checkpoints to a model folder.

Everything is made in OUT.partial and renamed at the end, so OUT is never half a model. An interrupted run can
be continued: a finished anchor is kept, and the bank goes on block by block.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.anchor import identify, read_config
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.convert.anchors.gguf import convert_gguf
from mlx_hiermem.convert.anchors.huggingface import TOKENIZER_FILES, convert_huggingface, files_like
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.checkpoint import open_checkpoint
from mlx_hiermem.convert.memories import AnchorDims, convert_memory
from mlx_hiermem.convert.source import Source, digests, files_of, find_source, find_tokenizer, tool_versions
from mlx_hiermem.convert.staging import ANCHOR, BANK, SOURCE, partial_folder
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError, OutputError
from mlx_hiermem.files import partial_name, path_of, read_json, write_json
from mlx_hiermem.progress import Progress

Warn = Callable[[str], None]

# Anchor bytes at most, staging included, per byte of source: a 4-bit GGUF becomes float16, written twice.
GROWTH = {"huggingface": 2.0, "openlm": 2.0, "gguf": 8.0}


@dataclass(frozen=True)
class ConvertReport:
    """What was made."""

    source: str
    architecture: str
    parameters: int
    dtype: str
    anchor_bytes: int
    blocks: int
    bank_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    src: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    memory: str | pathlib.Path | None = None,
    quantize: int | None = None,
    key_map: str | pathlib.Path | None = None,
    config: str | pathlib.Path | None = None,
    tokenizer: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Writes the model folder `out` (anchor/, and bank/ with `memory`) from a checkpoint.

    `src` is a Hugging Face folder or hub id, an OpenLM checkpoint or a GGUF file; `config` and `tokenizer`
    (folder or hub id) are for sources without theirs. Raises a HierMemError for anything that is wrong with
    them, and OutputError where `out` exists (unless `overwrite`) or the disk is too small.
    """
    if quantize not in (None, 4, 8):
        raise HierMemError(f"cannot quantise to {quantize} bits", "Choose 4 or 8.")
    src, out = str(path_of(src, "checkpoint")), path_of(out, "folder")
    memory, key_map, config = (pathlib.Path(given) if given else None for given in (memory, key_map, config))
    for given in (memory, key_map, config):
        if given and not given.exists():
            raise CheckpointError(f"there is no file or folder {given}", "Check the spelling of the path.")
    _check_out(out, overwrite)
    source = find_source(src)
    tokenizer_folder = find_tokenizer(tokenizer) if tokenizer else None
    _reserve(source, memory, out)
    warnings: list[str] = []
    with partial_folder(out, resume, overwrite) as partial:
        record = _record(source, quantize, memory) | _given(source, config, tokenizer_folder)
        _note_source(partial / SOURCE, record)
        anchor = partial / ANCHOR
        if not anchor.exists():
            _write_anchor(source, anchor, quantize, config, tokenizer_folder, warnings.append, progress)
        if memory and not (partial / BANK / MANIFEST).exists():
            convert_memory(
                memory,
                partial / BANK,
                anchor=identify(anchor, source.name),
                anchor_dims=anchor_dims(read_config(anchor)),
                key_map=key_map,
                resume=resume,
                progress=progress,
            )
        write_json(partial / SOURCE, record | {"anchor": digests(files_of(anchor))})
    return _report(out, source, warnings)


def anchor_dims(config: dict[str, Any]) -> AnchorDims:
    """The widths that memories attach to, by an anchor's config.json."""
    text = config.get("text_config") or config
    try:
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        kv_heads = text.get("num_key_value_heads") or heads
        return AnchorDims(hidden, text["intermediate_size"], heads * head_dim, kv_heads * head_dim)
    except KeyError as error:
        raise AnchorError(f"the anchor's config.json has no {error}", "It cannot carry memories.") from error


def _write_anchor(
    source: Source,
    anchor: pathlib.Path,
    quantize: int | None,
    config: pathlib.Path | None,
    tokenizer: pathlib.Path | None,
    warn: Warn,
    progress: Progress | None,
) -> None:
    """Converts into a sibling first: a folder named anchor is a whole one. What a killed run left is continued."""
    new = partial_name(anchor)
    if source.kind == "gguf":
        convert_gguf(source.path, new, quantize=quantize, tokenizer=tokenizer, warn=warn, progress=progress)
    elif source.kind == "openlm":
        convert_openlm(
            source.path, new, config=config, tokenizer=tokenizer, quantize=quantize, warn=warn, progress=progress
        )
    else:
        convert_huggingface(source.path, new, quantize=quantize, tokenizer=tokenizer, warn=warn, progress=progress)
    new.rename(anchor)


def _check_out(out: pathlib.Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out} exists already", "Choose another folder, or replace it with --overwrite.")
    if not (out / ANCHOR).is_dir():
        raise OutputError(f"{out} is not a model folder", "Only a converted model can be overwritten.")


def _reserve(source: Source, memory: pathlib.Path | None, out: pathlib.Path) -> None:
    """Raises OutputError where the disk has no room for the model at its largest."""
    need = source.bytes * GROWTH[source.kind]
    need += sum(file.stat().st_size for file in (files_of(memory) if memory else ()))
    existing = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise OutputError(
            f"converting needs up to {need / 1e9:.1f} GB, the disk of {out} has {free / 1e9:.1f} GB free",
            "Free some space, or write to another disk.",
        )


def _record(source: Source, quantize: int | None, memory: pathlib.Path | None) -> dict[str, Any]:
    """What source.json says of the source. Nothing in it varies with time or place.

    A memory checkpoint is known by its files' names and sizes: reading it twice would double the time.
    """
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in (files_of(memory) if memory else ())]
    return source.describe() | {"quantize": quantize, "memory": files, "versions": tool_versions()}


def _given(
    source: Source, config: pathlib.Path | None, tokenizer: pathlib.Path | None
) -> dict[str, list[dict[str, Any]]]:
    """What source.json says of the settings and the tokenizer, with which an interrupted run must go on."""
    beside = source.path / "config.json" if source.path.is_dir() else None
    settings = [file for file in (beside, config) if file and file.is_file()]
    own = files_like(tokenizer, TOKENIZER_FILES) if tokenizer else []
    return {"settings": digests(settings), "tokenizer": digests(own)}


def _note_source(file: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes source.json, or on resuming checks that source and options are the same."""
    noted = read_json(file) if file.exists() else record
    if {key: noted.get(key, []) for key in record} != record:
        raise OutputError(
            f"the interrupted run in {file.parent} had another source or other options",
            "Repeat it with the same, or remove that folder to start afresh.",
        )
    write_json(file, record)


def _report(out: pathlib.Path, source: Source, warnings: Sequence[str]) -> ConvertReport:
    config = read_config(out / ANCHOR)
    index = read_json(out / ANCHOR / "model.safetensors.index.json")
    if quantization := config.get("quantization"):
        dtype = f"{quantization['bits']} bits in groups of {quantization['group_size']}"
    else:
        with open_checkpoint(out / ANCHOR) as weights:
            dtype = ", ".join(sorted({weights.dtype(name) for name in weights.names()}))
    bank = MemoryBank.open(out / BANK).manifest.totals() if (out / BANK).is_dir() else {}
    return ConvertReport(
        source=f"{source.kind}: {source.name}",
        architecture=config["model_type"],
        parameters=index["metadata"]["total_parameters"],
        dtype=dtype,
        anchor_bytes=sum(file.stat().st_size for file in (out / ANCHOR).iterdir()),
        blocks=bank.get("blocks", 0),
        bank_bytes=bank.get("bytes", 0),
        warnings=tuple(warnings),
    )
