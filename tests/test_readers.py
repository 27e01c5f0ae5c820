"""Files as people have them: other encodings, damaged bytes, Markdown as it is written, office formats."""

from __future__ import annotations

import io
import json
import os
import pathlib
import zipfile

import pypdf
import pytest
from test_learn_corpus import pdf, read

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.learn.corpus.corpus import _stamp, read_corpus
from mlx_hiermem.learn.settings import CorpusSettings
from mlx_hiermem.learn.work import Work


def texts(*sources: object) -> list[str]:
    return [document.text for document in read(*sources)[0]]


def test_half_of_a_surrogate_pair_costs_a_sign_and_not_the_run(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "a\\ud800", "text": "one \\udc00 two"}\n{"text": "\\ud83d\\ude00 fine"}\n')
    documents, skipped = read(file)
    assert skipped == {}
    assert [(d.title, d.text) for d in documents] == [("a\ufffd", "one \ufffd two"), ("", "😀 fine")]
    assert all(d.text.encode() and d.title.encode() is not None for d in documents)


def test_a_file_name_that_is_no_unicode(tmp_path: pathlib.Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "w", encoding="utf-8") as stream:
        stream.write("Coffee is brewed.")
    [document], skipped = read(tmp_path)
    assert (document.source, document.title, skipped) == ("caf\ufffd.txt", "caf", {})
    assert len(_stamp([str(tmp_path)], None)) == 64


def test_one_bad_byte_costs_its_own_place(tmp_path: pathlib.Path) -> None:
    rows = [json.dumps({"text": f"row {n}"}).encode() for n in range(9)]
    rows[4] = b'{"text": "row \xff 4"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "b.txt").write_bytes(b"Bread rises.\n\nIt \xff browns.")
    documents, skipped = read(tmp_path)
    assert [d.text for d in documents] == [
        *(f"row {n}" for n in range(4)),
        "row \ufffd 4",
        *(f"row {n}" for n in range(5, 9)),
        "Bread rises.\n\nIt \ufffd browns.",
    ]
    assert skipped == {"b.txt": "1 place is not UTF-8 text; all else is learnt"}


def test_bytes_that_are_no_text_at_all(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(128, 256)) * 8)
    assert read(tmp_path)[1] == {"a.txt": "not UTF-8 text, nor UTF-16 with a byte order mark"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_says_which_encoding(tmp_path: pathlib.Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("Café and tea.", encoding=encoding)
    (tmp_path / "b.md").write_text("# Tea\nHot, for café.", encoding=encoding)
    documents, skipped = read(tmp_path)
    assert (skipped, [d.text for d in documents]) == ({}, ["Café and tea.", "Hot, for café."])


def test_an_array_is_said_to_be_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('[\n{"text": "one"},\n{"text": "two"}\n]\n')
    assert read(tmp_path) == ([], {"a.jsonl": "a JSON array; a .jsonl file has one object on each line"})


def test_markdown_as_people_write_it(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text(
        "---\ntitle: 'Tea at home'\ntags: [drink]\n---\nIntro.\n\nGreen tea\n---------\nSteep it.\n\n"
        "~~~sh\n# not a heading\n~~~\n\n   ```\n   # nor this\n   ```\n\n> # quoted\n\n"
        "Black tea\n=========\nBoil it.\n"
    )
    documents, _ = read(file)
    assert [d.title for d in documents] == ["Tea at home", "Tea at home: Green tea", "Tea at home: Black tea"]
    assert documents[0].text == "Intro."
    assert "# not a heading" in documents[1].text
    assert "# nor this" in documents[1].text
    assert documents[2].text == "Boil it."


def test_a_pdf_with_permissions_and_one_with_a_password(tmp_path: pathlib.Path) -> None:
    for name, password in (("open.pdf", ""), ("shut.pdf", "secret")):
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf("Copper conducts heat.")))
        writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-256")
        writer.write(tmp_path / name)
    documents, skipped = read(tmp_path)
    assert [d.text.strip() for d in documents] == ["Copper conducts heat."]
    assert skipped == {"shut.pdf": "it needs a password"}


def test_a_csv_of_texts_and_one_of_facts(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text('name,text\nOslo,"A city,\nin Norway."\n')
    (tmp_path / "b.csv").write_text("name;capital;area\nNorway;Oslo;385207\nPeru;Lima;\n", encoding="utf-8-sig")
    documents, skipped = read(tmp_path)
    assert skipped == {}
    assert [(d.source, d.title, d.text) for d in documents] == [
        ("a.csv:2", "Oslo", "A city,\nin Norway."),
        ("b.csv:2", "Norway", "name: Norway\ncapital: Oslo\narea: 385207"),
        ("b.csv:3", "Peru", "name: Peru\ncapital: Lima"),
    ]


def test_a_csv_whose_quotes_come_late(tmp_path: pathlib.Path) -> None:
    plain = "".join(f"row {n},a plain text that says nothing at all of note\n" for n in range(400))
    late = 'Anna,"She said ""hello, world"" and left, quickly."\n'
    (tmp_path / "a.csv").write_text(f"name,text\n{plain}{late}")
    assert texts(tmp_path)[-1] == 'She said "hello, world" and left, quickly.'


def test_half_of_a_pair_in_a_pdf(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Copper conducts heat."))
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: "half \ud835 a pair")
    assert texts(tmp_path) == ["half \ufffd a pair"]


OPEN = "http://schemas.openxmlformats.org"
PACKAGE = f"{OPEN}/package/2006"
OFFICE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
WORD = {
    "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" '
    'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/word/document.xml" ContentType="{OFFICE}"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" '
    f'Type="{OPEN}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
    "word/document.xml": f'<w:document xmlns:w="{OPEN}/wordprocessingml/2006/main"><w:body><w:p><w:r>'
    "<w:t>The keel is laid first.</w:t></w:r></w:p></w:body></w:document>",
}
BOOK = {
    "mimetype": "application/epub+zip",
    "META-INF/container.xml": '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
    '<rootfiles><rootfile full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles>'
    "</container>",
    "book.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
    '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Ships</dc:title></metadata>'
    '<manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
    '<spine><itemref idref="a"/></spine></package>',
    "a.xhtml": '<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>Masts</h1>'
    "<p>A mast carries sails.</p></body></html>",
}


def test_office_formats(tmp_path: pathlib.Path) -> None:
    from pptx import Presentation

    for name, parts in (("a.docx", WORD), ("b.epub", BOOK)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, content)
    slides = Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[1])
    slide.shapes.title.text, slide.placeholders[1].text = "Rigging", "Shrouds hold the mast."
    slides.save(str(tmp_path / "c.pptx"))
    (tmp_path / "d.docx").write_bytes(b"PK\x03\x04 no archive")
    documents, skipped = read(tmp_path)
    assert list(dict.fromkeys(d.source for d in documents)) == ["a.docx", "b.epub", "c.pptx"]
    said = " ".join(d.text for d in documents)
    for sentence in ("The keel is laid first.", "A mast carries sails.", "Shrouds hold the mast."):
        assert sentence in said
    assert any("Masts" in d.title for d in documents)
    assert list(skipped) == ["d.docx"]
    assert skipped["d.docx"].startswith("cannot be read")


def test_a_blob_is_no_language(tmp_path: pathlib.Path, minilm: Embedder) -> None:
    """Base64 in a text is left out, and one odd document does not make a corpus foreign."""
    root = tmp_path / "docs"
    root.mkdir()
    english = "The keel is laid first, and the frames are raised upon it before the planks are bent around them."
    for number in range(6):
        (root / f"{number}.txt").write_text(f"{english} Ship {number} has {number + 2} masts.")
    blob = "QmFzZTY0IGlzIG5vIGxhbmd1YWdl" * 400
    (root / "blob.txt").write_text(f"A picture follows.\n\n{blob}\n\nIt showed a ship.")
    (root / "words.txt").write_text(" ".join(f"qzx{n}vrk wprt{n} zzgh" for n in range(900)))
    assert not any(blob[:300] in text for text in texts(root))
    corpus = read_corpus(Work(tmp_path / "work"), [str(root)], minilm.tokenizer, CorpusSettings())
    assert corpus.count > 7


def test_a_csv_with_a_long_cell_loose_commas_or_a_line_of_excels(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text(f"name,text\nOne,{'word ' * 40000}\nTwo,short\n")
    assert [len(text) for text in texts(tmp_path)] == [200_000, 5]
    (tmp_path / "a.csv").write_text("text\nAshford has a mill, a church, and a bridge.\n")
    assert texts(tmp_path) == ["Ashford has a mill, a church, and a bridge."]
    (tmp_path / "a.csv").write_text("sep=;\nname;text\nOslo;A city.\n", encoding="utf-8-sig")
    [document], _ = read(tmp_path)
    assert (document.source, document.title, document.text) == ("a.csv:3", "Oslo", "A city.")


def test_what_has_no_text_is_said(tmp_path: pathlib.Path) -> None:
    (tmp_path / "docs" / "below").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("Not read.")
    (tmp_path / "docs" / "link").symlink_to(tmp_path / "other")
    for name, text in {"a.txt": " \n", "b.md": "# Heading\n", "c.csv": "text\n", "d.txt": "Read."}.items():
        (tmp_path / "docs" / name).write_text(text)
    documents, skipped = read(tmp_path / "docs")
    assert [d.source for d in documents] == ["d.txt"]
    assert skipped == dict.fromkeys(("a.txt", "b.md", "c.csv"), "no text in it") | {"link/": "a link to a folder"}


def test_text_between_two_rules_is_no_front_matter(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.md").write_text("---\n\nCalder is a town.\n\n---\n\nDunmore is another.\n")
    assert "Calder" in " ".join(texts(tmp_path))
    (tmp_path / "a.md").write_text("---\ndate: 2026\ntitle: Calder\n---\n\nIt is a town.\n")
    [document], _ = read(tmp_path)
    assert (document.title, "2026" in document.text) == ("Calder", False)
