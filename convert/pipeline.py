"""`hiermem convert`: finds out what a source is, converts anchor and memories, and puts the result in place.

Everything is made in OUT.partial and renamed at the end, so OUT is never half a model. An interrupted run can
be continued: a finished anchor is kept, and the bank goes on block by block.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_hiermem.anchor import identify, read_config
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank, file_digest
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.config import AnchorIdentity
from mlx_hiermem.convert.anchors.gguf import convert_gguf
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface, download, is_hub_id
from mlx_hiermem.convert.anchors.openlm import convert_openlm
from mlx_hiermem.convert.checkpoint import open_checkpoint
from mlx_hiermem.convert.memories import AnchorDims, convert_memory
from mlx_hiermem.convert.readers import TORCH_SUFFIXES
from mlx_hiermem.errors import AnchorError, CheckpointError, HierMemError, OutputError

Progress = Callable[[int, int], None]  # (done, total)

ANCHOR, BANK, SOURCE = "anchor", "bank", "source.json"
# Anchor bytes at most, staging included, per byte of source: a 4-bit GGUF becomes float16, written twice.
GROWTH = {"huggingface": 2.0, "openlm": 2.0, "gguf": 8.0}
TOOLS = ("mlx-hiermem", "mlx", "mlx-lm", "numpy", "gguf")


@dataclass(frozen=True)
class Source:
    """What SRC turned out to be. `name` is what a user would call it; `files` are the weights."""

    kind: str  # huggingface, openlm or gguf
    path: pathlib.Path
    name: str
    files: tuple[pathlib.Path, ...]

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


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
    src: str,
    out: pathlib.Path,
    *,
    memory: pathlib.Path | None = None,
    quantize: int | None = None,
    key_map: pathlib.Path | None = None,
    config: pathlib.Path | None = None,
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
    _check_out(out, overwrite)
    source = identify_source(src)
    tokenizer_folder = _tokenizer_folder(tokenizer) if tokenizer else None
    _reserve(source, memory, out)
    warnings: list[str] = []
    with _partial_folder(out, resume, overwrite) as partial:
        _note_source(partial, describe(source, quantize, memory))
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
        _move(partial, out)
    return _report(out, source, warnings)


def identify_source(src: str) -> Source:
    """Which kind of checkpoint SRC is. Raises CheckpointError where it is none, or several."""
    path, name = pathlib.Path(src), pathlib.Path(src).name
    if is_hub_id(src):
        path, name = download(src), src
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {src}", "Hub ids have the form owner/name.")
    if path.is_dir():
        return _identify_folder(path, name)
    if path.suffix == ".gguf":
        return Source("gguf", path, path.stem, (path,))
    if (path.parent / "config.json").is_file() and "model_type" in read_config(path.parent):
        raise CheckpointError(f"{path} is a part of a Hugging Face model", f"Give its folder, {path.parent}.")
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        return Source("openlm", path, path.stem, (path,))
    raise CheckpointError(
        f"{path} is not a checkpoint of a known kind",
        "Give a Hugging Face folder or hub id, an OpenLM .pt file, or a .gguf file.",
    )


def _identify_folder(folder: pathlib.Path, name: str) -> Source:
    ggufs = sorted(folder.glob("*.gguf"))
    has_config = (folder / "config.json").is_file()
    if has_config and ("model_type" in read_config(folder) or not list(folder.glob("*.pt"))):
        with open_checkpoint(folder) as weights:
            return Source("huggingface", folder, name, tuple(weights.files))
    if any(file.suffix in (".pt", ".pth") for file in folder.iterdir()):
        with open_checkpoint(folder) as weights:
            return Source("openlm", folder, name, tuple(weights.files))
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0], ggufs[0].stem, tuple(ggufs))
    if ggufs:
        raise CheckpointError(f"{folder} holds {len(ggufs)} GGUF files", "Name the one to convert.")
    raise CheckpointError(
        f"{folder} is no model: it has no config.json, no .pt and no .gguf file",
        "Give the folder that holds config.json, the weights and the tokenizer.",
    )


def describe(source: Source, quantize: int | None, memory: pathlib.Path | None) -> dict[str, Any]:
    """What source.json records: enough to know the source again, and what it was converted with.

    The memory checkpoint is known by name and size only: reading it twice would double the time.
    """
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    record: dict[str, Any] = {"kind": source.kind, "name": source.name, "files": digests(source.files)}
    record |= {"quantize": quantize, "memory": None, "versions": versions}
    if memory and memory.exists():
        files = sorted(f for f in memory.iterdir() if f.is_file()) if memory.is_dir() else [memory]
        record["memory"] = [{"name": f.name, "bytes": f.stat().st_size} for f in files]
    return record


def digests(files: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """Name, size and sha256 of each file."""
    return [{"name": f.name, "bytes": f.stat().st_size, "sha256": file_digest(f)} for f in files]


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
    warn: Callable[[str], None],
    progress: Progress | None,
) -> None:
    """Converts into a sibling first: a folder named anchor is a whole one."""
    new = anchor.with_name("anchor.new")
    shutil.rmtree(new, ignore_errors=True)
    if source.kind == "gguf":
        convert_gguf(source.path, new, quantize=quantize, tokenizer=tokenizer, warn=warn, progress=progress)
    elif source.kind == "openlm":
        convert_openlm(source.path, new, config=config, tokenizer=tokenizer, quantize=quantize, warn=warn)
    else:
        convert_huggingface(source.path, new, quantize=quantize, tokenizer=tokenizer)
    new.rename(anchor)


def _tokenizer_folder(tokenizer: str) -> pathlib.Path:
    """The folder of a tokenizer given as a folder, a file in it, or a hub id."""
    path = pathlib.Path(tokenizer)
    if is_hub_id(tokenizer):
        return download(tokenizer, weights=False)
    if not path.exists():
        raise CheckpointError(f"there is no tokenizer {tokenizer}", "Give a folder or a hub id (owner/name).")
    return path if path.is_dir() else path.parent


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
    if memory and memory.exists():
        need += sum(f.stat().st_size for f in (memory.rglob("*") if memory.is_dir() else [memory]) if f.is_file())
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise OutputError(
            f"converting needs up to {need / 1e9:.1f} GB, the disk of {out} has {free / 1e9:.1f} GB free",
            "Free some space, or write to another disk.",
        )


@contextlib.contextmanager
def _partial_folder(out: pathlib.Path, resume: bool, overwrite: bool) -> Iterator[pathlib.Path]:
    """OUT.partial. It stays where the run was interrupted, or ran out of space with `resume`; else it goes."""
    partial = out.absolute().with_name(out.name + ".partial")
    if partial.exists() and overwrite and not resume:
        shutil.rmtree(partial)
    continued = partial.exists()
    if continued and not resume:
        raise OutputError(f"an interrupted run left {partial}", "Continue it with --resume, or remove that folder.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        if not (continued or interrupted or (resume and isinstance(error, OutputError))):
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else str(error.strerror or error)
            raise OutputError(f"cannot write {out}: {why}", "Free some space." if full else "") from error
        raise


def _note_source(partial: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes source.json, or on resuming checks that it is the same source. Nothing in it varies with time."""
    file = partial / SOURCE
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise OutputError(
            f"the interrupted run in {partial} had another source or other options",
            "Repeat it with the same, or remove that folder to start afresh.",
        )
    file.write_text(text, encoding="utf-8")


def _move(partial: pathlib.Path, out: pathlib.Path) -> None:
    """Gives the complete folder its name; an old model goes only once the new one is whole."""
    old = out.absolute().with_name(out.name + ".old")
    if (out / ANCHOR).is_dir():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _report(out: pathlib.Path, source: Source, warnings: Sequence[str]) -> ConvertReport:
    config = read_config(out / ANCHOR)
    parameters, dtype = _weights(out / ANCHOR)
    if quantization := config.get("quantization"):
        dtype = f"{quantization['bits']} bits in groups of {quantization['group_size']}"
    bank = MemoryBank.open(out / BANK).manifest.totals() if (out / BANK).is_dir() else {}
    return ConvertReport(
        source=f"{source.kind}: {source.name}",
        architecture=config["model_type"],
        parameters=parameters,
        dtype=dtype,
        anchor_bytes=sum(file.stat().st_size for file in (out / ANCHOR).iterdir()),
        blocks=bank.get("blocks", 0),
        bank_bytes=bank.get("bytes", 0),
        warnings=tuple(warnings),
    )


def _weights(anchor: pathlib.Path) -> tuple[int, str]:
    """(parameters, dtype of the embeddings), by the index that mlx-lm writes and the files' headers."""
    index = json.loads((anchor / "model.safetensors.index.json").read_text(encoding="utf-8"))
    with open_checkpoint(anchor) as weights:
        return index["metadata"]["total_parameters"], weights.dtype("model.embed_tokens.weight")
