"""The names that clients may ask for: each model, and each of its memories as `model:memory`.

Many programs let their users choose a model, and send no field that they do not know. So a memory can also be
chosen in the model's name: `my-model:none`, `my-model:generic`, `my-model:3.1`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_hiermem.apps.server.refusal import ApiError
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.memory_choice import MemoryChoice
from mlx_hiermem.model import MemoryModel

STARTED = int(time.time())  # what OpenAI's rows call created


@dataclass(frozen=True)
class Named:
    """What a name stands for; `memory` where the name chooses one."""

    name: str  # as answers give it
    stem: str  # without the memory
    model: MemoryModel
    memory: MemoryChoice | None = None


@dataclass(frozen=True)
class Catalogue:
    """`models` are those that are served, the first for requests that name none."""

    models: Mapping[str, MemoryModel]
    any_model: bool = False  # an unknown name means the first model: some programs have a name built in

    def find(self, name: str) -> Named:
        """Raises ApiError for a name that there is not."""
        first = next(iter(self.models))
        if not name or name in self.models:
            return Named(name or first, name or first, self.models[name or first])
        stem, _, word = name.rpartition(":")
        if stem in self.models:
            return Named(name, stem, self.models[stem], self._memory(name, self.models[stem], word))
        if self.any_model:
            return Named(first, first, self.models[first])
        known = ", ".join(f"'{each}'" for each in self.models)
        some = f"the models are {known}" if len(self.models) > 1 else f"the model is {known}"
        raise ApiError(404, f"there is no model '{name}' here; {some}", "model", "model_not_found")

    def _memory(self, name: str, model: MemoryModel, word: str) -> MemoryChoice:
        try:
            memory = MemoryChoice.parse(word)
        except HierMemError:
            memory = None
        if memory is None or not has(model, memory):
            message = f"there is no model '{name}' here: '{word}' is no memory of it; /v1/models lists them"
            raise ApiError(404, message, "model", "model_not_found")
        return memory

    def rows(self) -> list[dict[str, Any]]:
        """Of /v1/models: every model, and below it its memories down to the top level of the tree."""
        rows = []
        for name, model in self.models.items():
            rows.append(self.row(Named(name, name, model)))
            rows += [self.row(Named(f"{name}:{memory}", name, model, memory)) for memory in _listed(model)]
        return rows

    def row(self, named: Named) -> dict[str, Any]:
        row = {"id": named.name, "object": "model", "created": STARTED, "owned_by": "mlx-hiermem"}
        return row | ({"parent": named.stem} if named.memory else {})


def has(model: MemoryModel, memory: MemoryChoice) -> bool:
    """Whether a model has this memory. Each has none; fetched is there where a bank is."""
    bank = model.bank
    if bank is None or memory in (MemoryChoice.NONE, MemoryChoice.FETCHED):
        return bank is not None or memory in (MemoryChoice.NONE, MemoryChoice.FETCHED)
    if memory.has_passage:
        return bank.sources is not None
    if memory == MemoryChoice.GENERIC:
        return bank.manifest.generic is not None
    return bank.tree.has(memory.path)


def _listed(model: MemoryModel) -> list[MemoryChoice]:
    """The memories that /v1/models names: without a bank none, since the model alone is none already."""
    if model.bank is None:
        return []
    top = [MemoryChoice(str(node)) for node in model.bank.manifest.blocks if len(node) == 1]
    open_top = [memory for memory in top if not model.bank.policy.blocker(Path.parse(memory))]
    words = [MemoryChoice(word) for word in MemoryChoice.WORDS if word != MemoryChoice.FETCHED]
    return [memory for memory in (*words, *open_top) if has(model, memory)]
