"""The web page in a real headless Chromium, against the real server over a tiny model: talk, and its memory."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from browsing import (
    NAMES,
    ask,
    caption,
    choose,
    direct,
    drawn,
    lit,
    opened,
    state,
    watched,
)
from elements import BANK
from playwright.sync_api import Browser, Page, expect
from serving import Running, serving
from tiny import Aimed, HashEmbedder, give_sources, make_model

from mlx_hiermem import load
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router
from mlx_hiermem.source_search import Source, SourceSearch


def held(server: Running) -> str:
    """What the page says is in memory."""
    return f"{server.engine.model.cache.bytes / 1000:.1f} kB"


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


def test_dark_mode(page: Page) -> None:
    def colours(scheme: Any) -> list[str]:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        script = "it => [getComputedStyle(it).backgroundColor, getComputedStyle(it).color]"
        return [colour for place in ("body", "[data-path='2']") for colour in page.locator(place).evaluate(script)]

    assert not set(colours("light")) & set(colours("dark"))


def test_a_long_conversation_leaves_out_its_oldest_turns(page: Page) -> None:
    for _ in range(4):
        ask(page, "tell me of neon, and at some length")
    assert page.locator(".note").last.inner_text() == "Left out, to fit the model's context: the oldest 1 turn."
