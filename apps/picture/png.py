"""The icicle as a PNG image, by matplotlib."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from mlx_hiermem.apps.cli.display import size
from mlx_hiermem.apps.picture.icicle import FONT, Picture
from mlx_hiermem.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100  # of the picture's own px; the image has twice as many
TOP, BOTTOM, SIDE = 64.0, 48.0, 20.0  # px for the title, the legend, the margins
# state -> fill, edge, hatch: told apart without colours too. The colours are those of picture.css.
STYLE = {
    "on disk": ("#d6e4ef", "#a5c1d8", ""),
    "remote": ("#ece7f5", "#8d7ab8", ".."),
    "blocked": ("#f8dfdb", "#b3483a", "//"),
    "missing": ("#f9f8f5", "#55606a", ""),
}
PAGE, INK, QUIET = "#f9f8f5", "#1b2530", "#55606a"


def png(picture: Picture) -> bytes:
    """The image. Raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a PNG picture needs matplotlib", "pip install 'mlx-hiermem[plots]', or take --html."
        ) from error
    width, height = picture.width + 2 * SIDE, TOP + picture.height + BOTTOM
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=2 * DPI, facecolor=PAGE)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-SIDE, picture.width + SIDE), ylim=(picture.height + BOTTOM, -TOP))
    axes.axis("off")
    _write(axes, 0, -34, picture.name, px=19, weight="bold")
    _write(axes, 0, -13, picture.summary, colour=QUIET)
    for block in picture.blocks:
        _rectangle(axes, block.x, block.y, block.width, block.height, block.state)
        for number, line in enumerate(block.lines):
            x, y, upright = block.line_place(number)
            _write(axes, x, y, line, upright=upright, middle=True, halo=STYLE[block.state][0])
    _legend(axes, picture)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks become boxes
        figure.savefig(image, format="png")
    return image.getvalue()


def _rectangle(axes: Axes, x: float, y: float, width: float, height: float, state: str) -> None:
    from matplotlib.patches import Rectangle

    fill, edge, hatch = STYLE[state]
    dashes = "--" if state == "missing" else "-"
    line = min(0.8, width / 8)  # no border broader than what it surrounds
    axes.add_patch(
        Rectangle((x, y), width, height, fc=fill, ec=edge, lw=line, ls=dashes, hatch=hatch, hatch_linewidth=0.4)
    )


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    px: float = FONT,
    colour: str = INK,
    weight: str = "normal",
    upright: bool = False,
    middle: bool = False,
    halo: str = "",
) -> None:
    """`y` is the baseline, or the `middle` of the line; an `upright` line is centred on (x, y)."""
    from matplotlib.patheffects import withStroke

    axes.text(
        x,
        y,
        text,
        fontsize=px * 72 / DPI,
        fontweight=weight,
        color=colour,
        rotation=90 if upright else 0,
        ha="center" if upright else "left",
        va="center" if middle else "baseline",
        parse_math=False,
        path_effects=[withStroke(linewidth=4, foreground=halo)] if halo else None,
    )


def _legend(axes: Axes, picture: Picture) -> None:
    x = 0.0
    for state, count, total in picture.legend:
        entry = f"{state}: {count} block{'s' * (count != 1)}, {size(total)}"
        _rectangle(axes, x, picture.height + 17, 18, 14, state)
        _write(axes, x + 26, picture.height + 28, entry)
        x += 50 + len(entry) * 0.6 * FONT
