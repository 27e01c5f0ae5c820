"""The page as a place to stay, in a real headless Chromium: conversations that are kept, and what can be done with
a turn.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from browsing import LENGTH, WAIT, ask, direct, lit, load_aimed, opened, watched
from playwright.sync_api import Browser, Page, Request, expect
from serving import Gate, Running, eventually, serving
from tiny import make_model

from mlx_hiermem.model import MemoryModel


@pytest.fixture
def asked(page: Page) -> list[Any]:
    """The bodies of the page's requests for a reply."""
    bodies: list[Any] = []

    def take(request: Request) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", take)
    return bodies


def said(body: Any) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in body["messages"]]


def titles(page: Page) -> list[str]:
    return page.locator("#chats .title").all_inner_texts()


def offer(page: Page, title: str, item: str) -> None:
    """Chooses from the menu of a conversation in the list."""
    page.get_by_role("button", name=f"{title}: rename").click()
    page.get_by_role("menuitem", name=item).click()


def halfway(page: Page, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Asks for neon; the reply waits at the gate when some of it is written."""
    gate = Gate(monkeypatch)
    gate.let(4)
    page.fill("#input", "tell me of neon")
    page.press("#input", "Enter")
    expect(page.locator("[aria-busy=true] .words")).not_to_be_empty()
    return gate


def ended(page: Page, server: Running, gate: Gate) -> None:
    """Opens the gate, and waits until nothing is written any more."""
    gate.open()
    assert eventually(lambda: server.engine.active == 0)
    expect(page.locator("#send")).to_be_visible(timeout=WAIT)


def rename(page: Page, title: str, new: str) -> None:
    offer(page, title, "Rename")
    page.keyboard.type(new)
    page.keyboard.press("Enter")


def second(page: Page, server: Running) -> Page:
    """Another tab of the same browser, with the list open."""
    other = opened(page.context, server)
    other.click("#open-chats")
    return other


def test_conversations_are_kept(page: Page) -> None:
    replies = [ask(page, "tell me of neon"), ask(page, "and its colour?")]
    page.click("#new")
    ask(page, "now of iron")
    page.reload()
    expect(page.locator(".user p")).to_have_text("now of iron")
    expect(page.locator(".blocks .lit")).to_have_count(2)
    assert lit(page) == ["2", "2.0"]
    page.click("#open-chats")
    assert titles(page) == ["now of iron", "tell me of neon"]
    page.click("#chats .title >> nth=1")
    assert page.locator(".words").all_inner_texts() == replies
    assert lit(page) == ["1", "1.1"]
    assert "Topic 1 › Topic 1.1" in page.locator("footer").last.inner_text()
    assert page.title().startswith("tell me of neon · ")
    page.go_back()
    expect(page.locator(".user p")).to_have_text("now of iron")
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".user p")).to_have_text("now of iron")
    ask(other, "and what else?")
    expect(page.locator(".user p")).to_have_count(2)  # the first window takes up what is said in the second


def test_rename_save_delete(page: Page) -> None:
    reply = ask(page, "tell me of neon")
    page.click("#open-chats")
    rename(page, "tell me of neon", "Noble gases")
    assert titles(page) == ["Noble gases"]
    expect(page.locator(":focus")).to_have_text("Noble gases")
    with page.expect_download() as download:
        offer(page, "Noble gases", "Save as a file")
    assert download.value.suggested_filename == "Noble gases.md"
    text = pathlib.Path(download.value.path()).read_text(encoding="utf-8")
    assert text.startswith("# Noble gases\n\n**tell me of neon**\n\n")
    assert reply.strip() in text
    page.reload()
    page.click("#open-chats")
    assert titles(page) == ["Noble gases"]
    offer(page, "Noble gases", "Delete")
    assert titles(page) == []
    assert page.locator(".turn").count() == 0
    expect(page.locator(":focus")).to_have_text("Undo")
    page.keyboard.press("Enter")
    assert titles(page) == ["Noble gases"]
    page.click("#chats .title")
    assert page.locator(".words").inner_text() == reply
    offer(page, "Noble gases", "Delete")
    page.reload()
    page.click("#open-chats")
    expect(page.locator("#chats .empty")).to_be_visible()


def test_edit_ask_again_copy(page: Page, asked: list[Any]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    first = ask(page, "tell me of neon")
    page.get_by_role("button", name="Copy this reply").click()
    expect(page.locator("#say")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == first
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as over plain HTTP
    page.evaluate("document.getElementById('say').textContent = ''")
    page.get_by_role("button", name="Copy this reply").click()
    expect(page.locator("#say")).to_have_text("Copied.")
    ask(page, "and its colour?")
    page.get_by_role("button", name="Edit this question").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".rewrite .note").inner_text() == "What follows goes."
    page.keyboard.press("Escape")
    expect(page.locator(":focus")).to_have_text("Edit")
    page.keyboard.press("Enter")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("tell me of iron")
    page.keyboard.press("Enter")
    expect(page.locator(".actions").last).to_contain_text("Ask again", timeout=WAIT)
    assert page.locator(".user p").all_inner_texts() == ["tell me of iron"]
    assert lit(page) == ["2", "2.0"]
    ask(page, "and what else?")
    page.get_by_role("button", name="Ask again").last.click()
    expect(page.locator("#send")).to_be_visible(timeout=WAIT)
    assert page.locator(".user p").all_inner_texts() == ["tell me of iron", "and what else?"]
    iron = page.locator(".words").first.inner_text()
    again = ["user: tell me of iron", f"assistant: {iron}", "user: and what else?"]
    assert [said(body) for body in asked[2:]] == [again[:1], again, again]


def test_system_message_and_temperature(page: Page, asked: list[Any]) -> None:
    ask(page, "tell me of neon")
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.7")
    page.keyboard.press("Enter")
    expect(page.locator("#open-settings")).to_have_text("Settings: system message, temperature 0.7")
    page.reload()
    expect(page.locator("#open-settings")).to_have_text("Settings: system message, temperature 0.7")
    ask(page, "and its colour?")
    page.click("#open-settings")
    page.fill("#temperature", "3")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#settings")).to_be_visible()  # it is not taken
    page.keyboard.press("Escape")
    page.click("#new")
    expect(page.locator("#open-settings")).to_have_text("Settings")  # they are the conversation's own
    ask(page, "tell me of iron")
    assert [body.get("temperature") for body in asked] == [None, 0.7, None]
    assert [said(body)[0] for body in asked] == [
        "user: tell me of neon",
        "system: Be brief.",
        "user: tell me of iron",
    ]


def test_memories_side_by_side(page: Page, server: Running) -> None:
    reply = ask(page, "tell me of neon")
    page.get_by_role("button", name="Compare memories").click()
    expect(page.locator(".compare .words")).to_have_count(3)
    expect(page.locator("#send")).to_be_visible(timeout=WAIT)
    expected = [direct(server, "tell me of neon", memory)[0] for memory in ("none", "generic", "fetched")]
    assert page.locator(".compare .words").all_inner_texts() == expected
    assert expected[2] == reply
    boxes = [page.locator(".compare .turn").nth(number).bounding_box() for number in range(3)]
    assert len({box["y"] for box in boxes if box}) == 1
    page.reload()
    assert page.locator(".compare .words").all_inner_texts() == expected
    page.get_by_role("button", name="Close comparison").click()
    page.reload()
    expect(page.locator(".words")).to_have_count(1)


def test_a_reply_that_was_left_is_kept_as_far_as_it_came(
    page: Page, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = halfway(page, monkeypatch)
    page.click("#new")
    assert page.locator(".turn").count() == 0
    ended(page, server, gate)
    page.go_back()
    assert 0 < len(page.locator(".words").inner_text()) < LENGTH
    ask(page, "tell me of iron")
    assert page.locator(".user p").all_inner_texts() == ["tell me of neon", "tell me of iron"]


def test_back_from_a_reply_that_is_written(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(page, "now of iron")
    iron = page.url
    page.click("#new")
    gate = halfway(page, monkeypatch)
    neon = page.url
    page.go_back()
    expect(page.locator(".user p")).to_have_text("now of iron")
    assert page.url == iron != neon
    ended(page, server, gate)
    page.reload()
    expect(page.locator(".user p")).to_have_text("now of iron")
    page.go_forward()
    expect(page.locator(".user p")).to_have_text("tell me of neon")
    assert 0 < len(page.locator(".words").inner_text()) < LENGTH


def test_deleted_while_its_reply_is_written(page: Page, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = halfway(page, monkeypatch)
    page.click("#open-chats")
    offer(page, "tell me of neon", "Delete")
    assert titles(page) == []
    ended(page, server, gate)
    assert titles(page) == titles(second(page, server)) == []
    page.get_by_role("button", name="Undo").click()
    page.click("#chats .title")
    assert 0 < len(page.locator(".words").inner_text()) < LENGTH  # as far as it came


@pytest.mark.parametrize("elsewhere", [False, True])
def test_renamed_while_its_reply_is_written(
    page: Page, server: Running, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """In this tab, or in another."""
    gate = halfway(page, monkeypatch)
    page.click("#open-chats")
    rename(second(page, server) if elsewhere else page, "tell me of neon", "Noble gases")
    expect(page.locator("#chats .title")).to_have_text("Noble gases")
    page.click("#chats .title")  # it is shown already
    ended(page, server, gate)
    reply = direct(server, "tell me of neon", "fetched")[0]
    for _ in range(2):
        assert page.title().startswith("Noble gases · ")
        assert page.locator(".words").text_content() == reply
        page.reload()
        page.wait_for_selector(".blocks .block")


@pytest.mark.parametrize("cleared", [False, True])
def test_deleted_in_another_tab_while_its_reply_is_written(
    page: Page, server: Running, monkeypatch: pytest.MonkeyPatch, cleared: bool
) -> None:
    gate = halfway(page, monkeypatch)
    other = second(page, server)
    if cleared:
        other.evaluate("localStorage.clear()")
    else:
        offer(other, "tell me of neon", "Delete")
    expect(page.locator(".turn")).to_have_count(0)
    ended(page, server, gate)
    assert titles(second(page, server)) == []


def test_a_wait_is_explained(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    page.fill("#input", "tell me of neon")
    page.press("#input", "Enter")
    expect(page.locator(".wait")).to_have_text("Reading the conversation, 2 s")
    gate.open()
    expect(page.locator(".words")).not_to_be_empty(timeout=WAIT)
    expect(page.locator(".wait")).to_be_hidden()


def test_where_nothing_can_be_kept(browser: Browser, server: Running) -> None:
    for script, words in (
        ("Storage.prototype.setItem = () => { throw new Error('full') }", "no more room"),
        ("Object.defineProperty(window, 'localStorage', { get() { throw new Error('no') } })", "keeps nothing"),
    ):
        with watched(browser) as context:
            context.add_init_script(script)
            page = opened(context, server)
            ask(page, "tell me of neon")
            assert words in page.locator("#trouble").inner_text()
            page.click("#open-chats")
            assert titles(page) == []


def test_models_are_chosen(browser: Browser, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Each with its own bank; a conversation goes on with the model that it had."""
    other = make_model(tmp_path / "other", absent=("1.1",))

    def loading() -> dict[str, MemoryModel]:
        return {"first": load_aimed(folder), "second": load_aimed(other)}

    with serving(loading) as running, watched(browser) as context:
        page = opened(context, running)
        expect(page.locator("#models option")).to_have_text(["first", "second"])
        ask(page, "tell me of neon")
        first = page.locator(".blocks .block").count()
        page.click("[data-path='0.0']")
        page.get_by_role("menuitem", name="Block").click()
        page.select_option("#models", "second")
        expect(page.locator("#about")).to_contain_text("second has")
        expect(page.locator(".blocks .block")).to_have_count(first - 1)
        assert page.locator("#chosen li").count() == 0  # the paths of another bank
        page.click("#new")
        ask(page, "tell me of iron")
        page.go_back()
        expect(page.locator("#models")).to_have_value("first")
        expect(page.locator(".blocks .block")).to_have_count(first)
        page.reload()
        expect(page.locator("#models")).to_have_value("first")


def test_the_list_on_a_phone(browser: Browser, server: Running) -> None:
    phone: dict[str, Any] = {"viewport": {"width": 375, "height": 740}, "has_touch": True, "is_mobile": True}
    with watched(browser, **phone) as context:
        page = context.new_page()
        page.goto(server.url)
        ask(page, "tell me of neon")
        page.get_by_role("button", name="Compare memories").tap()
        expect(page.locator("#send")).to_be_visible(timeout=WAIT)
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        page.get_by_role("button", name="Chats").tap()
        expect(page.locator("#chats")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#chats")).to_be_hidden()
        expect(page.get_by_role("button", name="Chats")).to_be_focused()
        page.tap("#new")
        ask(page, "tell me of iron")
        page.get_by_role("button", name="Chats").tap()
        page.get_by_role("button", name="tell me of neon", exact=True).tap()
        expect(page.locator("#chats")).to_be_hidden()
        expect(page.locator(".user p")).to_have_text("tell me of neon")
