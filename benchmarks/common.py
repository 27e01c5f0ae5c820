"""What the measurements share: the machine's description, turns, medians with spread, page cache, results.

A script makes its options with `options`, measures its sides in turns (`turns`), and ends with `save`. With
`--quick` it measures in little, and its results go to `results/quick/`, which is in no commit.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlx_hiermem import cpu

cpu.enable(lambda line: print(line, file=sys.stderr))  # so `import common` comes before MLX

RESULTS = pathlib.Path(__file__).parent / "results"
sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))  # where `elements` is


def options(doc: str | None, runs: int, quick: int = 3) -> argparse.ArgumentParser:
    """A parser with --runs and --quick; see `parsed`. `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--runs", type=int, help=f"rounds of turns; default {runs}, quick {quick}")
    parser.add_argument("--quick", action="store_true", help="a small measurement, not kept")
    parser.set_defaults(default_runs=(runs, quick))
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the number of runs settled."""
    found = parser.parse_args()
    found.runs = found.runs or found.default_runs[found.quick]
    return found


def machine() -> dict[str, Any]:
    """What was measured on. No host name, no path."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    cpu, memory = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if cpu.exists():
        names = [
            line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        info["cpu"] = names[0] if names else ""
    if memory.exists():
        info["memory_gib"] = round(int(memory.read_text().split("MemTotal:")[1].split()[0]) / (1 << 20))
    for package in ("mlx", "mlx-lm"):
        info[package] = _version(package)
    return info


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, smallest, largest, and the values themselves."""
    found = list(values)
    return {"median": statistics.median(found), "low": min(found), "high": max(found), "values": found}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Spread of ours / theirs, pair by pair: both of a pair were measured right after each other."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def turns(
    sides: Mapping[str, Callable[[], Any]], runs: int, prepare: Callable[[], Any] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Calls the sides in turns, `runs` times after a first round that does not count.

    Returns side -> {"wall": seconds of each call, "cpu": CPU seconds of the process}. `prepare` comes before each.
    The order alternates, so that no side always comes after the same other one.
    """
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for run in range(runs + 1):
        for name in sides if run % 2 else reversed(sides):
            if prepare:
                prepare()
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            if run:
                found[name]["wall"].append(seconds[0])
                found[name]["cpu"].append(seconds[1])
    return found


def compared(times: Mapping[str, Mapping[str, Sequence[float]]], against: str) -> dict[str, Any]:
    """Of `turns`: each side's spread in milliseconds, and its ratio to one of them by wall clock and CPU time."""
    return {
        name: {
            "wall_ms": spread(1e3 * value for value in side["wall"]),
            "cpu_ms": spread(1e3 * value for value in side["cpu"]),
            "wall_ratio": ratios(side["wall"], times[against]["wall"]),
            # The clock of CPU time has steps of a few microseconds; a read may take none.
            "cpu_ratio": ratios([c or 1e-9 for c in side["cpu"]], [c or 1e-9 for c in times[against]["cpu"]]),
        }
        for name, side in times.items()
    }


def drop(files: Iterable[pathlib.Path]) -> None:
    """Puts files out of the page cache, which Linux does on request for what is on the disk already."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring(files: Iterable[pathlib.Path]) -> None:
    """Puts files into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def child(script: str, *arguments: str) -> Any:
    """A process of its own; returns the JSON of its last line."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(script: str, result: Mapping[str, Any], asked: argparse.Namespace, before: float) -> None:
    """Writes results/NAME.json; `before` is the machine's load when the measurement began."""
    folder = RESULTS / "quick" if asked.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    load = {"before": before, "after": os.getloadavg()[0]}
    data = {"machine": machine(), "load": load, "runs": asked.runs, **result}
    file = folder / f"{pathlib.Path(script).stem}.json"
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints Markdown."""
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def around(values: Mapping[str, Any], digits: int = 2) -> str:
    """A spread in a cell: `1.03 (0.98–1.10)`."""
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f}–{values['high']:.{digits}f})"
