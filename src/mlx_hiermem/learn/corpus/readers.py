"""Readers: files, folders and data sets of the hub as a stream of documents.

A reader yields a `Document`, or `Skipped` with the reason where there is nothing to learn from. None holds more
than one document, and a long text file comes as several: a corpus may be larger than memory.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mlx_hiermem.errors import CorpusError, MissingDependencyError
from mlx_hiermem.learn.records import Document, Skipped
from mlx_hiermem.learn.work import STAGES, SUFFIX

Found = Document | Skipped

PIECE = 1 << 20  # characters of a text file that make one document
HUB = "hf://"
TITLES = ("title", "name", "heading", "subject")  # where a record's title is looked for
EXTRA = "pip install 'mlx-hiermem[learn]'"


def read(sources: Sequence[str], field: str = "text", title: str = "") -> Iterator[Found]:
    """Every document of these files, folders and `hf://owner/name[:split]` data sets, in a fixed order.

    `field` names what is learnt of a .jsonl line or a data set's row, `title` what it is called (by default the
    first of `TITLES` that is there). Raises CorpusError where a source does not exist or has no such field at all.
    """
    for source in sources:
        if source.startswith(HUB):
            yield from _read_hub(source, field, title)
        elif (path := pathlib.Path(source)).is_dir():
            yield from _read_folder(path, field, title)
        elif path.is_file():
            yield from _read_file(path, path.name, field, title)
        else:
            raise CorpusError(f"there is no file or folder {source}", f"A data set of the hub is {HUB}owner/name.")


def _read_folder(root: pathlib.Path, field: str, title: str) -> Iterator[Found]:
    """Sources are named from `root`."""
    for path, why in files_in(root):
        source = path.relative_to(root).as_posix()
        if why:
            yield Skipped(source + "/" * path.is_dir(), why)
        else:
            yield from _read_file(path, source, field, title)


def files_in(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """The files below a folder in the order of their names, folder by folder, each with the reason not to read it.

    A folder that is not read is listed, but not what is in it.
    """
    for folder, folders, files in os.walk(root):
        folders.sort()
        for path in [pathlib.Path(folder, name) for name in folders]:
            if why := _foreign(path):
                folders.remove(path.name)
                yield path, why
        for name in sorted(files):
            yield pathlib.Path(folder, name), "hidden file" if name.startswith(".") else ""


def _foreign(folder: pathlib.Path) -> str:
    """Why a folder below the one that was named is not read: what is learnt must not be what was made of it."""
    if folder.name.startswith("."):
        return "hidden folder"
    if any((folder / name).is_file() for name in ("bank.json", "bank/bank.json", "anchor/config.json")):
        return "a model"
    return "the work folder of a model" if folder.suffix == SUFFIX and (folder / STAGES).is_file() else ""


def _read_file(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    """A file by its suffix. A damaged file is skipped, whatever its reader's library raises."""
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            yield Skipped(source, "not a regular file")
        elif path.stat().st_size == 0:
            yield Skipped(source, "empty")
        elif suffix == ".txt":
            yield from _read_text(path, source)
        elif suffix in (".md", ".markdown"):
            yield from _read_markdown(path, source)
        elif suffix in (".html", ".htm"):
            yield _read_html(path, source)
        elif suffix == ".pdf":
            yield _read_pdf(path, source)
        elif suffix == ".jsonl":
            yield from _read_jsonl(path, source, field, title)
        else:
            yield Skipped(source, f"no reader for {suffix or 'files without a suffix'}")
    except (CorpusError, MissingDependencyError):
        raise
    except UnicodeDecodeError as error:
        yield Skipped(source, f"not UTF-8 text ({error.reason} at byte {error.start})")
    except _NotTextError:
        yield Skipped(source, "binary, not text")
    except Exception as error:
        yield Skipped(source, f"cannot be read: {str(error).splitlines()[0] if str(error) else error!r}")


class _NotTextError(Exception):
    """A file has bytes that no text has."""


def _title_of(path: pathlib.Path) -> str:
    return re.sub(r"[_\W]+", " ", path.stem).strip()


def _read_text(path: pathlib.Path, source: str) -> Iterator[Found]:
    for text in _pieces(path):
        yield Document(source, _title_of(path), text)


def _pieces(path: pathlib.Path) -> Iterator[str]:
    """A text file in pieces of about `PIECE` characters that end with a paragraph, or failing that with a line."""
    with path.open(encoding="utf-8-sig") as stream:
        rest = ""
        while block := stream.read(PIECE):
            if "\0" in block:
                raise _NotTextError
            rest += block
            if len(block) < PIECE:
                break
            end = max(rest.rfind("\n\n"), 0) or max(rest.rfind("\n"), rest.rfind(" "), 0) or len(rest)
            yield rest[:end]
            rest = rest[end:]
        if rest.strip():
            yield rest


def _read_markdown(path: pathlib.Path, source: str) -> Iterator[Found]:
    """One document a section, called by the file's first heading and its own: what stands below is about both."""
    called, section, lines = "", "", list[str]()

    def document() -> Iterator[Document]:
        if text := "\n".join(lines).strip():
            titles = dict.fromkeys(filter(None, (called or _title_of(path), section)))
            yield Document(source, ": ".join(titles), text)

    fenced = False
    for line in _lines(path):
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"#{1,6} +(.*?)[ #]*$", line)
        if heading is None:
            lines.append(line)
            continue
        yield from document()
        lines, section = [], heading[1]
        called = called or section
    yield from document()


def _lines(path: pathlib.Path) -> Iterator[str]:
    for piece in _pieces(path):
        yield from piece.split("\n")


def _read_html(path: pathlib.Path, source: str) -> Found:
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
    return Document(source, page.title or _title_of(path), page.text)


def _read_pdf(path: pathlib.Path, source: str) -> Found:
    try:
        import pypdf
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs pypdf", EXTRA) from error
    reader = pypdf.PdfReader(io.BytesIO(path.read_bytes()))
    text = "\n\n".join(page.extract_text() for page in reader.pages)
    if not text.strip():
        return Skipped(source, f"no text in its {len(reader.pages)} pages (scanned?)")
    return Document(source, (reader.metadata and reader.metadata.title) or _title_of(path), text)


def _read_jsonl(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    rows, others = 0, set[str]()
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{source}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                yield Skipped(where, f"not JSON: {error}")
                continue
            found = _of_row(row, where, field, title)
            others |= row.keys() if isinstance(row, dict) else set()
            rows += isinstance(found, Document)
            yield found
    if not rows and others and field not in others:
        raise CorpusError(f"{path} has no field '{field}'", f"Its fields are {', '.join(sorted(others))}.")


def _read_hub(source: str, field: str, title: str) -> Iterator[Found]:
    """A data set of the model hub, streamed: nothing of it is kept on disk."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs datasets", EXTRA) from error
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            if field not in row:
                fields = ", ".join(sorted(row))
                raise CorpusError(f"{source} has no field '{field}'", f"Its fields are {fields}.")
            yield _of_row(row, f"{source}:{number}", field, title)
    except CorpusError:
        raise
    except Exception as error:  # every kind of network and file error
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CorpusError(
            f"cannot read the data set {source}: {reason}", "Is the hub reachable, and the name right?"
        ) from error


def _of_row(row: Any, where: str, field: str, title: str) -> Found:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        return Skipped(where, f"no text in '{field}'")
    called = (row.get(key) for key in ([title] if title else TITLES))
    return Document(where, next((name for name in called if isinstance(name, str) and name), ""), text)
