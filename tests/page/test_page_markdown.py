"""Markdown in the page's replies, in a real headless Chromium: what is shown, while it comes and after it; and that
nothing in a reply becomes anything else.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from browsing import ask
from playwright.sync_api import Browser, Page, Route, expect

ALL = """# The elements

Neon is a **noble** gas, *not* a `metal`; see [its page](https://example.org/neon "Neon").

1. Take __one__:
   - small
   - light

   ```python
   if a < b:
   \tprint("<b>")
   ```
2. Take ~~two~~ <https://example.org/a_b_c>

> Said by
> somebody.

| element | number |
|:--|--:|
| Ne | 10 |
| \\|x\\| | `a` |

---
First line
second line with snake_case_name, 2 * 3 * 4 and \\*stars\\*.
"""
SHOWN = (
    "<h3>The elements</h3>"
    "<p>Neon is a <strong>noble</strong> gas, <em>not</em> a <code>metal</code>; see "
    '<a href="https://example.org/neon" title="https://example.org/neon" target="_blank" rel="noopener noreferrer">'
    "its page</a>.</p>"
    '<ol><li><p>Take <strong>one</strong>:</p><ul><li><p>small</p></li><li><p>light</p></li></ul><div class="code">'
    '<div class="top"><span>python</span><button type="button" aria-label="Copy this code">Copy</button></div>'
    '<pre tabindex="0" role="region" aria-label="Code, python"><code>'
    'if a &lt; b:\n\tprint("&lt;b&gt;")</code></pre>'
    "</div></li><li><p>Take <del>two</del> "
    '<a href="https://example.org/a_b_c" title="https://example.org/a_b_c" target="_blank" '
    'rel="noopener noreferrer">https://example.org/a_b_c</a></p></li></ol>'
    "<blockquote><p>Said by\nsomebody.</p></blockquote>"
    '<div class="table" tabindex="0" role="region" aria-label="Table"><table><thead><tr><th>element</th>'
    '<th class="right">number</th></tr></thead><tbody><tr><td>Ne</td><td class="right">10</td></tr>'
    '<tr><td>|x|</td><td class="right"><code>a</code></td></tr></tbody></table></div>'
    "<hr>"
    "<p>First line\nsecond line with snake_case_name, 2 * 3 * 4 and *stars*.</p>"
)
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "# <svg onload=alert(1)>",
    "- <a href='javascript:alert(1)'>x</a>",
    "| <b>x</b> | y |\n|---|---|\n| <img src=x onerror=alert(1)> | z |",
    "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>",
    "```html\n<script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](//example.org)",
    "[x](/v1/models)",
    "[x](file:///etc/passwd)",
    "<javascript:alert(1)>",
    "![x](https://example.org/x.png)",
    '[x](https://example.org/"onmouseover="alert(1))',
    "[x](https://example.org 'a' onclick='alert(1)')",
    'https://example.org/"><img/src=x/onerror=alert(1)>',
)
DETAILS = {
    "a *b **c** d* e": "<p>a <em>b <strong>c</strong> d</em> e</p>",
    "***a***": "<p><em><strong>a</strong></em></p>",
    "**open and `code": "<p>**open and `code</p>",
    "``a`b`` and \\`c`": "<p><code>a`b</code> and `c`</p>",
    "#no heading\n####### nor this": "<p>#no heading\n####### nor this</p>",
    "## Two ##\nnext": "<h4>Two</h4><p>next</p>",
    "- a\n  - b\n- c": "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>",
    "1. a\n  - b\n2. c": "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>",
    "- a\n\n- b": '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>',
    "3) a\n4) b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "In\n1984. A year": "<p>In\n1984. A year</p>",
    "* * *": "<hr>",
    "> a\nb\n\nc": "<blockquote><p>a\nb</p></blockquote><p>c</p>",
    "a | b\n1 | 2": "<p>a | b\n1 | 2</p>",
    "  verse\n    goes on": "<p>  verse\n    goes on</p>",
}
TAGS = "h3 h4 h5 h6 p strong em del code pre a ul ol li blockquote hr div span button table thead tbody tr th td"
WRITE = """async ([texts, growing]) => {
    const { Prose } = await import("/page/markdown.js");
    const place = document.createElement("div");
    document.body.append(place); // what would run runs
    const prose = new Prose(place, () => {});
    for (const text of texts) prose.write(text, growing);
    const made = [...place.querySelectorAll("*")].map((it) => [it.localName, ...it.getAttributeNames()]);
    const addresses = [...place.querySelectorAll("a")].map((it) => it.href);
    const found = { html: place.innerHTML, text: place.textContent, made, addresses };
    place.remove();
    return found;
}"""


def write(page: Page, *texts: str, growing: bool = False) -> Any:
    """What the last of the texts is shown as, where each goes on with the one before."""
    return page.evaluate(WRITE, [texts, growing])


def prefixes(text: str) -> list[str]:
    return [text[:end] for end in range(1, len(text) + 1)]


def replies(page: Page, text: str) -> None:
    """The server's next replies are this text, three characters at a time."""

    def answer(route: Route) -> None:
        pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
        chunks = [json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in pieces]
        body = "".join(f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]"))
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", answer)


def test_what_is_common(page: Page) -> None:
    assert write(page, ALL)["html"] == SHOWN


def test_it_ends_as_it_would_at_once(page: Page) -> None:
    assert write(page, *prefixes(ALL), growing=True)["text"] == write(page, ALL)["text"]
    for text in HOSTILE:
        assert write(page, *prefixes(text), text)["html"] == write(page, text)["html"]


def test_details(page: Page) -> None:
    for text, html in DETAILS.items():
        assert write(page, text)["html"] == html


def test_addresses(page: Page) -> None:
    for text, address in (
        ("(see https://example.org/a(b)c.)", "https://example.org/a(b)c"),
        ("**https://example.org/x**", "https://example.org/x"),
        ("[a [b] c](https://example.org/(x))", "https://example.org/(x)"),
        ("[mail](mailto:a@example.org)", "mailto:a@example.org"),
        ("![picture](https://example.org/x.png)", "https://example.org/x.png"),
    ):
        assert write(page, text)["addresses"] == [address]


def test_nothing_in_a_reply_becomes_anything_else(page: Page) -> None:
    """Neither whole nor at any moment while it comes."""
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    given = {"href", "title", "target", "rel", "class", "tabindex", "role", "aria-label", "type", "start"}
    for hostile in HOSTILE:
        for text in (hostile, f"a\n{hostile}\nb", f"**{hostile}**", f"> {hostile}", f"1. {hostile}"):
            for growing in (True, False):
                found = write(page, *prefixes(text), growing=growing)
                for tag, *attributes in found["made"]:
                    assert tag in TAGS.split(), text
                    assert set(attributes) <= given, text
                assert all(one.startswith(("https://example.org", "http://")) for one in found["addresses"]), text
    assert not alerts
    assert write(page, HOSTILE[0])["text"] == HOSTILE[0]
    assert write(page, HOSTILE[8])["html"] == f"<p>{HOSTILE[8]}</p>"


def test_long_and_deep_texts_do_not_stop_the_page(page: Page) -> None:
    for text in (
        "> " * 5000,
        "- " * 5000,
        "*a " * 5000,
        "[" * 5000,
        "`a``" * 2000,
        "|" * 5000,
        "# " + " " * 9999 + "x",
    ):
        took = page.evaluate(
            """async (text) => {
                const { Prose } = await import("/page/markdown.js");
                const begun = performance.now();
                new Prose(document.createElement("div"), () => {}).write(text);
                return performance.now() - begun;
            }""",
            text,
        )
        assert took < 3000, text[:10]  # ms; the machine may be busy


def test_what_is_over_stays_while_the_reply_goes_on(page: Page) -> None:
    """A block that is being read or copied is not made anew, and code is copied once it is whole."""
    kept, early = page.evaluate(
        """async () => {
            const { Prose } = await import("/page/markdown.js");
            const place = document.createElement("div");
            const prose = new Prose(place, () => {});
            prose.write("one\\n\\n```\\ncode", true);
            const [first, early] = [place.firstChild, place.querySelectorAll("button").length];
            prose.write("one\\n\\n```\\ncode\\n```\\nmore", true);
            return [first === place.firstChild, [early, place.querySelectorAll("button").length]];
        }"""
    )
    assert kept
    assert early == [0, 1]
    assert (
        "button" in write(page, "```\ncode", "```\ncode")["html"]
    )  # the reply is over, the second fence never came


def test_copies_and_files_have_the_source(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    replies(page, ALL)
    ask(page, "tell me of neon")
    expect(page.locator(".words table td").first).to_have_text("Ne")
    page.get_by_role("button", name="Copy this reply").click()
    expect(page.locator("#say")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == ALL
    page.evaluate("document.getElementById('say').textContent = ''")
    page.get_by_role("button", name="Copy this code").click()
    expect(page.locator("#say")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == 'if a < b:\n\tprint("<b>")'
    page.click("#open-chats")
    page.get_by_role("button", name="tell me of neon: rename").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Save as a file").click()
    assert ALL in pathlib.Path(download.value.path()).read_text(encoding="utf-8")
    page.reload()
    assert page.locator(".words").inner_html() == SHOWN


def test_a_wide_reply_on_a_phone(browser: Browser, page: Page) -> None:
    """Code and tables scroll in themselves; the page does not."""
    page.set_viewport_size({"width": 375, "height": 740})
    wide = "x" * 200
    table = "\n".join(f"|{'|'.join([cell] * 6)}|" for cell in ("a", "--", "number"))
    replies(page, f"```\n{wide}\n```\n\n{table}\n\n{wide}")
    ask(page, "tell me of neon")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.locator(".code pre").evaluate("it => it.scrollWidth > it.clientWidth")
    assert page.locator(".table").evaluate("it => it.scrollWidth > it.clientWidth")
