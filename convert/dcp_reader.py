"""The reader of a PyTorch distributed checkpoint (DCP), as FSDP writes it, which executes nothing that it holds.

Such a checkpoint is a folder: `.metadata` says which chunk of which tensor lies where in the `.distcp` files, and
every chunk is a small torch.save archive of its own. `.metadata` is a pickle, and PyTorch's own reader would run
it; here it may build the few classes that DCP puts there and nothing else. Rows are read from the files, so that
a bank larger than memory can be streamed.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.convert.readers import NUMPY_DTYPES, RawTensor, read_at, size_of
from mlx_hiermem.convert.torch_reader import STATE_DICTS
from mlx_hiermem.errors import CheckpointError, MissingDependencyError, first_line

METADATA = ".metadata"
DCP = "torch.distributed.checkpoint"
PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
ALLOWED = {
    f"{DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    f"{DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", *NUMPY_DTYPES},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": PATHS,
    "pathlib._local": PATHS,  # Python 3.13
}


def find_dcp(folder: pathlib.Path) -> pathlib.Path | None:
    """The `.metadata` of a distributed checkpoint in `folder`, or in its one folder of weights; else None.

    Accelerate and the Trainer of transformers write `pytorch_model_fsdp_0` beside `optimizer_0`.
    """
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("optim")]
    found = [path / METADATA for path in (folder, *inner) if (path / METADATA).is_file()]
    return found[0] if found and (found[0].parent == folder or len(found) == 1) else None


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, from `offsets` on; its archive is `length` bytes of a file from `start`."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class DCPFile:
    """One distributed checkpoint, by its `.metadata`. `extras` are the plain values beside the tensors."""

    def __init__(self, file: pathlib.Path) -> None:
        self.file = file
        self.metadata: dict[str, str] = {}
        self.extras: dict[str, Any] = {}
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._data: dict[Chunk, int] = {}  # where a chunk's numbers begin in its file
        content = _load_metadata(file)
        stored = {}
        for index, info in content.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{file.parent} is compressed", "Save it without extensions.")
            stored[index.fqn, tuple(index.offset or ())] = info
        names = sorted({info.relative_path for info in stored.values()})
        self.files = [file, *(self._part(name) for name in names)]
        self._open = {part.name: os.open(part, os.O_RDONLY) for part in self.files[1:]}
        paths = {name: tuple(map(str, path)) for name, path in (content.planner_data or {}).items()}
        tops = {paths.get(name, (name,))[0] for name in content.state_dict_metadata}
        table = next((key for key in STATE_DICTS if key in tops), None)
        try:
            for name, entry in content.state_dict_metadata.items():
                path = paths.get(name, (name,))
                if not hasattr(entry, "chunks"):
                    self._add_extra(path, stored[name, ()])
                elif table is None or (path[0] == table and len(path) > 1):
                    self._add(".".join(path[1:] if table else path), name, entry, stored)
            if not self.tensors:
                raise CheckpointError(f"{file.parent} holds no tensors of a model")
        except BaseException:
            self.close()
            raise

    def _part(self, name: str) -> pathlib.Path:
        part = self.file.parent / name
        if pathlib.PurePath(name).name != name or not part.is_file():
            raise CheckpointError(f"{self.file.parent} lacks {name}, which {METADATA} lists", "Copy it again.")
        return part

    def _add(self, ours: str, name: str, entry: Any, stored: dict[tuple[str, tuple[int, ...]], Any]) -> None:
        dtype, shape = str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size)
        if dtype not in NUMPY_DTYPES:
            raise CheckpointError(f"{self.file.parent}: the tensor {name} is {dtype}, which is not supported")
        chunks = []
        for chunk in entry.chunks:
            info = stored.get((name, tuple(chunk.offsets)))
            if info is None:
                raise CheckpointError(f"{self.file.parent}: a chunk of {name} is in no file", "Copy it again.")
            where = (info.relative_path, info.offset, info.length)
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *where))
        if sum(size_of("uint8", chunk.shape) for chunk in chunks) != size_of("uint8", shape):
            raise CheckpointError(f"{self.file.parent}: the chunks of {name} do not make {shape}", "Copy it again.")
        self.tensors[ours] = (dtype, shape)
        self._chunks[ours] = chunks

    def _add_extra(self, path: tuple[str, ...], info: Any) -> None:
        """A plain value, such as an epoch; what needs code to be read is left out."""
        import torch

        raw = read_at(self._open[info.relative_path], info.length, info.offset)
        try:
            value = torch.load(io.BytesIO(raw.tobytes() if raw is not None else b""), weights_only=True)
        except Exception:  # torch raises whatever its parsers stumble over
            return
        table = self.extras
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = value

    def rows(self, name: str, start: int, stop: int) -> RawTensor:
        dtype, shape = self.tensors[name]
        out = np.empty((stop - start, *shape[1:]) if shape else (), dtype=NUMPY_DTYPES[dtype])
        for chunk in self._chunks[name]:
            if not shape:
                out[...] = self._read(chunk, dtype, 0, 1).reshape(())
                continue
            begin, end = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.shape[0])
            if begin < end and out.size:
                target = (slice(begin - start, end - start), *_columns(chunk))
                out[target] = self._read(chunk, dtype, begin - chunk.offsets[0], end - chunk.offsets[0])
        return RawTensor(dtype, out.shape, out)

    def _read(self, chunk: Chunk, dtype: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a chunk."""
        if chunk not in self._data:
            self._data[chunk] = self._find_data(chunk, dtype)
        row = size_of(dtype, chunk.shape[1:])
        raw = read_at(self._open[chunk.file], row * (stop - start), self._data[chunk] + row * start)
        if raw is None:
            raise self._damaged(chunk, "it cannot be read to its end")
        rows = (stop - start, *chunk.shape[1:]) if chunk.shape else ()
        return raw.view(NUMPY_DTYPES[dtype]).reshape(rows)

    def _find_data(self, chunk: Chunk, dtype: str) -> int:
        """Where the numbers of a chunk begin in its file, after checking that its archive is what it should be."""
        import torch

        try:
            view = io.BufferedReader(_Slice(self._open[chunk.file], chunk.start, chunk.length))
            tensor = torch.load(view, map_location="meta", weights_only=True)
            with zipfile.ZipFile(view) as archive:
                record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
            head = os.pread(self._open[chunk.file], 30, chunk.start + record.header_offset)
            skip = 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        except Exception as error:  # torch and zipfile raise whatever they stumble over
            raise self._damaged(chunk, first_line(error)) from error
        found = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.is_contiguous())
        if found != (dtype, chunk.shape, True) or record.compress_type != zipfile.ZIP_STORED:
            raise self._damaged(chunk, f"it holds {found[0]} {found[1]}, not {dtype} {chunk.shape}")
        return chunk.start + record.header_offset + skip + tensor.storage_offset() * tensor.element_size()

    def _damaged(self, chunk: Chunk, why: str) -> CheckpointError:
        where = f"{self.file.parent / chunk.file} at byte {chunk.start}"
        return CheckpointError(f"{where} is truncated or damaged: {why}", "Copy it again.")

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}


class _Slice(io.RawIOBase):
    """Some bytes of a file as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        data = os.pread(self._descriptor, count, self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _columns(chunk: Chunk) -> Iterator[slice]:
    """Where a chunk lies along all axes but the first."""
    return (slice(at, at + n) for at, n in zip(chunk.offsets[1:], chunk.shape[1:], strict=True))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _load_metadata(file: pathlib.Path) -> Any:
    """What `.metadata` says. Raises CheckpointError where it is no such file, or wants any other code."""
    try:
        import torch.distributed.checkpoint  # noqa: F401  the classes that a pickle may name
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {file.parent} needs PyTorch", "Install it: pip install 'mlx-hiermem[torch]'"
        ) from error
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream).load()
        if type(content).__name__ != "Metadata" or not isinstance(content.storage_data, dict):
            raise ValueError("it is no Metadata")
        return content
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged or could execute code when opened: {error}; it is refused"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        raise CheckpointError(f"{file} is not the metadata of a distributed checkpoint: {error}") from error
