"""Two pictures of what the other scripts measured: how far each target is met, and what grows with the bank.

    python benchmarks/plot.py        # docs/images/targets.svg and growth.svg, from benchmarks/results/*.json

Every target becomes one number: what was measured, in shares of what the target allows. 1 is the target itself,
less is better; a bar is the spread from the smallest to the largest run.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import RESULTS, spread
from matplotlib.figure import Figure

IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"
Found = Mapping[str, Any]
Spread = Callable[[Found], Found]


def ratio(*keys: str) -> Spread:
    """A spread inside a result, by its keys."""

    def look(found: Found) -> Found:
        for key in keys:
            found = found[key]
        return found

    return look


def batch(found: Found) -> Found:
    return spread(run["alone_seconds"] / run["batch_seconds"] for run in found["runs"])


def convert(found: Found) -> Found:
    (row,) = [row for row in found["rows"] if row["form"] == ".safetensors"]
    return spread(copy / ours["seconds"] for copy, ours in zip(row["copies"], row["conversions"], strict=True))


def decode(anchor: str) -> Spread:
    """Speed with memory in shares of the bound that the bytes set."""

    def look(found: Found) -> Found:
        row = found["anchors"][anchor]
        return spread(value / row["bound"] for value in row["ways"]["side"]["wall_speed"]["values"])

    return look


def learning(side: str) -> Spread:
    return lambda found: spread([found["text"][side]["ratio_per_cpu_second"]])


# What, in which result, where in it, the target, and whether more than that is better.
TARGETS: list[tuple[str, str, Spread, float, bool]] = [
    ("fetch, warm: preadv", "fetch", ratio("warm", "fetch", "wall_ratio"), 1.15, False),
    ("fetch, cold: preadv", "fetch", ratio("cold", "fetch", "wall_ratio"), 1.15, False),
    ("first token, cold fetch: warm", "hidden_fetch", ratio("cold", "wall_ratio"), 1.10, False),
    ("swap, bfloat16 to float32: 20 ms", "swap", ratio("bfloat16 to float32", "swap", "wall_ms"), 20, False),
    ("swap, bfloat16: 20 ms", "swap", ratio("bfloat16", "swap", "wall_ms"), 20, False),
    ("swap, float32: 20 ms", "swap", ratio("float32", "swap", "wall_ms"), 20, False),
    ("decode, float32: bytes", "decode", decode("float32"), 1, True),
    ("decode, 8 bits: bytes", "decode", decode("8 bits"), 1, True),
    ("decode, 4 bits: bytes", "decode", decode("4 bits"), 1, True),
    ("batch of 8: one at a time", "batch_memory", batch, 2.5, True),
    ("convert: copy", "convert_memory", convert, 0.8, True),
    ("MiniLM, documents: PyTorch", "minilm", ratio("documents", "wall", "speed_ratio"), 1, True),
    ("MiniLM, questions: PyTorch", "minilm", ratio("questions", "wall", "speed_ratio"), 1, True),
    ("start: mlx_lm.generate", "start", ratio("sides", "hiermem ask --plain", "wall_ratio"), 1.25, False),
    ("open 69 904 blocks: 340", "growth", lambda found: found["rows"][-1]["open"]["wall_ratio"], 1.5, False),
    ("learn, all layers: mlx_lm lora", "train_speed", learning("uniform"), 1, True),
    ("learn, late layers: mlx_lm lora", "train_speed", learning("late, kept states"), 2.5, True),
]


def shares() -> Iterator[tuple[str, Found]]:
    """What of each target, in its order, is used up; what was not measured yet is left out."""
    for what, name, look, target, more in TARGETS:
        if not (RESULTS / f"{name}.json").is_file():
            continue
        found = look(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        values = [target / found[key] if more else found[key] / target for key in ("median", "low", "high")]
        yield what, dict(zip(("median", "low", "high"), (values[0], *sorted(values[1:])), strict=True))


def targets() -> Figure:
    rows = list(shares())[::-1]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for at, (_, share) in enumerate(rows):
        colour = "C2" if share["median"] <= 1 else "C3"
        axes.plot([share["low"], share["high"]], [at, at], colour, lw=1.5)
        axes.plot(share["median"], at, "o", color=colour)
    axes.axvline(1, color="0.5", lw=0.8)
    axes.set_xscale("log")
    ticks = (0.25, 0.5, 1, 2, 4)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [what for what, _ in rows])
    axes.set_xlabel("share of what the target allows: left of 1 it is met")
    return figure


def growth() -> Figure:
    found = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    rows = found["rows"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    leaves = [row["leaves"] for row in rows]
    for what, times in (("fetch", found["fetches"]), ("open", 1), ("route", found["fetches"])):  # in a turn
        medians = [row[what]["wall_ms"]["median"] / times for row in rows]
        axes.plot(leaves, medians, "o-", label=what)
    axes.set(xscale="log", yscale="log", xlabel="leaves", ylabel="milliseconds")
    axes.set_xticks(leaves, [f"{count:,}".replace(",", " ") for count in leaves])
    axes.legend()
    return figure


def main() -> None:
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = "mlx-hiermem"  # the same figures give the same file
    for name, figure in (("targets", targets()), ("growth", growth())):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
