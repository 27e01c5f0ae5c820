"""The page where something is in the way: errors, a reply that is stopped, a full queue, an API key."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import (
    LENGTH,
    ask,
    direct,
    lit,
    opened,
    watched,
)
from playwright.sync_api import Browser, Page, expect
from serving import CONTEXT, Gate, Running, eventually, serving

from mlx_hiermem.model import MemoryModel


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
        tries = ("wrong", "only with its API key"), ("ключ", "does not take"), ("open sesame", "does not take")
        for key, words in tries:
            expect(page.locator("#key-words")).to_contain_text(words)
            page.fill("#key-input", key)
            page.keyboard.press("Enter")
        page.wait_for_selector(".blocks .block")
        ask(page, "tell me of neon")
        assert lit(page) == ["1", "1.1"]
        page.reload()  # the tab remembers
        page.wait_for_selector(".blocks .block")
        expect(page.locator("#key")).to_be_hidden()
