"""A model folder in the making: everything goes into OUT.partial, which is renamed once it is whole.

So OUT is never half a model. What an interrupted run has left is continued with `resume`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from mlx_hiermem.errors import OutputError
from mlx_hiermem.files import partial_name, reason, replace_folder, writing
from mlx_hiermem.locks import locked

ANCHOR, BANK, SOURCE = "anchor", "bank", "source.json"


@contextlib.contextmanager
def partial_folder(
    out: pathlib.Path, resume: bool, overwrite: bool = False, keep: bool = True
) -> Iterator[pathlib.Path]:
    """OUT.partial, which becomes OUT; an old model there goes only once the new one is whole.

    It stays where the run was interrupted, or ran out of space with `resume`; after other errors, and without
    `keep`, it goes. Raises OutputError where another process is writing it.
    """
    if out.is_symlink():  # it stays one: what it leads to is written, on that disk
        out = out.resolve()
    partial = partial_name(out.absolute())
    continued = partial.exists()
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, "writing"):
        if continued and overwrite and not resume:
            _clear(partial)
            continued = False
        if continued and not resume:
            hint = "Continue with --resume, or remove that folder."
            raise OutputError(f"an interrupted run left {partial}", hint)
        with _named(partial, out, continued, resume, keep):
            yield partial


def _clear(folder: pathlib.Path) -> None:
    with writing(folder):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _named(partial: pathlib.Path, out: pathlib.Path, continued: bool, resume: bool, keep: bool) -> Iterator[None]:
    """Gives `partial` its name at the end of the block, or clears it away."""
    try:
        yield
        if (out / ANCHOR).is_dir():
            replace_folder(partial, out)
        else:
            os.rename(partial, out)
    except BaseException as error:
        told = _told(out, error)
        interrupted = keep and not isinstance(error, Exception)
        if not (continued or interrupted or (resume and isinstance(told, OutputError))):
            shutil.rmtree(partial, ignore_errors=True)
        if told is error:
            raise
        raise told from error


def _told(out: pathlib.Path, error: BaseException) -> BaseException:
    """An OutputError for what the operating system refuses; any other error as it is."""
    if isinstance(error, RuntimeError) and "Unable to write" in str(error):  # all that MLX says of a full disk
        return OutputError(f"cannot write {out}: the disk is full", "Free some space.")
    return OutputError(f"cannot write {out}: {reason(error)}") if isinstance(error, OSError) else error
