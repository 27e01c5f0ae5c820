"""Opening a model, and which one a command means that names none: $HIERMEM_MODEL, the last one used, the demo's."""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import waiting
from mlx_hiermem.errors import AnchorError, OutputError
from mlx_hiermem.files import write_text

if TYPE_CHECKING:
    from mlx_hiermem.model import MemoryModel


def open_model(name: str, cache_bytes: int = 512 << 20) -> MemoryModel:
    """Loads a model by folder or hub id, and notes it as the last one used."""
    from mlx_hiermem.share.resolve import resolve

    folder = resolve(name)  # first: a download has a bar of its own
    with waiting("loading"):
        from mlx_hiermem.model import load

        model = load(folder, cache_bytes=cache_bytes)
    remember(name)
    return model


def remember(model: str | pathlib.Path) -> None:
    """Notes the model last used. A cache folder that cannot be written is no reason to fail."""
    name = str(pathlib.Path(model).resolve()) if pathlib.Path(model).is_dir() else str(model)
    file = _note()
    with contextlib.suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, name + "\n")


def preferred() -> str:
    """A model's folder or hub id. Raises AnchorError where there is none, saying how to get one."""
    from mlx_hiermem.apps.demo import tour

    if named := os.environ.get("HIERMEM_MODEL"):
        return named
    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = _note().read_text(encoding="utf-8").strip()
        # A folder that is gone is no choice; a hub id (not absolute) is in the cache or comes from the hub.
        if last and (not os.path.isabs(last) or os.path.isdir(last)):
            return last
    if tour.ready(tour.model_folder()):
        return str(tour.model_folder())
    raise AnchorError(
        "no model was named and none was used before",
        "`hiermem demo` makes one; or name yours, or set HIERMEM_MODEL to its folder.",
    )


def _note() -> pathlib.Path:
    from mlx_hiermem.assets import cache_folder

    return cache_folder() / "last-model"
