"""The icicle: exact areas, children below their parents, labels that fit; and both ways of drawing it."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.cells import cell_len
from tiny import CONFIG, make_anchor, make_bank

from mlx_hiermem.apps.picture.icicle import CELL, FONT, HEIGHT, PAD, WIDTH, Block, Picture, block_row, icicle
from mlx_hiermem.apps.picture.page import SHARED, page
from mlx_hiermem.apps.picture.png import STYLE, TOP, png
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.errors import MissingDependencyError

SIZES = replace(CONFIG, branching=4, block_sizes=(6, 3, 1))
ABSENT = ("0", "1.2", "1.3", "2.0.1", "2.0.2", "2.0.3", "3.1", "3.2", "3.3", "3.0.0")
LABELS = {
    "1": "Gases & <vapours>",
    "2": "A label of many words that will not fit into one line",
    "3": "元素の周期表",
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> MemoryBank:
    """Ragged, three levels, with something in each state."""
    folder = tmp_path_factory.mktemp("picture")
    root = make_bank(folder / "bank", make_anchor(folder / "anchor"), SIZES, ABSENT)
    manifest = MemoryBank.open(root).manifest
    rows = {
        node: replace(
            row, label=LABELS.get(str(node), row.label), documents=len(node), sources=("a", "b", "c", "d")
        )
        for node, row in manifest.blocks.items()
    }
    replace(manifest, blocks=rows).write(root / MANIFEST)
    edit.block(root, [Path((2, 1))])
    (root / "blocks/1/0.safetensors").unlink()
    return MemoryBank.open(root)


@pytest.fixture(scope="module")
def picture(bank: MemoryBank) -> Picture:
    return icicle(bank, "my <model>")


def by_path(picture: Picture) -> dict[Path, Block]:
    return {block.path: block for block in picture.blocks}


def test_every_block_is_there_and_its_area_is_its_bytes(bank: MemoryBank, picture: Picture) -> None:
    found = by_path(picture)
    assert found.keys() == bank.manifest.blocks.keys()
    total = sum(row.bytes for row in bank.manifest.blocks.values())
    for node, row in bank.manifest.blocks.items():
        block = found[node]
        assert block.width * block.height == pytest.approx(WIDTH * HEIGHT * row.bytes / total)


def test_blocks_tile_the_picture(picture: Picture) -> None:
    """With areas that sum up to the whole, within its bounds and without overlap, there is no gap."""
    near = 1e-6
    blocks = picture.blocks
    assert sum(block.width * block.height for block in blocks) == pytest.approx(WIDTH * HEIGHT)
    for i, a in enumerate(blocks):
        assert -near <= a.x < a.x + a.width <= WIDTH + near
        assert -near <= a.y < a.y + a.height <= HEIGHT + near
        for b in blocks[:i]:
            beside = a.x + a.width <= b.x + near or b.x + b.width <= a.x + near
            assert beside or a.y + a.height <= b.y + near or b.y + b.height <= a.y + near, (a.path, b.path)


def test_children_hang_below_their_parent(picture: Picture) -> None:
    found = by_path(picture)
    for node, block in found.items():
        if len(node) > 1:
            parent = found[Path(node[:-1])]
            assert block.y == pytest.approx(parent.y + parent.height)
            assert parent.x - 1e-6 <= block.x <= block.x + block.width <= parent.x + parent.width + 1e-6


def test_labels_stay_inside(picture: Picture) -> None:
    assert by_path(picture)[Path((1,))].lines[0] == "Gases & <vapours>"
    for block in picture.blocks:
        length, across = (block.height, block.width) if block.upright else (block.width, block.height)
        assert len(block.lines) * FONT <= across
        assert all(cell_len(line) * CELL <= length - 2 * PAD + 1e-6 for line in block.lines)
    assert any(block.upright for block in picture.blocks if block.lines)


def test_small_blocks_have_short_labels_or_none(bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hiermem.apps.picture.icicle.WIDTH", 300.0)
    monkeypatch.setattr("mlx_hiermem.apps.picture.icicle.HEIGHT", 200.0)
    found = by_path(icicle(bank, "small"))
    assert any(not block.lines for block in found.values())
    assert found[Path((2,))].lines[-1].endswith("…")


def test_states_and_their_legend(picture: Picture) -> None:
    states = {str(block.path): block.state for block in picture.blocks}
    assert (states["1.0"], states["2.1.3"], states["3"]) == ("missing", "blocked", "on disk")
    counts = {state: count for state, count, _ in picture.legend}
    assert counts == {"on disk": len(states) - 6, "blocked": 5, "missing": 1}


def test_depth_and_an_empty_bank(bank: MemoryBank) -> None:
    assert {len(block.path) for block in icicle(bank, "", 2).blocks} == {1, 2}
    empty = MemoryBank(bank.root, replace(bank.manifest, blocks={}))
    nothing = icicle(empty, "empty")
    assert (nothing.blocks, nothing.legend) == ((), ())
    assert "0 blocks" in page(nothing)
    assert png(nothing)


def test_nodes_without_a_block_take_no_room(bank: MemoryBank) -> None:
    leaves = {node: row for node, row in bank.manifest.blocks.items() if len(node) == 3}
    blocks = icicle(MemoryBank(bank.root, replace(bank.manifest, blocks=leaves)), "leaves").blocks
    assert {round(block.height, 6) for block in blocks} == {HEIGHT}
    assert sum(block.width for block in blocks) == pytest.approx(WIDTH)


class Tags(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else(picture: Picture) -> None:
    """What it looks like in a browser is in page/test_page_picture.py."""
    text = page(picture)
    tags = Tags(text).found
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed"}
    for _, attributes in tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert not [line for line in text.splitlines() if line.startswith("import ")]
    assert "default-src 'none'" in text


def test_the_page_holds_each_block_for_everyone(bank: MemoryBank, picture: Picture) -> None:
    text = page(picture)
    data = text.split('id="nodes">')[1].split("</script>")[0]
    assert "<" not in data  # whatever the labels hold
    blocks = sorted(bank.manifest.blocks.items())
    assert json.loads(data) == [block_row(entry, bank.state(node)) for node, entry in blocks]
    table = text.split("<tbody>")[1].split("</tbody>")[0]
    assert table.count("<tr>") == len(picture.blocks)
    assert "<td>1 Gases &amp; &lt;vapours&gt;<td>" in table
    assert "<td>2.1 topic 2.1<td>2.5 kB<td>blocked<td>2<td>a, b, c, d\n" in table
    assert "<h1>my &lt;model&gt;</h1>" in text


def test_a_row_names_some_sources_and_counts_the_rest(bank: MemoryBank) -> None:
    entry = replace(bank.manifest.blocks[Path((1,))], sources=tuple("abcdefghij"))
    made = block_row(entry, "on disk")
    assert (made["path"], made["label"], made["state"]) == ("1", "Gases & <vapours>", "on disk")
    assert (made["sources"], made["more_sources"]) == (list("abcdefgh"), 2)


def test_both_pictures_have_the_same_colours() -> None:
    styles = (SHARED / "picture.css").read_text(encoding="utf-8")
    assert all(fill in styles and edge in styles for fill, edge, _ in STYLE.values())


@pytest.mark.filterwarnings("error")  # nor are letters that the font lacks worth a warning
def test_the_png_has_each_blocks_colour_in_its_place(picture: Picture) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(png(picture)))[..., :3]
    assert pixels.shape[:2] == (round(2 * (picture.height + 112)), round(2 * (picture.width + 40)))
    for block in picture.blocks:
        if block.width > 12 and block.height > 60:  # room enough for a patch without letters
            top, left = 2 * (TOP + block.y + block.height - 12), 2 * (20 + block.x + 3)
            patch = pixels[int(top) : int(top) + 12, int(left) : int(left) + 8].reshape(-1, 3)
            fill = np.array(to_rgb(STYLE[block.state][0]))
            assert (np.abs(patch - fill).max(axis=1) < 0.02).mean() > 0.3, block.path


def test_without_matplotlib_an_extra_is_named(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"mlx-hiermem\[plots\]"):
        png(picture)


def test_the_pictures_are_the_same_every_time(bank: MemoryBank, picture: Picture) -> None:
    again = icicle(bank, "my <model>")
    assert again == picture
    assert page(again) == page(picture)
