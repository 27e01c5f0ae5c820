"""Hostile files by the thousand: each reader in processes of its own, watched from outside.

    python tests/torture/fuzz.py --inputs 10000            # all readers, spread over them
    python tests/torture/fuzz.py --inputs 500 --only gguf --seed 7
    python tests/torture/fuzz.py --guided manifest --seconds 60      # coverage-guided (pip install -e '.[fuzz]')

An input fails where the reader raises anything but a HierMemError, takes more than SECONDS of the processor (those
of the clock on a quiet machine), makes the process grow by more than GROWTH bytes and four times the file, or ends
the process. Failures are kept in tests/torture/seeds/, from where tests/test_torture.py reads them for good.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parents[1])]

from torture.mutate import mutated  # noqa: E402
from torture.readers import BY_NAME, READERS, Reader  # noqa: E402

from mlx_hiermem.errors import HierMemError  # noqa: E402

SEEDS = pathlib.Path(__file__).parent / "seeds"
SECONDS = 2.0
GROWTH = 256 << 20  # bytes, beside four times the file
STUCK = 60.0  # seconds of the clock after which the process itself is ended
MAKING = 300.0  # seconds that making the good file may take besides
SAVED = 5.0  # seconds between two looks at a process
WORDS = ("read", "refused", "failed")
CONTEXT = multiprocessing.get_context("fork")  # all is imported once, and MLX has not been used yet


class TooLongError(Exception):
    """Raised inside a reader that takes too long."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLongError

    old = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def verdict(reader: Reader, file: pathlib.Path, seconds: float = SECONDS) -> str:
    """What became of one input: `read`, `refused`, or what is wrong with that."""
    size = file.stat().st_size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    try:
        with at_most(seconds):
            reader.read(file)
        found = "read"
    except HierMemError as error:
        found = "refused" if str(error).strip() else "failed: an error without words"
    except TooLongError:
        found = f"failed: more than {seconds:g} s"
    except (Exception, RecursionError, MemoryError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        found = f"failed: {type(error).__name__} at {pathlib.Path(place.filename).name}:{place.name}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if grown > GROWTH + 4 * size:
        return f"failed: {grown >> 20} MB more memory for {size} bytes"
    return found


def input_of(reader: Reader, good: bytes, seed: str) -> bytes:
    return mutated(good, reader.kind, random.Random(seed))


class Progress:
    """What a process that reads inputs is at, in memory that is still there when it has died."""

    def __init__(self) -> None:
        self.numbers = CONTEXT.RawArray("q", 1 + len(WORDS))  # the input that is read, and how many were so far
        self.times = CONTEXT.RawArray("d", 3)  # when it was begun, by two clocks; the longest time

    def begin(self, number: int) -> None:
        self.times[:2] = [time.monotonic(), time.process_time()]
        self.numbers[0] = number

    def end(self, word: str) -> None:
        self.numbers[1 + WORDS.index(word)] += 1
        self.times[2] = max(self.times[2], time.process_time() - self.times[1])

    @property
    def number(self) -> int:
        return int(self.numbers[0])

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(WORDS, self.numbers[1:], strict=True))


def work(reader: Reader, first: int, count: int, seed: int, progress: Progress, failures: Any) -> None:
    """Reads inputs `first` to `count` of a reader, in a process of its own."""
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        file = reader.make(pathlib.Path(folder))
        good = file.read_bytes()
        if (found := verdict(reader, file, 60.0)) != "read":
            failures.send((-1, f"the good file: {found}"))
        for number in range(first, count):
            data = input_of(reader, good, f"{seed} {reader.name} {number}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            progress.begin(number)
            found = verdict(reader, file)
            progress.end(found.split(":")[0])
            if found.startswith("failed"):
                failures.send((number, found))
    progress.begin(count)


Row = dict[str, Any]


def campaign(reader: Reader, count: int, row: Row, save: Callable[[Row], None]) -> Row:
    """Goes on to `count` inputs of a reader, in one process as long as that lives. Saves the row now and then."""
    while row["inputs"] < count:
        progress, (ours, theirs) = Progress(), CONTEXT.Pipe(duplex=False)
        progress.begin(row["inputs"])
        arguments = (reader, row["inputs"], count, row["seed"], progress, theirs)
        process = CONTEXT.Process(target=work, args=arguments)
        process.start()
        theirs.close()
        before, why = row, ""
        while not why:
            why = watch(process, progress)
            while ours.poll():
                try:
                    number, what = ours.recv()
                except EOFError:
                    break
                before["failures"].setdefault(what, number)
            save(row := _together(before, progress))
        if progress.number < count:
            row["counts"]["failed"] += 1
            row["inputs"] += 1
            row["failures"].setdefault(f"failed: {why}", progress.number)
    return row


def _together(before: Row, progress: Progress) -> Row:
    """A reader's row, and what has been read since."""
    counts = {word: before["counts"][word] + more for word, more in progress.counts.items()}
    slowest = max(before["slowest"], progress.times[2])
    return before | {"counts": counts, "slowest": slowest, "inputs": progress.number}


def watch(process: Any, progress: Progress) -> str:
    """Waits a while; why the process has ended, empty where it goes on."""
    process.join(SAVED)
    if process.exitcode is not None:
        return f"the process ended with {process.exitcode}"
    if time.monotonic() - progress.times[0] < STUCK + (MAKING if not sum(progress.numbers[1:]) else 0):
        return ""
    process.kill()
    process.join()
    return f"the process hung for more than {STUCK:g} s"


def keep(reader: Reader, number: int, seed: int) -> None:
    """Writes an input into the repository's seeds, and says where."""
    with tempfile.TemporaryDirectory() as folder:
        good = reader.make(pathlib.Path(folder)).read_bytes()
    keep_bytes(reader.name, input_of(reader, good, f"{seed} {reader.name} {number}"))


def keep_bytes(name: str, data: bytes) -> None:
    file = SEEDS / name / hashlib.sha256(data).hexdigest()[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    print(f"    kept as {file.relative_to(SEEDS.parent)}", flush=True)


def guided(reader: Reader, seconds: int) -> None:
    """libFuzzer over the reader's own Python code, from its good file and its seeds. Does not return."""
    import atheris

    folder = pathlib.Path(tempfile.mkdtemp(prefix="torture-"))
    file = reader.make(folder)
    inputs = folder / "corpus"
    inputs.mkdir()
    (inputs / "good").write_bytes(file.read_bytes())
    for number, seed in enumerate(sorted((SEEDS / reader.name).glob("*"))):
        (inputs / str(number)).write_bytes(seed.read_bytes())
    rng = random.Random(0)
    for number in range(100):
        (inputs / f"m{number}").write_bytes(mutated(file.read_bytes(), reader.kind, rng))

    def one(data: bytes) -> None:
        file.write_bytes(data)
        if (found := verdict(reader, file)).startswith("failed"):
            raise RuntimeError(found)

    ours = [one for one in gc.get_objects() if isinstance(one, types.FunctionType)]
    for function in ours:  # all that is loaded would take minutes
        if (function.__module__ or "").startswith("mlx_hiermem") or function.__module__ == "json.decoder":
            atheris.instrument_func(function)
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=20", str(inputs)], one
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(BY_NAME))
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON, from which a campaign goes on")
    parser.add_argument("--guided", choices=sorted(BY_NAME))
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    if asked.guided:
        guided(BY_NAME[asked.guided], asked.seconds)
    readers = [reader for reader in READERS if not asked.only or reader.name in asked.only]
    whole = sum(reader.speed for reader in readers)
    failed = [_run(reader, max(1, round(asked.inputs * reader.speed / whole)), asked) for reader in readers]
    sys.exit(1 if any(failed) else 0)


def _run(reader: Reader, count: int, asked: argparse.Namespace) -> int:
    """One reader's inputs, from where an earlier campaign of this seed stopped; returns how many failed."""
    rows = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else {}
    row = rows.get(reader.name, {})
    if row.get("seed") != asked.seed:
        row = {"counts": dict.fromkeys(WORDS, 0), "failures": {}, "slowest": 0.0, "inputs": 0, "seed": asked.seed}

    def save(row: Row) -> None:
        if asked.out:
            asked.out.write_text(json.dumps(rows | {reader.name: row}, indent=1, sort_keys=True) + "\n")

    save(row := campaign(reader, count, row, save))
    print(f"{reader.name:16} {row['counts']}, slowest {row['slowest']:.2f} s", flush=True)
    for what, number in row["failures"].items():
        print(f"    {what}", flush=True)
        if number >= 0:  # in a process of its own: a copy of one that has used MLX could hang
            process = CONTEXT.Process(target=keep, args=(reader, number, asked.seed))
            process.start()
            process.join()
    return len(row["failures"])


if __name__ == "__main__":
    main()
