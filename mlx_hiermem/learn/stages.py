"""The stages from documents to placed windows, each with its files in the work folder (see `mlx_hiermem.learn`).

    work = Work(folder)
    corpus = read_corpus(work, sources, tokenizer, CorpusSettings())
    planted = plant(work, corpus, embedder, TreeSettings())
    describe_nodes(work, planted, count)

Self-study may come between the first two: `plant` takes the questions of its study.jsonl into account.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_hiermem.config import Path
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn import Document, Placed, Skipped, Window, corpus, labels, probes, vectors
from mlx_hiermem.learn.clustering import EVEN, Shape, grow
from mlx_hiermem.learn.duplicates import Seen
from mlx_hiermem.learn.routing import LEAVES, ProbeVectors, Separation, agreement, place
from mlx_hiermem.learn.windows import TOKENS, splintered, split, untruncated
from mlx_hiermem.learn.work import Work, read_lines, with_rows, write_lines, write_text
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree

WINDOWS, SKIPPED, STUDY, PROBES = "windows.jsonl", "skipped.jsonl", "study.jsonl", "probes.jsonl"
PROBE_VECTORS, MEANS = "probes.npy", "means.npy"
TREE, LEAVES_FILE, AGREEMENT, NODES = "tree.safetensors", "leaves.jsonl", "agreement.json", "nodes.json"
FOREIGN = 0.25  # see `splintered`
LOOKED_AT = 500  # windows, to tell the language
LONGEST_LINE = 1 << 20  # bytes; a window is of some hundred tokens
HELD_OUT = 10  # one generated question in so many measures the routing and shapes nothing


@dataclass(frozen=True)
class CorpusSettings:
    """Which field of a record is the text, which its title ("": found), and the tokens of a window.

    Unless `any_language`, a corpus in a language that the embedder does not know is refused.
    """

    field: str = "text"
    title: str = ""
    tokens: int = TOKENS
    any_language: bool = False


@dataclass(frozen=True)
class TreeSettings:
    """The tree's shape (0: chosen from the corpus' size), and in how many leaves a window is learnt at most."""

    branching: int = 0
    depth: int = 0
    leaves: int = LEAVES
    balance: float = EVEN
    seed: int = 0

    def shape(self, windows: int) -> Shape:
        chosen = Shape.of(windows)
        return Shape(self.branching or chosen.branching, self.depth or chosen.depth)


@dataclass(frozen=True)
class Corpus:
    """A corpus in windows; `digest` says what it was made of."""

    work: Work
    digest: str

    @property
    def count(self) -> int:
        return _count(self.work.path(WINDOWS))

    @property
    def documents(self) -> int:
        """How many there are, by the last window's."""
        with self.work.path(WINDOWS).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - LONGEST_LINE))
            return int(json.loads(stream.read().splitlines()[-1])["document"]) + 1

    def windows(self) -> Iterator[Window]:
        return (Window(**row) for row in read_lines(self.work.path(WINDOWS)))

    def skipped(self) -> Iterator[Skipped]:
        return (Skipped(**row) for row in read_lines(self.work.path(SKIPPED)))


@dataclass(frozen=True)
class Planted:
    """The tree, and what is learnt where. `agreement` is None where there was no question to measure it by."""

    corpus: Corpus
    digest: str

    @property
    def tree(self) -> ClusterTree:
        return ClusterTree.load(self.corpus.work.path(TREE))

    @property
    def agreement(self) -> dict[str, Any]:
        return json.loads(self.corpus.work.path(AGREEMENT).read_text(encoding="utf-8"))

    def placed(self) -> Iterator[Placed]:
        for row in read_lines(self.corpus.work.path(LEAVES_FILE)):
            yield Placed(row["window"], tuple(map(Path.parse, row["leaves"])))


def read_corpus(
    work: Work,
    sources: Sequence[str],
    tokenizer: Tokenizer,
    settings: CorpusSettings = CorpusSettings(),
    progress: Callable[[str], None] = lambda what: None,
) -> Corpus:
    """Stage `corpus`. `progress` is told each document's source. Raises CorpusError where nothing is left."""

    def make() -> None:
        beside, reader = work.path(SKIPPED + ".tmp"), untruncated(tokenizer)
        with beside.open("w", encoding="utf-8") as stream, Seen(work.path("seen.sqlite")) as seen:

            def skip(skipped: Skipped) -> None:
                stream.write(json.dumps(asdict(skipped), ensure_ascii=False) + "\n")

            documents = _new_documents(corpus.read(sources, settings.field, settings.title), seen, skip, progress)
            windows = _windows(documents, reader, settings.tokens)
            count = write_lines(work.path(WINDOWS), map(asdict, windows))
        beside.replace(work.path(SKIPPED))
        if not count:
            first = next(
                (f": {row['what']} is skipped, {row['why']}" for row in read_lines(work.path(SKIPPED))), ""
            )
            raise CorpusError(
                f"there is nothing to learn in {', '.join(sources)}{first}",
                "Readable are .txt .md .html .pdf .jsonl files, folders of them, and data sets of the hub.",
            )

        if not settings.any_language:
            _check_language(work, reader)

    return Corpus(work, work.stage("corpus", [asdict(settings), _stamp(sources)], (), make))


def _check_language(work: Work, tokenizer: Tokenizer) -> None:
    windows = itertools.islice(read_lines(work.path(WINDOWS)), LOOKED_AT)
    share = splintered(" ".join(row["text"] for row in windows), tokenizer)
    if share > FOREIGN:
        raise CorpusError(
            f"the corpus does not seem to be in English, the sentence embedder's language: {share:.0%} of its "
            "tokens are splinters of words, and questions would hardly find their answers",
            "--any-language learns it nevertheless.",
        )


def _stamp(sources: Sequence[str]) -> str:
    """Changes when a file of the sources does, by name, size or time; of a data set only the name is known."""
    digest = hashlib.sha256()
    for source in sources:
        path = pathlib.Path(source)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        digest.update(source.encode())
    return digest.hexdigest()


def _new_documents(
    found: Iterable[corpus.Found], seen: Seen, skip: Callable[[Skipped], None], progress: Callable[[str], None]
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
        for text in split(document.text, tokenizer, tokens):
            yield Window(count, number, document.source, document.title, text)
            count += 1


def plant(
    work: Work,
    made: Corpus,
    embedder: TextEmbedder,
    settings: TreeSettings = TreeSettings(),
    progress: vectors.Progress | None = None,
) -> Planted:
    """Stages `probes`, `vectors` and `tree`. `progress` counts the embedded probes.

    Raises CorpusError for a corpus of one window.
    """
    study = work.path(STUDY)
    studied = hashlib.sha256(study.read_bytes()).hexdigest() if study.exists() else ""
    asked = work.stage("probes", studied, [made.digest], lambda: _write_probes(work, made))

    def embed() -> None:
        for part in work.folder.glob("*.npy.part"):  # of other probes, unless these are the ones that were noted
            if work.path("embedding").exists() and work.path("embedding").read_text() == asked:
                break
            part.unlink()
        write_text(work.path("embedding"), asked)
        count = _count(work.path(PROBES))
        rows = (row["text"] for row in read_lines(work.path(PROBES)))
        vectors.embed(rows, count, work.path(PROBE_VECTORS), embedder, progress)

    embedded = work.stage("vectors", None, [asked], embed)
    return Planted(made, work.stage("tree", asdict(settings), [embedded], lambda: _grow(work, made, settings)))


def _write_probes(work: Work, made: Corpus) -> None:
    """Window by window; last the generated questions that are kept for measuring."""
    study = work.path(STUDY)

    def rows() -> Iterator[dict[str, Any]]:
        named = probes.with_subjects(made.windows())
        for (window, subject), studied in with_rows(named, study, lambda pair: pair[0].id):
            own = [question for question in _questions(studied) if not is_held_out(window.id, question)]
            yield from ({"window": window.id, "text": text} for text in probes.probes(window.text, subject, own))
        for number, studied in with_rows(range(made.count), study, lambda number: number):
            for question in _questions(studied):
                if is_held_out(number, question):
                    yield {"window": number, "text": question, "held_out": True}

    write_lines(work.path(PROBES), rows())


def _questions(studied: Iterable[dict[str, Any]]) -> dict[str, None]:
    """The questions among a window's rows, each once."""
    return dict.fromkeys(row["question"] for row in studied if row.get("question"))


def is_held_out(window: int, question: str) -> bool:
    """Whether a generated question is one of those that measure, by what it is alone."""
    return zlib.crc32(f"{window} {question}".encode()) % HELD_OUT == 0


def _grow(work: Work, made: Corpus, settings: TreeSettings) -> None:
    everything = np.load(work.path(PROBE_VECTORS), mmap_mode="r")
    owner, shapes, count = np.empty(len(everything), np.int64), 0, made.count
    for i, row in enumerate(read_lines(work.path(PROBES))):
        owner[i] = row["window"]
        shapes += "held_out" not in row
    shaping = ProbeVectors.of(everything[:shapes], owner[:shapes], count)
    means = vectors.write(shaping.means(), count, everything.shape[1], work.path(MEANS))
    grown = grow(means, settings.shape(count), settings.seed, Separation(shaping), settings.balance)
    grown.tree.save(work.path(TREE))
    placed, asked, total = dict[int, tuple[Path, ...]](), set(owner[shapes:].tolist()), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal total
        for window, leaves in enumerate(place(grown.tree, shaping, settings.leaves)):
            total += len(leaves)
            if window in asked:
                placed[window] = leaves
            yield {"window": window, "leaves": [str(leaf) for leaf in leaves]}

    write_lines(work.path(LEAVES_FILE), rows())
    questions = [[int(window)] for window in owner[shapes:]]
    found = agreement(grown.tree, placed, everything[shapes:], questions)
    report = {
        "branching": grown.tree.branching,
        "depth": grown.tree.depth,
        "windows": count,
        "leaves_a_window": total / count,
        "questions": len(questions),
        "agreement": found if questions else None,
    }
    write_text(work.path(AGREEMENT), json.dumps(report, indent=1) + "\n")


def given_agreement(planted: Planted, embedder: TextEmbedder, questions: Sequence[tuple[str, str]]) -> float:
    """Share of given questions that reach a leaf of the document that answers them.

    Each is (question, the document's source or title). Raises CorpusError where the corpus has no such document.
    """
    answers = defaultdict[str, list[int]](list)
    wanted, placed = {document for _, document in questions}, dict[int, tuple[Path, ...]]()
    for window, place_ in zip(planted.corpus.windows(), planted.placed(), strict=True):
        for name in wanted.intersection((window.source, window.title)):
            answers[name].append(window.id)
            placed[window.id] = place_.leaves
    if missing := sorted(wanted - answers.keys()):
        raise CorpusError(
            f"no document is called '{missing[0]}', which a question asks about",
            f"Name documents by their title, or by their source as {WINDOWS} has it.",
        )
    vectors_ = embedder.embed([question for question, _ in questions])
    return agreement(planted.tree, placed, vectors_, [answers[document] for _, document in questions])


def describe_nodes(work: Work, planted: Planted, tokens: Callable[[str], int]) -> dict[str, dict[str, Any]]:
    """Stage `labels`: every node's label, documents, windows, tokens (as `tokens` counts them) and sources."""

    def make() -> None:
        nodes = labels.describe(planted.corpus.windows, planted.placed, tokens)
        write_text(work.path(NODES), json.dumps(nodes, ensure_ascii=False, indent=1) + "\n")

    work.stage("labels", None, [planted.digest], make)
    return json.loads(work.path(NODES).read_text(encoding="utf-8"))


def _count(file: pathlib.Path) -> int:
    """Lines of a file."""
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
