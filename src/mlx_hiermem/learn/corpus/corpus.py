"""The corpus: documents, read, without repetitions, cut into windows. It is the first stage of learning.

corpus = read_corpus(Work(folder), ["./docs"], tokenizer, CorpusSettings())
for window in corpus.windows(): ...

Equal documents are found by digest, nearly equal ones by MinHash (Broder, 1997); the later one is left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import sqlite3
import statistics
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import TracebackType

import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.errors import CorpusError, NothingToLearnError
from mlx_hiermem.files import file_digest, new_file
from mlx_hiermem.learn.corpus import readers
from mlx_hiermem.learn.corpus.windows import Document, Skipped, Window, splintered, split, untruncated
from mlx_hiermem.learn.settings import CorpusSettings
from mlx_hiermem.learn.work import (
    FILES,
    GO_ON,
    PROMPTS,
    SKIPPED,
    STUDY,
    WINDOWS,
    WINDOWS_DIGEST,
    Work,
    count_lines,
    read_rows,
    write_rows,
    write_text,
)

FOREIGN = 0.25  # share of splintered tokens from which on a corpus is not in English; see `splintered`
LOOKED_AT = 500  # windows, by which the language is judged
LONGEST_LINE = 1 << 20  # bytes of windows.jsonl; a window has some hundred tokens
RUN = 5  # words, of which a document is a set when it is compared
ALIKE = 0.95  # of the runs that two documents have in common, for the later one to go
VALUES, BAND = 128, 16  # values in a signature, and in each of its bands; 8 bands find 99 % of pairs alike by 0.95
PRIME = (1 << 31) - 1


@dataclass(frozen=True)
class Corpus:
    """A corpus in windows; `digest` is theirs: what was made of them holds where files were only touched."""

    work: Work
    digest: str

    @classmethod
    def of(cls, work: Work) -> Corpus:
        """That of a work folder whose stage `corpus` is done."""
        return cls(work, work.path(WINDOWS_DIGEST).read_text(encoding="utf-8"))

    @property
    def count(self) -> int:
        return count_lines(self.work.path(WINDOWS))

    @property
    def documents(self) -> int:
        """How many there are, as the last window says."""
        with self.work.path(WINDOWS).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - LONGEST_LINE))
            return int(json.loads(stream.read().splitlines()[-1])["document"]) + 1

    @property
    def studied(self) -> pathlib.Path:
        """The file with prompts and answers about the windows: of self-study and of the user. There may be none."""
        with_given = self.work.path(PROMPTS)
        return with_given if with_given.exists() else self.work.path(STUDY)

    def windows(self) -> Iterator[Window]:
        return (Window(**row) for row in read_rows(self.work.path(WINDOWS)))

    def read(self, numbers: Iterable[int]) -> Iterator[Window]:
        """Windows by their numbers, in this order."""
        with self.work.path(WINDOWS).open("rb") as stream:
            for number in numbers:
                stream.seek(self._starts[number])
                yield Window(**json.loads(stream.readline()))

    @cached_property
    def _starts(self) -> array[int]:
        """Where each window's line begins."""
        found, at = array("q"), 0
        with self.work.path(WINDOWS).open("rb") as stream:
            for line in stream:
                found.append(at)
                at += len(line)
        return found

    def skipped(self) -> Iterator[Skipped]:
        return (Skipped(**row) for row in read_rows(self.work.path(SKIPPED)))


def check_asked(corpus: Corpus, questions: Iterable[tuple[str, str]]) -> None:
    """Raises CorpusError where a question, given with its document's source or title, is about none of these."""
    wanted = {document for _, document in questions}
    if wanted and (missing := wanted - {name for one in corpus.windows() for name in (one.source, one.title)}):
        raise not_there(min(missing), "a question")


def not_there(document: str, what: str) -> CorpusError:
    """The error for a document that `what` is about, but the corpus has not."""
    return CorpusError(
        f"no document is called '{document}', which {what} is about",
        "Name documents by their title, or by their source as windows.jsonl has it.",
    )


def read_corpus(
    work: Work,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    settings: CorpusSettings = CorpusSettings(),
    progress: Callable[[str], None] = lambda what: None,
    only: Collection[str] | None = None,
) -> Corpus:
    """Stage `corpus`. `progress` is told each document's source; `only` names files, as for `readers.read`.

    Raises NothingToLearnError where nothing is left, and CorpusError for what is wrong with it.
    """

    def make() -> None:
        reader = untruncated(tokenizer)
        write_rows(work.path(FILES), _files(sources, only))  # before they are read: what changes later is seen
        with (
            new_file(work.path(SKIPPED), GO_ON) as beside,
            beside.open("w", encoding="utf-8") as stream,
            Seen(work.path("seen.sqlite")) as seen,
        ):

            def skip(skipped: Skipped) -> None:
                stream.write(json.dumps(asdict(skipped), ensure_ascii=False) + "\n")

            documents = _new_documents(
                readers.read(sources, settings.field, settings.title, only), seen, skip, progress
            )
            windows = _windows(documents, reader, settings.tokens)
            count = write_rows(work.path(WINDOWS), map(asdict, windows))
        if not count:
            first = next((f": {row['what']} is skipped, {row['why']}" for row in read_rows(work.path(SKIPPED))), "")
            raise NothingToLearnError(
                f"there is nothing to learn in {', '.join(sources)}{first}",
                "Readable: .txt .md .html .pdf .docx .pptx .epub .csv .jsonl files, folders of them, data sets.",
            )

        if not settings.any_language:
            _check_language(work, reader)
        write_text(work.path(WINDOWS_DIGEST), file_digest(work.path(WINDOWS)))

    # The file's name is there for older work folders, which have none: their corpus is read again.
    work.stage("corpus", [asdict(settings), _stamp(sources, only), WINDOWS_DIGEST], (), make)
    return Corpus.of(work)


def _check_language(work: Work, tokenizer: Tokenizer) -> None:
    texts: dict[int, list[str]] = {}  # by document, each of which counts alike: one long table decides nothing
    for row in itertools.islice(read_rows(work.path(WINDOWS)), LOOKED_AT):
        texts.setdefault(row["document"], []).append(row["text"])
    share = statistics.median(splintered(" ".join(parts), tokenizer) for parts in texts.values())
    if share > FOREIGN:
        raise CorpusError(
            f"the corpus does not seem to be in English, the sentence embedder's language: {share:.0%} of its "
            "tokens are splinters of words, and questions would hardly find their answers",
            "--any-language learns it nevertheless.",
        )


def _stamp(sources: Sequence[str], only: Collection[str] | None) -> str:
    """Changes when a file of the sources does, by name, size or time; of a data set only the name is known."""
    digest = hashlib.sha256()
    for source in sources:
        for file, _ in readers.files_of([source], only):
            if file.is_file():
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogatepass"))
        name = source if source.startswith(readers.HUB) else os.path.normpath(source)
        digest.update(name.encode(errors="surrogatepass"))
    return digest.hexdigest()


def _files(sources: Sequence[str], only: Collection[str] | None) -> Iterator[dict[str, str]]:
    """Each file of the sources, by its whole path, with its digest."""
    for file, name in readers.files_of(sources, only):
        if not file.is_file():  # a pipe would be waited for; its reader says what it is
            continue
        with contextlib.suppress(OSError):  # one that cannot be read is skipped, and its reader says why
            yield {"file": readers.clean(os.path.abspath(file)), "name": name, "sha256": file_digest(file)}


def _new_documents(
    found: Iterable[readers.Found], seen: Seen, skip: Callable[[Skipped], None], progress: Callable[[str], None]
) -> Iterator[Document]:
    """The documents that no earlier one says again; the rest is skipped with its reason."""
    for one in found:
        if isinstance(one, Skipped):
            skip(one)
        elif why := seen.before(one.source, one.text):
            skip(Skipped(one.source, why))
        else:
            progress(one.source)
            yield one


def _windows(documents: Iterable[Document], tokenizer: Tokenizer, tokens: int) -> Iterator[Window]:
    count = 0
    for number, document in enumerate(documents):
        for start, text in split(document.text, tokenizer, tokens):
            yield Window(count, number, document.source, document.title, text, document.place(start), document.file)
            count += 1


# Repetitions


class Seen:
    """The documents so far, in a SQLite file, so that memory does not grow with the corpus; it goes in the end."""

    def __init__(self, file: pathlib.Path) -> None:
        file.unlink(missing_ok=True)
        self.file, self.database = file, sqlite3.connect(file, isolation_level=None)
        # A crash means reading the corpus again, so nothing need reach the disk in order.
        self.database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE digests (digest BLOB PRIMARY KEY, what TEXT) WITHOUT ROWID;
            CREATE TABLE signatures (id INTEGER PRIMARY KEY, what TEXT, signature BLOB);
            CREATE TABLE bands (band BLOB, id INTEGER, PRIMARY KEY (band, id)) WITHOUT ROWID;
            BEGIN;
            """
        )
        rng = np.random.default_rng(0)
        self.a, self.b = (rng.integers(1, PRIME, (VALUES, 1), dtype=np.uint64) for _ in range(2))

    def __enter__(self) -> Seen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()
        self.file.unlink(missing_ok=True)

    def before(self, what: str, text: str) -> str:
        """Why `text` is a duplicate, naming the earlier one; "" if it is not, and then it counts as `what`."""
        words = text.lower().split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        same = self.database.execute("SELECT what FROM digests WHERE digest = ?", (digest,)).fetchone()
        if same:
            return f"the same as {same[0]}"
        signature = self.signature(words)
        bands = [bytes([i]) + part.tobytes() for i, part in enumerate(signature.reshape(-1, BAND))]
        if near := self._nearest(bands, signature):
            return near
        self.database.execute("INSERT INTO digests VALUES (?, ?)", (digest, what))
        row = self.database.execute(
            "INSERT INTO signatures (what, signature) VALUES (?, ?)", (what, signature.tobytes())
        )
        self.database.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)",
            ((hashlib.blake2b(band, digest_size=8).digest(), row.lastrowid) for band in bands),
        )
        return ""

    def signature(self, words: list[str]) -> np.ndarray:
        """[VALUES] uint32: for each of that many random orders of all runs, the first that the document has."""
        # With margins, so that the first word counts as much as the others: often it is what the text is about.
        words = [*[""] * (RUN - 1), *words, *[""] * (RUN - 1)]
        runs = {" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
        hashes = np.array([zlib.crc32(run.encode()) % PRIME for run in runs], np.uint64)
        least = np.full((VALUES, 1), PRIME, np.uint64)
        for start in range(0, len(hashes), 4096):
            mixed = (self.a * hashes[start : start + 4096] + self.b) % PRIME
            least = np.minimum(least, mixed.min(1, keepdims=True))
        return least[:, 0].astype(np.uint32)

    def _nearest(self, bands: list[bytes], signature: np.ndarray) -> str:
        for band in bands:
            rows = self.database.execute(
                "SELECT what, signature FROM bands JOIN signatures USING (id) WHERE band = ? LIMIT 64",
                (hashlib.blake2b(band, digest_size=8).digest(),),
            )
            for what, stored in rows:
                alike = float(np.mean(np.frombuffer(stored, np.uint32) == signature))
                if alike >= ALIKE:
                    return f"{alike:.0%} the same as {what}"
        return ""
