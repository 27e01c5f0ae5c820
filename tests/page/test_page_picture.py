"""The page's picture of the bank; `hiermem bank show --html` writes a file with the same."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable

import pytest
from browsing import (
    EVIL,
    choose,
    drawn,
    opened,
    state,
    watched,
)
from playwright.sync_api import Browser, Page
from serving import serving

from mlx_hiermem.apps.picture.icicle import HEIGHT, WIDTH, icicle
from mlx_hiermem.apps.picture.page import page as picture_page
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel


def test_fetched_blocks_light_up(browser: Browser, loading: Callable[[], MemoryModel]) -> None:
    """On a server of its own: nothing is in memory yet."""
    for motion, animation in (("no-preference", "fetched"), ("reduce", "none")):
        with serving(loading) as server, watched(browser, reduced_motion=motion) as context:
            page = opened(context, server)
            page.fill("#input", "tell me of neon")
            page.press("#input", "Enter")
            block = page.wait_for_selector(".fetched[data-path='1.1']")
            assert block
            assert block.evaluate("block => getComputedStyle(block).animationName") == animation


def test_blocking_a_node_closes_all_below(page: Page) -> None:
    choose(page, "1.2", "Pin")
    choose(page, "2.1", "Block")
    choose(page, "1", "Block")
    choose(page, "2", "Block")
    assert page.locator("#chosen span").all_inner_texts() == ["1 Topic 1", "2 Topic 2"]  # and the pin is gone
    assert state(page, "2.2") == "blocked"
    page.click("[data-path='2.2']")
    assert page.get_by_role("menuitem", name="Pin").is_disabled()
    page.get_by_role("menuitem", name="Unblock 2").click()
    assert page.locator("#chosen span").all_inner_texts() == ["1 Topic 1"]


def test_what_a_block_tells(page: Page, folder: pathlib.Path) -> None:
    size = MemoryBank.open(folder / "bank").manifest.blocks[Path((0,))].bytes
    facts = page.locator(".facts p")
    page.hover("[data-path='0']")
    name, figures, sources = facts.all_inner_texts()
    assert name == f"0 {EVIL}"
    assert figures.startswith(f"{size / 1000:.1f} kB · ")
    assert figures.endswith(" · 4 documents")
    assert sources.lower() == "learnt from alpha, beta"
    page.hover("[data-path='0.2']")
    assert "blocked by the bank" in facts.nth(1).inner_text()
    page.click("[data-path='0.2']")
    assert page.get_by_role("menuitem", name="Pin").is_disabled()
    assert page.get_by_role("menuitem", name="Blocked by the bank").is_disabled()


def test_labels_can_be_read(page: Page) -> None:
    """No label stands on its side, and rows of a file are counted, not listed."""
    assert page.locator(".blocks .upright").count() == 0
    assert page.locator(".block[data-path='2.2'] .label").inner_text() == "Topic 2.2"
    script = """async () => {
        const { describe } = await import("/page/facts.js");
        const row = { path: "1", bytes: 1, documents: 9 };
        const rows = (sources, more) => describe({ ...row, sources, more_sources: more }, "on disk");
        return [rows(["a.jsonl:1", "a.jsonl:20"], 3), rows(["a.jsonl:1", "Neon"], 0)];
    }"""
    first, second = page.evaluate(script)
    assert (first["from"], second["from"]) == (
        "learnt from 5 rows of a.jsonl",
        "learnt from Neon, 1 row of a.jsonl",
    )
    assert "documents" not in first["figures"]


def test_a_file_has_the_same_picture(browser: Browser, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Its blocks lie where the PNG's do, and it needs nothing else."""
    picture = icicle(MemoryBank.open(folder / "bank"), "tiny")
    (tmp_path / "bank.html").write_text(picture_page(picture), encoding="utf-8")
    with watched(browser) as context:
        page = context.new_page()
        page.goto((tmp_path / "bank.html").as_uri())
        frame = page.locator(".blocks").bounding_box()
        assert frame
        across, down = frame["width"] / WIDTH, frame["height"] / HEIGHT
        for block in picture.blocks:
            box = page.locator(f"[data-path='{block.path}']").bounding_box()
            assert box
            place = (box["x"] - frame["x"], box["y"] - frame["y"], box["width"], box["height"])
            expected = (block.x * across, block.y * down, block.width * across, block.height * down)
            assert place == pytest.approx(expected, abs=2.1)  # gaps, and whole pixels
            assert state(page, str(block.path)) == block.state.replace(" ", "-")
        page.hover("[data-path='0']")
        assert page.locator(".facts .name").inner_text() == f"0 {EVIL}"
        page.click("[data-path='1']")
        assert drawn(page) == ["1", "1.0", "1.1", "1.2"]


def test_a_large_bank_is_folded(page: Page) -> None:
    """16 + 256 + 4096 blocks: a fold stands for those that are too narrow, and opens to pointer and keys."""
    sizes, topics = (256, 64, 16), "ABCDEFGHIJKLMNOP"
    paths = [path for level in (1, 2, 3) for path in itertools.product(range(16), repeat=level)]
    nodes = [
        {
            "path": ".".join(map(str, path)),
            "label": "".join(topics[step] for step in path) * 3,
            "bytes": sizes[len(path) - 1],
            "state": "remote" if path[0] == 5 else "on disk",
        }
        for path in paths
    ]
    script = """async nodes => {
        const { MemoryPicture } = await import("/page/picture.js");
        window.picture = new MemoryPicture(document.getElementById("picture"));
        picture.show(nodes);
        picture.light(["7", "7.7", "7.7.7"]);
    }"""
    page.evaluate(script, nodes)
    fold = page.locator("[data-fold]")
    assert drawn(page) == sorted(
        [*map(str, range(16)), "7.7", "7.7.7"], key=lambda path: [*map(int, path.split("."))]
    )
    assert [text.splitlines()[0] for text in fold.all_inner_texts()] == [topic * 3 for topic in topics]
    leaf, around = page.locator("[data-path='7.7.7']").bounding_box(), fold.nth(7).bounding_box()
    assert leaf
    assert around
    assert leaf["width"] == 3
    assert (leaf["x"] - around["x"]) / around["width"] == pytest.approx((7 + 7 / 16) / 16, abs=0.03)
    backgrounds = [fold.nth(n).evaluate("it => getComputedStyle(it).backgroundImage") for n in (4, 5, 6)]
    assert backgrounds[0] == backgrounds[2] != backgrounds[1]
    fold.nth(5).hover()
    assert page.locator(".facts p").all_inner_texts()[:2] == ["Below 5 FFF", "272 blocks · 5.1 kB · 272 remote"]

    fold.nth(5).click(position={"x": 20, "y": 200})
    assert page.locator(".trail button").all_inner_texts() == ["Whole bank", "FFF"]
    assert drawn(page) == ["5", *(f"5.{n}" for n in range(16))]
    focus = page.locator(":focus")
    assert focus.get_attribute("data-path") == "5.0"
    page.keyboard.press("ArrowDown")
    assert focus.get_attribute("data-path") == "5.0.0"
    assert drawn(page) == ["5.0", *(f"5.0.{n}" for n in range(16))]
    for seen in ("5", "0"):
        page.keyboard.press("Escape")
        assert drawn(page)[0] == seen
    assert focus.get_attribute("data-path") == "5"
    page.evaluate("picture.reveal(['7', '7.7', '7.7.7'])")
    assert drawn(page) == ["7.7", *(f"7.7.{n}" for n in range(16))]
