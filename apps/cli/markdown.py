"""A reply's Markdown in the terminal, while it comes.

A block that is over (a paragraph, an item of a list, code) is printed once and stays in the terminal's scrollback.
Only the block that is being written is drawn again as it grows, and no more of it than the screen holds.
markdown-it-py reads the text, Rich lays it out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live_render import LiveRender
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.theme import Theme

from mlx_hiermem.printable import printable

EVERY = 0.08  # seconds between two drawings: laying out takes time from the model
STYLES = Theme(  # for dark and light terminals
    {
        **dict.fromkeys(("markdown.h1", "markdown.h2", "markdown.h3", "markdown.table.header"), "bold"),
        **dict.fromkeys(("markdown.h4", "markdown.h5", "markdown.h6"), "italic"),
        **dict.fromkeys(("markdown.hr", "markdown.block_quote", "markdown.item.number"), "dim"),
        **dict.fromkeys(("markdown.link", "markdown.table.border"), "none"),
        "markdown.code": "cyan",
        "markdown.link_url": "underline",
    }
)
# HTML and pictures stay text, and so does `[name]: address`, which could stand far from its use.
PARSER = MarkdownIt("commonmark", {"html": False})
PARSER.enable(["strikethrough", "table"]).disable(["image", "reference"])


@contextmanager
def markdown(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows the pieces that are given to it. The cursor is at the start of a line before and after."""
    reply = Reply(console)
    with console.use_theme(STYLES):
        console.show_cursor(False)
        try:
            yield reply.take
        finally:
            reply.end()
            console.show_cursor(True)


class Reply:
    """What was printed of a reply, and the text of the block that is being written."""

    def __init__(self, console: Console) -> None:
        self._console, self._text, self._drawn = console, "", 0.0
        self._above = ("", "")  # the block above: its kind and source
        self._growing = LiveRender("")

    def take(self, piece: str) -> None:
        self._text += printable(piece)
        if time.monotonic() - self._drawn >= EVERY:
            *over, (kind, self._text) = split(self._text) or [("", self._text)]
            blocks = [self._finish(*block) for block in over]
            self._draw(*blocks, End(self._block(kind, self._text)))

    def end(self) -> None:
        blocks = [self._finish(*block) for block in split(self._text)]
        self._console.print(self._growing.position_cursor(), *blocks, end="")

    def _draw(self, *blocks: RenderableType) -> None:
        """In one write: the last of the blocks takes the place of what was growing, below the others."""
        back = self._growing.position_cursor()
        self._growing.set_renderable(blocks[-1])
        self._console.print(back, *blocks[:-1], self._growing, end="")
        self._drawn = time.monotonic()

    def _finish(self, kind: str, source: str) -> RenderableType:
        block, self._above = self._block(kind, source), (kind, source)
        return block

    def _block(self, kind: str, source: str) -> RenderableType:
        """A block, with an empty line above where there is something to keep apart."""
        above, before = self._above
        goes_on = above == kind == "item" and not before.endswith("\n\n")
        return Block(source, apart=bool(above) and not goes_on)


def split(text: str) -> list[tuple[str, str]]:
    """The blocks of a text, and the items of its lists, each with its kind: `item`, or its token's type."""
    starts: dict[int, str] = {}
    for token in PARSER.parse(text):
        item = token.type == "list_item_open" and token.level == 1
        if token.map and (item or token.level == 0):
            starts[token.map[0]] = "item" if item else token.type
    lines = text.split("\n")
    blocks = []
    for first, end in pairwise([*starts, len(lines)]):
        blocks.append((starts[first], "\n".join(lines[first:end]) + "\n" * (end < len(lines))))
    return blocks


class LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "default"
        yield self.text


class IndentedCode(CodeBlock):
    """Without a background, and in the terminal's own colours."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 2))


class Blocks(Markdown):
    """Rich's, but lines stay lines, addresses are shown, and nothing is left out."""

    elements = Markdown.elements | {
        "heading_open": LeftHeading,
        "fence": IndentedCode,
        "code_block": IndentedCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", justify="default", hyperlinks=False)
        self.parsed = _shown(PARSER.parse(text))


def _shown(tokens: list[Token]) -> list[Token]:
    """Without control characters, which `&#13;` stands for, and with line breaks that Rich keeps."""
    for token in tokens:
        token.content = printable(token.content)
        token.type = {"softbreak": "hardbreak"}.get(token.type, token.type)
        if token.children is not None:  # an address that is its own text needs no second
            token.children = _shown([one for one in token.children if one.markup != "autolink"])
    return tokens


class Block:
    """One block without the empty lines that Rich puts around some; `apart` has one above."""

    def __init__(self, source: str, apart: bool) -> None:
        self.parsed, self.apart = Blocks(source), apart

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.parsed, options, pad=False)
        full = [at for at, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        for line in ([[]] if self.apart else []) + lines[min(full, default=0) : max(full, default=-1) + 1]:
            yield from line
            yield Segment.line()


class End:
    """The end of a block that may be taller than the screen."""

    def __init__(self, block: RenderableType) -> None:
        self.block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.block, options, pad=False)
        for line in lines[-max(options.size.height - 1, 1) :]:
            yield from line
            yield Segment.line()
