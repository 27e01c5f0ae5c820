"""Safe reading of checkpoints: .safetensors, .pt and distributed ones, never executing what they hold.

A `TensorSource` knows every tensor's shape and dtype from the headers alone and reads rows of it on demand,
so that a checkpoint larger than memory can be streamed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_hiermem.convert.dcp_reader import METADATA, DCPFile, find_dcp
from mlx_hiermem.convert.readers import (
    TORCH_SUFFIXES,
    CheckpointFile,
    RawTensor,
    SafetensorsFile,
    is_finite,
    size_of,
    some,
)
from mlx_hiermem.convert.torch_reader import TorchFile
from mlx_hiermem.errors import CheckpointError
from mlx_hiermem.files import parse_json

NO_WEIGHTS = ("adapter", "optimizer", "scheduler", "training_args", "rng_state")

__all__ = ["RawTensor", "TensorSource", "is_finite", "open_checkpoint"]


class TensorSource:
    """The tensors of one or more files under one set of names. Use it as a context manager, or close it."""

    def __init__(self, readers: Sequence[CheckpointFile]) -> None:
        self.files = [file for reader in readers for file in reader.files]
        self.metadata: dict[str, str] = {}
        self.extras: dict[str, Any] = {}
        self._readers = list(readers)
        self._owner: dict[str, CheckpointFile] = {}
        self._stored: dict[str, str] = {}  # name -> name in the file, where it is another
        for reader in readers:
            self.metadata |= reader.metadata
            self.extras |= reader.extras
            for name in reader.tensors:
                if name in self._owner:
                    first = self._owner[name].file.name
                    raise CheckpointError(
                        f"the tensor {name} is in both {first} and {reader.file.name} of {reader.file.parent}",
                        "If they are different checkpoints, name the one file to read.",
                    )
                self._owner[name] = reader

    def names(self) -> list[str]:
        return list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader(name).tensors[self._name(name)][1]

    def dtype(self, name: str) -> str:
        return self._reader(name).tensors[self._name(name)][0]

    def nbytes(self, name: str) -> int:
        return size_of(self.dtype(name), self.shape(name))

    @property
    def is_plain(self) -> bool:
        """Whether the names are those in the files, and all of them."""
        return not self._stored and len(self._owner) == sum(len(reader.tensors) for reader in self._readers)

    def rename(self, names: Mapping[str, str]) -> None:
        """From now on a tensor has the name on the left; tensors that are not on the right are left out."""
        self._owner = {ours: self._reader(name) for ours, name in names.items()}
        self._stored = {ours: self._name(name) for ours, name in names.items() if ours != self._name(name)}

    def read(self, name: str) -> RawTensor:
        """The whole tensor."""
        shape = self.shape(name)
        raw = self._reader(name).rows(self._name(name), 0, shape[0] if shape else 1)
        return RawTensor(raw.dtype, shape, raw.data.reshape(shape))

    def rows(self, name: str, start: int, stop: int) -> RawTensor:
        """Rows [start, stop) along the first axis, as one read. Safe to call from several threads."""
        shape = self.shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name} {shape}")
        return self._reader(name).rows(self._name(name), start, stop)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, name: str) -> str:
        return self._stored.get(name, name)

    def _reader(self, name: str) -> CheckpointFile:
        if name not in self._owner:
            raise CheckpointError(f"there is no tensor {name} in {self.files[0]}")
        return self._owner[name]


def open_checkpoint(path: pathlib.Path | str) -> TensorSource:
    """Opens a .safetensors or .pt/.pth/.bin file, or a folder: of them (with or without an index.json), or of DCP.

    Reads headers only. Raises CheckpointError where something is missing, damaged, unsafe or not understood.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}", "Check the spelling of the path.")
    readers: list[CheckpointFile] = []
    try:
        for file in _files_in(path) if path.is_dir() else [path]:
            readers.append(_open_file(file))
        source = TensorSource(readers)
        if path.is_dir():
            _check_index(path, source)
    except BaseException:
        for reader in readers:
            reader.close()
        raise
    return source


def _open_file(file: pathlib.Path) -> CheckpointFile:
    try:
        if file.suffix == ".safetensors":
            return SafetensorsFile(file)
        if file.suffix in TORCH_SUFFIXES:
            return TorchFile(file)
        if file.name == METADATA:
            return DCPFile(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{file} is not a checkpoint that can be read",
        f"Expected a file ending in .safetensors, {', '.join(TORCH_SUFFIXES)}, or a folder of such files.",
    )


def _files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's checkpoint files: those of its index, else the usual single name, else all of a kind."""
    index = _index_file(folder)
    if index:
        return [folder / name for name in sorted(set(_read_index(index).values()))]
    for usual, pattern in (("model", "*.safetensors"), ("pytorch_model", "*.bin"), ("model", "*.pt*")):
        files = sorted(file for file in folder.glob(pattern) if _holds_weights(file))
        single = [file for file in files if file.stem == usual]
        if files:
            return single or files
    if distributed := find_dcp(folder):
        return [distributed]
    found = sorted(entry.name for entry in folder.iterdir())
    raise CheckpointError(
        f"{folder} holds no checkpoint, only {some(found) or 'nothing'}",
        "Expected .safetensors or .pt/.bin files in the folder.",
    )


def _holds_weights(file: pathlib.Path) -> bool:
    """Whether a file's name says that it is a checkpoint, no adapter and nothing that lies beside one."""
    if file.name.startswith(NO_WEIGHTS) or file.name.endswith("adapters.safetensors"):
        return False
    return file.suffix in (".safetensors", *TORCH_SUFFIXES)


def _index_file(folder: pathlib.Path) -> pathlib.Path | None:
    """`model.safetensors.index.json` before others, and before `pytorch_model.bin.index.json`.

    Mistral's own form, `consolidated`, may lie beside it.
    """
    found = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    found = [file for file in found if not file.name.startswith("consolidated")]
    return min(
        found,
        key=lambda file: (file.name != "model.safetensors.index.json", ".bin." in file.name, file.name),
        default=None,
    )


def _read_index(index: pathlib.Path) -> dict[str, str]:
    """tensor name -> shard file name."""
    try:
        shards = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read the index {index}: {error!r}") from error
    outside = [file for file in names.values() if pathlib.Path(file).name != file]
    missing = sorted({file for file in names.values() if not (index.parent / file).is_file()})
    if outside or not names:
        raise CheckpointError(f"the index {index} names no files of its own folder: {some(outside)}")
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {some(missing)}, which {index.name} lists", "Copy or download it again."
        )
    return names


def _check_index(folder: pathlib.Path, source: TensorSource) -> None:
    index = _index_file(folder)
    missing = sorted(set(_read_index(index)) - set(source.names())) if index else []
    if missing:
        raise CheckpointError(f"{folder}: the shards lack tensors that the index lists: {some(missing)}")
