"""What a memory is: its kind, its sizes, the layers that carry it, and the path that names a block.

Frozen dataclasses, JSON in and out. Everything else in the project derives shapes and sizes from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from mlx_hiermem.errors import BankError, HierMemError
from mlx_hiermem.printable import printable

KINDS = ("ffn", "lora-qk", "lora-vo", "lora-ffn", "kv")
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # name -> bytes per value
BITS, GROUP_SIZES = (2, 4, 8), (32, 64, 128)  # of quantised blocks; the group sizes are MLX's
PACKED = "uint32"  # the dtype of quantised values: 32 / bits of them in each
PATH = re.compile(r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8}))*", re.ASCII)
SCALES, BIASES = ".scales", ".biases"  # after a quantised tensor's name


class Path(tuple[int, ...]):
    """Child indices from the root to a node: `(10, 7, 15)`, in text `10.7.15`. Every prefix is a node."""

    @classmethod
    def parse(cls, text: str) -> Path:
        """`"10.7.15"` -> Path; raises HierMemError for anything else: a node has one spelling."""
        if not isinstance(text, str) or not PATH.fullmatch(text):
            raise HierMemError(f"{text!r} is not a path", "Write child indices with dots between: 10.7.15")
        return cls(map(int, text.split(".")))

    def __str__(self) -> str:
        return ".".join(map(str, self))

    def prefixes(self) -> list[Path]:
        """The nodes on the way, level 1 first: 10.7 -> [10, 10.7]."""
        return [Path(self[: level + 1]) for level in range(len(self))]

    def row(self, branching: int) -> int:
        """The path read as a base-k number: the row of its cluster in a dense per-level tensor."""
        row = 0
        for child in self:
            row = row * branching + child
        return row

    @classmethod
    def of_row(cls, row: int, level: int, branching: int) -> Path:
        """The inverse of `row` for a node at `level` (1 is the level below the root)."""
        children = []
        for _ in range(level):
            row, child = divmod(row, branching)
            children.append(child)
        return cls(reversed(children))


ROOT = Path()  # above level 1: all clusters are below it, and a text that enters none stays there
GENERIC_NODE, GENERIC_LEVEL = ROOT, 0  # where the generic block stands among the others: it belongs to no cluster


@dataclass(frozen=True)
class Quantization:
    """MLX's affine quantisation: `group_size` values in a row share a scale and a bias: scale * q + bias."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.group_size not in GROUP_SIZES:
            raise BankError(
                f"blocks of {self.bits} bits in groups of {self.group_size} are not possible",
                f"Bits are {', '.join(map(str, BITS))}, groups {', '.join(map(str, GROUP_SIZES))}.",
            )

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"


@dataclass(frozen=True)
class MemoryConfig:
    """One memory design. `block_sizes` are r_1..r_p, the units (or ranks, or slots) a block has per layer.

    `ffn_width` (d_f), `q_width` (heads x head dim) and `kv_width` (key/value heads x head dim) are needed
    by the LoRA and KV kinds only; an FFN memory touches the residual width `hidden` alone. `quantization` has an
    entry for each level, None where its blocks are of `dtype` throughout; it is empty where all are.
    """

    kind: str
    branching: int
    block_sizes: tuple[int, ...]
    layers: tuple[int, ...]
    hidden: int
    dtype: str = "float16"
    ffn_width: int = 0
    q_width: int = 0
    kv_width: int = 0
    alpha: float = 2.0  # LoRA only: W + (alpha / r) B A, each block with its own r
    quantization: tuple[Quantization | None, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_sizes", tuple(self.block_sizes))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "quantization", tuple(self.quantization) if any(self.quantization) else ())
        if self.kind not in KINDS:
            raise HierMemError(f"unknown memory kind '{self.kind}'", f"Known kinds: {', '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise HierMemError(f"unknown dtype '{self.dtype}'", f"Known dtypes: {', '.join(DTYPES)}.")
        if self.branching < 2 or not self.block_sizes or min(self.block_sizes) < 0:
            raise HierMemError(
                f"a tree of branching {self.branching} with block sizes {self.block_sizes} is not possible",
                "Branching is at least 2 and every block size at least 0.",
            )
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise HierMemError(f"memory layers {self.layers} are not distinct layer indices")
        missing = [name for name, width in self.widths.items() if width <= 0]
        if missing:
            raise HierMemError(
                f"a {self.kind} memory needs the anchor's widths for {', '.join(missing)}",
                "Give hidden, ffn_width, q_width and kv_width.",
            )
        self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantization and len(self.quantization) != self.depth:
            raise BankError(f"{len(self.quantization)} levels are quantised, the memory has {self.depth}")
        for size in {level.group_size for level in self.quantization if level}:
            for name, width in self.widths.items():
                if width % size:
                    fits = [str(other) for other in GROUP_SIZES if not any(w % other for w in self.widths.values())]
                    hint = f"Groups of {' or '.join(fits)} fit." if fits else "This memory cannot be quantised."
                    raise BankError(f"{name} is {width} wide, which groups of {size} do not divide", hint)

    @property
    def depth(self) -> int:
        return len(self.block_sizes)

    @property
    def fetched_size(self) -> int:
        """R = sum of r_l: the units that a full path adds to a layer."""
        return sum(self.block_sizes)

    @property
    def widths(self) -> dict[str, int]:
        """Tensor name -> width of its last axis. Every tensor of a block is [L, r, width]."""
        d, f, q, kv = self.hidden, self.ffn_width, self.q_width, self.kv_width
        return {
            "ffn": {"gate": d, "up": d, "down": d},
            "lora-qk": {"q.a": d, "q.b": q, "k.a": d, "k.b": kv},
            "lora-vo": {"v.a": d, "v.b": kv, "o.a": q, "o.b": d},
            "lora-ffn": {"gate.a": d, "gate.b": f, "up.a": d, "up.b": f, "down.a": f, "down.b": d},
            "kv": {"k": q, "v": q},
        }[self.kind]

    def shapes(self, units: int) -> dict[str, tuple[int, int, int]]:
        """Tensor name -> [L, units, width] of a block with that many units."""
        return {name: (len(self.layers), units, width) for name, width in self.widths.items()}

    def quantized(self, level: int) -> Quantization | None:
        """How the blocks of a level are stored; None as they are. Level 0 is the generic block.

        It is stored like the finest of the levels, so that the control never does worse for its rounding.
        """
        if not self.quantization:
            return None
        if level:
            return self.quantization[level - 1]
        used = [how for how, units in zip(self.quantization, self.block_sizes, strict=True) if units]
        return None if None in used else max(filter(None, used), key=lambda how: how.bits, default=None)

    def stored(self, level: int, units: int) -> dict[str, tuple[str, tuple[int, int, int]]]:
        """Tensor name -> (dtype, shape) in the file of a level's block. What is quantised is three tensors."""
        how, tensors = self.quantized(level), {}
        for name, (layers, _, width) in self.shapes(units).items():
            if how is None:
                tensors[name] = (self.dtype, (layers, units, width))
                continue
            tensors[name] = (PACKED, (layers, units, width * how.bits // 32))
            for part in (SCALES, BIASES):
                tensors[name + part] = (self.dtype, (layers, units, width // how.group_size))
        return tensors

    @property
    def precision(self) -> str:
        """For people: `float16`, or level by level `8 bits in groups of 64, then 4 bits in groups of 64`."""
        used = [level for level, units in enumerate(self.block_sizes, 1) if units]
        names = [str(self.quantized(level) or self.dtype) for level in used]
        return ", then ".join(name for i, name in enumerate(names) if not i or name != names[i - 1])

    def parameters(self, units: int) -> int:
        """s_l = c0 * r_l (arXiv:2510.02375, §2.2)."""
        return len(self.layers) * units * sum(self.widths.values())

    @property
    def fetched_parameters(self) -> int:
        return self.parameters(self.fetched_size)

    @property
    def bank_parameters(self) -> int:
        """Sum of s_l * k^l over a full tree."""
        return sum(self.parameters(r) * self.branching**level for level, r in enumerate(self.block_sizes, 1))

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"block_sizes": list(self.block_sizes), "layers": list(self.layers)}
        levels = data.pop("quantization")  # asdict made dictionaries of them
        return data | {"quantization": list(levels)} if levels else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryConfig:
        """Unknown keys are refused: they would be settings that this version silently ignores."""
        try:
            stored = data.get("quantization") or ()
            levels = [level if level is None else _typed(Quantization(**level)) for level in stored]
            return _typed(cls(**{**data, "quantization": tuple(levels)}))
        except (TypeError, AttributeError) as error:
            raise BankError(f"the memory config does not fit this version: {error}") from error


@dataclass(frozen=True)
class AnchorIdentity:
    """Which anchor a bank belongs to. Digests: see `mlx_hiermem.anchor.identify`."""

    name: str
    config_digest: str
    weights_digest: str
    hidden: int
    layers: int

    def is_same(self, other: AnchorIdentity) -> bool:
        """Whether both are one anchor, whatever they are called."""
        mine, theirs = ((i.config_digest, i.weights_digest, i.hidden, i.layers) for i in (self, other))
        return mine == theirs

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AnchorIdentity:
        """Raises TypeError for what is none."""
        return _typed(cls(**{**data, "name": printable(data["name"])}))


@dataclass(frozen=True)
class EmbedderIdentity:
    """The sentence embedder that a bank's tree was built with."""

    name: str
    digest: str
    max_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EmbedderIdentity:
        """Raises TypeError for what is none."""
        return _typed(cls(**{**data, "name": printable(data["name"])}))


T = TypeVar("T", bound="AnchorIdentity | EmbedderIdentity | MemoryConfig | Quantization")


def _typed(made: T) -> T:
    """The object itself; TypeError where JSON gave one of its simple fields another type."""
    types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    for field in fields(made):
        value = getattr(made, field.name)
        numbers = value if field.type == "tuple[int, ...]" else ()
        if type(value) not in types.get(str(field.type), (type(value),)) or any(
            type(n) is not int for n in numbers
        ):
            raise TypeError(f"{field.name} is {value!r}")
    return made
