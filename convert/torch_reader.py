"""The reader of a PyTorch file, which executes nothing that the file holds.

A .pt file is a pickle. It is opened with `weights_only=True`, which builds tensors and plain values and refuses
anything else, and mapped rather than loaded. Where the system tells where (Linux), rows are then read from the
file instead of the mapping, whose pages would count as resident memory and come in 64 KB at a time.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from mlx_hiermem.convert.readers import NUMPY_DTYPES, RawTensor, read_at, some
from mlx_hiermem.errors import CheckpointError, MissingDependencyError, first_line

STATE_DICTS = ("av_model_sd", "state_dict", "model")  # the first that is there; OpenLM's averages come first


class TorchFile:
    """One PyTorch file. Tensors of nested dicts get dotted names; plain values beside them are `extras`."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file, self.files = file, [file]
        self.metadata: dict[str, str] = {}
        self.extras: dict[str, Any] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._data: dict[str, Any] = {}
        content = _load_torch(file)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors")
        self.extras = {str(key): value for key, value in content.items() if _is_plain(value)}
        tables = {key: value for key, value in content.items() if str(key) not in self.extras}
        state = next((tables[key] for key in STATE_DICTS if isinstance(tables.get(key), Mapping)), tables)
        for name, value in _flatten(state):
            self._add(name, value)
        if not self.tensors:
            raise CheckpointError(f"{file} holds no tensors", f"Its keys are {some(list(map(str, content)))}.")
        self._spans = _mapped_spans(file)
        self._fd = os.open(file, os.O_RDONLY)

    def _add(self, name: str, value: Any) -> None:
        if not hasattr(value, "data_ptr"):
            self.extras.setdefault(name, value)
            return
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in NUMPY_DTYPES or str(value.layout) != "torch.strided":
            raise CheckpointError(
                f"{self.file}: the tensor {name} is {dtype}, {value.layout}, which is not supported",
                "Save it dense, as float32, float16 or bfloat16.",
            )
        if name in self.tensors:
            raise CheckpointError(f"{self.file} lists tensors twice: {name}")
        self.tensors[name] = (dtype, tuple(value.shape))
        self._data[name] = value.detach()

    def rows(self, name: str, start: int, stop: int) -> RawTensor:
        import torch

        dtype, shape = self.tensors[name]
        part = self._data[name][start:stop] if shape else self._data[name]
        data = self._from_file(part, dtype)
        if data is None:
            values = part.contiguous()
            bits = values.view(torch.int16) if dtype == "bfloat16" else values
            data = bits.numpy().copy().view(NUMPY_DTYPES[dtype])
        return RawTensor(dtype, tuple(part.shape), data)

    def _from_file(self, part: Any, dtype: str) -> np.ndarray | None:
        """A view's values, by one pread of the bytes it spans; None if they are not in the file's mapping.

        None too for a view that is strewn so widely that the mapping serves it better.
        """
        address, steps = part.data_ptr(), [n * part.element_size() for n in part.stride()]
        offset = next((address - start + at for start, end, at in self._spans if start <= address < end), None)
        span = part.element_size() + sum((n - 1) * step for n, step in zip(part.shape, steps, strict=True))
        if offset is None or not part.numel() or span > 2 * part.nbytes:
            return None
        raw = read_at(self._fd, span, offset)
        if raw is None:
            raise CheckpointError(f"{self.file} cannot be read to its end", "Copy or download it again.")
        return np.ascontiguousarray(as_strided(raw.view(NUMPY_DTYPES[dtype]), tuple(part.shape), steps))

    def close(self) -> None:
        self._data.clear()  # the mapping goes with the last tensor
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _load_torch(file: pathlib.Path) -> Any:
    """torch.load of tensors and plain values only. Raises CheckpointError for anything else."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {file.name} needs PyTorch", "Install it: pip install 'mlx-hiermem[torch]'"
        ) from error
    with file.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"  # else the format before PyTorch 1.6, which cannot be mapped
    try:
        with warnings.catch_warnings(action="ignore"):  # on pickles that are refused anyway
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and could execute code when opened: it is refused",
            "Save its state dict alone, best as .safetensors.",
        ) from error
    except Exception as error:  # torch raises whatever its parsers stumble over
        why = first_line(error).split(". ")[0]
        raise CheckpointError(
            f"{file} is truncated or not a PyTorch file: {why}", "Copy or download it again."
        ) from error


def _flatten(table: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts under dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_plain(value: Any) -> bool:
    """Whether a value is JSON-like: no tensors anywhere in it."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _mapped_spans(file: pathlib.Path) -> list[tuple[int, int, int]]:
    """Where this process has mapped `file`: (first address, last + 1, offset in the file). Linux tells.

    Elsewhere the list is empty. macOS needs it less: it does not charge a process for clean pages of files.
    """
    inode, spans = str(file.stat().st_ino), []
    try:
        lines = pathlib.Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    for addresses, _, offset, _, found, *_ in map(str.split, lines):
        if found == inode:
            start, end = (int(bound, 16) for bound in addresses.split("-"))
            spans.append((start, end, int(offset, 16)))
    return spans
