"""The web page in a real headless Chromium, against the real server over a tiny model; and the page that
`hiermem bank show --html` writes, which has the same picture.

Without a browser these tests are skipped; where CI is set they fail.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import CONTEXT, Running, serving
from tiny import Aimed, make_model

from mlx_hiermem import load
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROME = pathlib.Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = {"neon": Path((1, 1)), "iron": Path((2, 0))}
LENGTH = 12  # tokens of a reply: a tiny model does not end by itself
EVIL = "<img src=x onerror=alert(1)> & more"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), str(CHROME) if CHROME.exists() else None)
    if not found:
        message = f"no browser: none of {', '.join(BROWSERS)} is on the PATH"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A bank with documents and sources, a label that would be HTML, and a node that its policy blocks."""
    folder = make_model(tmp_path_factory.mktemp("page") / "model")
    bank = MemoryBank.open(folder / "bank")
    rows = {
        path: replace(row, documents=4, sources=("Alpha", "Beta"), label=EVIL if path == (0,) else f"Topic {path}")
        for path, row in bank.manifest.blocks.items()
    }
    replace(bank.manifest, blocks=rows).write(folder / "bank" / MANIFEST)
    edit.block(folder / "bank", [Path((0, 2))])
    return folder


@pytest.fixture(scope="module")
def loading(folder: pathlib.Path) -> Callable[[], MemoryModel]:
    def loading() -> MemoryModel:
        model = load(folder)
        assert model.bank
        embedder: Any = Aimed(model.bank.tree, NAMES, Path((0, 1)))
        model._router = Router(model.bank.tree, embedder, model.bank.policy)
        model.config["max_position_embeddings"] = CONTEXT
        return model

    return loading


@pytest.fixture(scope="module", autouse=True)
def short_replies() -> Iterator[None]:
    real = MemoryBatch.add

    def add(self: MemoryBatch, tokens: Any, choice: Any, sampling: Any) -> Any:
        return real(self, tokens, choice, replace(sampling, max_tokens=min(LENGTH, sampling.max_tokens)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBatch, "add", add)
        yield


@pytest.fixture(scope="module")
def server(loading: Callable[[], MemoryModel]) -> Iterator[Running]:
    with serving(loading) as running:
        yield running


@contextmanager
def watched(browser: Browser, **options: Any) -> Iterator[BrowserContext]:
    """A fresh profile. Fails where its pages complain, or ask another host for something."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    context.set_default_timeout(15_000)
    complaints: list[str] = []
    hosts: set[str] = set()
    context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("request", lambda request: hosts.add(request.url.split("/")[2].partition(":")[0]))
    try:
        yield context
        # A refused request is in the console whatever the page does about it.
        assert not [text for text in complaints if "Failed to load resource" not in text]
        assert hosts <= {"127.0.0.1", ""}
    finally:
        context.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    with watched(browser) as context:
        yield opened(context, server)


def opened(context: BrowserContext, server: Running) -> Page:
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(".blocks .block")
    return page


def ask(page: Page, text: str) -> str:
    """Asks, and waits for the end; returns the reply."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    expect(page.locator(".words").last).not_to_be_empty()
    expect(page.locator("#send")).to_be_visible()
    return page.locator(".words").last.text_content() or ""


def direct(server: Running, text: str, memory: Any) -> tuple[str, dict[str, Any]]:
    """The same question without the page: the reply, and its memory."""
    body = {"messages": [{"role": "user", "content": text}], "memory": memory}
    status, answer = server.json("POST", "/v1/chat/completions", body)
    assert status == 200
    return answer["choices"][0]["message"]["content"], answer["memory"]


def lit(page: Page) -> list[str | None]:
    return [block.get_attribute("data-path") for block in page.locator(".blocks .lit").all()]


def choose(page: Page, path: str, item: str) -> None:
    """Clicks a block, and an item of its menu."""
    page.locator(f".block[data-path='{path}']").click(position={"x": 8, "y": 8})
    page.get_by_role("menuitem", name=item).click()


def caption(page: Page) -> str:
    return page.locator("footer").last.inner_text()


def test_a_conversation_and_a_change_of_topic(page: Page, server: Running) -> None:
    first = ask(page, "tell me of neon")
    assert first == direct(server, "tell me of neon", "auto")[0]
    assert lit(page) == ["1", "1.1"]
    assert "Topic 1 › Topic 1.1" in caption(page)
    assert "fetched" in caption(page)
    assert "tokens/s" in caption(page)
    expect(page.locator(".block[data-path='1.1']")).to_have_attribute(
        "aria-label", "1.1 Topic 1.1, answering", timeout=1
    ) if False else None
    ask(page, "and its colour?")
    assert lit(page) == ["1", "1.1"]
    assert "already in memory · kept the topic" in caption(page)
    ask(page, "now of iron")
    assert lit(page) == ["2", "2.0"]
    expect(page.locator(".block[data-path='1.1']")).to_have_class("block in-memory")
    expect(page.locator("#held")).to_contain_text("of 512")
    expect(page.locator("#say")).to_contain_text("Topic 2 › Topic 2.0")
    page.locator("button.path").first.click()
    assert lit(page) == ["1", "1.1"]
    page.click("#new")
    assert (page.locator(".turn").count(), lit(page)) == (0, [])
