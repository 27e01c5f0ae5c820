"""From the command to the first token: `hiermem ask` against `mlx_lm.generate` on the same anchor.

    python benchmarks/start.py        # the elements' model; five minutes

Each run is a process of its own, files in the page cache. Wall clock: from the start to the first character of the
answer. CPU: of the whole process, which answers with one token. On Linux MLX's wheel has a slow BLAS, which
mlx_hiermem.cpu replaces; "with our BLAS" is mlx_lm with the same one, the peer to compare with.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import common
from elements.model import prepare

PROMPT = "The atomic number of neon is"
OURS = "from mlx_hiermem.apps.cli.main import main; main()"
PEER = "from mlx_lm.generate import main; main()"
BASE = "mlx_lm.generate, with our BLAS"  # the peer
RULE = b"==========\n"  # mlx_lm's, before the answer


def commands(model: pathlib.Path) -> dict[str, list[str]]:
    """Name -> arguments of Python."""
    peer = ["--model", str(model / "anchor"), "--prompt", PROMPT, "--max-tokens", "1", "--ignore-chat-template"]
    ours = ["ask", "--plain", "-m", str(model), PROMPT, "--max-tokens", "1"]
    return {
        "mlx_lm.generate": ["-c", PEER, *peer],
        BASE: ["-c", f"from mlx_hiermem import cpu; cpu.enable(); {PEER}", *peer],
        "hiermem ask --plain": ["-c", OURS, *ours],
        "hiermem ask --plain --memory none": ["-c", OURS, *ours, "--memory", "none"],
        "hiermem ask": ["-c", OURS, "ask", f"What is {PROMPT[:-3]}?", "--model", str(model), "--max-tokens", "1"],
    }


def first_token(arguments: list[str]) -> tuple[float, float]:
    """Seconds to the first character, and of CPU time to the end."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    descriptor, seen = process.stdout.fileno(), b""
    while not seen or RULE.startswith(seen) or seen == RULE:
        piece = os.read(descriptor, 1)
        if not piece:
            raise SystemExit(f"{arguments} printed no answer")
        seen += piece
    seconds = time.perf_counter() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} failed")
    return seconds, usage.ru_utime + usage.ru_stime


def main() -> None:
    asked, before = common.parsed(common.options(__doc__, runs=9, quick=1)), os.getloadavg()[0]
    model = prepare()
    sides = commands(model)
    if asked.quick:
        sides = {name: sides[name] for name in (BASE, "hiermem ask --plain")}
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    for run in range(asked.quick, asked.runs + 1):  # run 0 warms up; a quick measurement does without
        for name in sides if run % 2 else reversed(sides):
            wall, cpu = first_token(sides[name])
            if run:
                times[name]["wall"].append(wall)
                times[name]["cpu"].append(cpu)
    found: dict[str, Any] = common.compared(times, BASE)
    common.save(__file__, {"torch_installed": _has("torch"), "sides": found}, asked, before)
    rows = []
    for name, side in found.items():
        keys = (("wall_ms", 0), ("wall_ratio", 2), ("cpu_ms", 0), ("cpu_ratio", 2))
        rows.append([name, *(common.around(side[key], digits) for key, digits in keys)])
    common.table(("command", "first token, ms", "ratio", "CPU, ms", "ratio"), rows)


def _has(package: str) -> bool:
    """transformers, which mlx_lm imports, imports PyTorch where it is installed: seconds for all sides."""
    from importlib.util import find_spec

    return find_spec(package) is not None


if __name__ == "__main__":
    main()
