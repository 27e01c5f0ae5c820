"""From windows to a tree, and to the leaves that each window is learnt in."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlx_hiermem.config import Path
from mlx_hiermem.files import file_digest
from mlx_hiermem.learn.corpus.corpus import Corpus
from mlx_hiermem.learn.records import Placed
from mlx_hiermem.learn.settings import TreeSettings
from mlx_hiermem.learn.study.prompts import not_there
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.tree import labels, probes, vectors
from mlx_hiermem.learn.tree.kmeans import Shape, grow
from mlx_hiermem.learn.tree.routing import ProbeVectors, Separation, agreement, place, reach_of
from mlx_hiermem.learn.work import (
    AGREEMENT,
    LEAVES_FILE,
    MEANS,
    NODES,
    PROBE_VECTORS,
    PROBES,
    TREE,
    Row,
    Work,
    count_lines,
    read_lines,
    with_rows,
    write_lines,
    write_text,
)
from mlx_hiermem.router import TextEmbedder
from mlx_hiermem.tree import ClusterTree

HELD_OUT = 10  # one generated question in so many measures the routing and shapes nothing


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
    embedded = _embed_probes(work, made, embedder, progress)

    def make() -> None:
        found = _Probes.read(work, made)
        means = np.load(work.path(MEANS), mmap_mode="r")
        shape, tune = _shape(settings, made.count), Separation(found.plain, found.turned)
        tree = grow(means, shape, settings.seed, tune, settings.balance).tree
        tree.save(work.path(TREE))
        _place(work, found, tree, settings.leaves)

    return Planted(made, work.stage("tree", asdict(settings), [embedded], make))


def _shape(settings: TreeSettings, windows: int) -> Shape:
    """The shape that is asked for, and where none is, the one that suits so many windows."""
    chosen = Shape.of(windows)
    return Shape(settings.branching or chosen.branching, settings.depth or chosen.depth)


def settle(
    work: Work,
    made: Corpus,
    embedder: TextEmbedder,
    choose: Callable[[np.ndarray], ClusterTree],
    of: str,
    leaves: int = TreeSettings.leaves,
    progress: vectors.Progress | None = None,
) -> Planted:
    """The same for a tree that is there: `choose` gives it for the [windows, dim] means; `of` says which it is."""
    embedded = _embed_probes(work, made, embedder, progress)

    def make() -> None:
        found = _Probes.read(work, made)
        tree = choose(np.load(work.path(MEANS)))
        tree.save(work.path(TREE))
        _place(work, found, tree, leaves)

    return Planted(made, work.stage("tree", [of, leaves], [embedded], make))


def _embed_probes(work: Work, made: Corpus, embedder: TextEmbedder, progress: vectors.Progress | None) -> str:
    """Stages `probes` and `vectors`; returns the digest of the second."""
    studied = file_digest(made.studied) if made.studied.exists() else ""
    asked = work.stage("probes", studied, [made.digest], lambda: _write_probes(work, made))

    def embed() -> None:
        for part in work.folder.glob("*.npy.part"):  # of other probes, unless these are the ones that were noted
            if work.path("embedding").exists() and work.path("embedding").read_text() == asked:
                break
            part.unlink()
        write_text(work.path("embedding"), asked)
        count = count_lines(work.path(PROBES))
        rows = (row["text"] for row in read_lines(work.path(PROBES)))
        vectors.embed(rows, count, work.path(PROBE_VECTORS), embedder, progress)

    return work.stage("vectors", None, [asked], embed)


def _write_probes(work: Work, made: Corpus) -> None:
    """Window by window; then the reversed questions; last the generated ones that are kept for measuring."""

    def rows() -> Iterator[dict[str, Any]]:
        named = probes.with_subjects(made.windows())
        for (window, subject), studied in with_rows(named, made.studied, lambda pair: pair[0].id):
            own, given = _parted(studied, turned=False)
            texts = probes.probes(window.text, subject, _asked(window.id, own))
            yield from ({"window": window.id, "text": text} for text in dict.fromkeys((*texts, *given)))
        for number, studied in _studied(made):
            own, given = _parted(studied, turned=True)
            texts = probes.framed(_asked(number, (row for row in own if not row.get("chat")), "prompt"))
            yield from (
                {"window": number, "text": text, "reversed": True} for text in dict.fromkeys((*texts, *given))
            )
        for number, studied in _studied(made):
            for turned in (False, True):
                kept = _asked(number, _parted(studied, turned)[0], held_out=True)
                more = {"held_out": True} | ({"reversed": True} if turned else {})
                yield from ({"window": number, "text": text} | more for text in kept)

    write_lines(work.path(PROBES), rows())


def _studied(made: Corpus) -> Iterator[tuple[int, list[Row]]]:
    return with_rows(range(made.count), made.studied, lambda number: number)


def _parted(studied: Sequence[Row], turned: bool) -> tuple[list[Row], list[str]]:
    """Of the rows that are reversed, or those that are not: self-study's, and the texts of the given ones."""
    rows = [row for row in studied if bool(row.get("reversed")) == turned]
    given = [row for row in rows if row.get("given")]
    texts = [text for row in given for text in (row.get("question"), row["prompt"]) if text]
    return [row for row in rows if not row.get("given")], texts


def _asked(window: int, rows: Iterable[Row], also: str = "question", held_out: bool = False) -> list[str]:
    """What rows ask, each once: their questions, or what `also` names where they have none."""
    texts = dict.fromkeys(row.get("question") or row.get(also) for row in rows)
    return [text for text in texts if text and is_held_out(window, text) == held_out]


def is_held_out(window: int, question: str) -> bool:
    """Whether a generated question is one of those that measure, by what it is alone."""
    return zlib.crc32(f"{window} {question}".encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class _Probes:
    """The embedded probes by what they are for; the means of `plain` are written."""

    plain: ProbeVectors  # what is typed by who knows what a window is about
    turned: ProbeVectors  # reversed questions, which ask what that is
    shaping: np.ndarray  # [n, dim]: both
    kept: np.ndarray  # [m, dim]: what measures
    asked: np.ndarray  # [m]: the windows of these
    backwards: np.ndarray  # bool [m]: which of these are reversed

    @classmethod
    def read(cls, work: Work, made: Corpus) -> _Probes:
        everything = np.load(work.path(PROBE_VECTORS), mmap_mode="r")
        counts = np.zeros((2, made.count), np.int64)  # plain, turned
        asked, backwards = list[int](), list[bool]()
        for row in read_lines(work.path(PROBES)):
            if "held_out" in row:
                asked.append(row["window"])
                backwards.append("reversed" in row)
            else:
                counts[int("reversed" in row), row["window"]] += 1
        plain, shapes = counts[0].sum(), counts.sum()
        found = ProbeVectors.counted(everything[:plain], counts[0])
        vectors.write(found.means(), made.count, everything.shape[1], work.path(MEANS))
        turned = ProbeVectors.counted(everything[plain:shapes], counts[1])
        kept = everything[shapes:]
        return cls(found, turned, everything[:shapes], kept, np.array(asked, np.int64), np.array(backwards, bool))


def _place(work: Work, found: _Probes, tree: ClusterTree, most: int) -> None:
    """Writes which window is learnt where, and how many of the kept questions reach one of theirs."""
    placed, wanted, total = dict[int, tuple[Path, ...]](), set(found.asked.tolist()), 0
    windows = len(found.plain.first) - 1

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal total
        for window, leaves in enumerate(place(tree, found.plain, most)):
            total += len(leaves)
            if window in wanted:
                placed[window] = leaves
            yield {"window": window, "leaves": [str(leaf) for leaf in leaves]}

    write_lines(work.path(LEAVES_FILE), rows())

    def agreed(rows: np.ndarray) -> float | None:
        answers = [[int(window)] for window in found.asked[rows]]
        return agreement(tree, placed, found.kept[rows], answers) if answers else None

    report = {
        "branching": tree.branching,
        "depth": tree.depth,
        "windows": windows,
        "leaves_a_window": total / windows,
        "questions": int((~found.backwards).sum()),
        "agreement": agreed(~found.backwards),
        "reversed_questions": int(found.backwards.sum()),
        "reversed_agreement": agreed(found.backwards),
        "reach": reach_of(tree, found.shaping),
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
        raise not_there(missing[0], "a question")
    vectors_ = embedder.embed([question for question, _ in questions])
    return agreement(planted.tree, placed, vectors_, [answers[document] for _, document in questions])


def describe_nodes(
    work: Work, planted: Planted, tokens: Callable[[str], int], examples: TrainingSet
) -> dict[str, dict[str, Any]]:
    """Stage `labels`: every node's label, documents, windows, tokens (as `tokens` counts them), and its sources,
    which are those of the examples that it learns."""

    def make() -> None:
        made = planted.corpus
        learnt = _learnt_in(examples, made.count)
        nodes = labels.describe(made.windows(), made.read, planted.placed(), learnt, tokens)
        write_text(work.path(NODES), json.dumps(nodes, ensure_ascii=False, indent=1) + "\n")

    work.stage("labels", None, [planted.digest, examples.digest], make)
    return json.loads(work.path(NODES).read_text(encoding="utf-8"))


def _learnt_in(examples: TrainingSet, windows: int) -> Iterator[set[Path]]:
    """The leaves in which something of each window is learnt."""
    pairs = zip(examples.windows.tolist(), examples.leaves_of(), strict=True)  # in the order of the windows
    groups = itertools.groupby(pairs, key=lambda pair: pair[0])
    at, own = next(groups, (windows, iter(())))
    for window in range(windows):
        if window < at:
            yield set()
            continue
        yield {leaf for _, leaves in own for leaf in leaves}
        at, own = next(groups, (windows, iter(())))
