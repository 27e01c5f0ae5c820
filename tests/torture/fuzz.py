"""Hostile files by the thousand: each reader in processes of its own, watched from outside.

    python tests/torture/fuzz.py --inputs 10000            # all readers, spread over them
    python tests/torture/fuzz.py --inputs 500 --only gguf --seed 7
    python tests/torture/fuzz.py --guided manifest --seconds 60      # coverage-guided (pip install -e '.[fuzz]')

An input fails where the reader raises anything but a HierMemError, takes more than SECONDS, makes the process grow
by more than GROWTH bytes and four times the file, or ends the process. Failures are kept in tests/torture/seeds/,
from where tests/test_torture.py reads them for good.
"""

from __future__ import annotations

import argparse
import contextlib
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
STUCK = 20.0  # seconds after which the process itself is ended


class TooLongError(Exception):
    """Raised inside a reader that takes too long."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TooLongError

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


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


Place = tuple[str, int]  # a reader, and the number of an input


def work(counts: list[tuple[str, int, int]], seed: int, results: Any) -> None:
    """Reads inputs `first` to `count` of each reader. Says which it is at, for whoever watches."""
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for name, first, count in counts:
        reader = BY_NAME[name]
        results.send((name, -1, None))
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            try:
                file = reader.make(pathlib.Path(folder))
            except Exception as error:
                results.send((name, -1, f"failed: making it raises {type(error).__name__}: {error}"))
                continue
            good = file.read_bytes()
            results.send((name, -1, verdict(reader, file, 60.0)))
            for number in range(first, count):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(input_of(reader, good, f"{seed} {name} {number}"))
                results.send((name, number, None))
                results.send((name, number, verdict(reader, file)))
    results.send(("", 0, "done"))


def campaign(wanted: dict[str, int], seed: int, tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Reads so many inputs of each reader, all in one process as long as that lives; tells what became of each."""
    rest = [(name, 0, count) for name, count in wanted.items()]
    context = multiprocessing.get_context("spawn")
    row: dict[str, Any] = {}
    while rest:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(rest, seed, theirs))
        process.start()
        theirs.close()
        for name, number, what, took in watch(ours, process):
            if what == "done":
                break
            if name and name != rest[0][0]:  # the next reader has begun
                tell(rest.pop(0)[0], row)
                row = {}
            if not row:
                row = {"counts": {}, "failures": {}, "slowest": 0.0, "inputs": rest[0][2], "seed": seed}
            if number >= 0:
                word = what.split(":")[0]
                row["counts"][word] = row["counts"].get(word, 0) + 1
                row["slowest"] = max(row["slowest"], took)
                rest[0] = (rest[0][0], number + 1, rest[0][2])
            if what.startswith("failed") or (number < 0 and what != "read"):
                row["failures"].setdefault(what if number >= 0 else f"the good file: {what}", number)
        process.join()
        if what == "done" or rest[0][1] >= rest[0][2] or number < 0:
            tell(rest.pop(0)[0], row)
            row = {}


def watch(ours: Any, process: Any) -> Iterator[tuple[str, int, str, float]]:
    """(reader, number, verdict, seconds) as the process tells them; without a reader where it was ended."""
    begun = time.monotonic()
    at: Place = ("", 0)
    while True:
        try:
            if not ours.poll(STUCK if at[0] else 300):
                process.kill()
                yield (*at, f"failed: the process hung for more than {STUCK:g} s", STUCK)
                return
            name, number, what = ours.recv()
        except EOFError:
            process.join()
            yield (*at, f"failed: the process ended with {process.exitcode}", time.monotonic() - begun)
            return
        at = (name, number)
        if what is None:
            begun = time.monotonic()
            continue
        yield name, number, what, time.monotonic() - begun
        if what == "done":
            return


def keep(reader: Reader, number: int, seed: int) -> pathlib.Path:
    """Writes an input into the repository's seeds."""
    with tempfile.TemporaryDirectory() as folder:
        good = reader.make(pathlib.Path(folder)).read_bytes()
    data = input_of(reader, good, f"{seed} {reader.name} {number}")
    file = SEEDS / reader.name / hashlib.sha256(data).hexdigest()[:12]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


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

    atheris.instrument_all()
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=20", str(inputs)], one
    )
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(BY_NAME))
    parser.add_argument("--out", type=pathlib.Path, help="figures as JSON; those of readers that are not run stay")
    parser.add_argument("--guided", choices=sorted(BY_NAME))
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    if asked.guided:
        guided(BY_NAME[asked.guided], asked.seconds)
    readers = [reader for reader in READERS if not asked.only or reader.name in asked.only]
    whole = sum(reader.weight for reader in readers)
    failed = list[str]()

    def tell(name: str, found: dict[str, Any]) -> None:
        print(f"{name:16} {found['counts']}, slowest {found['slowest']:.2f} s", flush=True)
        for what, number in found["failures"].items():
            failed.append(what)
            kept = f"kept as {keep(BY_NAME[name], number, asked.seed)}" if number >= 0 else ""
            print(f"    {what}\n    {kept}", flush=True)
        if asked.out:
            rows = json.loads(asked.out.read_text()) if asked.out.exists() else {}
            asked.out.write_text(json.dumps(rows | {name: found}, indent=1, sort_keys=True) + "\n")

    wanted = {reader.name: max(1, round(asked.inputs * reader.weight / whole)) for reader in readers}
    campaign(wanted, asked.seed, tell)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
