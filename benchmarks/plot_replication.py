"""One picture of docs/replication.md: each finding's shares of right answers, with their intervals.

    python benchmarks/plot_replication.py    # docs/images/replication.svg, from the results of replication.py,
                                             # settings_replication.py and harm.py

A panel for each row, in the colour of its verdict. The rows 1b and 6 show gains over the anchor alone instead.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from common import RESULTS
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot import IMAGES

COLOURS = {"yes": "C2", "no": "C3", "unclear": "0.45"}
COLUMNS = 3
Point = tuple[str, float, float, float]  # what, share, low, high
Finding = dict[str, Any]


def harm(result: Finding) -> Finding:
    """Row 1b: what memory does to the tasks of common knowledge."""
    mean = result["means"]["mean of common knowledge"]
    gains = {one["task"]: gain(one["difference"], one["interval"]) for one in result["tasks"][:3]}
    gains["mean"] = gain(mean["difference"], mean["interval"])
    figures = {"gains by": gains}
    return {"number": "1b", "claim": "common knowledge holds", "verdict": mean["verdict"], "figures": figures}


def gain(value: float, interval: tuple[float, float]) -> Finding:
    return {"value": value, "low": interval[0], "high": interval[1]}


def findings() -> list[Finding]:
    """Of both scripts, by number; one without shares of its own (7a) is told by another's panel."""
    found = list[Finding]()
    for name in ("replication", "settings_replication"):
        if (file := RESULTS / f"{name}.json").is_file():
            found += json.loads(file.read_text(encoding="utf-8"))["findings"]
    if (file := RESULTS / "harm.json").is_file():
        found.append(harm(json.loads(file.read_text(encoding="utf-8"))))
    shown = [one for one in found if {"shares", "gains by"} & one["figures"].keys()]
    return sorted(shown, key=lambda one: (int(one["number"].rstrip("abcd")), one["number"]))


def points(figures: Finding) -> Iterator[Point]:
    """What a panel shows, from the top down."""
    if "gains by" in figures:
        for name, one in figures["gains by"].items():
            yield name, *(one[key] for key in ("value", "low", "high"))
        return
    for name, one in figures["shares"].items():
        if "of" in one:
            yield name, one["right"] / one["of"], *one["interval"]
        else:  # shares of several groups of questions
            for setting, inner in one.items():
                yield f"{name}, {setting}", inner["right"] / inner["of"], *inner["interval"]


def panel(axes: Axes, finding: Finding) -> None:
    shown, colour = list(points(finding["figures"])), COLOURS[finding["verdict"]]
    for at, (_, share, low, high) in enumerate(shown):
        axes.plot([100 * low, 100 * high], [at, at], colour, lw=1.5)
        axes.plot(100 * share, at, "o", color=colour, ms=5)
    axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
    axes.set(xlim=(min(0, *(110 * low for *_, low, _ in shown)), 100), ylim=(len(shown) - 0.5, -0.5))
    title = f"{finding['number']}  {finding['claim']}: {finding['verdict']}"
    axes.set_title(textwrap.fill(title, 32), fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", lw=0.3)


def picture(found: list[Finding]) -> Figure:
    rows = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(11, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes, finding in zip(panels, found, strict=False):
        panel(axes, finding)
    figure.supxlabel("right answers, %; rows 1b and 6: how many more than without memory, points", fontsize=9)
    return figure


def main() -> None:
    rcParams["svg.hashsalt"] = "mlx-hiermem"  # the same figures give the same file
    picture(findings()).savefig(IMAGES / "replication.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
