"""Documents: what is read, what is skipped and why, windows of whole sentences, duplicates, bounded memory."""

from __future__ import annotations

import errno
import os
import pathlib
import tracemalloc
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import CorpusError, OutputError
from mlx_hiermem.learn.corpus import formats, readers
from mlx_hiermem.learn.corpus.corpus import Seen, read_corpus
from mlx_hiermem.learn.corpus.windows import Document, Skipped, splintered, split, untruncated
from mlx_hiermem.learn.settings import CorpusSettings
from mlx_hiermem.learn.work import FILES, SKIPPED, WINDOWS, WINDOWS_DIGEST, Work
from mlx_hiermem.sentences import sentences

PAGE = """<html><head><title>Salt</title></head><body><nav><a href="/">Home</a> <a href="/all">All pages</a></nav>
<article><h1>Salt</h1><p>Salt is a mineral composed primarily of sodium chloride. It is present in vast quantities
in seawater, where it is the main mineral constituent.</p><p>The open sea has about 35 grams of solids in a litre,
which is a salinity of 3.5 per cent.</p></article><footer>Imprint</footer></body></html>"""


@pytest.fixture(scope="module")
def tokenizer(minilm: Embedder) -> Tokenizer:
    return untruncated(minilm.tokenizer)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "docs"
    (root / "sub").mkdir(parents=True)
    return root


def pdf(text: str) -> bytes:
    """A PDF of one page with one line."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, starts = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        starts.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    return out + head + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)


def read(*sources: object, **options: str) -> tuple[list[Document], dict[str, str]]:
    """(documents, what was skipped -> why)"""
    found = list(readers.read([str(source) for source in sources], **options))
    return [d for d in found if isinstance(d, Document)], {s.what: s.why for s in found if isinstance(s, Skipped)}


def test_every_kind_of_file(folder: pathlib.Path) -> None:
    (folder / "a_note.txt").write_text("﻿Bread rises.\n", encoding="utf-8")
    (folder / "b.md").write_text("Before.\n# Tea\nHot.\n## Green\nSteep it.\n```\n# code\n```\n")
    (folder / "c.html").write_text(PAGE)
    (folder / "d.PDF").write_bytes(pdf("Copper conducts heat."))
    (folder / "sub" / "e.jsonl").write_text('{"name": "Oslo", "text": "A city."}\n\n{"text": "No title."}\n')
    documents, skipped = read(folder)
    assert skipped == {}
    assert [(d.source, d.title) for d in documents] == [
        ("a_note.txt", "a note"),
        ("b.md", "b"),
        ("b.md", "Tea"),
        ("b.md", "Tea: Green"),
        ("c.html", "Salt"),
        ("d.PDF", "d"),
        ("sub/e.jsonl:1", "Oslo"),
        ("sub/e.jsonl:3", ""),
    ]
    assert documents[0].text == "Bread rises.\n"
    assert documents[3].text == "Steep it.\n```\n# code\n```"
    assert "35 grams" in documents[4].text
    assert "Imprint" not in documents[4].text
    assert documents[5].text == "Copper conducts heat."


def test_what_is_skipped_says_why(folder: pathlib.Path) -> None:
    (folder / "a.png").write_bytes(b"\x89PNG")
    (folder / "b.txt").write_bytes(b"abc\x00def")
    (folder / "c.txt").write_bytes(b"\xe9\xe8 \xe0")
    (folder / "d.txt").touch()
    (folder / "e.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "f.html").write_text("<html><body></body></html>")
    (folder / "g.jsonl").write_text('{"text": "Fine."}\n{"text": 3}\n[1]\n{broken\n')
    (folder / "h").write_text("no suffix")
    (folder / ".hidden").write_text("x")
    (folder / ".git").mkdir()
    for own in ("model/bank/bank.json", "plain/anchor/config.json", "model.learn/stages.json"):
        (folder / own).parent.mkdir(parents=True)
        (folder / own).with_name("learnt.txt").write_text("Made of what lies beside it.")
        (folder / own).write_text("{}")
    documents, skipped = read(folder)
    assert [d.source for d in documents] == ["g.jsonl:1"]
    assert skipped.pop("e.pdf").startswith("cannot be read: ")
    assert skipped.pop("g.jsonl:4").startswith("not JSON: ")
    assert skipped == {
        ".git/": "hidden folder",
        "model/": "a model",
        "plain/": "a model",
        "model.learn/": "the work folder of a model",
        ".hidden": "hidden file",
        "a.png": "no reader for .png",
        "b.txt": "binary, not text",
        "c.txt": "not UTF-8 text, nor UTF-16 with a byte order mark",
        "d.txt": "empty",
        "f.html": "no text in the page",
        "g.jsonl:2": "no text in 'text'",
        "g.jsonl:3": "no text in 'text'",
        "h": "no reader for files without a suffix",
    }


def test_fields_are_chosen(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"name": "n", "key": "k", "body": "Text of it."}\n')
    assert read(file, field="body")[0] == [Document("rows.jsonl:1", "n", "Text of it.")]
    assert read(file, field="body", title="key")[0][0].title == "k"
    with pytest.raises(CorpusError, match=r"no field 'text'. Its fields are body, key, name"):
        read(file)
    with pytest.raises(CorpusError, match="no file or folder"):
        read(tmp_path / "none")


def test_long_text_comes_in_pieces(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "PIECE", 100)
    text = "".join(f"Paragraph {i} has some words in it.\n\n" for i in range(40))
    (folder / "book.txt").write_text(text)
    documents, _ = read(folder)
    assert "".join(d.text for d in documents) == text
    assert max(len(d.text) for d in documents) < 200
    assert all(d.text.lstrip().startswith("Paragraph") for d in documents)
    (folder / "book.txt").write_text("x" * 1000)  # no place to cut at all
    assert "".join(d.text for d in read(folder)[0]) == "x" * 1000


def test_windows_know_their_place(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    def places(name: str) -> list[tuple[str, str]]:
        work = Work(tmp_path / f"work-{name}")
        corpus = read_corpus(work, [str(tmp_path / name)], tokenizer, CorpusSettings(tokens=8))
        return [(window.place, window.text) for window in corpus.windows()]

    (tmp_path / "a.txt").write_text("Copper conducts heat very well.\nIt is red.\n\n  Gold does not rust at all.\n")
    assert places("a.txt") == [
        ("line 1", "Copper conducts heat very well."),
        ("line 2", "It is red."),
        ("line 4", "Gold does not rust at all."),
    ]
    (tmp_path / "b.md").write_text(
        "---\ntitle: Metals\n---\n\n# Copper\n\nIt conducts heat very well.\n\n# Gold\nIt is soft.\n"
    )
    assert [place for place, _ in places("b.md")] == ["line 7", "line 10"]
    (tmp_path / "c.jsonl").write_text('{"text": "Copper conducts heat."}\n')
    assert places("c.jsonl") == [("", "Copper conducts heat.")]
    pages = Document("d.pdf", "", "Page one.\n\nPage two.\n\n", pages=(0, 11))
    assert [pages.place(at) for at in (0, 8, 11, 15)] == ["page 1", "page 1", "page 2", "page 2"]


def test_sentences() -> None:
    assert sentences('He said "Go." Then\n he left (soon). It cost 3.5 e.g. once! Why?  “So.”') == [
        'He said "Go."',
        "Then he left (soon).",
        "It cost 3.5 e.g. once!",
        "Why?",
        "“So.”",
    ]
    assert sentences("A heading\n\nA line\nand another") == ["A heading", "A line and another"]
    assert sentences("水は液体です。氷は固体です。") == ["水は液体です。", "氷は固体です。"]
    assert sentences("  \n ") == []


def test_windows_are_whole_sentences(tokenizer: Tokenizer) -> None:
    text = " ".join(f"Sentence number {i} is here." for i in range(30))
    windows = [window for _, window in split(text, tokenizer, 40)]
    assert " ".join(windows) == text
    sizes = [len(tokenizer.encode(w, add_special_tokens=False)) for w in windows]
    assert max(sizes) <= 40
    assert min(sizes[:-1]) > 30
    assert all(w.endswith("here.") for w in windows)


def test_a_long_sentence_is_cut_between_words(tokenizer: Tokenizer) -> None:
    text = "incomprehensibilities " * 100
    windows = [window for _, window in split(text, tokenizer, 50)]
    assert " ".join(windows) == text.strip()
    assert all(len(tokenizer.encode(w, add_special_tokens=False)) <= 50 for w in windows)
    assert list(split("a" * 400, tokenizer, 8))  # one word longer than a window still ends


STORY = " ".join(f"word{i} stands beside other{i}." for i in range(200))


def test_duplicates_are_named(tmp_path: pathlib.Path) -> None:
    with Seen(tmp_path / "seen") as seen:
        assert seen.before("a", STORY) == ""
        assert seen.before("b", STORY.upper().replace(" ", "\n")) == "the same as a"
        assert seen.before("c", STORY.replace("word77 ", "else77 ")).endswith("the same as a")
        assert seen.before("d", STORY.replace("word", "name")) == ""
    assert not (tmp_path / "seen").exists()


def test_one_other_word_makes_another_fact(tmp_path: pathlib.Path) -> None:
    """Short documents of one form are not duplicates, however alike they are."""
    with Seen(tmp_path / "seen") as seen:
        for name in ("Oslo", "Lima", "Rome", "Bern"):
            text = f"{name} is a city that lies on a river and has a cathedral, a market and an old town hall."
            assert seen.before(name, text) == ""


def test_likeness_is_estimated_well(tmp_path: pathlib.Path) -> None:
    with Seen(tmp_path / "seen") as seen:
        words = [f"w{i}" for i in range(1000)]
        a, b = seen.signature(words[:800]), seen.signature(words[200:])
        assert (a == b).mean() == pytest.approx(596 / 1012, abs=0.15)  # runs in common, of all


def test_a_corpus_in_files(folder: pathlib.Path, tmp_path: pathlib.Path, minilm: Embedder) -> None:
    tokenizer = minilm.tokenizer  # reads 256 tokens of a text, and the text is longer
    (folder / "a.txt").write_text(STORY)
    (folder / "b.txt").write_text(STORY)
    (folder / "c.bin").write_bytes(b"\0")
    work = Work(tmp_path / "work")
    made = read_corpus(work, [str(folder)], tokenizer, CorpusSettings(tokens=100))
    windows = list(made.windows())
    assert [w.id for w in windows] == list(range(made.count))
    assert " ".join(w.text for w in windows) == STORY
    assert {(w.document, w.source, w.title) for w in windows} == {(0, "a.txt", "a")}
    assert list(made.skipped()) == [Skipped("b.txt", "the same as a.txt"), Skipped("c.bin", "no reader for .bin")]
    there = sorted(path.name for path in work.folder.iterdir())
    assert there == [FILES, SKIPPED, "stages.json", WINDOWS, WINDOWS_DIGEST]


def test_a_stage_is_made_again_only_if_something_changed(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    (folder / "a.txt").write_text("One thing.")
    seen = list[str]()

    def go(tokens: int = 100) -> str:
        settings = CorpusSettings(tokens=tokens)
        return read_corpus(Work(tmp_path / "work"), [str(folder)], tokenizer, settings, seen.append).digest

    first = go()
    assert go() == first
    assert seen == ["a.txt"]
    assert go(tokens=50) == first  # read again, but the windows are the same
    (folder / "b.txt").write_text("Another thing.")
    assert go(tokens=50) != first
    assert seen == ["a.txt", "a.txt", "a.txt", "b.txt"]


def test_what_was_made_of_windows_holds_where_files_are_only_touched(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    """A checkout or a copy gives files new times. A teacher is not asked for everything anew because of that."""
    (folder / "a.txt").write_text("One thing.")
    work, made = Work(tmp_path / "work"), list[str]()

    def go() -> None:
        corpus = read_corpus(work, [str(folder)], tokenizer)
        work.stage("study", None, [corpus.digest], lambda: made.append("study"))

    go()
    os.utime(folder / "a.txt", (0, 0))
    go()
    assert made == ["study"]
    (folder / "a.txt").write_text("One thought.")
    go()
    assert made == ["study", "study"]


def test_an_empty_corpus_says_so(folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    work = Work(tmp_path / "work")
    with pytest.raises(CorpusError, match="nothing to learn in"):
        read_corpus(work, [str(folder)], tokenizer)
    (folder / "a.bin").write_bytes(b"\0")
    with pytest.raises(CorpusError, match=r"a.bin is skipped, no reader for .bin"):
        read_corpus(work, [str(folder)], tokenizer)
    (folder / "a.txt").write_text("Now there is.")
    assert read_corpus(work, [str(folder)], tokenizer).count == 1


def test_another_language_than_the_embedders(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer
) -> None:
    german = "Das Gebäude wurde im achtzehnten Jahrhundert errichtet und später mehrfach umgebaut."
    assert splintered(german, tokenizer) > 0.4
    assert splintered("The building dates from the eighteenth century, and was altered later.", tokenizer) < 0.1
    (folder / "a.txt").write_text(german, encoding="utf-8")
    work = Work(tmp_path / "work")
    with pytest.raises(CorpusError, match="not seem to be in English"):
        read_corpus(work, [str(folder)], tokenizer)
    assert read_corpus(work, [str(folder)], tokenizer, CorpusSettings(any_language=True)).count == 1


def test_a_full_disk_keeps_what_was_done(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.txt").write_text("One thing.")
    work = Work(tmp_path / "work")
    made = read_corpus(work, [str(folder)], tokenizer)

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "nodes.json")

    with pytest.raises(OutputError, match=r"cannot write nodes.json: the disk is full. What was done is kept"):
        work.stage("labels", None, [made.digest], full)
    assert read_corpus(Work(tmp_path / "work"), [str(folder)], tokenizer).digest == made.digest


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot use the work folder"):
        Work(tmp_path / "file" / "work")


def test_memory_does_not_grow_with_the_corpus(
    folder: pathlib.Path, tmp_path: pathlib.Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(documents: int) -> int:
        def found() -> Iterator[Document]:
            for i in range(documents):
                yield Document(f"{i}", "", f"Line {i} of it. " + f"{i} words. " * 100)

        monkeypatch.setattr(readers, "read", lambda *args: found())
        tracemalloc.start()
        read_corpus(Work(tmp_path / f"work{documents}"), [str(folder)], tokenizer)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # loads what is loaded once
    assert peak(400) < peak(100) + 200_000  # of 300 documents more, each 1 kB
