"""`hiermem verify OUT --coreml`: runs an exported folder as an app would, and holds it to its source.

By the interpreter, or on a Mac by Core ML itself; the report is the same. Without the source it can still tell
whether the files are those exported, memories come and go without a trace, and both functions agree.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.convert.checks import Check
from mlx_hiermem.convert.coreml.device import open_package
from mlx_hiermem.convert.coreml.exported import Exported
from mlx_hiermem.convert.coreml.interfaces import check_interfaces
from mlx_hiermem.convert.coreml.interpreter import Program
from mlx_hiermem.convert.coreml.prompts import TEXTS
from mlx_hiermem.convert.coreml.references import Reference, open_reference
from mlx_hiermem.convert.coreml.text_checks import check_choices, check_texts
from mlx_hiermem.convert.source import tool_versions
from mlx_hiermem.convert.verify import RECEIPT, Receipt, write_receipt
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import BankError, CoreMLError
from mlx_hiermem.files import file_digest, read_json
from mlx_hiermem.progress import Progress

COSINE = 2e-6  # 1 - cos; rounding the weights to float16 alone makes 5e-7
ROUTES = 0.9  # share of texts that go the same way; one that lies between two clusters may go either
PROMPTS = 4  # of twenty


@dataclass(frozen=True)
class Options:
    """`against`: the model folder that was exported, or its source. `text`: a file for `check_choices`."""

    against: str | None = None
    prompts: int = PROMPTS
    text: pathlib.Path | None = None


def verify_export(folder: pathlib.Path, options: Options, progress: Progress | None = None) -> Receipt:
    """Checks an exported folder, and adds what it found to its receipt.json.

    Raises a HierMemError where there is nothing to check or to compare with; what is wrong with the folder's own
    files fails a check.
    """
    if options.text and not options.against:
        raise CoreMLError(f"{options.text} needs a model to compare with", "Name it with --against.")
    exported = Exported(folder)
    verification = _Verification(exported, options)
    checks = list[Check]()
    try:
        for check in verification.run():
            checks.append(check)
            if progress:
                progress(len(checks), max(verification.total, len(checks)))
    except (BankError, CoreMLError) as error:
        checks.append(Check("files", error.what, "can be used", False))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    receipt = Receipt(exported.manifest["name"], date, tool_versions(), verification.source, tuple(checks))
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
    program = open_package(folder / described["package"])
    tokenizer = Tokenizer.from_file(str(folder / described["tokenizer"]))
    embedder = Embedder.load()
    sentences = [text.replace("|", "") for text in TEXTS]
    sentences += [" ".join(sentences[:count]) for count in (2, 5, 20)]
    expected = np.concatenate(
        [embedder.embed([text]) for text in sentences]
    )  # together they were all of one length
    found = np.stack([_embed(program, described["lengths"], tokenizer.encode(text).ids) for text in sentences])
    lost = 1 - (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    figure = f"1 - cos {np.nan_to_num(lost, nan=np.inf).max():.1e} on {len(sentences)} texts"
    yield Check("retriever", figure, f"{COSINE:g}", bool((lost <= COSINE).all()), {"lost": lost.tolist()})
    if exported.bank:
        tree = exported.bank.tree
        same = sum(a.path == b.path for a, b in zip(tree.route(found), tree.route(expected), strict=True))
        passed = same >= ROUTES * len(sentences)
        yield Check("routes", f"{same} of {len(sentences)} the same", f"{ROUTES:.0%}", passed)


def _embed(program: Program, lengths: list[int], ids: list[int]) -> np.ndarray:
    """[dim] in float64, by the shortest call that has room."""
    length = next(length for length in lengths if length >= len(ids))
    rows = np.zeros((2, 1, length), np.int32)
    rows[0, 0, : len(ids)], rows[1, 0, : len(ids)] = ids, 1
    return program.run("main", {"input_ids": rows[0], "attention_mask": rows[1]})["embedding"][0].astype(np.float64)
