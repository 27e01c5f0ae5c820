"""Models and banks that are loaded and unloaded from the page, in a real headless Chromium."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
from browsing import ask, load_aimed, make_paged, opened, watched
from playwright.sync_api import Browser, Page, expect
from serving import Running, serving
from tiny import HashEmbedder, make_anchor, make_bank, make_model

LISTS = ("#banks .loaded", "#banks .found")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Beside it are a model, a bank of another anchor, and a folder that is neither."""
    shelf = tmp_path_factory.mktemp("shelf")
    folder = make_paged(shelf / "model")
    make_model(shelf / "other", absent=("1.1",))
    make_bank(shelf / "stranger", make_anchor(tmp_path_factory.mktemp("elsewhere") / "anchor", seed=7))
    (shelf / "pictures").mkdir()
    return folder


@pytest.fixture
def loading_server(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr("mlx_hiermem.router.load_embedder", lambda _: HashEmbedder())
    monkeypatch.setattr("mlx_hiermem.apps.server.banks.cache_folder", lambda: folder.parent.parent / "no-cache")
    with serving(lambda: {"model": load_aimed(folder)}, allow_loading=True) as running:
        yield running


def rows(page: Page) -> list[list[str]]:
    return [page.locator(f"{place} strong").all_inner_texts() for place in LISTS]


def test_a_bank_comes_and_goes(browser: Browser, loading_server: Running, folder: pathlib.Path) -> None:
    with watched(browser) as context:
        page = opened(context, loading_server)
        before = page.locator(".blocks .block").count()
        page.get_by_role("button", name="Banks").click()
        expect(page.locator("#banks .found li")).to_have_count(2)
        assert rows(page) == [["model"], ["other", "stranger"]]
        assert page.locator("#banks .loaded small").inner_text().startswith(f"{before} blocks, ")
        assert page.locator("#banks .found small").first.inner_text() == str(folder.parent / "other")
        expect(page.get_by_role("button", name="Unload model")).to_be_disabled()  # the only one

        page.get_by_role("button", name="Load stranger").click()
        expect(page.locator("#banks .trouble")).to_contain_text("is a bank without its anchor")
        page.fill("#banks-path", str(folder.parent / "pictures"))
        page.keyboard.press("Enter")
        expect(page.locator("#banks .trouble")).to_contain_text("pictures")
        assert rows(page) == [["model"], ["other", "stranger"]]

        page.get_by_role("button", name="Load other").click()
        expect(page.locator("#banks")).to_be_hidden()
        expect(page.locator("#models")).to_have_value("other")
        expect(page.locator(".blocks .block")).to_have_count(before - 1)
        expect(page.locator("#say")).to_have_text("other is loaded, and answers now.")
        ask(page, "tell me of neon")

        page.get_by_role("button", name="Banks").click()
        assert rows(page)[0] == ["model", "other"]
        page.get_by_role("button", name="Unload other").click()
        expect(page.locator("#about")).to_contain_text("model has")
        expect(page.locator(".blocks .block")).to_have_count(before)
        assert rows(page) == [["model"], ["other", "stranger"]]
        page.keyboard.press("Escape")
        expect(page.locator("#models")).to_be_hidden()
        assert list(loading_server.engine.models) == ["model"]


def test_another_one_goes_while_this_one_answers(
    browser: Browser, loading_server: Running, folder: pathlib.Path
) -> None:
    path = str(folder.parent / "other")
    assert loading_server.json("POST", "/v1/banks/load", {"name": "other", "path": path})[0] == 200
    with watched(browser) as context:
        page = opened(context, loading_server)
        expect(page.locator("#models option")).to_have_text(["model", "other"])
        page.get_by_role("button", name="Banks").click()
        page.get_by_role("button", name="Unload other").click()
        expect(page.locator("#models option")).to_have_text(["model"])
        assert page.locator("#models").input_value() == "model"


def test_it_is_offered_only_where_it_is_allowed(page: Page) -> None:
    expect(page.locator("#about")).to_contain_text("has")
    assert page.evaluate("fetch('/v1/banks').then((answer) => answer.json())")["found"] == []
    expect(page.get_by_role("button", name="Banks")).to_be_hidden()
