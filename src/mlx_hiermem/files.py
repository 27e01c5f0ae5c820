"""Files, as everything here writes and reads them.

Writing: a file or folder is written beside its place and renamed once it is whole, so that a reader finds the old
one or the new one. Reading: what is missing or damaged raises a typed error that names the file, and the line. The
caller says which type (`raises`), because a damaged bank and a damaged checkpoint call for different remedies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_hiermem.errors import FileError, HierMemError, OutputError

if TYPE_CHECKING:
    import numpy as np

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AXES = 32  # of a tensor, at most: nothing here has more than four
HEADER_LIMIT = 100_000_000  # bytes: the safetensors format's own
# bytes of a value, by the name that safetensors files give its type
VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
VALUE_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


def file_digest(file: pathlib.Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Writing


def partial_name(out: pathlib.Path) -> pathlib.Path:
    """Where `out` is written until it is whole: beside it, so that giving it its name is a rename."""
    return out.with_name(out.name + ".partial")


def reason(error: Exception) -> str:
    """Why the operating system refused, in a few words."""
    if getattr(error, "errno", None) in DISK_FULL:
        return "the disk is full"
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][2])  # of a copied folder: a list of (from, to, why)
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def writing(out: pathlib.Path, hint: str = "") -> Iterator[None]:
    """Raises an OutputError that names `out` for what the operating system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {out}: {reason(error)}", hint) from error


@contextlib.contextmanager
def new_file(file: pathlib.Path, hint: str = "") -> Iterator[pathlib.Path]:
    """Yields a name to write to; the file there becomes `file` once the block has ended, and goes on an error.

    Raises OutputError where it cannot be written. It is safe from a killed process, not from a power cut.
    """
    partial = partial_name(file)
    with writing(file, hint):
        try:
            yield partial
            os.replace(partial, file)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def new_folder(out: pathlib.Path, hint: str = "") -> Iterator[pathlib.Path]:
    """Yields an empty folder that becomes `out` once the block has ended, and goes on an error.

    `out` must not be there, or be empty. What a killed process left is cleared away. Raises OutputError.
    """
    partial = partial_name(out)
    with writing(out, hint):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def replace_folder(new: pathlib.Path, out: pathlib.Path) -> None:
    """Gives a complete folder the name `out`. An older `out` goes only once the new one is there.

    A process that is killed between the two renames leaves `<out>.old`: see `restore_folder`.
    """
    old = _old_name(out)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(new, out)
    except OSError:
        restore_folder(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(out: pathlib.Path) -> None:
    """Brings back what a `replace_folder` that was killed has put aside."""
    if not out.exists() and _old_name(out).is_dir():
        os.rename(_old_name(out), out)


def _old_name(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(out.name + ".old")


def write_text(file: pathlib.Path, text: str, hint: str = "") -> None:
    """Writes a file whole or not at all. Raises OutputError."""
    with new_file(file, hint) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: pathlib.Path, value: Any, indent: int | None = 2, hint: str = "") -> None:
    """Writes one JSON value whole or not at all. Raises OutputError."""
    write_text(file, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", hint)


def write_json_lines(file: pathlib.Path, rows: Iterable[Any], hint: str = "") -> int:
    """Writes JSON values, one a line, whole or not at all; returns how many. Raises OutputError."""
    count = 0
    with new_file(file, hint) as partial, partial.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def fsync(file: pathlib.Path) -> None:
    """Returns once a file is on disk. Works for folders too: the names in them are on disk only then."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_disk(root: pathlib.Path) -> None:
    """Returns once everything below `root` is on disk, names included.

    Linux waits in `sync`, which is one call: an fsync for each of many thousand small files would take longer
    than writing them. Elsewhere `sync` may return early, and fsync is quick.
    """
    os.sync()
    if sys.platform != "linux":
        for folder, _, files in os.walk(root):
            for name in (*files, "."):
                fsync(pathlib.Path(folder, name))


@contextlib.contextmanager
def locked(folder: pathlib.Path, doing: str) -> Iterator[None]:
    """Holds a folder for this process. Raises OutputError where another one holds it: "is {doing} {folder}".

    The system lets go of the lock when the process ends, however it ends.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process is {doing} {folder}", "Wait for it to end.") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def try_lock(file: pathlib.Path) -> Iterator[bool]:
    """Tells whether this process has a file's lock now, and lets go of it in the end. The file is made."""
    with writing(file):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)


# Reading


def read_text(file: pathlib.Path, raises: type[HierMemError] = FileError, hint: str = "") -> str:
    """The whole of a text file. Raises `raises` where it cannot be read, or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error, raises, hint) from error


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """`json.loads` for what others have written: a ValueError also where it is nested too deeply."""
    try:
        return json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads`, with a ValueError also where it is nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: pathlib.Path, raises: type[HierMemError] = FileError, hint: str = "") -> Any:
    """The JSON value in a file. Raises `raises` where it cannot be read, or holds something else."""
    try:
        return parse_json(read_text(file, raises, hint))
    except ValueError as error:
        raise raises(f"cannot read {file}: it is not JSON ({error})", hint) from error


def read_lines(
    file: pathlib.Path, raises: type[HierMemError] = FileError, hint: str = ""
) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that have text, counted from 1. Raises `raises` as `read_text` does."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error, raises, hint) from error


def read_json_lines(
    file: pathlib.Path, raises: type[HierMemError] = FileError, hint: str = ""
) -> Iterator[tuple[int, Any]]:
    """(number, value) of each line that has text. Raises `raises`, naming file:line where a line is not JSON."""
    for number, line in read_lines(file, raises, hint):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise raises(f"{file}:{number} is not JSON", hint) from error
        yield number, value


def _unreadable(file: pathlib.Path, error: Exception, raises: type[HierMemError], hint: str) -> HierMemError:
    why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason(error)
    return raises(f"cannot read {file}: {why}", hint)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file: `begin` and `end` are counted from the file's first byte."""

    dtype: str  # as the file names it: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(
    file: pathlib.Path,
    raises: type[HierMemError] = FileError,
    hint: str = "Copy or download it again.",
    data: bytes | None = None,
) -> SafetensorsHeader:
    """Reads and checks the header of a safetensors file: eight bytes of length, a JSON table, then the data.

    Every tensor must lie in the file, share no byte with another, and have the bytes that its shape and type ask
    for (types that are not in VALUE_BYTES are passed on unchecked). Raises `raises` otherwise. `data` is the whole
    file, where it has been read already.
    """

    def damaged(why: str) -> HierMemError:
        return raises(f"{file} is truncated or damaged: {why}", hint)

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise damaged(f"it lists tensors twice: {', '.join(twice[:8])}")
        return dict(pairs)

    try:
        with file.open("rb") if data is None else io.BytesIO(data) as stream:
            size = os.fstat(stream.fileno()).st_size if data is None else len(data)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise damaged("its header is longer than the file")
            text = stream.read(length)
    except OSError as error:
        raise _unreadable(file, error, raises, hint) from error
    try:
        rows = parse_json(text, object_pairs_hook=table)
    except ValueError as error:
        raise damaged("its header is not JSON") from error
    if not isinstance(rows, dict) or not isinstance(metadata := rows.pop("__metadata__", None) or {}, dict):
        raise damaged("its header is not a table of tensors")
    tensors = {}
    for name, row in rows.items():
        try:
            tensors[name] = _stored(name, row, 8 + length, size)
        except ValueError as error:
            raise damaged(str(error)) from error
    ordered = sorted((row.begin, row.end, name) for name, row in tensors.items() if row.end > row.begin)
    for (_, end, one), (begin, _, other) in itertools.pairwise(ordered):
        if begin < end:
            raise damaged(f"{one} and {other} overlap")
    return SafetensorsHeader(tensors, {str(key): str(value) for key, value in metadata.items()})


def map_tensors(
    file: pathlib.Path, dtypes: Sequence[str], raises: type[HierMemError] = FileError, hint: str = ""
) -> dict[str, np.ndarray]:
    """Name -> read-only memory-mapped array of a safetensors file; its own reader copies whole tensors.

    Raises `raises` where the file is damaged, or has a tensor that is not of these dtypes.
    """
    import numpy as np  # here, because every command imports this module

    header = read_header(file, raises, hint)
    names = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BOOL": "?"}
    data = np.memmap(file, dtype=np.uint8, mode="r")
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in header.tensors.items():
        if tensor.dtype not in dtypes:
            raise raises(f"{file} has {name} as {tensor.dtype}, not as {' or '.join(dtypes)}", hint)
        arrays[name] = data[tensor.begin : tensor.end].view(np.dtype(names[tensor.dtype])).reshape(tensor.shape)
    return arrays


def _stored(name: str, row: Any, start: int, size: int) -> StoredTensor:
    """One row of the header of a file of `size` bytes, whose data starts at `start`. Raises ValueError."""
    try:
        dtype, shape, (begin, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or len(shape) > AXES or any(type(number) is not int for number in numbers):
            raise TypeError
        (name + dtype).encode()  # a ValueError for half a surrogate pair
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header entry of {name} is incomplete") from error
    fits = VALUE_BYTES.get(dtype) is None or end - begin == math.prod(shape) * VALUE_BYTES[dtype]
    if min((*shape, begin, end - begin)) < 0 or not fits:
        raise ValueError(f"the shape {shape} of {name} does not fit its {end - begin} bytes")
    if start + end > size:
        raise ValueError(f"the data of {name} ends beyond the end of the file")
    return StoredTensor(dtype, shape, start + begin, start + end)
