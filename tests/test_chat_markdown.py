"""Replies as Markdown in a terminal: what stands on the screen while they come, and once they are over."""

from __future__ import annotations

import io
import os
import pathlib
import pty
import random
import re
import sys

import pytest
from rich.console import Console

from mlx_hiermem.apps.cli import markdown
from mlx_hiermem.apps.cli.display import console, written

SOURCE = """# The elements

Neon is a **noble** gas, *not* a `metal`; see [its page](https://example.org/neon) and
<https://example.org>. This goes on, with **bold
text** on two lines.

1. Take __one__:
   - small

   ```python
   if a < b: print("<b>")
   ```
2. Take two

- loose

- list

> Said by
> somebody.

| element | number |
|:--|--:|
| Ne | 10 |

---
Roses are red,
<b>not HTML</b> &#13;&#27;[2J ![a picture](https://example.org/x.png)
"""
SHOWN = """\
The elements

Neon is a noble gas, not a metal; see its page
(https://example.org/neon) and
https://example.org. This goes on, with bold
text on two lines.

 1 Take one:
    • small
     if a < b: print("<b>")
 2 Take two

 • loose

 • list

▌ Said by
▌ somebody.

 element  number
 ───────────────
 Ne           10

--------------------------------------------------

Roses are red,
<b>not HTML</b> �[2J !a picture
(https://example.org/x.png)
"""
WIDTH, HEIGHT = 50, 8


class Screen(io.StringIO):
    """What a terminal shows of the codes that are written here; all that scrolled away is above."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True
        self.written: list[str] = []  # by each write

    def write(self, text: str) -> int:
        self.written.append(text)
        for code, character in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|([^\x1b])", text):
            if not code:
                self._put(character)
            elif code == "\x1b[1A":
                self.row -= 1
                assert self.row >= len(self.lines) - HEIGHT, "it went above the screen"
            elif code == "\x1b[2K":
                self.lines[self.row] = ""
            elif code.startswith("\x1b[?25"):
                self.cursor = code.endswith("h")
            else:
                assert code.endswith("m"), code
        return len(text)

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row >= len(self.lines))
        elif character == "\r":
            self.column = 0
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def terminal(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(markdown, "EVERY", 0.0)
    return Console(file=screen, force_terminal=True, width=WIDTH, height=HEIGHT, color_system="standard")


def shown(terminal: Console, text: str, size: int = 3) -> None:
    with markdown.markdown(terminal) as show:
        for at in range(0, len(text), size):
            show(text[at : at + size])


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_what_is_left_does_not_depend_on_the_pieces(terminal: Console, screen: Screen, size: int) -> None:
    shown(terminal, SOURCE, size)
    assert screen.text == SHOWN
    assert screen.cursor


def test_it_is_seen_while_it_comes(terminal: Console, screen: Screen) -> None:
    """Each piece at once, in one write; what is over is not written again."""
    with markdown.markdown(terminal) as show:
        show("First.\n\nSome **bo")
        assert screen.text == "First.\n\nSome **bo"
        assert not screen.cursor
        before = len(screen.written)
        show("ld** text")
        assert screen.text == "First.\n\nSome bold text"
        assert len(screen.written) == before + 1
        assert "First" not in screen.written[-1]
        assert "\x1b[1mbold\x1b[0m" in screen.written[-1]


def test_a_block_that_is_taller_than_the_screen(terminal: Console, screen: Screen) -> None:
    """Its end is seen while it comes; in the end all of it is there, once."""
    lines = [f"line {number}" for number in range(3 * HEIGHT)]
    with markdown.markdown(terminal) as show:
        show("Before.\n\n")
        for line in lines:
            show(f"{line}\n")
            assert screen.text.splitlines()[-1] == line
    assert screen.text == "\n".join(["Before.", "", *lines, ""])


def test_a_reply_that_is_stopped_stays(terminal: Console, screen: Screen) -> None:
    def stopped() -> None:
        with markdown.markdown(terminal) as show:
            show("One.\n\nTwo *thr")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert screen.text == "One.\n\nTwo *thr\n"
    assert screen.cursor


def test_no_colours_where_none_are_wanted(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown(Console(file=screen, force_terminal=True, width=WIDTH, color_system="standard"), SOURCE)
    codes = {
        number for code in re.findall(r"\x1b\[([\d;]*)m", "".join(screen.written)) for number in code.split(";")
    }
    assert codes <= {"", "0", "1", "2", "3", "4", "9"}  # bold, dim, italic, underlined, struck out


@pytest.mark.slow
def test_nothing_controls_the_terminal_and_nothing_is_lost(terminal: Console, screen: Screen) -> None:
    """The screen fails at every code that it does not know."""
    seed = random.Random(0)
    marks = ["*", "**", "_", "`", "~~", "[", "](", ")", "<b>", "<kbd>", "</kbd>", "<!--", "|", "\\", "!["]
    marks += ["&#27;", "&#155;", "&#13;", "&amp;", "http://a.b"]
    marks += ["```\n", "\n", "\n\n", "- ", "1. ", "> ", "# ", "|--|\n", "\t", "    ", "---\n", "===\n", "[a]: b\n"]
    marks += ["\x1b[2J", "\x07", "\r", "\x9b2J", "\x0b", "\u2028", "word "]
    for number in range(300):
        text = "".join(seed.choice((*marks, f"w{n}w")) for n in range(seed.randrange(1, 30)))
        shown(terminal, text, seed.randrange(1, 20))
        words = re.findall(r"w\d+w", re.sub(r"(```|\n\[).*", "", text))  # a fence's first line names a language
        missing = [word for word in words if word not in screen.text.replace("\n", "")]
        assert not missing, (number, text)
        screen.clear()


def test_a_pipe_and_plain_get_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)  # as FORCE_COLOR does
    with written(plain=False) as show:
        show(SOURCE)
    assert capsys.readouterr().out == f"{SOURCE}\n"
    monkeypatch.setattr(console, "_file", stand_in := io.StringIO())
    monkeypatch.setattr(stand_in, "isatty", lambda: True, raising=False)
    with written(plain=True) as show:
        show(SOURCE)
    assert stand_in.getvalue() == f"{SOURCE}\n"


def test_in_a_real_terminal(tmp_path: pathlib.Path) -> None:
    """The same from a process of its own, which has a terminal of its own."""
    program = (
        "from mlx_hiermem.apps.cli.display import written\n"
        f"with written(plain=False) as show:\n    [show(piece) for piece in {SOURCE!r}]"
    )
    child, master = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": str(WIDTH), "LINES": str(HEIGHT)}
        os.execv(sys.executable, [sys.executable, "-c", program])
    text = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # Linux says so at the end
            break
        if not piece:
            break
        text += piece
    assert os.waitpid(child, 0)[1] == 0
    screen = Screen()
    screen.write(text.decode())
    assert screen.text == SHOWN
