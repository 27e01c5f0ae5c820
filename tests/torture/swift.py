"""The Swift readers with hostile files: made here, read by HostileFilesTests.swift, judged here.

    make test-swift                                        # builds the tests, and reads a few thousand of them
    python tests/torture/swift.py --inputs 100000 --out benchmarks/results/fuzz_swift.json
    python tests/torture/swift.py --inputs 3000 --write    # writes the files for `swift test`, no more

What Swift reads too is changed as for Python, from the same good file and the same seed. Swift says of each input
whether it was read or refused, one byte each; an input behind which there is no byte has ended the process. Such
inputs are kept in tests/torture/seeds/, from where both languages read them for good.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from torture.fuzz import GROWTH, SECONDS, SEEDS, keep_bytes  # noqa: E402
from torture.mutate import mutated  # noqa: E402
from torture.readers import BY_NAME  # noqa: E402

ROOT = HERE.parents[1]
FOLDER = ROOT / "build/swift/hostile"
FIXTURES = ROOT / "apps/ios/HierMemKit/Tests/HierMemKitTests/Fixtures"
PROGRAM = ("apps/ios/swift.sh", ".build/debug/HierMemKitPackageTests.xctest", "--testing-library", "swift-testing")
BATCH = 5000
STUCK = 60.0  # seconds without another input, after which the process is ended
PATIENT = 5  # how much more of everything is allowed beside other tests
SAID = {"r": "read", "u": "refused", "s": "slow", "m": "memory", "e": "untyped", "c": "crashed", "h": "hung"}


@dataclass(frozen=True)
class Case:
    """A file that Swift reads. `reader` is Swift's word for how; `file` lies below the folder that it is given."""

    name: str  # Python's reader of the same file, where there is one
    reader: str
    file: str
    kind: str = "header"

    def make(self, folder: pathlib.Path) -> None:
        """The good files."""
        if self.reader == "tokenizer":
            shutil.copytree(FIXTURES / "inputs" / self.name.removeprefix("tokenizer-"), folder)
        else:
            with tempfile.TemporaryDirectory() as made:
                file = BY_NAME[self.name].make(pathlib.Path(made))
                if self.reader == "bank" and self.name == "policy":
                    bank = BY_NAME["manifest"].make(pathlib.Path(made) / "more").parent
                    file = pathlib.Path(shutil.copy(file, bank))
                shutil.copytree(file.parents[self.file.count("/")], folder)
        if self.reader == "export":
            shutil.copytree(FIXTURES / "inputs/digits", folder / "tokenizer")
            shutil.copytree(FIXTURES / "inputs/wordpiece", folder / "retriever")


CASES = (
    Case("manifest", "bank", "bank.json", "json"),
    Case("tree", "bank", "tree.safetensors"),
    Case("block", "bank", "blocks/1/0.safetensors"),
    Case("quantized", "bank", "blocks/1/0.safetensors"),
    Case("generic", "bank", "generic.safetensors"),
    Case("sources-index", "bank", "sources/index.safetensors"),
    Case("sources-texts", "bank", "sources/windows.jsonl", "lines"),
    Case("policy", "bank", "policy.json", "json"),
    Case("export", "export", "manifest.json", "json"),
    Case("tokenizer-digits", "tokenizer", "tokenizer.json", "json"),
    Case("tokenizer-split", "tokenizer", "tokenizer.json", "json"),
    Case("tokenizer-wordpiece", "tokenizer", "tokenizer.json", "json"),
)


class Inputs:
    """The inputs of one case: the seeds first, then changed copies of the good file."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed, self.folder = case, seed, FOLDER / case.name
        if self.folder.exists():
            shutil.rmtree(self.folder)
        case.make(self.folder)
        self.good = (self.folder / case.file).read_bytes()
        self.kept = [file.read_bytes() for file in sorted((SEEDS / case.name).glob("*"))]
        self.kind = BY_NAME[case.name].kind if case.name in BY_NAME else case.kind

    def __getitem__(self, number: int) -> bytes:
        """The good file itself, then what has ever failed, then what Python's campaign of this seed reads."""
        if number < 1 + len(self.kept):
            return [self.good, *self.kept][number]
        number -= 1 + len(self.kept)
        return mutated(self.good, self.kind, random.Random(f"{self.seed} {self.case.name} {number}"))

    def write(self, first: int, count: int) -> None:
        with (FOLDER / f"{self.case.name}.inputs").open("wb") as file:
            for number in range(first, first + count):
                data = self[number]
                file.write(struct.pack("<I", len(data)) + data)
        self.found.unlink(missing_ok=True)

    @property
    def found(self) -> pathlib.Path:
        return FOLDER / f"{self.case.name}.found"


def write_cases(cases: list[Case], patience: float) -> None:
    rows = [{"name": case.name, "reader": case.reader, "file": case.file} for case in cases]
    limits = {"seconds": SECONDS * patience, "growth": int(GROWTH * patience)}
    (FOLDER / "cases.json").write_text(json.dumps({"cases": rows, "limits": limits}, indent=1) + "\n")


def run() -> None:
    """Has Swift read what has not been read of the batch, again behind each input that ends it."""
    command = [str(ROOT / PROGRAM[0]), *PROGRAM[1:], "--filter", "HostileFilesTests"]
    log = (FOLDER / "log.txt").open("wb")
    assert (ROOT / PROGRAM[1]).exists(), "build it first: make test-swift"
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    before, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        done = sum(file.stat().st_size for file in FOLDER.glob("*.found"))
        if done != before:
            before, since = done, time.monotonic()
        if time.monotonic() - since > STUCK:
            process.terminate()
            process.wait()


def batch(inputs: Inputs, first: int, count: int) -> str:
    """One byte for each of these inputs."""
    write_cases([inputs.case], 1)
    inputs.write(first, count)
    inputs.found.write_bytes(b"")
    while inputs.found.stat().st_size < count:
        run()
        if first == inputs.found.stat().st_size == 0:  # not even the good file
            sys.exit((FOLDER / "log.txt").read_text(errors="replace")[-2000:])
        if inputs.found.stat().st_size < count:
            with inputs.found.open("ab") as file:
                file.write(b"c")
    return inputs.found.read_text()


def campaign(case: Case, count: int, seed: int, out: pathlib.Path | None) -> int:
    """A case's inputs, from where an earlier campaign of this seed stopped; returns how many failed."""
    inputs, rows = Inputs(case, seed), json.loads(out.read_text()) if out and out.exists() else {}
    row: dict[str, Any] = rows.get(case.name, {})
    if row.get("seed") != seed:
        row = {"seed": seed, "inputs": 0, "counts": {}, "failures": {}}
    while row["inputs"] < count:
        first = row["inputs"]
        said = batch(inputs, first, min(BATCH, count - first))
        row["counts"] = dict(Counter(row["counts"]) + Counter(SAID[letter] for letter in said))
        row["inputs"] += len(said)
        for number, letter in enumerate(said, first):
            if letter not in "ru":
                row["failures"].setdefault(SAID[letter], []).append(number)
                keep_bytes(case.name, inputs[number])
        if out:
            out.write_text(json.dumps(rows | {case.name: row}, indent=1, sort_keys=True) + "\n")
    print(f"{case.name:20} {row['counts']}", *row["failures"].items(), sep="\n    ", flush=True)
    return sum(map(len, row["failures"].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON, from which a campaign goes on")
    parser.add_argument("--write", action="store_true", help="write the inputs and read none")
    asked = parser.parse_args()
    cases = [case for case in CASES if not asked.only or case.name in asked.only]
    each = asked.inputs // len(cases)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if asked.write:
        for case in cases:
            Inputs(case, asked.seed).write(0, each)
        write_cases(cases, PATIENT)
        return
    sys.exit(1 if sum(campaign(case, each, asked.seed, asked.out) for case in cases) else 0)


if __name__ == "__main__":
    main()
