"""Files, as everything here writes and reads them.

Writing: a file or folder is written beside its place and renamed once it is whole, so that a reader finds the old
one or the new one. Reading: what is missing or damaged raises a typed error that names the file, and the line. The
caller says which type (`raises`), because a damaged bank and a damaged checkpoint call for different remedies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_hiermem.errors import ArgumentError, FileError, HierMemError, OutputError

# What code that takes values out of JSON of another shape raises; int(inf) is an OverflowError
MALFORMED = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_of(given: Any, what: str) -> pathlib.Path:
    """The path that a program names. Raises ArgumentError, saying `what` it was to be, where it is none."""
    if not isinstance(given, str | os.PathLike):
        raise ArgumentError(f"{given!r} is no {what}", "Give its path, as text or as a pathlib.Path.")
    return pathlib.Path(given)


def file_digest(file: pathlib.Path) -> str:
    """sha256 of a file, in hexadecimal. An OSError names the file also where it was opened and cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        error.filename = str(file)
        raise


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

    A process that is killed between the two renames leaves `<out>.old`: see `restore_folder`. From another disk the
    folder is copied.
    """
    if new.stat().st_dev != out.parent.stat().st_dev:
        beside = out.with_name(out.name + ".new")
        shutil.rmtree(beside, ignore_errors=True)
        new = pathlib.Path(shutil.copytree(new, beside))
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


# Reading


def read_text(file: pathlib.Path, raises: type[HierMemError] = FileError, hint: str = "") -> str:
    """The whole of a text file. Raises `raises` where it cannot be read, or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error, raises, hint) from error


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
        raise unreadable(file, error, raises, hint) from error


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


def unreadable(file: pathlib.Path, error: Exception, raises: type[HierMemError], hint: str) -> HierMemError:
    why = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason(error)
    return raises(f"cannot read {file}: {why}", hint)
