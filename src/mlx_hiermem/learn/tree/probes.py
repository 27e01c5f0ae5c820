"""Probes: what somebody may type who wants a window. By them the tree is shaped, and windows are put into leaves.

A question that reaches another leaf than the one its answer was learnt in gets no answer. The embedder mixes what a
text is about with how it is put, so a window is not only embedded whole, but in the shapes in which it may be asked
for: each sentence with its title; the beginnings of these, as a prompt is a beginning; the title; the questions of
self-study where there are any; and all of it once more in the frame that questions are put in. A title is used if
the document names it: most file names are none. See benchmarks/results/routing_agreement.md.

One generated question in ten is held out: it shapes nothing, and measures where questions go.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hiermem.files import file_digest, new_file
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.corpus.windows import Window
from mlx_hiermem.learn.work import (
    GO_ON,
    MEANS,
    PROBE_VECTORS,
    PROBES,
    Ranks,
    Row,
    Work,
    help_make_parts,
    make_parts,
    read_rows,
    with_rows,
    write_rows,
)
from mlx_hiermem.progress import Progress, unheard
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.sentences import sentences
from mlx_hiermem.tokenizer import FRAME

BEGINNINGS = (0.4, 0.7)  # of a sentence's words
HELD_OUT = 10  # one generated question in so many is held out
BATCH = 512  # texts embedded together, and lost by a crash at most


def with_subjects(windows: Iterable[Window]) -> Iterator[tuple[Window, str]]:
    """Each window and what it is about: its title, or "" where no window of its document names that."""
    for _, group in itertools.groupby(windows, key=lambda window: window.document):
        document = list(group)
        named = any(names(window.text, part) for window in document for part in window.title.split(": "))
        for window in document:
            yield window, window.title if named else ""


def probe_texts(text: str, subject: str, questions: Sequence[str] = ()) -> list[str]:
    """The probes of one window, without repetitions; `questions` are those of self-study."""
    return framed(list(dict.fromkeys((*statements(text, subject), *questions))))


def framed(texts: list[str]) -> list[str]:
    """Texts as they stand, and once more in the frame of questions."""
    return texts + [FRAME.format(text) for text in texts]


def statements(text: str, subject: str) -> Iterator[str]:
    """The window's own words: whole, its sentences, and their beginnings as far as they name the subject."""
    yield about(text, subject)
    if subject:
        yield subject
    for sentence in sentences(text):
        yield f"{subject}. {sentence}" if subject else sentence
        words = about(sentence, subject).split()
        for part in BEGINNINGS:
            beginning = " ".join(words[: max(1, round(part * len(words)))])
            if not subject or names(beginning, subject):
                yield beginning


def about(text: str, subject: str) -> str:
    """The text, with its subject before it unless it names it itself."""
    return text if not subject or names(text, subject) else f"{subject}. {text}"


def names(text: str, title: str) -> bool:
    """Whether a text contains a title as whole words."""
    return bool(title) and re.search(rf"(?<!\w){re.escape(title)}(?!\w)", text, re.IGNORECASE) is not None


def embed_probes(
    work: Work, corpus: Corpus, embedder: TextEmbedder, progress: Progress = unheard, ranks: Ranks | None = None
) -> str:
    """Stages `probes` and, shared among ranks, `vectors`; returns its digest. `progress` counts texts."""
    studied = file_digest(corpus.studied) if corpus.studied.exists() else ""
    asked = work.stage("probes", studied, [corpus.digest], lambda: _write_probes(work, corpus))

    def embed() -> None:
        batches, done = _Batches(work, embedder), 0

        def there(batch: _Batch) -> None:
            nonlocal done
            done += batch.count
            progress(done, sum(one.count for one in batches.all))

        batches.folder.mkdir(exist_ok=True)
        with ranks.sharing("vectors") if ranks else contextlib.nullcontext():
            files = make_parts(batches.file, lambda: batches.all, batches.make, there)
        size, dim = sum(one.count for one in batches.all), embedder.embed([""]).shape[1]
        write_vectors(map(np.load, files), size, dim, work.path(PROBE_VECTORS))
        shutil.rmtree(batches.folder)

    return work.stage("vectors", None, [asked], embed)


class KnownProbes:
    """An embedder that has the probes' vectors already, and embeds what is none. After `embed_probes`."""

    def __init__(self, work: Work, embedder: TextEmbedder) -> None:
        self.embedder, self._vectors = embedder, np.load(work.path(PROBE_VECTORS), mmap_mode="r")  # [p, dim]
        keys = np.fromiter((_key(row["text"]) for row in read_rows(work.path(PROBES))), np.uint64)  # [p]
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """n texts -> [n, dim]."""
        keys = np.array([_key(text) for text in texts], np.uint64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        known = self._keys[at] == keys  # bool [n]
        found = np.array(self._vectors[self._order[at]])  # [n, dim]
        if not known.all():
            found[~known] = self.embedder.embed(
                [text for text, is_known in zip(texts, known, strict=True) if not is_known]
            )
        return found


def _key(text: str) -> int:
    """64 bits that stand for a text: of ten million, two have the same by a chance of 1 in 400 000."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def help_embed(work: Work, embedder: TextEmbedder, wanted: Callable[[], bool]) -> None:
    """What another rank than the first does of stage `vectors`."""
    batches = _Batches(work, embedder)
    help_make_parts(batches.file, lambda: batches.all, batches.make, wanted)


@dataclass(frozen=True)
class _Batch:
    """Probes that are embedded together: a text's last bits depend on those that it is embedded with."""

    begin: int  # in probes.jsonl, in bytes
    count: int


class _Batches:
    """All probes in batches, a file each."""

    def __init__(self, work: Work, embedder: TextEmbedder) -> None:
        self.work, self.embedder, self.folder = work, embedder, work.path("vectors.parts")
        self.all = list(_in_batches(work.path(PROBES)))

    def file(self, number: int) -> pathlib.Path:
        return self.folder / f"{self.work.digest('probes')[:16]}-{number}.npy"

    def make(self, batch: _Batch, file: pathlib.Path) -> None:
        """Embeds a batch."""
        with self.work.path(PROBES).open("rb") as stream:
            stream.seek(batch.begin)
            texts = [json.loads(line)["text"] for line in itertools.islice(stream, batch.count)]
        with new_file(file, GO_ON) as partial, partial.open("wb") as out:
            np.save(out, np.ascontiguousarray(self.embedder.embed(texts), "<f4"))


def _in_batches(file: pathlib.Path) -> Iterator[_Batch]:
    """The lines of a file, `BATCH` at a time."""
    begin, count, size = 0, 0, 0
    with file.open("rb") as stream:
        for line in stream:
            count, size = count + 1, size + len(line)
            if count == BATCH:
                yield _Batch(begin, count)
                begin, count, size = begin + size, 0, 0
    if count:
        yield _Batch(begin, count)


def _write_probes(work: Work, corpus: Corpus) -> None:
    """Window by window; then the reversed questions; last the generated ones that are held out."""

    def rows() -> Iterator[dict[str, Any]]:
        named = with_subjects(corpus.windows())
        for (window, subject), studied in with_rows(named, corpus.studied, lambda pair: pair[0].id):
            own, given = _parted(studied, turned=False)
            texts = probe_texts(window.text, subject, _asked(window.id, own))
            yield from ({"window": window.id, "text": text} for text in dict.fromkeys((*texts, *given)))
        for number, studied in _studied(corpus):
            own, given = _parted(studied, turned=True)
            texts = framed(_asked(number, (row for row in own if not row.get("chat")), "prompt"))
            yield from (
                {"window": number, "text": text, "reversed": True} for text in dict.fromkeys((*texts, *given))
            )
        for number, studied in _studied(corpus):
            for turned in (False, True):
                kept = _asked(number, _parted(studied, turned)[0], held_out=True)
                more = {"held_out": True} | ({"reversed": True} if turned else {})
                yield from ({"window": number, "text": text} | more for text in kept)

    write_rows(work.path(PROBES), rows())


def _studied(corpus: Corpus) -> Iterator[tuple[int, list[Row]]]:
    return with_rows(range(corpus.count), corpus.studied, lambda number: number)


def _parted(studied: Sequence[Row], turned: bool) -> tuple[list[Row], list[str]]:
    """Of the rows that are reversed, or those that are not: self-study's, and the texts of the given ones."""
    rows = [row for row in studied if bool(row.get("reversed")) == turned]
    given = [row for row in rows if is_learnt(row)]
    texts = [text for row in given for text in (row.get("question"), row.get("prompt")) if text]
    return [row for row in rows if not is_learnt(row)], texts


def is_learnt(row: Row) -> bool:
    """Whether a row is learnt in any case, and so never held out."""
    return bool(row.get("given") or row.get("learnt"))


def _asked(window: int, rows: Iterable[Row], also: str = "question", held_out: bool = False) -> list[str]:
    """What rows ask, each once: their questions, or what `also` names where they have none."""
    texts = dict.fromkeys(row.get("question") or row.get(also) for row in rows)
    return [text for text in texts if text and is_held_out(window, text) == held_out]


def is_held_out(window: int, question: str) -> bool:
    """Whether a generated question is one of those that measure, by what it is alone."""
    return zlib.crc32(f"{window} {question}".encode()) % HELD_OUT == 0


@dataclass(frozen=True, eq=False)
class ProbeVectors:
    """Unit vectors [p, dim] of the probes, window after window: window i has `vectors[first[i]:first[i + 1]]`."""

    vectors: np.ndarray  # [p, dim] float32, perhaps a memory map
    first: np.ndarray  # [windows + 1] int64

    @classmethod
    def of(cls, vectors: np.ndarray, windows: np.ndarray, count: int) -> ProbeVectors:
        """`windows` [p] says, in rising order, whose each probe is; `count` is the number of windows."""
        return cls(vectors, np.searchsorted(windows, np.arange(count + 1)))

    @classmethod
    def counted(cls, vectors: np.ndarray, counts: np.ndarray) -> ProbeVectors:
        """`counts` [windows] says how many each window has."""
        return cls(vectors, np.concatenate([[0], np.cumsum(counts)]))

    def of_windows(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows [m] -> (indices of all their probes [q], each one's place in `members` [q])."""
        counts = self.first[members + 1] - self.first[members]  # [m]
        owner = np.repeat(np.arange(len(members)), counts)  # [q]
        before = np.repeat(np.cumsum(counts) - counts, counts)  # [q]: probes of the members before the owner
        return np.arange(len(owner)) - before + self.first[members][owner], owner

    def means(self) -> Iterator[np.ndarray]:
        """[n, dim] in chunks: the mean of each window's probes, at length 1. It is what is clustered."""
        for start in range(0, len(self.first) - 1, 1024):
            bounds = self.first[start : start + 1025]  # [n + 1]
            part = np.asarray(self.vectors[bounds[0] : bounds[-1]])
            sums = np.add.reduceat(part, bounds[:-1] - bounds[0], axis=0)  # [n, dim]
            yield sums / np.linalg.norm(sums, axis=1, keepdims=True)


@dataclass(frozen=True)
class EmbeddedProbes:
    """The embedded probes by what they are for."""

    plain: ProbeVectors  # typed by who knows what a window is about
    turned: ProbeVectors  # reversed questions, which ask what that is
    shaping: np.ndarray  # [n, dim]: both
    held_out: np.ndarray  # [m, dim]: the questions that measure
    asked: np.ndarray  # int64 [m]: the window that answers each of these
    backwards: np.ndarray  # bool [m]: which of these are reversed

    @classmethod
    def read(cls, work: Work, corpus: Corpus) -> EmbeddedProbes:
        """After `embed_probes`; writes the means of `plain`, which are clustered."""
        everything = np.load(work.path(PROBE_VECTORS), mmap_mode="r")  # [n + m, dim]
        counts = np.zeros((2, corpus.count), np.int64)  # plain, turned
        asked, backwards = list[int](), list[bool]()
        for row in read_rows(work.path(PROBES)):
            if "held_out" in row:
                asked.append(row["window"])
                backwards.append("reversed" in row)
            else:
                counts[int("reversed" in row), row["window"]] += 1
        plain, shaping = counts[0].sum(), counts.sum()
        found = ProbeVectors.counted(everything[:plain], counts[0])
        write_vectors(found.means(), corpus.count, everything.shape[1], work.path(MEANS))
        turned = ProbeVectors.counted(everything[plain:shaping], counts[1])
        return cls(
            found,
            turned,
            everything[:shaping],
            everything[shaping:],
            np.array(asked, np.int64),
            np.array(backwards, bool),
        )


def write_vectors(chunks: Iterable[np.ndarray], count: int, dim: int, file: pathlib.Path) -> np.ndarray:
    """[count, dim] float32 in a .npy file, from chunks of vectors [n, dim], as a memory map. Raises OutputError."""
    with new_file(file, GO_ON) as partial, partial.open("wb") as stream:
        stream.write(_header(count, dim))
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk, "<f4").tobytes())
    return np.load(file, mmap_mode="r")


def _header(count: int, dim: int) -> bytes:
    """What a .npy file of [count, dim] float32 begins with; always equally long."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})
    return out.getvalue()
