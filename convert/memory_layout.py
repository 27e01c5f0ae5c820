"""What a memory checkpoint holds, worked out from its headers and settings before anything is written.

The documented layout (docs/convert.md) is dense: one row per cluster, in the order of the path read as a
base-k number. Settings that shapes tell may be left out; whatever is said twice must agree; and every tensor
has to be accounted for, none left over and none missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_hiermem.config import DTYPES, GENERIC_LEVEL, KINDS, AnchorIdentity, MemoryConfig
from mlx_hiermem.convert.checkpoint import TensorSource
from mlx_hiermem.convert.key_map import KeyMap
from mlx_hiermem.convert.memory_settings import MINILM, CheckpointSettings
from mlx_hiermem.convert.readers import RawTensor, is_finite, some
from mlx_hiermem.errors import AnchorMismatchError, CheckpointError
from mlx_hiermem.tree import ClusterTree

MEMORY = re.compile(r"memory\.(?:level(?P<level>[1-9]\d*)|generic)\.(?P<projection>\w+)(?P<side>\.[ab])?")
TREE = re.compile(r"tree\.level(?P<level>[1-9]\d*)\.(?P<what>centroids|present)")
FFN_NAMES = {"w1": "gate", "w2": "up", "w3": "down"}  # in the checkpoint: in a block
PROJECTIONS = {
    **{alias: ours for name, ours in FFN_NAMES.items() for alias in (name, ours, f"{ours}_proj")},
    **{alias: letter for letter in "qkvo" for alias in (letter, f"w{letter}", f"{letter}_proj")},
}


@dataclass(frozen=True)
class AnchorDims:
    """The widths of an anchor that memories attach to (see MemoryConfig)."""

    hidden: int
    ffn_width: int
    q_width: int
    kv_width: int


@dataclass(frozen=True)
class Stored:
    """Where a block tensor comes from: its name in the checkpoint, and whether its last axes are swapped."""

    name: str
    swapped: bool = False


@dataclass(frozen=True)
class MemoryLayout:
    """A memory checkpoint understood: the design, the tree, and each level's tensors by their block name.

    `tensors[0]`, if there, is the generic block; `units` has the r of each level in `tensors`.
    """

    config: MemoryConfig
    tree: ClusterTree
    tensors: dict[int, dict[str, Stored]]
    units: dict[int, int]


def read_layout(
    source: TensorSource,
    settings: CheckpointSettings,
    key_map: KeyMap,
    anchor: AnchorIdentity,
    dims: AnchorDims,
    dtype: str | None = None,
) -> MemoryLayout:
    """Reads headers and the tree and checks all that they can tell.

    Raises CheckpointError for what is missing, left over or contradictory, AnchorMismatchError where the
    memory was made for another anchor.
    """
    _check_anchor(settings, anchor)
    blocks, trees, left = _sort(key_map.documented(source.names()))
    kind = settings.kind or _infer_kind(source, blocks)
    _check_complete(source, settings, kind, blocks, trees, left)
    tree = _read_tree(source, settings, trees)
    stored = {
        level: {part: Stored(name, key_map.transposed(_documented(level, part))) for part, name in parts.items()}
        for level, parts in blocks.items()
    }
    units, layers = _sizes(source, settings, kind, stored, anchor)
    stored = {level: parts for level, parts in stored.items() if units[level]}
    config = MemoryConfig(
        kind,
        tree.branching,
        tuple(units.get(level, 0) for level in range(1, tree.depth + 1)),
        layers,
        dims.hidden,
        dtype or _common_dtype(source, stored),
        dims.ffn_width,
        dims.q_width,
        dims.kv_width,
        settings.alpha,
    )
    stored = {
        level: {
            part: _oriented(source, config, part, parts[part], _shape(config, level, units[level], part))
            for part in config.widths
        }
        for level, parts in sorted(stored.items())
    }
    return MemoryLayout(config, tree, stored, units)


def _check_anchor(settings: CheckpointSettings, anchor: AnchorIdentity) -> None:
    """Compares what the settings tell of the anchor with the one at hand. Names may differ."""
    for key in ("hidden", "layers", "config_digest", "weights_digest"):
        told = settings.anchor.get(key)
        if told not in (None, "", getattr(anchor, key)):
            raise AnchorMismatchError(
                f"the memory was made for another anchor, {settings.anchor.get('name', 'unnamed')}: "
                f"its {key} is {str(told)[:12]}, that of {anchor.name} {str(getattr(anchor, key))[:12]}",
                "Convert it with the anchor it was trained on.",
            )


def _sort(
    names: Mapping[str, str],
) -> tuple[dict[int, dict[str, str]], dict[tuple[int, str], str], list[str]]:
    """documented name -> name becomes ({level: {block tensor: name}}, {(level, what): name}, left over)."""
    blocks: dict[int, dict[str, str]] = {}
    trees: dict[tuple[int, str], str] = {}
    left = []
    for documented, name in names.items():
        memory, tree = MEMORY.fullmatch(documented), TREE.fullmatch(documented)
        if memory and memory["projection"] in PROJECTIONS:
            part = PROJECTIONS[memory["projection"]] + (memory["side"] or "")
            level = blocks.setdefault(int(memory["level"] or GENERIC_LEVEL), {})
            if part in level:
                raise CheckpointError(f"{level[part]} and {name} are the same tensor by two names")
            level[part] = name
        elif tree:
            trees[int(tree["level"]), tree["what"]] = name
        else:
            left.append(name)
    return blocks, trees, left


def _parts(kind: str) -> list[str]:
    """The names of a block's tensors."""
    return list(MemoryConfig(kind, 2, (1,), (0,), 1, ffn_width=1, q_width=1, kv_width=1).widths)


def _documented(level: int, part: str) -> str:
    """(2, "gate") -> memory.level2.w1: the name that error messages use."""
    projection, dot, side = part.partition(".")
    projection = {ours: name for name, ours in FFN_NAMES.items()}.get(projection, projection)
    return f"memory.{f'level{level}' if level else 'generic'}.{projection}{dot}{side}"


def _infer_kind(source: TensorSource, blocks: Mapping[int, Mapping[str, str]]) -> str:
    found = {part for parts in blocks.values() for part in parts}
    fitting = [kind for kind in KINDS if found and found <= set(_parts(kind))]
    if len(fitting) != 1:
        seen = f"has {some(source.names())}" if not found else f"the tensors {some(sorted(found))} fit no one kind"
        raise CheckpointError(
            f"{source.files[0]} is not a memory checkpoint of a known kind: {seen}",
            "Expected memory.level1.w1 and so on (docs/convert.md); --key-map maps other names.",
        )
    return fitting[0]


def _check_complete(
    source: TensorSource,
    settings: CheckpointSettings,
    kind: str,
    blocks: Mapping[int, Mapping[str, str]],
    trees: Mapping[tuple[int, str], str],
    left: list[str],
) -> None:
    """Nothing left over, nothing missing; the error lists both."""
    declared = {level for level, size in enumerate(settings.block_sizes or (), 1) if size}
    levels = sorted(declared | set(blocks))
    depth = max(*levels, *(level for level, _ in trees), 1)
    parts = _parts(kind)
    left = left + [name for level in blocks.values() for part, name in level.items() if part not in parts]
    missing = [_documented(level, part) for level in levels for part in parts if part not in blocks.get(level, {})]
    missing += [
        f"tree.level{level}.centroids" for level in range(1, depth + 1) if (level, "centroids") not in trees
    ]
    if left or missing:
        said = [f"{len(left)} tensors left over: {some(left)}"] * bool(left)
        said += [f"{len(missing)} tensors missing: {some(missing)}"] * bool(missing)
        raise CheckpointError(
            f"{source.files[0]} has {'; and '.join(said)}", "A key map (--key-map) renames or ignores tensors."
        )


def _read_tree(
    source: TensorSource, settings: CheckpointSettings, trees: Mapping[tuple[int, str], str]
) -> ClusterTree:
    """The tree in memory: float32 centroids (100 MB for the paper's), absent ones zero."""
    first = source.shape(trees[1, "centroids"])
    k, dim = first[1:] if len(first) == 3 else (0, 0)
    if settings.branching not in (None, k):
        raise CheckpointError(f"the settings say branching {settings.branching}, the tree's is {k}")
    if settings.embedder == MINILM and dim != 384:
        raise CheckpointError(f"the tree's centroids have {dim} values, those of {MINILM.name} have 384")
    centroids: list[np.ndarray] = []
    present: list[np.ndarray] = []
    for level in range(1, max(level for level, _ in trees) + 1):
        c = _read(source, trees[level, "centroids"], (k ** (level - 1), k, dim)).float32()
        p = np.ones(c.shape[:2], dtype=bool)
        if (level, "present") in trees:
            p = _read(source, trees[level, "present"], p.shape).data != 0
        if present:
            p &= present[-1].reshape(-1, 1)  # below an absent node there is nothing
        c = np.where(p[..., None], c, np.float32(0))
        if not is_finite(RawTensor("float32", c.shape, c)):
            raise CheckpointError(f"{trees[level, 'centroids']} has values that are not finite")
        centroids.append(c)
        present.append(p)
    if not present[0].any():
        raise CheckpointError(f"the tree in {source.files[0]} has no cluster that is present")
    return ClusterTree(centroids, present)


def _read(source: TensorSource, name: str, shape: tuple[int, ...]) -> RawTensor:
    if source.shape(name) != shape:
        raise CheckpointError(f"{name} is {source.shape(name)}, expected {shape}")
    return source.read(name)


def _sizes(
    source: TensorSource,
    settings: CheckpointSettings,
    kind: str,
    stored: Mapping[int, Mapping[str, Stored]],
    anchor: AnchorIdentity,
) -> tuple[dict[int, int], tuple[int, ...]]:
    """({level: r}, layers), from the first tensor of each level; the settings must agree."""
    units, counts = {}, {}
    for level, parts in stored.items():
        tensor = parts[_parts(kind)[0]]
        shape = _merge_heads(kind, source.shape(tensor.name), axes=4 if level else 3)
        if len(shape) != (4 if level else 3):
            raise CheckpointError(
                f"{tensor.name} is {shape}, expected [{'clusters, ' * bool(level)}layers, units, width]"
            )
        counts[level], units[level] = shape[-3], shape[-1 if tensor.swapped else -2]
    declared = settings.block_sizes
    for level in range(1, max(*units, len(declared or ())) + 1):
        said = declared[level - 1] if declared and level <= len(declared) else 0
        if declared and said != units.get(level, 0):
            raise CheckpointError(
                f"the settings say {said} units for level {level}, the tensors have {units.get(level, 0)}"
            )
    if not any(size for level, size in units.items() if level):
        raise CheckpointError(f"{source.files[0]} has no level with memory")
    return units, _layers(settings, counts[max(counts)], anchor)


def _layers(settings: CheckpointSettings, count: int, anchor: AnchorIdentity) -> tuple[int, ...]:
    """The indices of the `count` layers that carry memory."""
    said = settings.layers
    if isinstance(said, tuple):
        if len(said) != count:
            raise CheckpointError(f"the settings name {len(said)} layers, the tensors have {count}")
        if any(not 0 <= layer < anchor.layers for layer in said):
            raise AnchorMismatchError(
                f"the memory is for layers up to {max(said)}, {anchor.name} has {anchor.layers} layers",
                "Convert it with the anchor it was trained on.",
            )
        return said
    if count > anchor.layers:
        raise AnchorMismatchError(
            f"the memory is for {count} layers, {anchor.name} has {anchor.layers}",
            "Convert it with the anchor it was trained on.",
        )
    if count != anchor.layers or said not in (None, count):
        raise CheckpointError(
            f"the memory is for {count} of {anchor.layers} layers and its settings do not say which",
            'Give "layers": [indices] in the JSON file beside the checkpoint.',
        )
    return tuple(range(count))


def _common_dtype(source: TensorSource, stored: Mapping[int, Mapping[str, Stored]]) -> str:
    """As stored, if all blocks agree on a dtype that banks have; else float32, which loses the least."""
    found = {source.dtype(tensor.name) for parts in stored.values() for tensor in parts.values()}
    strange = found - {"float64", *DTYPES}
    if strange:
        raise CheckpointError(
            f"the memory tensors of {source.files[0]} are {some(sorted(strange))}", "They must be floating point."
        )
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else "float32"


def _shape(config: MemoryConfig, level: int, units: int, part: str) -> tuple[int, ...]:
    """[k^l, L, r, width], for the generic block [L, r, width]."""
    rows = (config.branching**level,) if level else ()
    return (*rows, *config.shapes(units)[part])


def _merge_heads(kind: str, shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """KV memories may have an axis for the heads, [.., r, heads, head dim]: the same bytes as [.., r, width]."""
    return (*shape[:-2], shape[-2] * shape[-1]) if kind == "kv" and len(shape) == axes + 1 else shape


def _oriented(
    source: TensorSource, config: MemoryConfig, part: str, tensor: Stored, shape: tuple[int, ...]
) -> Stored:
    """Checks a tensor's shape. LoRA's B may also be stored as [out, r], the way a linear layer has it."""
    found, turned = _merge_heads(config.kind, source.shape(tensor.name), len(shape)), (*shape[:-2], *shape[:-3:-1])
    if found == (turned if tensor.swapped else shape):
        return tensor
    if part.endswith(".b") and found == turned:
        return Stored(tensor.name, swapped=True)
    if not tensor.swapped and found[:-1] == shape[:-1]:
        raise AnchorMismatchError(
            f"{tensor.name} is {found[-1]} wide where the anchor has {config.widths[part]}",
            "The memory was made for another anchor.",
        )
    raise CheckpointError(f"{tensor.name} is {found}, expected {turned if tensor.swapped else shape}")
