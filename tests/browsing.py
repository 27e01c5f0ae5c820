"""A headless Chromium on the server's page, and what it is shown: for the tests of the page.

Without a browser these tests are skipped; where CI is set they fail instead.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import CONTEXT, Running
from tiny import Aimed, make_model

from mlx_hiermem import load
from mlx_hiermem.bank import edit
from mlx_hiermem.bank.bank import MANIFEST, MemoryBank
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.config import Path
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.router import Router

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
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
WAIT = 60_000  # ms for a reply; a busy machine is slow
LENGTH = 12  # tokens of a reply: a tiny model does not end by itself
EVIL = "<img src=x onerror=alert(1)> & more"


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as driver:
        found = shutil.which(ON_A_MAC) or shutil.which(driver.chromium.executable_path)
        found = next(filter(None, map(shutil.which, BROWSERS)), found)
        if not found:
            message = "no Chromium: install one, or let `playwright install chromium` do it"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        expect.set_options(timeout=15_000)
        browser = driver.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


def make_paged(folder: pathlib.Path) -> pathlib.Path:
    """A model whose bank has documents, a label that would be HTML, and a node that its policy blocks."""
    make_model(folder)
    bank = MemoryBank.open(folder / "bank")
    rows = {
        path: replace(row, documents=4, sources=("Alpha", "Beta"), label=EVIL if path == (0,) else f"Topic {path}")
        for path, row in bank.manifest.blocks.items()
    }
    replace(bank.manifest, blocks=rows).write(folder / "bank" / MANIFEST)
    edit.block(folder / "bank", [Path((0, 2))])
    return folder


def load_aimed(folder: pathlib.Path) -> MemoryModel:
    """The model with an embedder of `NAMES`, and a context with an end."""
    model = load(folder)
    assert model.bank
    embedder: Any = Aimed(model.bank.tree, NAMES, Path((0, 1)))
    model._router = Router(model.bank.tree, embedder, model.bank.policy)
    model.config["max_position_embeddings"] = CONTEXT
    return model


@contextmanager
def replies_cut() -> Iterator[None]:
    """Replies have `LENGTH` tokens at most."""
    real = MemoryBatch.add

    def add(self: MemoryBatch, tokens: Any, choice: Any, sampling: Any, *more: Any) -> Any:
        return real(self, tokens, choice, replace(sampling, max_tokens=min(LENGTH, sampling.max_tokens)), *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBatch, "add", add)
        yield


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


def opened(context: BrowserContext, server: Running) -> Page:
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(".blocks .block")
    return page


def ask(page: Page, text: str) -> str:
    """Asks, and waits for the end; returns the reply."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    expect(page.locator(".words").last).not_to_be_empty(timeout=WAIT)
    expect(page.locator("#send")).to_be_visible(timeout=WAIT)
    return page.locator(".words").last.text_content() or ""


def direct(server: Running, text: str, memory: Any) -> tuple[str, dict[str, Any]]:
    """The same question without the page: the reply, and its memory."""
    body = {"messages": [{"role": "user", "content": text}], "memory": memory}
    status, answer = server.json("POST", "/v1/chat/completions", body)
    assert status == 200
    return answer["choices"][0]["message"]["content"], answer["memory"]


def lit(page: Page) -> list[str | None]:
    return [block.get_attribute("data-path") for block in page.locator(".blocks .lit").all()]


def caption(page: Page) -> str:
    return page.locator("footer").last.inner_text()


def choose(page: Page, path: str, item: str) -> None:
    """Clicks a block, and an item of its menu."""
    page.locator(f".block[data-path='{path}']").click(position={"x": 8, "y": 8})
    page.get_by_role("menuitem", name=item).click()


def state(page: Page, path: str) -> str:
    """The class of a block that its state has given to it."""
    return (page.locator(f".block[data-path='{path}']").get_attribute("class") or "").split()[1]


def drawn(page: Page) -> list[str]:
    return [block.get_attribute("data-path") or "" for block in page.locator(".blocks .block").all()]
