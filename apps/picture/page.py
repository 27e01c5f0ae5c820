"""The icicle as one HTML file: inline SVG, no script, nothing loaded from elsewhere.

Every block can be reached by keyboard and pointer; the one in focus tells its title in the line below. The same
is there as a table, for screen readers and for blocks too small to hit.
"""

from __future__ import annotations

from html import escape
from string import Template

from mlx_hiermem.apps.cli.display import size
from mlx_hiermem.apps.picture.icicle import FONT, Block, Picture

TIP = 30.0  # px below the blocks, for the title of the one in focus

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b2733; --quiet: #5c6873; --line: #d5dbe1; --focus: #d97400;
  --on-disk: #cfe3f5; --on-disk-edge: #5b8fbf; --remote: #ece6f6; --remote-edge: #8a76b8;
  --blocked: #f7d4cf; --blocked-edge: #b3483a; --missing-edge: #8a8a8a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12171c; --ink: #e7edf3; --quiet: #9aa7b3; --line: #323c46; --focus: #ffb454;
    --on-disk: #1f4563; --on-disk-edge: #5f98c7; --remote: #3a3156; --remote-edge: #9c88cf;
    --blocked: #5d2720; --blocked-edge: #d9705f; --missing-edge: #8a949d;
  }
}
body { margin: 0 auto; max-width: 1240px; padding: 20px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3em; margin: 0; }
p { margin: .2em 0 .8em; color: var(--quiet); }
.legend { display: flex; flex-wrap: wrap; gap: .3em 1.6em; margin: 0 0 .8em; padding: 0; list-style: none; }
.legend svg { width: 18px; height: 14px; margin-right: 8px; vertical-align: -2px; }
.scroll { overflow-x: auto; }
.scroll > svg { display: block; width: 100%; min-width: 1000px; height: auto; }
svg text { font: ${font}px system-ui, sans-serif; fill: var(--ink); pointer-events: none; }
.block text { paint-order: stroke; stroke: var(--halo, transparent); stroke-width: 3; } /* over stripes and dots */
rect { stroke-width: .8; vector-effect: non-scaling-stroke; }
.on-disk rect { fill: var(--on-disk); stroke: var(--on-disk-edge); }
.remote { --halo: var(--remote); }
.remote rect { fill: url(#dots); stroke: var(--remote-edge); }
.blocked { --halo: var(--blocked); }
.blocked rect { fill: url(#stripes); stroke: var(--blocked-edge); }
.missing rect { fill: var(--page); stroke: var(--missing-edge); stroke-dasharray: 4 3; }
.block .tip { visibility: hidden; stroke: none; }
.block:hover .tip, .block:focus .tip { visibility: visible; }
/* the pointer moved elsewhere: only what it is on speaks */
svg:hover .block:focus:not(:hover) .tip { visibility: hidden; }
.block:hover rect, .block:focus rect { stroke: var(--focus); stroke-width: 2.5 !important; stroke-dasharray: none; }
details { margin-top: 1em; }
table { border-collapse: collapse; margin-top: .6em; }
th, td { text-align: left; vertical-align: top; padding: .2em 1.2em .2em 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: normal; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
.block:focus-visible { outline: none; } /* its rectangle shows it */
</style>
<main>
<h1>$name</h1>
<p>$summary</p>
<ul class="legend">$legend</ul>
<div class="scroll">
<svg viewBox="-2 -2 $width $height" role="list" aria-label="The blocks of $name">
<defs>
<pattern id="stripes" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path d="M0 0h7v7H0z" fill="var(--blocked)"/><path d="M0 0v7" stroke="var(--blocked-edge)" opacity=".55"/></pattern>
<pattern id="dots" width="7" height="7" patternUnits="userSpaceOnUse">
<path d="M0 0h7v7H0z" fill="var(--remote)"/>
<circle cx="2" cy="2" r=".8" fill="var(--remote-edge)" opacity=".7"/></pattern>
</defs>
$blocks
</svg>
</div>
<details><summary>The blocks as a table</summary>
<table><thead><tr><th>path, label<th>bytes<th>state<th>documents, sources</thead><tbody>
$rows
</tbody></table></details>
</main>
</html>
""")


def page(picture: Picture) -> str:
    """The whole HTML document."""
    return PAGE.substitute(
        name=escape(picture.name),
        summary=escape(picture.summary),
        font=f"{FONT:g}",
        width=f"{picture.width + 4:g}",
        height=f"{picture.height + TIP + 4:g}",
        legend="".join(_legend_entry(*entry) for entry in picture.legend),
        blocks="\n".join(_block(block, picture) for block in picture.blocks),
        rows="\n".join(_row(block) for block in picture.blocks),
    )


def _legend_entry(state: str, count: int, total: int) -> str:
    swatch = f'<svg class="{_class(state)}" aria-hidden="true"><rect x="1" y="1" width="16" height="12"/></svg>'
    return f"<li>{swatch}{state}: {count} block{'s' * (count != 1)}, {size(total)}</li>"


def _class(state: str) -> str:
    return state.replace(" ", "-")


def _block(block: Block, picture: Picture) -> str:
    title = escape(block.title)
    box = f'x="{block.x:.2f}" y="{block.y:.2f}" width="{block.width:.2f}" height="{block.height:.2f}"'
    if block.width < 4:  # no border broader than what it surrounds
        box += f' style="stroke-width:{block.width / 5:.2f}"'
    lines = "".join(_line(block, number, line) for number, line in enumerate(block.lines))
    tip = f'<text class="tip" y="{picture.height + TIP - 8:g}" aria-hidden="true">{title}</text>'
    return (
        f'<g class="block {_class(block.state)}" role="listitem" tabindex="0" aria-label="{title}">'
        f"<title>{title}</title><rect {box}/>{lines}{tip}</g>"
    )


def _line(block: Block, number: int, text: str) -> str:
    x, y, upright = block.line_place(number)
    turn = f' transform="rotate(-90 {x:.2f} {y:.2f})" text-anchor="middle"' if upright else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" dy=".35em"{turn} aria-hidden="true">{escape(text)}</text>'


def _row(block: Block) -> str:
    name, amount, state, *rest = map(escape, block.facts)
    return f"<tr><td>{name}<td>{amount}<td>{state}<td>{', '.join(rest)}"
