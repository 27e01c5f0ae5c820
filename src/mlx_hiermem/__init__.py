"""mlx-hiermem: language models with hierarchical memories on Apple silicon.

    from mlx_hiermem import load
    model = load("my-model")
    print(model.generate("The atomic number of neon is"))

The method is arXiv:2510.02375. Importing this package is cheap: MLX is loaded when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_hiermem.model import MemoryModel, load

__version__ = "0.1.0"
__all__ = ["MemoryModel", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mlx_hiermem import model

        return getattr(model, name)
    raise AttributeError(f"module 'mlx_hiermem' has no attribute '{name}'")
