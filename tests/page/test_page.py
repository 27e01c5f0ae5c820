"""The web page in a real headless Chromium, against the real server over a tiny model; and the page that
`hiermem bank show --html` writes, which has the same picture.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from browsing import (
    EVIL,
    LENGTH,
    NAMES,
    ask,
    caption,
    direct,
    lit,
    opened,
    watched,
)
from elements import BANK
from playwright.sync_api import Browser, Page, expect
from serving import CONTEXT, Gate, Running, eventually, serving
from tiny import Aimed, HashEmbedder, give_sources, make_model

from mlx_hiermem import load
from mlx_hiermem.apps.picture.icicle import HEIGHT, WIDTH, icicle
from mlx_hiermem.apps.picture.page import page as picture_page
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.source_search import Source, SourceSearch


def held(server: Running) -> str:
    """What the page says is in memory."""
    return f"{server.engine.model.cache.bytes / 1000:.1f} kB"


def choose(page: Page, path: str, item: str) -> None:
    """Clicks a block, and an item of its menu."""
    page.locator(f".block[data-path='{path}']").click(position={"x": 8, "y": 8})
    page.get_by_role("menuitem", name=item).click()


def state(page: Page, path: str) -> str:
    """The class of a block that its state has given to it."""
    return (page.locator(f".block[data-path='{path}']").get_attribute("class") or "").split()[1]


def drawn(page: Page) -> list[str]:
    return [block.get_attribute("data-path") or "" for block in page.locator(".blocks .block").all()]


def test_a_conversation_and_a_change_of_topic(page: Page, server: Running) -> None:
    assert page.locator("#speed").inner_text() == "–"
    assert page.locator("#use [value=source]").get_attribute("hidden") is not None  # this bank keeps none
    first = ask(page, "tell me of neon")
    assert first == direct(server, "tell me of neon", "fetched")[0]
    assert lit(page) == ["1", "1.1"]
    assert "Topic 1 › Topic 1.1" in caption(page)
    assert "fetched" in caption(page)
    assert "tokens/s" in caption(page)
    assert float(page.locator("#speed").inner_text()) > 0
    expect(page.locator("#held")).to_have_text(f"{held(server)} of 536.9 MB")
    assert int(page.locator("#meter").get_attribute("aria-valuenow") or 0) == server.engine.model.cache.bytes
    before = held(server)
    ask(page, "and its colour?")
    assert lit(page) == ["1", "1.1"]
    assert "already in memory · kept the topic" in caption(page)
    ask(page, "now of iron")
    assert lit(page) == ["2", "2.0"]
    assert state(page, "1.1") == "in-memory"
    assert held(server) != before
    expect(page.locator("#held")).to_have_text(f"{held(server)} of 536.9 MB")
    expect(page.locator("#say")).to_contain_text("Topic 2 › Topic 2.0")
    page.locator("button.path").first.click()
    assert lit(page) == ["1", "1.1"]
    page.click("#new")
    assert (page.locator(".turn").count(), lit(page)) == (0, [])


def test_the_source_is_named_below_the_answer(
    browser: Browser, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = make_model(tmp_path / "model"), list[Source]()
    give_sources(
        folder / "bank", {"1.1": [("Neon", "Neon glows red."), ("Argon", "Argon is idle.")]}, HashEmbedder().embed
    )
    monkeypatch.setattr(SourceSearch, "find", lambda *_: tuple(found))  # random replies say nothing

    def loading() -> MemoryModel:
        model = load(folder)
        assert model.bank
        aimed: Any = Aimed(model.bank.tree, NAMES, Path((0, 1)))
        model._router = Router(model.bank.tree, aimed, model.bank.policy)
        return model

    with serving(loading) as running, watched(browser) as context:
        page = opened(context, running)
        ask(page, "tell me of neon")
        assert page.locator(".source").last.inner_text() == "No source in this bank says this."
        found.append(Source("Neon.txt", "Neon", "line 1", "Neon glows red.", 0.9))
        page.select_option("#use", "source")
        ask(page, "tell me of neon")
        source = page.locator(".source").last
        assert source.inner_text().startswith("From Neon (Neon.txt, line 1)")
        assert source.locator("q").inner_text() == "Neon glows red."
        source.get_by_role("button").click()
        expect(page.locator("#passage mark")).to_have_text("Neon glows red.")
        assert page.locator("#passage .where").inner_text() == "Neon.txt, line 1 · 1 of 2 on this topic"
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#passage .passage")).to_have_text("Argon is idle.")
        page.keyboard.press("Escape")
        passage = page.get_by_role("button", name="passage ").last
        passage.click()
        expect(page.locator("#passage h2")).to_have_text(passage.inner_text().removeprefix("passage "))
        expect(page.locator("#passage .where")).to_contain_text(" of 2 on this topic")
        page.keyboard.press("Escape")
        page.select_option("#use", "none")
        ask(page, "tell me of neon")
        assert not page.locator(".source").last.is_visible()


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


def test_blocking_a_node_changes_the_answer(page: Page, server: Running) -> None:
    before = ask(page, "tell me of neon")
    choose(page, "1.1", "Block")
    assert state(page, "1.1") == "blocked"
    assert page.locator("#chosen li").all_inner_texts() == ["Blocked\n1.1 Topic 1.1\nUnblock"]
    assert "blocked here" in page.locator(".facts p").nth(1).inner_text()
    page.click("#new")
    after = ask(page, "tell me of neon")
    expected, memory = direct(server, "tell me of neon", {"blocked": ["1.1"]})
    assert after == expected != before
    assert lit(page) == ["1", memory["path"]] != ["1", "1.1"]
    assert "went around 1.1" in caption(page)
    page.get_by_role("button", name="Unblock 1.1").click()
    assert page.locator("#chosen li").count() == 0
    page.click("#new")
    assert ask(page, "tell me of neon") == before


def test_real_weights(browser: Browser, smollm2_anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The elements' bank: what was learnt is known, and no longer once its block is closed."""
    (tmp_path / "anchor").symlink_to(smollm2_anchor)
    (tmp_path / "bank").symlink_to(BANK)
    question = "What is the atomic number of iron?"
    with serving(lambda: load(tmp_path), timeout=120) as server, watched(browser) as context:
        page = opened(context, server)
        assert "26" in ask(page, question)
        assert "halogens, astatine, bromine" in caption(page)
        group, leaf = lit(page)
        assert leaf
        ask(page, "What is the atomic number of gold?")
        assert not {group, leaf} & {*lit(page)}
        choose(page, leaf, "Block")
        page.click("#new")
        assert "26" not in ask(page, question)
        assert f"went around {leaf}" in caption(page)
        assert leaf not in lit(page)


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


def test_pinned_no_and_generic_memory(page: Page, server: Running) -> None:
    choose(page, "2.2", "Pin")
    assert page.locator("#use").input_value() == "pinned"
    assert "2.2 Topic 2.2" in page.locator("#meaning").inner_text()
    assert ask(page, "tell me of neon") == direct(server, "tell me of neon", "2.2")[0]
    assert lit(page) == ["2", "2.2"]
    page.get_by_role("button", name="Unpin 2.2").click()
    for use, words in (
        ("generic", "General memory"),
        ("none", "Without memory"),
        ("fetched", "Topic 1 › Topic 1.1"),
    ):
        page.select_option("#use", use)
        page.click("#new")
        assert ask(page, "tell me of neon") == direct(server, "tell me of neon", use)[0]
        assert words in caption(page)
        assert lit(page) == (["1", "1.1"] if use == "fetched" else [])


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


def test_the_keyboard_alone(page: Page) -> None:
    """From the question to a blocked node, without a pointer."""
    press, focus = page.keyboard.press, page.locator(":focus")
    page.keyboard.type("tell me")
    press("Shift+Enter")
    page.keyboard.type("of neon")
    press("Enter")
    expect(page.locator("#send")).to_be_visible()
    assert page.locator(".user p").inner_text() == "tell me\nof neon"
    stops = 0
    while focus.get_attribute("role") != "treeitem":
        press("Tab")
        stops += 1
        assert stops < 7
        assert focus.evaluate("it => it.matches(':focus-visible')")
    assert page.locator(".blocks [tabindex='0']").count() == 1
    steps = {"ArrowRight": "0.0", "ArrowDown": "0.1", "End": "2.2", "ArrowUp": "2.1", "ArrowLeft": "2", "Home": "0"}
    for key, path in steps.items():
        press(key)
        assert focus.get_attribute("data-path") == path
        assert page.locator(".facts .name").inner_text().startswith(f"{path} ")
    press("ArrowDown")
    press("Enter")
    press("ArrowDown")
    assert focus.inner_text() == "Block: answer without it"
    press("Escape")
    assert (focus.get_attribute("data-path"), page.locator("#chosen li").count()) == ("1", 0)
    press("Enter")
    press("ArrowUp")  # from the first to the last
    press("Enter")
    assert page.locator(".trail button").all_inner_texts() == ["Whole bank", "Topic 1"]
    assert drawn(page) == ["1", "1.0", "1.1", "1.2"]
    press("Escape")
    assert len(drawn(page)) == 12
    for key in ("Enter", "ArrowDown", "Enter"):
        press(key)
    assert page.locator("#chosen span").all_inner_texts() == ["1 Topic 1"]
    assert focus.get_attribute("data-path") == "1"


def test_a_phone(browser: Browser, server: Running) -> None:
    """The first screen is for the conversation; the memory is a tap away."""
    with watched(browser, viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#about")).not_to_be_empty()
        memory = page.get_by_role("button", name="Memory")
        assert (memory.get_attribute("aria-expanded"), page.locator(".blocks").is_visible()) == ("false", False)
        welcome = page.locator("#welcome").bounding_box()
        assert welcome
        assert welcome["y"] < 740 / 4
        memory.tap()
        page.tap("[data-path='2.2']")
        page.get_by_role("menuitem", name="Pin").tap()
        ask(page, "x" * 60)
        width = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert page.evaluate(width) == 375
        tree, log = page.locator(".blocks").bounding_box(), page.locator(".scroll").bounding_box()
        assert tree
        assert log
        assert tree["y"] + tree["height"] <= log["y"]
        memory.tap()
        expect(page.locator(".blocks")).to_be_hidden()
        assert page.evaluate(width) == 375
        expect(page.locator("#input")).to_be_in_viewport(ratio=1)
        page.locator("button.path").last.tap()
        expect(page.locator(".blocks .lit")).to_have_count(2)


def test_the_memory_folds_on_a_desktop(page: Page) -> None:
    fold, chat = page.get_by_role("button", name="Memory"), page.locator(".chat")
    before = chat.bounding_box()
    assert before
    assert before["width"] > 1280 / 2  # the conversation is the wider column
    fold.click()
    expect(page.locator(".blocks")).to_be_hidden()
    after = chat.bounding_box()
    assert after
    assert after["width"] > before["width"]
    fold.click()
    expect(page.locator(".blocks .block")).to_have_count(12)


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


def test_dark_mode(page: Page) -> None:
    def colours(scheme: Any) -> list[str]:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        script = "it => [getComputedStyle(it).backgroundColor, getComputedStyle(it).color]"
        return [colour for place in ("body", "[data-path='2']") for colour in page.locator(place).evaluate(script)]

    assert not set(colours("light")) & set(colours("dark"))


def test_errors_are_told(page: Page) -> None:
    page.fill("#input", "too long " * CONTEXT)
    page.press("#input", "Enter")
    expect(page.locator(".error")).to_contain_text(f"are more than the model's {CONTEXT}")
    page.context.set_offline(True)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".error")).to_contain_text("The server cannot be reached")
    expect(page.locator("#offline")).to_be_visible()
    page.context.set_offline(False)
    expect(page.locator("#offline")).to_be_hidden()
    ask(page, "tell me of neon")  # what failed is no part of the conversation
    assert lit(page) == ["1", "1.1"]


def test_a_long_conversation_leaves_out_its_oldest_turns(page: Page) -> None:
    for _ in range(4):
        ask(page, "tell me of neon, and at some length")
    assert page.locator(".note").last.inner_text() == "Left out, to fit the model's context: the oldest 1 turn."


def test_stop(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.let(4)
    page.fill("#input", "tell me of neon")
    page.press("#input", "Enter")
    expect(page.locator("[aria-busy=true] .words")).not_to_be_empty()
    page.click("#stop")
    expect(page.locator("footer")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_focused()  # it has taken the place of the other
    assert len(page.locator(".words").text_content() or "") < LENGTH
    gate.open()
    assert eventually(lambda: server.engine.active == 0)
    ask(page, "tell me of iron")
    assert lit(page) == ["2", "2.0"]


def test_escape_stops_a_reply(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.let(4)
    page.fill("#input", "tell me of neon")
    page.press("#input", "Enter")
    expect(page.locator("[aria-busy=true] .words")).not_to_be_empty()
    page.press("#input", "Escape")
    expect(page.locator("footer")).to_contain_text("stopped")
    gate.open()
    assert eventually(lambda: server.engine.active == 0)


def test_a_full_queue_and_a_server_that_is_gone(
    browser: Browser, loading: Callable[[], MemoryModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with watched(browser) as context:
        with serving(loading, max_batch=1, max_queue=0) as server, ThreadPoolExecutor(1) as pool:
            page = opened(context, server)
            other = pool.submit(direct, server, "tell me of iron", "fetched")
            assert eventually(lambda: server.engine.active == 1)
            page.fill("#input", "tell me of neon")
            page.press("#input", "Enter")
            expect(page.locator(".error")).to_have_text("The queue is full; try again in a moment.")
            gate.open()
            other.result()
            page.get_by_role("button", name="Try again").click()
            expect(page.locator("footer")).to_contain_text("tokens/s")
        expect(page.locator("#offline")).to_be_visible()
        page.fill("#input", "now of iron")
        page.press("#input", "Enter")
        expect(page.locator(".error")).to_contain_text(
            "The server cannot be reached. Is hiermem serve still running?"
        )


def test_an_api_key_is_asked_for(browser: Browser, loading: Callable[[], MemoryModel]) -> None:
    with serving(loading, api_key="open sesame") as server, watched(browser) as context:
        page = context.new_page()
        page.goto(server.url)
        for key, words in (("wrong", "only with its API key"), ("open sesame", "does not take this key")):
            expect(page.locator("#key-words")).to_contain_text(words)
            page.fill("#key-input", key)
            page.keyboard.press("Enter")
        page.wait_for_selector(".blocks .block")
        ask(page, "tell me of neon")
        assert lit(page) == ["1", "1.1"]
        page.reload()  # the tab remembers
        page.wait_for_selector(".blocks .block")
        expect(page.locator("#key")).to_be_hidden()


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
        const start = performance.now();
        picture.show(nodes);
        picture.light(["7", "7.7", "7.7.7"]);
        return performance.now() - start;
    }"""
    assert page.evaluate(script, nodes) < 2000  # ms
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
