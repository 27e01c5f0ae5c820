"""One reader for each format of files: text, Markdown, Word and the like, HTML, PDF, JSON lines, CSV.

Plain formats are read here, others by libraries that are kept well: HTML by trafilatura, PDF by pypdf, Markdown's
structure by markdown-it, and Word, PowerPoint and EPUB by markitdown, which makes Markdown of them.

A reader yields a `Document`, or `Skipped` with the reason where there is nothing to learn from. None holds more
than one document, and a long text file comes as several: a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any, TextIO

from mlx_hiermem.errors import CorpusError, MissingDependencyError
from mlx_hiermem.learn.corpus.windows import Document, Skipped

Found = Document | Skipped

PIECE = 1 << 20  # characters of a text file that make one document
TITLES = ("title", "name", "heading", "subject")  # where a record's title is looked for
EXTRA = "pip install 'mlx-hiermem[learn]'"
DAMAGED = 0.1  # share of characters that could not be decoded, from which on a file is no text
MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),  # before UTF-16's: they begin alike
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
BLOB = re.compile(r"[A-Za-z0-9+/=_-]{200,}")  # base64, keys, sequences: no words, and no language
# Its first line is a key or a comment: what stands between two rules is text.
FRONT_MATTER = re.compile(r"---\n(\s*(?:[\w-]+:|#).*?)\n(?:---|\.\.\.)(?:\n|$)", re.DOTALL)
SEPARATOR = re.compile(r"(?i:sep)=([,;\t|])\r?\n")  # what Excel writes and reads above a table
LONGEST_CELL = 1 << 30  # characters; Python's own limit ends the table


class NotTextError(Exception):
    """A file has bytes that no text has; says which."""


def clean(text: str) -> str:
    """The same text as Unicode that can be written: halves of surrogate pairs are joined, or replaced.

    JSON can spell such halves, and a file name that is not UTF-8 reaches Python as some.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def title_of(path: pathlib.Path) -> str:
    return clean(re.sub(r"[_\W]+", " ", path.stem).strip())


def encoding_of(path: pathlib.Path) -> str:
    """By the byte order mark; without one it is UTF-8."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


def read_text(path: pathlib.Path, source: str) -> Iterator[Found]:
    line = 1
    for text in _pieces(path):
        yield Document(source, title_of(path), text, line)
        line += text.count("\n")
    yield from _damage(path, source)


def _pieces(path: pathlib.Path) -> Iterator[str]:
    """A text file in pieces of about `PIECE` characters that end with a paragraph, or failing that with a line.

    Bytes that are no text are replaced (U+FFFD), so that one of them does not cost the whole file.
    """
    with path.open(encoding=encoding_of(path), errors="replace") as stream:
        rest = ""
        while block := stream.read(PIECE):
            if "\0" in block:
                raise NotTextError("binary, not text")
            if block.count("\ufffd") > DAMAGED * len(block):
                raise NotTextError("not UTF-8 text, nor UTF-16 with a byte order mark")
            rest += BLOB.sub(" ", block)
            if len(block) < PIECE:
                break
            end = max(rest.rfind("\n\n"), 0) or max(rest.rfind("\n"), rest.rfind(" "), 0) or len(rest)
            yield rest[:end]
            rest = rest[end:]
        if rest.strip():
            yield rest


def _damage(path: pathlib.Path, source: str) -> Iterator[Skipped]:
    """Says how many bytes of a text file were none; what stands around them is learnt."""
    decoder = codecs.getincrementaldecoder(encoding_of(path))(errors="replace")
    lost = 0
    with path.open("rb") as stream:
        while block := stream.read(PIECE):
            lost += decoder.decode(block).count("\ufffd") - block.count("\ufffd".encode())
    if lost > 0:
        places = "1 place is" if lost == 1 else f"{lost} places are"
        yield Skipped(source, f"{places} not UTF-8 text; all else is learnt")


def read_markdown(path: pathlib.Path, source: str) -> Iterator[Found]:
    yield from _sections("".join(_pieces(path)), title_of(path), source, line=1)
    yield from _damage(path, source)


def _sections(text: str, title: str, source: str, line: int = 0) -> Iterator[Document]:
    """One document a section, called by the file's title and its own: what stands below is about both.

    The title is that of the front matter, else the first heading, else the file's name. `line` is the text's first
    in the file; 0 where its lines are not the file's.
    """
    from markdown_it import MarkdownIt

    called, section, start = "", "", 0
    if front := FRONT_MATTER.match(text):
        found = re.search(r"^title:[ \t]*(.+)$", front[1], re.MULTILINE)
        called = found[1].strip(" \t\"'") if found else ""
        text = text[front.end() :]
        line += front[0].count("\n") if line else 0
    lines = text.splitlines()

    def document(end: int) -> Iterator[Document]:
        section_text = "\n".join(lines[start:end])
        if body := section_text.strip():
            titles = dict.fromkeys(filter(None, (called or title, section)))
            above = start + section_text[: section_text.index(body)].count("\n")
            yield Document(source, ": ".join(titles), body, line + above if line else 0)

    tokens = MarkdownIt("commonmark").parse("\n".join(lines))
    for heading, inside in itertools.pairwise(tokens):
        if heading.type != "heading_open" or heading.level or heading.map is None:
            continue  # a heading in a quotation or a list begins no section
        yield from document(heading.map[0])
        start, section = heading.map[1], inside.content
        called = called or section
    yield from document(len(lines))


def read_office(path: pathlib.Path, source: str) -> Iterator[Found]:
    try:
        from markitdown import MarkItDown
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs markitdown", EXTRA) from error
    if not zipfile.is_zipfile(path):  # markitdown would take it for plain text
        yield Skipped(source, f"cannot be read: it is no {path.suffix.lower()} file")
        return
    made = MarkItDown(enable_plugins=False).convert_local(path)
    documents: list[Found] = list(_sections(BLOB.sub(" ", made.markdown), made.title or title_of(path), source))
    yield from documents or [Skipped(source, "no text in it")]


def read_html(path: pathlib.Path, source: str) -> Found:
    """The page's own text without menus and footers, by trafilatura."""
    try:
        import trafilatura
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs trafilatura", EXTRA) from error
    page: Any = trafilatura.bare_extraction(
        path.read_bytes(), favor_recall=True, include_comments=False, with_metadata=True
    )
    if page is None or not page.text:
        return Skipped(source, "no text in the page")
    return Document(source, page.title or title_of(path), page.text)


def read_pdf(path: pathlib.Path, source: str) -> Found:
    try:
        import pypdf
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs pypdf", EXTRA) from error
    reader = pypdf.PdfReader(io.BytesIO(path.read_bytes()))  # opens what is encrypted for permissions only
    if reader.is_encrypted and not reader.decrypt(""):
        return Skipped(source, "it needs a password")
    texts = [page.extract_text() + "\n\n" for page in reader.pages]
    text, pages = "".join(texts)[:-2], tuple(itertools.accumulate(map(len, texts[:-1]), initial=0))
    if not text.strip():
        return Skipped(source, f"no text in its {len(reader.pages)} pages (scanned?)")
    return Document(source, (reader.metadata and reader.metadata.title) or title_of(path), text, pages=pages)


def read_jsonl(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    rows, others = 0, set[str]()
    with path.open(encoding=encoding_of(path), errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{source}:{number}"
            if number == 1 and line.lstrip().startswith("["):
                yield Skipped(source, "a JSON array; a .jsonl file has one object on each line")
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Skipped(where, f"not JSON: {error}")
                continue
            found = of_row(row, where, field, title)
            others |= row.keys() if isinstance(row, dict) else set()
            rows += isinstance(found, Document)
            yield found
    if not rows and others and field not in others:
        raise CorpusError(f"{path} has no field '{field}'", f"Its fields are {', '.join(sorted(others))}.")


def read_csv(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    """A document a row: the column `field` where there is one, else every column with its name."""
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as stream:
        dialect, lines = _dialect(stream)
        csv.field_size_limit(LONGEST_CELL)
        for number, row in enumerate(csv.DictReader(stream, dialect=dialect), 2 + lines):
            if rest := row.pop(None, None):  # commas without quotes, most often in the text at the end
                last = list(row)[-1]
                row[last] = (dialect.delimiter + " " * dialect.skipinitialspace).join([row[last], *rest])
            told = {name: value for name, value in row.items() if name and isinstance(value, str) and value.strip()}
            if field not in row:
                told[field] = "\n".join(f"{name}: {value}" for name, value in told.items())
            yield of_row(told, f"{source}:{number}", field, title)


def _dialect(stream: TextIO) -> tuple[csv.Dialect, int]:
    """How a table separates its cells, and how many lines it has for saying so; the stream is then behind these."""
    dialect, sample = csv.excel(), stream.read(1 << 14)
    stream.seek(0)
    if said := SEPARATOR.match(sample):
        stream.readline()
        dialect.delimiter = said[1]
        return dialect, 1
    with contextlib.suppress(csv.Error):
        found = csv.Sniffer().sniff(sample, ",;\t")  # not how it takes quotes: it guesses by the first rows
        dialect.delimiter, dialect.skipinitialspace = found.delimiter, found.skipinitialspace
    return dialect, 0


def of_row(row: Any, where: str, field: str, title: str) -> Found:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        return Skipped(where, f"no text in '{field}'")
    called = (row.get(key) for key in ([title] if title else TITLES))
    name = next((name for name in called if isinstance(name, str) and name), "")
    return Document(where, clean(name), BLOB.sub(" ", clean(text)))
