"""Whether what manifest.json tells the app is so: functions, shapes, types and states, memory and bank.

An app allocates by the manifest. Where a package differs, its first prediction fails on the phone, or worse, runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_hiermem.convert.checks import Check
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.exported import Exported
from mlx_hiermem.convert.coreml.program import FunctionSpec, TensorSpec
from mlx_hiermem.convert.coreml.runner import MEMORY

Told = Mapping[str, Mapping[str, Any]]  # name -> {shape, dtype} as in the manifest


def check_interfaces(exported: Exported) -> Check:
    """The first contradiction is the figure, `details` has all."""
    wrong = [*_functions(exported), *_sizes(exported), *_memory(exported), *_retriever(exported)]
    figure = wrong[0] if wrong else f"{len(exported.program.functions)} functions"
    return Check("interfaces", figure, "as in the manifest", not wrong, {"wrong": wrong})


def _functions(exported: Exported) -> Iterator[str]:
    anchor, functions = exported.anchor, exported.program.functions
    for name, tokens in anchor["functions"].items():
        if name not in functions:
            yield f"there is no function {name}"
            continue
        for role in ("inputs", "outputs", "states"):
            yield from _tensors(name, anchor[role], getattr(functions[name], role), tokens)
    if load := anchor["load_block"]:
        if load not in functions:
            yield f"there is no function {load}"
            return
        states = anchor["states"]
        new = {f"new_{name}": states[name] for name in MEMORY if name in states}
        yield from _tensors(load, new, functions[load].inputs)
        yield from _tensors(load, states, functions[load].states)


def _tensors(function: str, told: Told, found: Mapping[str, TensorSpec], tokens: int = -1) -> Iterator[str]:
    for name in {**told, **found}:
        if name not in found or name not in told:
            yield f"{name} of {function} is {'not there' if name in told else 'not in the manifest'}"
            continue
        row, spec = told[name], found[name]
        shape = [tokens if size == -1 else size for size in row["shape"]]
        if (shape, row["dtype"]) != (list(spec.shape), spec.dtype):
            yield f"{name} of {function} is {spec.dtype} {list(spec.shape)}, told is {row['dtype']} {shape}"


def _sizes(exported: Exported) -> Iterator[str]:
    """What the manifest says twice."""
    anchor = exported.anchor
    widths = [anchor["outputs"].get(name, {"shape": [0]})["shape"][-1] for name in anchor["logits"]]
    if min(widths, default=0) == 0 or sum(widths) < anchor["vocabulary"]:
        yield f"the logits have {widths} values, the vocabulary {anchor['vocabulary']}"
    for name, row in anchor["states"].items():
        if name not in MEMORY and row["shape"][-2] != anchor["context"]:
            yield f"{name} has room for {row['shape'][-2]} tokens, the context is {anchor['context']}"


def _memory(exported: Exported) -> Iterator[str]:
    """The memory's shape, against where it is written to and against the bank."""
    memory, bank = exported.memory, exported.bank
    if memory is None or bank is None:
        return
    told = {key: memory[key] for key in ("layers", "units", "hidden")}
    config = bank.config
    has = {"layers": list(config.layers), "units": config.fetched_size, "hidden": config.hidden}
    if told != has:
        yield f"the memory has {told}, the bank's {has}"
    shape = [len(memory["layers"]), memory["units"], memory["hidden"]]
    places = exported.anchor["inputs" if memory["mode"] == "input" else "states"]
    for name in MEMORY:
        if (found := places.get(name, {}).get("shape")) != shape:
            yield f"the memory's {name} is {found}, expected is {shape}"


def _retriever(exported: Exported) -> Iterator[str]:
    described = exported.retriever
    if described is None:
        return
    function = open_package(exported.folder / described["package"]).functions.get("main")
    if function is None:
        yield "the retriever has no function main"
        return
    wanted = [(1, length) for length in described["lengths"]]
    for name, spec in function.inputs.items():
        if sorted(spec.shapes or (spec.shape,)) != sorted(wanted):
            yield f"{name} of the retriever takes {sorted(spec.shapes)}, told is {wanted}"
    yield from _tensors("the retriever", described["inputs"], _open(function), -1)
    yield from _tensors("the retriever", described["outputs"], function.outputs)


def _open(function: FunctionSpec) -> dict[str, TensorSpec]:
    """Inputs with -1 for the sizes that vary, as the manifest has them."""
    return {name: TensorSpec((1, -1), spec.dtype) for name, spec in function.inputs.items()}
