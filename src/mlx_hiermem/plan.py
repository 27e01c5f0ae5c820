"""What a model needs on a device: whether it fits, what stays in memory, and how long a fetch would take.

Sizes come from the model's own files. Speeds come from devices.json, where each figure has its source; times
are arithmetic with them (see `tiers`), not measurements, and are as good as the figures.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from mlx_hiermem.anchor import read_config
from mlx_hiermem.bank.bank import MANIFEST
from mlx_hiermem.bank.manifest import BankManifest
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.files import parse_json
from mlx_hiermem.tiers import Stored, Tier, fetch_ms, flat_ms, place

GIB = 1 << 30
EMBEDDER_BYTES = 90_868_376  # all-MiniLM-L6-v2 in float32
PROGRAM_BYTES = 270_000_000  # Python, MLX and mlx-lm: resident after import, on Linux; a native app needs less
APP_BYTES = 100_000_000  # assumed: a native app with Core ML, which has been measured on no device
EXPORT = "manifest.json"  # of a folder that `hiermem export coreml` wrote
FILE_MS = 0.1  # assumed: opening a file and the first answer of the storage
CONTEXTS = (512, 2048, 4096, 8192, 32768)
KV_TYPES = {"float32": 4}  # bytes per value; everything else runs in half precision


@dataclass(frozen=True)
class Figure:
    """A device's figure: `basis` is vendor, measured, reported or assumed."""

    value: float
    basis: str
    source: str


@dataclass(frozen=True)
class Disk:
    """An external disk: MB/s, and milliseconds to the first byte of a file."""

    name: str
    title: str
    storage: Figure
    access: Figure


@dataclass(frozen=True)
class Device:
    """Memory in GiB, storage in MB/s, memory bandwidth in GB/s.

    `program_share` is the part of the memory that one program may use; `access` is the storage's, in milliseconds a
    file.
    """

    name: str
    title: str
    memory: Figure
    program_share: Figure
    storage: Figure
    bandwidth: Figure
    access: Figure = Figure(FILE_MS, "assumed", "opening a file and the first answer of the storage")

    @property
    def usable(self) -> int:
        """Bytes that the model and its program may take."""
        return int(self.memory.value * self.program_share.value * GIB)

    def with_disk(self, disk: Disk) -> Device:
        """This device with the bank on an external disk."""
        title = f"{self.title}, the bank on a {disk.title}"
        return replace(self, title=title, storage=disk.storage, access=disk.access)

    def in_memory(self, room: float = math.inf) -> Tier:
        """Blocks that are in memory, or that the system still has there: each byte is read and written once."""
        return Tier("memory", self.bandwidth.value / 2, room=room)

    @property
    def on_storage(self) -> Tier:
        """Blocks that have to be read from storage."""
        return Tier("storage", self.storage.value / 1e3, self.access.value)

    def cold_ms(self, files: int, size: int) -> float:
        """Reading blocks from storage."""
        return self.on_storage.milliseconds(size, files)

    def warm_ms(self, size: int) -> float:
        """Reading blocks that are in memory."""
        return self.in_memory().milliseconds(size)


@dataclass(frozen=True)
class Level:
    """One level of the bank: its blocks, the size of one (the largest), and of all together."""

    level: int
    blocks: int
    block_bytes: int
    bytes: int


@dataclass(frozen=True)
class ModelSize:
    """What a plan needs to know of a model."""

    name: str
    anchor_bytes: int
    kv_bytes: int  # per token of context, at most: windows of sliding attention need less
    max_context: int
    levels: tuple[Level, ...] = ()
    embedder_bytes: int = EMBEDDER_BYTES
    program_bytes: int = PROGRAM_BYTES

    @property
    def path_bytes(self) -> int:
        """The blocks of one path, each level's largest."""
        return sum(level.block_bytes for level in self.levels)

    @property
    def bank_bytes(self) -> int:
        return sum(level.bytes for level in self.levels)

    @property
    def has_bank(self) -> bool:
        return bool(self.levels)

    @property
    def paths(self) -> int:
        """How many paths there are, as far as their blocks differ."""
        return max((level.blocks for level in self.levels), default=0)

    def paths_in(self, left: int) -> int:
        """How many paths' blocks below level 1 fit in so many bytes, if no two paths share one."""
        if sum(level.bytes for level in self.levels[1:]) <= left:
            return self.paths
        deeper = sum(level.block_bytes for level in self.levels[1:])
        return max(left, 0) // deeper if deeper else 0


@dataclass(frozen=True)
class Fetch:
    """Getting the blocks of a path that are not cached."""

    what: str
    files: int
    bytes: int
    cold_ms: float
    warm_ms: float


@dataclass(frozen=True)
class Context:
    """What a context length costs, and how many paths' blocks the rest of the memory then holds."""

    tokens: int
    kv_bytes: int
    left_bytes: int  # negative: it does not fit
    paths: int


@dataclass(frozen=True)
class Plan:
    """`fixed_bytes` is all that is in memory whatever the context: anchor, level 1, embedder, program, one path."""

    device: Device
    model: ModelSize
    fixed_bytes: int
    pinned_levels: int  # levels that fit as a whole, beside everything else at the shortest context
    contexts: tuple[Context, ...]
    fetches: tuple[Fetch, ...]
    topic_ms: float  # a new topic's blocks, with the pinned levels in memory and the rest on storage
    flat_ms: float  # as many bytes in one block of a flat bank on storage
    tokens_per_second: float  # at most: memory bandwidth over the bytes read for each token

    @property
    def fits(self) -> bool:
        return self.contexts[0].left_bytes >= 0

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["device"]["usable_bytes"] = self.device.usable
        data["model"] |= {"path_bytes": self.model.path_bytes, "bank_bytes": self.model.bank_bytes}
        return (
            data
            | {"fits": self.fits}
            | {key: data["model"].pop(key) for key in ("embedder_bytes", "program_bytes")}
        )


@cache
def devices() -> Mapping[str, Device]:
    """The devices of devices.json by name."""
    return {name: Device(name, **row) for name, row in _rows().items() if "memory" in row}


@cache
def disks() -> Mapping[str, Disk]:
    """The external disks of devices.json by name."""
    return {name: Disk(name, **row) for name, row in _rows().items() if "memory" not in row}


def _rows() -> dict[str, dict[str, Any]]:
    """Name -> title and figures."""
    rows = parse_json(pathlib.Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
    return {
        name: {key: value if key == "title" else Figure(**value) for key, value in row.items()}
        for name, row in rows.items()
    }


def device(name: str, disk: str = "") -> Device:
    """A device by name, with the bank on an external disk if one is named; HierMemError for unknown ones."""
    if name not in devices():
        raise HierMemError(f"there is no device '{name}' in the table", f"Known: {', '.join(devices())}.")
    if disk and disk not in disks():
        raise HierMemError(f"there is no disk '{disk}' in the table", f"Known: {', '.join(disks())}.")
    return devices()[name].with_disk(disks()[disk]) if disk else devices()[name]


def measure(model: str | pathlib.Path) -> ModelSize:
    """Reads a model's sizes from its folder, or from the hub by its id, without downloading weights.

    A folder that `hiermem export coreml` wrote is a model too, run by an app instead of Python.
    """
    from mlx_hiermem.share.resolve import home, peek

    folder = pathlib.Path(model)
    if (folder / EXPORT).is_file():
        return _exported(folder)
    if not folder.is_dir():
        folder = home(model)
    if folder.is_dir():
        anchor = folder / "anchor" if (folder / "anchor").is_dir() else folder
        manifest = folder / "bank" / MANIFEST
        bank = BankManifest.read(manifest) if manifest.parent.is_dir() else None
        weights = sum(file.stat().st_size for file in anchor.glob("model*.safetensors"))
        return _size(str(model), read_config(anchor), weights, bank)
    config, bank, weights = peek(str(model))
    return _size(str(model), config, weights, bank)


def _size(name: str, config: Mapping[str, Any], weights: int, bank: BankManifest | None) -> ModelSize:
    text = config.get("text_config") or config
    longest = text.get("max_position_embeddings") or max(CONTEXTS)
    return ModelSize(name, weights, kv_bytes(text), int(longest), levels_of(bank))


def levels_of(bank: BankManifest | None) -> tuple[Level, ...]:
    levels = []
    for level in range(1, bank.memory.depth + 1) if bank else ():
        sizes = [entry.bytes for node, entry in bank.blocks.items() if len(node) == level] if bank else []
        levels.append(Level(level, len(sizes), max(sizes, default=0), sum(sizes)))
    return tuple(levels)


def _exported(folder: pathlib.Path) -> ModelSize:
    """The caches are as long as the context that was chosen on exporting, however short a text is."""
    try:
        data = parse_json((folder / EXPORT).read_text(encoding="utf-8"))
        name, anchor, retriever, bank = (data[key] for key in ("name", "anchor", "retriever", "bank"))
        layers, heads, _, width = anchor["states"]["k_cache"]["shape"]
        context = anchor["context"]
        packages = [
            sum(
                row["bytes"] for name, row in data["files"].items() if one and name.startswith(one["package"] + "/")
            )
            for one in (anchor, retriever)
        ]
        numbers = [layers, heads, context, width, *packages]
        if not isinstance(name, str) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{numbers} are no sizes of {name!r}")
        manifest = BankManifest.read(folder / bank["folder"] / MANIFEST) if bank else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HierMemError(f"{folder} is no exported folder: {error!r}", "See `hiermem export coreml`.") from error
    kv = 2 * layers * heads * width * 2
    return ModelSize(name, packages[0], kv, context, levels_of(manifest), packages[1], APP_BYTES)


def kv_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values that one token adds: 2 · layers · key/value heads · head width · bytes a value.

    Raises HierMemError where the config does not say.
    """
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    except KeyError as error:
        raise HierMemError(
            f"the anchor's config.json has no {error}", "Its KV cache cannot be computed."
        ) from error
    return int(values) * KV_TYPES.get(str(config.get("torch_dtype") or config.get("dtype")), 2)


def plan(model: ModelSize, on: Device, contexts: Sequence[int] = CONTEXTS) -> Plan:
    """What fits on a device, at several context lengths (its own where the anchor does not reach so far)."""
    lengths = sorted({min(length, model.max_context) for length in contexts})
    level_1 = model.levels[0].bytes if model.has_bank else 0
    memory = model.embedder_bytes + level_1 + model.path_bytes if model.has_bank else 0
    fixed = model.anchor_bytes + model.program_bytes + memory
    rows = []
    for length in lengths:
        left = on.usable - fixed - model.kv_bytes * length
        rows.append(Context(length, model.kv_bytes * length, left, model.paths_in(left)))
    read = model.anchor_bytes + model.path_bytes
    stored = _stored(model, on, rows[0].left_bytes)
    return Plan(
        device=on,
        model=model,
        fixed_bytes=fixed,
        pinned_levels=sum(level.tier.name == "memory" for level in stored),
        contexts=tuple(rows),
        fetches=tuple(_fetches(model, on)),
        topic_ms=fetch_ms(stored),
        flat_ms=flat_ms(stored, on.on_storage) if stored else 0.0,
        tokens_per_second=on.bandwidth.value * 1e9 / read if read else 0.0,
    )


def _stored(model: ModelSize, on: Device, left: int) -> tuple[Stored, ...]:
    """Where each level lies if the levels that fit whole are in memory. Level 1 is in the fixed bytes already."""
    if left < 0 or not model.has_bank:
        return tuple(Stored(level.block_bytes, level.bytes, on.on_storage) for level in model.levels)
    room = left + model.levels[0].bytes
    return place([(level.block_bytes, level.bytes) for level in model.levels], (on.in_memory(room), on.on_storage))


def _fetches(model: ModelSize, on: Device) -> list[Fetch]:
    """The whole path, then what is left of it as more levels stay from before."""
    rows = []
    for kept in range(sum(1 for level in model.levels if level.blocks)):
        below = [level for level in model.levels[kept:] if level.blocks]
        size = sum(level.block_bytes for level in below)
        if not size:
            continue
        what = "the whole path" if not kept else "level 1 stays" if kept == 1 else f"levels 1–{kept} stay"
        rows.append(Fetch(what, len(below), size, on.cold_ms(len(below), size), on.warm_ms(size)))
    return rows
