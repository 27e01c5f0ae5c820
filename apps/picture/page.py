"""The icicle as one HTML file that needs nothing else: the picture of `hiermem serve`'s page, without its chat.

Style and scripts are those of `apps/server/page`, written into the file. The blocks are there as a table too, for
readers without scripts.
"""

from __future__ import annotations

import json
import pathlib
import re
from html import escape
from string import Template

from mlx_hiermem.apps.cli.display import size
from mlx_hiermem.apps.picture.icicle import Block, Picture, block_row

SHARED = pathlib.Path(__file__).parent.parent / "server" / "page"
# Each after those that it imports.
SCRIPTS = ("dom.js", "facts.js", "label.js", "fold.js", "layout.js", "picture.js")

# The policy lets nothing in from elsewhere, whatever a bank's labels hold.
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$name</title>
<style>
$style
body { margin: 0 auto; max-width: 1240px; padding: 28px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 20px; margin: 0; }
h1 + p { margin: 2px 0 20px; color: var(--quiet); max-width: 76ch; }
.frame { flex: none; height: min(620px, 66vh); }
details { margin-top: 12px; }
table { border-collapse: collapse; margin-top: 8px; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 20px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: normal; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
</style>
<main>
<h1>$name</h1>
<p>$summary</p>
<div class="picture" id="picture"><noscript>The picture needs scripts; the table does not.</noscript></div>
<details><summary>The blocks as a table</summary>
<table><thead><tr><th>path, label<th>bytes<th>state<th>documents<th>learnt from</thead><tbody>
$rows
</tbody></table></details>
</main>
<script type="application/json" id="nodes">$nodes</script>
<script type="module">
$script
const nodes = JSON.parse(document.getElementById("nodes").textContent);
new MemoryPicture(document.getElementById("picture")).show(nodes);
</script>
</html>
""")


def page(picture: Picture) -> str:
    """The whole HTML document."""
    nodes = json.dumps([block_row(block.entry, block.state) for block in picture.blocks], ensure_ascii=False)
    return PAGE.substitute(
        name=escape(picture.name),
        summary=escape(picture.summary),
        style=(SHARED / "picture.css").read_text(encoding="utf-8"),
        rows="\n".join(map(_row, picture.blocks)),
        nodes=nodes.replace("<", "\\u003c"),  # no label may end the script
        script="\n".join(map(_script, SCRIPTS)),
    )


def _script(name: str) -> str:
    """A module without its imports: in the file all are one."""
    return re.sub(r"^import .*\n", "", (SHARED / name).read_text(encoding="utf-8"), flags=re.MULTILINE)


def _row(block: Block) -> str:
    entry = block.entry
    name = f"{entry.path} {entry.label}".strip()
    cells = (name, size(entry.bytes), block.state, str(entry.documents or ""), ", ".join(entry.sources))
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)
