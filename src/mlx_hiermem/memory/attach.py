"""Joining a fetched memory to an anchor, and swapping it.

`attach` gives the layers that carry memory their slots, once; `Attachment.set` then fills the slots with
another memory whenever the path changes. With nothing set the anchor computes exactly what it did before.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_hiermem.bank.block import FetchedMemory
from mlx_hiermem.config import MemoryConfig
from mlx_hiermem.errors import AnchorError
from mlx_hiermem.memory.ffn import activation, attach_ffn, feed_forward
from mlx_hiermem.memory.kv import attach_kv
from mlx_hiermem.memory.lora import attach_lora
from mlx_hiermem.memory.slot import Slot, release


class Attachment:
    """The slots of one anchor. `carriers[i]` belongs to `config.layers[i]`."""

    def __init__(self, config: MemoryConfig, carriers: list[list[tuple[nn.Module, Slot]]]) -> None:
        self.config, self.carriers = config, carriers

    def takes(self, config: MemoryConfig) -> bool:
        """Whether memories of this design fit the slots: of the same kind and widths, for the same layers."""
        mine, other = self.config, config
        return (mine.kind, mine.layers, mine.widths) == (other.kind, other.layers, other.widths)

    def set(self, memory: FetchedMemory | None) -> None:
        """Fills every slot from the memory's tensors [L, R, width]; None empties them."""
        if memory is None:
            return self.clear()
        # Evaluated here, so that the swap's cost is not hidden in the next token's.
        mx.eval(self.fill(memory))

    def fill(self, memory: FetchedMemory) -> list[mx.array]:
        """The same without computing anything, so that gradients can flow; returns the slots' arrays."""
        if memory.config.kind != self.config.kind or memory.config.layers != self.config.layers:
            raise AnchorError("this memory is of another kind or for other layers than the anchor's slots")
        layers, filled = {name: memory.by_layer(name) for name in memory.tensors}, list[mx.array]()
        for index, carriers in enumerate(self.carriers):
            for _, slot in carriers:
                slot.fill([layers[name][index] for name in slot.names])
                filled.extend(slot.tensors)
        return filled

    def clear(self) -> None:
        for carriers in self.carriers:
            for _, slot in carriers:
                slot.clear()

    def detach(self) -> None:
        """Gives the anchor its own classes back."""
        for carriers in self.carriers:
            for module, slot in carriers:
                slot.clear()
                release(module)


def attach(model: nn.Module, config: MemoryConfig) -> Attachment:
    """Gives an mlx-lm model the slots that `config` describes; it computes as before until `set`.

    Raises AnchorError where the architecture or its sizes cannot carry this memory; the model is then unchanged.
    """
    layers = model.layers
    if max(config.layers) >= len(layers):
        raise AnchorError(f"the memory is for layer {max(config.layers)}, the anchor has {len(layers)} layers")
    carriers: list[list[tuple[nn.Module, Slot]]] = []
    try:
        gated = activation(feed_forward(layers[config.layers[0]])) if config.kind == "ffn" else None
        for index in config.layers:
            if gated is not None:
                carriers.append(attach_ffn(layers[index], config, gated))
            elif config.kind == "kv":
                carriers.append(attach_kv(layers[index], config))
            else:
                carriers.append(attach_lora(layers[index], config))
    except AnchorError:
        Attachment(config, carriers).detach()
        raise
    return Attachment(config, carriers)
