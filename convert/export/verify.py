"""`hiermem verify OUT --coreml`: runs an exported folder as an app would, and holds it to its source.

By the interpreter, or on a Mac by Core ML itself; the report is the same. Without the source it can still tell
whether the files are those exported, memories come and go without a trace, and both functions agree.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.convert.checks import Check
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.program import FunctionSpec, TensorSpec
from mlx_hiermem.convert.export.exported import MEMORY, Exported
from mlx_hiermem.convert.export.references import Reference, open_reference
from mlx_hiermem.convert.export.sample_texts import TEXTS
from mlx_hiermem.convert.export.shape import STEP, filled
from mlx_hiermem.convert.export.text_checks import check_choices, check_texts
from mlx_hiermem.convert.source import tool_versions
from mlx_hiermem.convert.verify import RECEIPT, VerifyReceipt, write_receipt
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError, CoreAIError, CoreMLError
from mlx_hiermem.files import file_digest, read_json
from mlx_hiermem.progress import Progress

COSINE = 2e-6  # 1 - cos; rounding the weights to float16 alone makes 5e-7
ROUTES = 0.9  # share of texts that go the same way; one that lies between two clusters may go either
PROMPTS = 4  # of twenty
Told = Mapping[str, Mapping[str, Any]]  # name -> {shape, dtype} as in the manifest


@dataclass(frozen=True)
class Options:
    """`against`: the model folder that was exported, or its source. `text`: a file for `check_choices`."""

    against: str | None = None
    prompts: int = PROMPTS
    text: pathlib.Path | None = None
    format: str = ""  # that the folder must have


def verify_export(folder: pathlib.Path, options: Options, progress: Progress | None = None) -> VerifyReceipt:
    """Checks an exported folder, and adds what it found to its receipt.json.

    Raises a HierMemError where there is nothing to check or to compare with; what is wrong with the folder's own
    files fails a check.
    """
    if options.text and not options.against:
        raise CoreMLError(f"{options.text} needs a model to compare with", "Name it with --against.")
    exported = Exported(folder)
    if options.format not in ("", exported.format):
        raise CoreMLError(f"{folder} is {exported.format}, not {options.format}", "Say --coreml or --coreai.")
    verification = _Verification(exported, options)
    checks = list[Check]()
    try:
        for check in verification.run():
            checks.append(check)
            if progress:
                progress(len(checks), max(verification.total, len(checks)))
    except (BankError, CoreAIError, CoreMLError) as error:
        checks.append(Check("files", error.what, "can be used", False))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    receipt = VerifyReceipt(exported.manifest["name"], date, tool_versions(), verification.source, tuple(checks))
    file = folder / RECEIPT
    made = read_json(file) if file.is_file() else {}
    write_receipt(file, made | {"verification": receipt.to_json()})
    return receipt


class _Verification:
    """The checks, one after another; what was changed is not run."""

    def __init__(self, exported: Exported, options: Options) -> None:
        self.exported, self.options = exported, options
        self.source: dict[str, Any] = {"against": options.against or ""}
        self.total = 2

    def run(self) -> Iterator[Check]:
        exported, options = self.exported, self.options
        for check in (check_files, check_interfaces):
            found = check(exported)
            yield found
            if not found.passed:
                return
        reference = self.open_reference()
        if exported.retriever:
            yield from check_retriever(exported)
        yield from check_texts(exported, reference, options.prompts)
        if reference and options.text:
            yield check_choices(exported, reference, options.text)

    def open_reference(self) -> Reference | None:
        exported, against = self.exported, self.options.against
        reference = open_reference(against, exported.bank) if against else None
        self.source = {"by": exported.program.name, "against": reference.name if reference else ""}
        rounds = 1 + len(exported.memories())
        self.total = 4 + 2 * bool(exported.retriever) + (4 if reference else 2) * rounds + bool(self.options.text)
        return reference


def check_files(exported: Exported) -> Check:
    """Sizes and digests, against the manifest."""
    files = exported.manifest["files"]
    wrong = [what for name, row in files.items() if (what := _changed(exported.folder / name, row, name))]
    figure = ", ".join(wrong[:4]) if wrong else f"{len(files)} files"
    return Check("digests", figure, "all equal", not wrong, {"wrong": wrong})


def _changed(file: pathlib.Path, row: dict[str, Any], name: str) -> str:
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != row["bytes"]:
        return f"{name} has {size} of {row['bytes']} bytes"
    return "" if file_digest(file) == row["sha256"] else f"{name} was changed"


def check_retriever(exported: Exported) -> Iterator[Check]:
    """Vectors against those of the embedder in MLX, on sentences of every length; and where the tree sends them."""
    described, folder = exported.retriever, exported.folder
    program = exported.open(described["package"])
    tokenizer = Tokenizer.from_file(str(folder / described["tokenizer"]))
    embedder = Embedder.load()
    sentences = [text.replace("|", "") for text in TEXTS]
    sentences += [" ".join(sentences[:count]) for count in (2, 5, 20)]
    expected = np.concatenate(
        [embedder.embed([text]) for text in sentences]
    )  # together they were all of one length
    found = np.stack([_embed(program, described, tokenizer.encode(text).ids) for text in sentences])
    lost = 1 - (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    figure = f"1 - cos {np.nan_to_num(lost, nan=np.inf).max():.1e} on {len(sentences)} texts"
    yield Check("retriever", figure, f"{COSINE:g}", bool((lost <= COSINE).all()), {"lost": lost.tolist()})
    if exported.bank:
        tree = exported.bank.tree
        same = sum(a.path == b.path for a, b in zip(tree.route(found), tree.route(expected), strict=True))
        passed = same >= ROUTES * len(sentences)
        yield Check("routes", f"{same} of {len(sentences)} the same", f"{ROUTES:.0%}", passed)


def _embed(program: Program, described: Mapping[str, Any], ids: list[int]) -> np.ndarray:
    """[dim] in float64, by the shortest call that has room."""
    length = next(length for length in described["lengths"] if length >= len(ids))
    functions = {tokens: name for name, tokens in described.get("functions", {}).items()}
    rows = np.zeros((2, 1, length), np.int32)
    rows[0, 0, : len(ids)], rows[1, 0, : len(ids)] = ids, 1
    given = {"input_ids": rows[0], "attention_mask": rows[1]}
    return program.run(functions.get(length, "main"), given)["embedding"][0].astype(np.float64)


# Whether what manifest.json tells the app is so


def check_interfaces(exported: Exported) -> Check:
    """Functions, shapes, types, states, memory and bank. The first contradiction is the figure, `details` has all.

    An app allocates by the manifest. Where a package differs, its first prediction fails on the phone, or worse,
    runs.
    """
    wrong = [
        *_functions(exported),
        *_sizes(exported),
        *_memory(exported),
        *_load_block(exported),
        *_retriever(exported),
    ]
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


def _load_block(exported: Exported) -> Iterator[str]:
    anchor, functions = exported.anchor, exported.program.functions
    if load := anchor["load_block"]:
        if load not in functions:
            yield f"there is no function {load}"
            return
        states, given = anchor["states"], {"shape": _given(exported), "dtype": "float16"}
        new = {f"new_{name}": given for name in MEMORY if name in states}
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
        if name not in MEMORY and row["shape"][-2] not in (anchor["context"], filled(anchor["context"], STEP)):
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
    shape, places = _given(exported), exported.anchor["inputs" if memory["mode"] == "input" else "states"]
    longer = [shape[0], *(filled(size, STEP) for size in shape[1:])]
    for name in MEMORY:
        found = places.get(name, {}).get("shape")
        if found != shape and (memory["mode"] == "input" or found != longer):
            yield f"the memory's {name} is {found}, expected is {shape}"


def _given(exported: Exported) -> list[int]:
    """The shape of a memory as an app gives it."""
    memory = exported.memory or {"layers": (), "units": 0, "hidden": 0}
    return [len(memory["layers"]), memory["units"], memory["hidden"]]


def _retriever(exported: Exported) -> Iterator[str]:
    described = exported.retriever
    if described is None:
        return
    functions = exported.open(described["package"]).functions
    if "functions" in described:  # one for each length
        for name, tokens in described["functions"].items():
            if name not in functions:
                yield f"the retriever has no function {name}"
                continue
            yield from _tensors(name, described["inputs"], functions[name].inputs, tokens)
            yield from _tensors(name, described["outputs"], functions[name].outputs)
        return
    function = functions.get("main")
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
