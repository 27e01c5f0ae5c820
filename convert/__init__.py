"""Checkpoints become memory models: `from mlx_hiermem.convert import convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_hiermem.convert.pipeline import ConvertReport, convert

__all__ = ["ConvertReport", "convert"]


def __getattr__(name: str) -> Any:
    """Loads what is exported when it is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_hiermem.convert import pipeline

    return getattr(pipeline, name)
