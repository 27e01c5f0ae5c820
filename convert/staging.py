"""A model folder in the making: everything goes into OUT.partial, which is renamed once it is whole.

So OUT is never half a model. What an interrupted run has left is continued with `resume`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from mlx_hiermem.errors import OutputError

ANCHOR, BANK, SOURCE = "anchor", "bank", "source.json"


@contextlib.contextmanager
def partial_folder(out: pathlib.Path, resume: bool, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """OUT.partial. It stays where the run was interrupted, or ran out of space with `resume`; else it goes."""
    partial = out.absolute().with_name(out.name + ".partial")
    if partial.exists() and overwrite and not resume:
        shutil.rmtree(partial)
    continued = partial.exists()
    if continued and not resume:
        raise OutputError(f"an interrupted run left {partial}", "Continue with --resume, or remove that folder.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        if not (continued or interrupted or (resume and isinstance(error, OutputError))):
            shutil.rmtree(partial, ignore_errors=True)
        if _disk_full(error):
            raise OutputError(f"the disk is full: cannot write {out}", "Free some space.") from error
        if isinstance(error, OSError):
            raise OutputError(f"cannot make {out}: {error.strerror or error}") from error
        raise


def move(partial: pathlib.Path, out: pathlib.Path) -> None:
    """Gives the complete folder its name; an old model goes only once the new one is whole."""
    old = out.absolute().with_name(out.name + ".old")
    if (out / ANCHOR).is_dir():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_json(file: pathlib.Path, record: dict[str, Any]) -> None:
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _disk_full(error: BaseException) -> bool:
    """MLX says nothing but that it could not write."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and "Unable to write" in str(error)
