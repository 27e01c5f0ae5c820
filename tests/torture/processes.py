"""Processes that die, and disks that fill up, in the middle of every change to a bank.

    python tests/torture/processes.py --trials 200       # deaths and full disks, spread over the operations

A trial runs one operation in a process of its own that is killed (before a random change of the file system, or at
a random moment) or whose disk takes no more than a random number of bytes. Then a reader finds a bank that works,
with the old content or the new; a full disk was told of by an OutputError; and the same operation, run again, ends
with exactly the files that an undisturbed run makes, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import numpy as np  # noqa: E402
from tiny import CONFIG, make_bank, make_model  # noqa: E402
from torture.disk import fails, with_a_disk_that_fails  # noqa: E402

from mlx_hiermem.bank import commit, edit, merge, quantize  # noqa: E402
from mlx_hiermem.bank.bank import MemoryBank  # noqa: E402
from mlx_hiermem.bank.check import check  # noqa: E402
from mlx_hiermem.config import Path  # noqa: E402
from mlx_hiermem.errors import OutputError  # noqa: E402
from mlx_hiermem.learn.publish import forget  # noqa: E402
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSetWriter  # noqa: E402

DIED, FULL, FAILED = 9, 7, 1  # exit statuses of a trial's process
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")
LONGEST = 120.0  # seconds that an operation may take here


@dataclass(frozen=True)
class Operation:
    """`run` changes the folder `model` of a work folder, or writes `out` there."""

    name: str
    run: Callable[[pathlib.Path], object]
    makes: str = ""  # the folder that it writes, where it does not change the model


def _remove(work: pathlib.Path) -> None:
    tree = MemoryBank.open(work / "model/bank").tree
    edit.remove(work / "model/bank", [node for node in (Path((1,)), Path((2, 1))) if tree.has(node)])
    forget(work / "model/bank")


def _repeatable(run: Callable[[pathlib.Path], object]) -> Callable[[pathlib.Path], object]:
    """A change that may stand already, wholly or half carried out."""

    def again(work: pathlib.Path) -> None:
        with commit.editing(work / "model/bank"):
            pass
        run(work)

    return again


def _add(work: pathlib.Path) -> None:
    block, node = work / "model/bank/blocks/0/1.safetensors", Path((2, 0))
    centroid = np.ones(384, np.float32) / np.sqrt(384).astype(np.float32)
    edit.add(work / "model/bank", block, node, centroid=centroid, label="new", replacing=True)


def _block(work: pathlib.Path) -> None:
    edit.block(work / "model/bank", [Path((0,))], "parent")


def _merge(work: pathlib.Path) -> None:
    banks = MemoryBank.open(work / "model/bank"), MemoryBank.open(work / "other")
    merge.merge(*banks, work / "out", prefer="second", resume=True)


def _quantize(work: pathlib.Path) -> None:
    bank = MemoryBank.open(work / "model/bank")
    quantize.quantize(bank, work / "out", quantize.design(bank.config, [8, 4]), resume=True)


OPERATIONS = (
    Operation("remove", _repeatable(_remove)),
    Operation("add-block", _repeatable(_add)),
    Operation("block", _repeatable(_block)),
    Operation("merge", _merge, "out"),
    Operation("quantize", _quantize, "out"),
)


def make_start(work: pathlib.Path) -> None:
    make_model(work / "model", absent=("2.0",))
    make_bank(work / "other", work / "model/anchor", CONFIG, absent=("2.0",), seed=0)
    with TrainingSetWriter(work / "model/learning/examples") as out:
        for number in range(40):
            leaf = Path((number % 3, number % 2 or 1))
            out.add(TrainingExample(np.arange(number, number + 9, dtype=np.int32), np.arange(9) > 0), [leaf])


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file, without what a process that died had only begun to write."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    named = {file.relative_to(folder).as_posix(): file for file in files}
    return {
        name: file.read_bytes() for name, file in named.items() if ".partial" not in name and ".fewer" not in name
    }


def in_a_process(action: Callable[[], object], events: int = 0, room: int = -1, after: float = 0.0) -> int:
    """Its exit status: 0, DIED, FULL for an OutputError, FAILED for anything else. Dies before change `events`."""
    child = os.fork()
    if child == 0:
        left = [events]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(DIED)

        try:
            warnings.filterwarnings("ignore")
            if events:
                sys.addaudithook(count)
            if room >= 0:
                ctypes.CDLL(None).torture_full(ctypes.c_long(room))
            action()
            os._exit(0)
        except OutputError:
            os._exit(FULL)
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
        finally:  # this process is a copy: nothing above it may go on
            os._exit(FAILED)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    ends = time.monotonic() + LONGEST
    while time.monotonic() < ends:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return DIED if code == -signal.SIGKILL else code
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return FAILED


def judge(
    operation: Operation, work: pathlib.Path, code: int, start: dict[str, bytes], done: dict[str, bytes]
) -> str:
    """What is wrong after a trial; empty where all is well. Runs in a process of its own: it uses MLX."""
    if code not in (0, DIED, FULL):
        return f"exit status {code}"
    bank = MemoryBank.open(work / "model/bank")
    for route in bank.tree.route(np.random.default_rng(0).standard_normal((20, 384)), bank.policy.blocked):
        for node in bank.nodes_on(route.path):
            bank.read(node)
    half = commit.interrupted(bank.root) is not None
    now = contents(work)
    texts = {name for name in now if "learning/" in name or name.endswith("forget.json")}
    same = [
        {n: d for n, d in state.items() if n not in texts and "learning/" not in n} for state in (now, start, done)
    ]
    if not half and same[0] not in same[1:]:
        return f"neither the old files nor the new: {sorted(dict(same[0].items() ^ same[1].items()))[:6]}"
    if operation.makes and code == FULL and (work / operation.makes).exists():
        return "a folder that is not whole has its name"
    if not (operation.makes and (work / operation.makes).exists()):  # else it stands, and is not written over
        operation.run(work)
    if contents(work) != done:
        return f"the second run ends otherwise: {sorted(dict(contents(work).items() ^ done.items()))[:6]}"
    if left := [file for file in work.rglob("*") if ".partial" in file.name or ".fewer" in file.name]:
        return f"left lying about: {left[0].name}"
    problems = list(check(MemoryBank.open(work / operation.makes if operation.makes else bank.root)))
    return "; ".join(problems)


def judged(*arguments: Any) -> str:
    """`judge` in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = judge(*arguments)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    return said if status == 0 else f"the check ended with {status}"


def trial(
    operation: Operation, start: pathlib.Path, done: dict[str, bytes], rng: random.Random, seconds: float
) -> str:
    """Runs one; what was done to it, and what is wrong then."""
    with tempfile.TemporaryDirectory(dir=start.parent) as folder:
        work = pathlib.Path(shutil.copytree(start, pathlib.Path(folder) / "work"))
        how = rng.choice(("change", "moment", "full"))
        if how == "full" and not fails():
            how = "change"
        match how:
            case "change":
                code = in_a_process(lambda: operation.run(work), events=int(2 ** rng.uniform(0, 5.5)))
            case "moment":
                code = in_a_process(lambda: operation.run(work), after=rng.uniform(0.001, seconds))
            case _:
                code = in_a_process(lambda: operation.run(work), room=int(2 ** rng.uniform(0, 16)))
        wrong = judged(operation, work, code, contents(start), done)
    what = {0: "ended first", DIED: f"died ({how})", FULL: "disk full"}.get(code, "failed")
    return f"{what}|{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON")
    asked = parser.parse_args()
    with_a_disk_that_fails()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    rng, figures, failed = random.Random(asked.seed), dict[str, Any](), 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        start = pathlib.Path(folder) / "start"
        start.mkdir()
        assert in_a_process(lambda: make_start(start)) == 0, "the start cannot be made"
        for operation in OPERATIONS:
            work = pathlib.Path(shutil.copytree(start, pathlib.Path(folder) / operation.name))
            begun = time.monotonic()
            assert in_a_process(lambda work=work, run=operation.run: run(work)) == 0, f"{operation.name} fails"
            seconds, done, counts = time.monotonic() - begun, contents(work), Counter[str]()
            wrong = list[str]()
            for _ in range(max(1, asked.trials // len(OPERATIONS))):
                what, _, said = trial(operation, start, done, rng, seconds).partition("|")
                counts[what] += 1
                wrong += [f"{what}: {said}"] if said else []
            figures[operation.name] = {"trials": counts.total(), "counts": dict(counts), "wrong": wrong}
            failed += len(wrong)
            print(f"{operation.name:10} {dict(counts)}, wrong: {len(wrong)}", *wrong[:5], sep="\n    ", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(figures | {"seed": asked.seed}, indent=1, sort_keys=True) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
