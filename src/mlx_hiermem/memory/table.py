"""Several memories attached at once: a table whose row each sequence of a batch names.

Every carrier gets its tensors for all memories in one array [S, R, width]; `mx.gather_mm` multiplies each sequence
with the row that it names, so sequences of one path share one copy. Row 0 is no memory: zeros. A memory that is
shorter than the table is padded with zeros, which add nothing (in attention they are masked).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import mlx.core as mx

from mlx_hiermem.bank.block import FetchedMemory
from mlx_hiermem.memory.attach import Attachment

NOTHING = 0  # the row without a memory


class MemoryTable:
    """Memories by key, each held while a sequence uses it and kept afterwards until its row is needed."""

    def __init__(self, attachment: Attachment) -> None:
        self._slots = [
            (layer, slot)
            for layer, carriers in enumerate(attachment.carriers)
            for _, slot in carriers
            if slot.names  # a KV memory's query projection takes nothing
        ]
        units = attachment.config.fetched_size
        widths = attachment.config.widths
        self._tables = [
            [mx.zeros((2, units, widths[name]), slot.dtype) for name in slot.names] for _, slot in self._slots
        ]
        # Row 0 attends to one zero key with a zero value: softmax over nothing would not be a number.
        self._real = mx.zeros((2, units), mx.bool_)  # which units of a row are no padding
        self._real[NOTHING, 0] = True
        self._rows: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first
        self._users: dict[Hashable, int] = {}

    def __len__(self) -> int:
        """Memories that have a row."""
        return len(self._rows)

    @property
    def capacity(self) -> int:
        """Memories that there is room for without a larger table."""
        return len(self._real) - 1

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for tables in self._tables for table in tables)

    def hold(self, key: Hashable, memory: FetchedMemory | None) -> int:
        """The row of a memory, written if it is not there; `drop` gives it back. None has row 0."""
        if memory is None:
            return NOTHING
        if key not in self._rows:
            self._rows[key] = self._free_row()
            self._write(self._rows[key], memory)
        self._rows.move_to_end(key)
        self._users[key] = self._users.get(key, 0) + 1
        return self._rows[key]

    def drop(self, key: Hashable) -> None:
        """One sequence less uses this memory."""
        if key in self._users:
            self._users[key] -= 1

    def forget(self) -> None:
        """Empties the rows that no sequence uses."""
        for key in [key for key in self._rows if not self._users.get(key)]:
            row = self._rows.pop(key)
            self._users.pop(key, None)
            for tables in self._tables:
                for table in tables:
                    table[row] = 0
            self._real[row] = False

    def use(self, rows: mx.array) -> None:
        """Attaches the table for the next forward pass: rows [B] of its sequences."""
        for (_, slot), tables in zip(self._slots, self._tables, strict=True):
            slot.tensors, slot.rows, slot.real = tuple(tables), rows, self._real

    def _free_row(self) -> int:
        if len(self._rows) < self.capacity:
            return next(row for row in range(1, len(self._real)) if row not in self._rows.values())
        unused = next((key for key in self._rows if not self._users.get(key)), None)
        if unused is not None:
            self._users.pop(unused, None)
            return self._rows.pop(unused)
        first = len(self._real)
        self._tables = [[_doubled(table) for table in tables] for tables in self._tables]
        self._real = _doubled(self._real)
        return first

    def _widen(self, units: int) -> None:
        """Makes room for a memory that is longer than all before: another bank's, or a larger generic block."""
        more = units - self._real.shape[1]
        self._tables = [[mx.pad(table, [(0, 0), (0, more), (0, 0)]) for table in tables] for tables in self._tables]
        self._real = mx.pad(self._real, [(0, 0), (0, more)])

    def _write(self, row: int, memory: FetchedMemory) -> None:
        if memory.units > self._real.shape[1]:
            self._widen(memory.units)
        written: list[mx.array] = []
        layers = {name: memory.by_layer(name) for name in memory.tensors}
        for (layer, slot), tables in zip(self._slots, self._tables, strict=True):
            for table, name in zip(tables, slot.names, strict=True):
                tensor = layers[name][layer].astype(slot.dtype)
                table[row] = mx.pad(tensor, [(0, table.shape[1] - len(tensor)), (0, 0)])
                written.append(table)
        self._real[row] = mx.arange(self._real.shape[1]) < memory.units
        mx.eval(written, self._real)  # so that the swap's cost is not hidden in the next token's


def _doubled(table: mx.array) -> mx.array:
    return mx.concatenate([table, mx.zeros_like(table)])
