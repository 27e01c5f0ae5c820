"""Readers: files, folders and data sets of the hub as a stream of documents.

Which files there are, and which reader each one gets by its suffix; the readers of the formats are in `formats`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mlx_hiermem.errors import ArgumentError, CorpusError, MissingDependencyError, first_line
from mlx_hiermem.learn.corpus import formats
from mlx_hiermem.learn.corpus.formats import Found, clean
from mlx_hiermem.learn.corpus.windows import Document, Skipped
from mlx_hiermem.learn.work import STAGES, SUFFIX, SYNC

HUB = "hf://"
UNREADABLE = "a folder that cannot be read"
OFFICE = (".docx", ".pptx", ".epub")


def read(
    sources: Sequence[str], field: str = "text", title: str = "", only: Collection[str] | None = None
) -> Iterator[Found]:
    """Every document of these files, folders and `hf://owner/name[:split]` data sets, in a fixed order.

    `field` names what is learnt of a .jsonl line or a data set's row, `title` what it is called (by default the
    first of `formats.TITLES` that is there). `only` names the files that are read of folders, where given. Raises
    CorpusError where a source does not exist or has no such field at all.
    """
    check_there(sources)
    for source in sources:
        if source.startswith(HUB):
            yield from _read_hub(source, field, title)
        elif (path := pathlib.Path(source)).is_dir():
            yield from _read_folder(path, field, title, only)
        else:
            yield from _read_file(path, clean(path.name), field, title)


def files_of(sources: Sequence[str], only: Collection[str] | None = None) -> Iterator[tuple[pathlib.Path, str]]:
    """The files that `read` opens, each with the name that its documents have as their source."""
    for source in sources:
        path = pathlib.Path(source)
        if path.is_dir():
            names = ((file, _name_below(path, file)) for file, why in files_in(path) if not why)
            yield from ((file, name) for file, name in names if only is None or name in only)
        elif path.is_file():
            yield path, clean(path.name)


def check_there(sources: Sequence[str]) -> None:
    """Raises CorpusError for the first file or folder that does not exist; ArgumentError for what is no list."""
    several = isinstance(sources, Sequence) and not isinstance(sources, str)
    if not several or not all(isinstance(source, str) for source in sources):
        raise ArgumentError(f"{sources!r} is no list of documents", 'Give the paths as texts: ["docs"].')
    for source in sources:
        if not (source.startswith(HUB) or (path := pathlib.Path(source)).is_dir() or path.is_file()):
            raise CorpusError(f"there is no file or folder {source}", f"A data set of the hub is {HUB}owner/name.")


def _name_below(root: pathlib.Path, file: pathlib.Path) -> str:
    return clean(file.relative_to(root).as_posix())


def _read_folder(root: pathlib.Path, field: str, title: str, only: Collection[str] | None) -> Iterator[Found]:
    """Sources are named from `root`."""
    for path, why in files_in(root):
        source = _name_below(root, path)
        if only is not None and source not in only:
            continue
        if why:
            yield Skipped(source + "/" * path.is_dir(), why)
        else:
            yield from _read_file(path, source, field, title)


def files_in(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """The files below a folder in the order of their names, folder by folder, each with the reason not to read it.

    A folder that is not read is listed, but not what is in it.
    """
    for folder, folders, files in os.walk(root, onerror=_not_listed):
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
    if folder.is_symlink():
        return "a link to a folder"
    try:
        with os.scandir(folder):
            model = any((folder / name).is_file() for name in ("bank.json", "bank/bank.json", "anchor/config.json"))
        work = folder.suffix in (SUFFIX, SYNC) and (folder / STAGES).is_file()
    except OSError:
        return UNREADABLE
    return "a model" if model else "the work folder of a model" if work else ""


def _not_listed(error: OSError) -> None:
    raise CorpusError(f"cannot read the folder {error.filename}: {error.strerror}", "Make it readable.") from error


def _read_file(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    """A file's documents, which know its whole path."""
    file, empty = clean(os.path.abspath(path)), True
    for found in _by_suffix(path, source, field, title):
        if isinstance(found, Document):  # a PDF's text may have halves of characters, which no file can hold
            found = replace(found, title=clean(found.title), text=clean(found.text), file=file)
        empty = False
        yield found
    if empty:
        yield Skipped(source, "no text in it")


def _by_suffix(path: pathlib.Path, source: str, field: str, title: str) -> Iterator[Found]:
    """A file by its suffix. A damaged file is skipped, whatever its reader's library raises."""
    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            yield Skipped(source, "not a regular file")
        elif path.stat().st_size == 0:
            yield Skipped(source, "empty")
        elif suffix == ".txt":
            yield from formats.read_text(path, source)
        elif suffix in (".md", ".markdown"):
            yield from formats.read_markdown(path, source)
        elif suffix in (".html", ".htm"):
            yield formats.read_html(path, source)
        elif suffix == ".pdf":
            yield formats.read_pdf(path, source)
        elif suffix == ".jsonl":
            yield from formats.read_jsonl(path, source, field, title)
        elif suffix == ".csv":
            yield from formats.read_csv(path, source, field, title)
        elif suffix in OFFICE:
            yield from formats.read_office(path, source)
        else:
            yield Skipped(source, f"no reader for {suffix or 'files without a suffix'}")
    except (CorpusError, MissingDependencyError):
        raise
    except formats.NotTextError as error:
        yield Skipped(source, str(error))
    except Exception as error:
        yield Skipped(source, f"cannot be read: {first_line(error)}")


def _read_hub(source: str, field: str, title: str) -> Iterator[Found]:
    """A data set of the model hub, streamed: nothing of it is kept on disk."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{source} needs datasets", formats.EXTRA) from error
    name, _, split = source.removeprefix(HUB).partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            if field not in row:
                fields = ", ".join(sorted(row))
                raise CorpusError(f"{source} has no field '{field}'", f"Its fields are {fields}.")
            yield formats.of_row(row, f"{source}:{number}", field, title)
    except CorpusError:
        raise
    except Exception as error:  # every kind of network and file error
        raise CorpusError(
            f"cannot read the data set {source}: {first_line(error)}", "Is the hub reachable, and the name right?"
        ) from error
