"""mlx-hiermem: language models with hierarchical memories on Apple silicon.

    from mlx_hiermem import load
    model = load("my-model")
    print(model.chat("What is the capital of Laos?"))

Other programs may build on what `__all__` lists here, in `mlx_hiermem.learn` and in `mlx_hiermem.convert`;
docs/python.md shows it. The method is arXiv:2510.02375. Importing this package is cheap: MLX is loaded when a
model is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlx_hiermem.config import Path
from mlx_hiermem.errors import (
    AnchorError,
    AnchorMismatchError,
    ArgumentError,
    AssetError,
    BankError,
    ChatTemplateError,
    CheckpointError,
    CoreAIError,
    CoreMLError,
    CorpusError,
    FileError,
    HierMemError,
    HubError,
    MissingDependencyError,
    NothingToLearnError,
    OutputError,
    SettingsError,
    TaskError,
    TeacherError,
    VerificationError,
)
from mlx_hiermem.memory_choice import MemoryChoice

if TYPE_CHECKING:
    from mlx_hiermem.bank.bank import MemoryBank
    from mlx_hiermem.model import MemoryModel
    from mlx_hiermem.model_folder import load
    from mlx_hiermem.response import Response
    from mlx_hiermem.selection import Selection
    from mlx_hiermem.session import Session

__version__ = "0.1.0"
__all__ = [
    "AnchorError",
    "AnchorMismatchError",
    "ArgumentError",
    "AssetError",
    "BankError",
    "ChatTemplateError",
    "CheckpointError",
    "CoreAIError",
    "CoreMLError",
    "CorpusError",
    "FileError",
    "HierMemError",
    "HubError",
    "MemoryBank",
    "MemoryChoice",
    "MemoryModel",
    "MissingDependencyError",
    "NothingToLearnError",
    "OutputError",
    "Path",
    "Response",
    "Selection",
    "Session",
    "SettingsError",
    "TaskError",
    "TeacherError",
    "VerificationError",
    "load",
]

_MODULES = {  # of what needs MLX, and is loaded when it is first used
    "MemoryBank": "bank.bank",
    "MemoryModel": "model",
    "Response": "response",
    "Selection": "selection",
    "Session": "session",
    "load": "model_folder",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'mlx_hiermem' has no attribute '{name}'")
    return getattr(importlib.import_module(f"mlx_hiermem.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
