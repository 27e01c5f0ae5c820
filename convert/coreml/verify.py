"""`hiermem verify OUT --coreml`: runs an exported folder as an app would, and holds it to its source.

By the interpreter, or on a Mac by Core ML itself; the report is the same. Without the source it can still tell
whether the files are those exported, memories come and go without a trace, and both functions agree.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.bank.bank import file_digest
from mlx_hiermem.convert.checks import Check
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.exported import Exported
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.prompts import TEXTS
from mlx_hiermem.convert.coreml.references import Reference, open_reference
from mlx_hiermem.convert.coreml.text_checks import check_texts
from mlx_hiermem.convert.source import tool_versions
from mlx_hiermem.convert.verify import RECEIPT, Progress, Receipt, write_json
from mlx_hiermem.embedder import Embedder

COSINE = 2e-6  # 1 - cos; rounding the weights to float16 alone makes 5e-7


def verify_export(
    folder: pathlib.Path, against: str | None = None, *, count: int = 4, progress: Progress | None = None
) -> Receipt:
    """Checks an exported folder on the first `count` prompts, and adds what it found to its receipt.json.

    `against` is the model folder it was exported from, or the source of that. Raises a HierMemError where there is
    nothing to check or to compare with.
    """
    exported = Exported(folder)
    reference = open_reference(against, exported.bank) if against else None
    checks = list[Check]()
    total = 3 + 2 * len(exported.memories()) + bool(exported.manifest.get("retriever")) * 2
    for check in _checks(exported, reference, count):
        checks.append(check)
        if progress:
            progress(min(len(checks), total), total)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    source = {"by": exported.program.name, "against": reference.name if reference else ""}
    receipt = Receipt(exported.manifest["name"], date, tool_versions(), source, tuple(checks))
    file = folder / RECEIPT
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    write_json(file, made | {"verification": receipt.to_json()})
    return receipt


def _checks(exported: Exported, reference: Reference | None, count: int) -> Iterator[Check]:
    yield check_files(exported)
    yield check_interfaces(exported)
    yield from check_texts(exported, reference, count)
    if exported.manifest.get("retriever"):
        yield from check_retriever(exported)


def check_files(exported: Exported) -> Check:
    """Sizes and digests, against the manifest."""
    files = exported.manifest["files"]
    wrong = [name for name, row in files.items() if not _unchanged(exported.folder / name, row)]
    figure = f"{', '.join(wrong[:4])} changed" if wrong else f"{len(files)} files"
    return Check("digests", figure, "all equal", not wrong, {"changed": wrong})


def _unchanged(file: pathlib.Path, row: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == row["bytes"] and file_digest(file) == row["sha256"]


def check_interfaces(exported: Exported) -> Check:
    """What the manifest says of inputs, outputs and states, against the package."""
    wrong = []
    for function, tokens in exported.anchor["functions"].items():
        found = exported.program.functions.get(function)
        for role in ("inputs", "outputs", "states"):
            told = {
                name: (tuple(tokens if size == -1 else size for size in row["shape"]), row["dtype"])
                for name, row in exported.anchor[role].items()
            }
            if found is None or told != {
                name: (spec.shape, spec.dtype) for name, spec in getattr(found, role).items()
            }:
                wrong.append(f"{role} of {function}")
    figure = f"other {', '.join(wrong)}" if wrong else f"{len(exported.program.functions)} functions"
    return Check("interfaces", figure, "as in the manifest", not wrong)


def check_retriever(exported: Exported) -> Iterator[Check]:
    """Vectors against those of the embedder in MLX, on sentences of every length; and where the tree sends them."""
    described, folder = exported.manifest["retriever"], exported.folder
    program, tokenizer = (
        open_package(folder / described["package"]),
        Tokenizer.from_file(str(folder / described["tokenizer"])),
    )
    embedder = Embedder.load()
    sentences = [text.replace("|", "") for text in TEXTS]
    sentences += [" ".join(sentences[:count]) for count in (2, 5, 20)]
    expected = embedder.embed(sentences)
    found = np.stack([_embed(program, described["lengths"], tokenizer.encode(text).ids) for text in sentences])
    lost = 1 - (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    figure = f"1 - cos {np.nan_to_num(lost, nan=np.inf).max():.1e} on {len(sentences)} texts"
    yield Check("retriever", figure, f"{COSINE:g}", bool((lost <= COSINE).all()), {"lost": lost.tolist()})
    if exported.bank:
        tree = exported.bank.tree
        same = sum(a.path == b.path for a, b in zip(tree.route(found), tree.route(expected), strict=True))
        yield Check("routes", f"{same} of {len(sentences)} the same", "all", same == len(sentences))


def _embed(program: Program, lengths: list[int], ids: list[int]) -> np.ndarray:
    """[dim] in float64, by the shortest call that has room."""
    length = next(length for length in lengths if length >= len(ids))
    rows = np.zeros((2, 1, length), np.int32)
    rows[0, 0, : len(ids)], rows[1, 0, : len(ids)] = ids, 1
    return program.run("main", {"input_ids": rows[0], "attention_mask": rows[1]})["embedding"][0].astype(np.float64)
