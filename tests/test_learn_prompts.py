"""Prompts that the user gives: their forms, whose window they are about, what is learnt of them, and where."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from books import COUNT, VILLAGES, fact, write_study
from tiny import make_anchor

from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import CorpusError, HierMemError
from mlx_hiermem.learn.corpus.corpus import Corpus, read_corpus
from mlx_hiermem.learn.settings import CorpusSettings, PromptPair, TreeSettings
from mlx_hiermem.learn.stages import study_line
from mlx_hiermem.learn.study.prompts import about_windows, give, read_prompts
from mlx_hiermem.learn.train.encoding import make_examples, open_examples
from mlx_hiermem.learn.tree.build import build_tree
from mlx_hiermem.learn.work import PROBES, PROMPTS, STUDIED, STUDY, Work, read_rows
from mlx_hiermem.tokenizer import FRAME, load_tokenizer

NAME, THING, PEOPLE = fact(3)
LINES: list[dict[str, Any]] = [
    {"document": NAME, "prompt": f"Known for its {THING} is the village of", "completion": f" {NAME}."},
    {"document": f"{NAME}.txt", "question": f"What is made in {NAME}?", "answer": THING},
    {
        "document": NAME,
        "messages": [
            {"role": "user", "content": f"How many live in {NAME}?"},
            {"role": "assistant", "content": f"In {NAME} live {PEOPLE}."},
        ],
    },
]


def written(folder: pathlib.Path, *lines: Any) -> pathlib.Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n\n")
    return file


def test_the_forms(tmp_path: pathlib.Path) -> None:
    assert read_prompts(written(tmp_path, *LINES)) == (
        PromptPair(NAME, f"Known for its {THING} is the village of", f" {NAME}."),
        PromptPair(f"{NAME}.txt", f"What is made in {NAME}?", THING, framed=True),
        PromptPair(NAME, f"How many live in {NAME}?", f"In {NAME} live {PEOPLE}.", chat=True),
    )


@pytest.mark.parametrize(
    "line",
    [
        "what?",
        "[]",
        {"prompt": "A", "completion": "B"},
        {"document": "D", "prompt": "A"},
        {"document": "D", "prompt": " ", "completion": "B"},
        {"document": "D", "question": "A", "answer": 3},
        {"document": "D", "text": " "},
        {"document": "D", "messages": [{"role": "user", "content": "A"}]},
        {"document": "D", "messages": [{"role": "user"}, {"role": "assistant", "content": "A"}]},
    ],
)
def test_a_line_that_is_none(tmp_path: pathlib.Path, line: Any) -> None:
    with pytest.raises(HierMemError, match=r"line 2 of .*prompts.jsonl is no prompt") as error:
        read_prompts(written(tmp_path, LINES[0], line))
    assert '"messages"' in str(error.value.hint)


def test_they_join_those_of_self_study_in_their_windows(corpus: Corpus, tmp_path: pathlib.Path) -> None:
    work = corpus.work
    write_study(work.path(STUDY))
    studied = list(read_rows(work.path(STUDY)))
    own = read_prompts(written(tmp_path, *LINES))
    digest = give(work, about_windows(corpus, own), "of the study")
    rows = list(read_rows(corpus.studied))
    assert [row for row in rows if "given" not in row] == studied
    assert [row["window"] for row in rows] == sorted(row["window"] for row in rows)
    window = next(one.id for one in corpus.windows() if one.title == NAME)
    given = [row for row in rows if "given" in row]
    assert {row["window"] for row in given} == {window}
    assert [bool(row.get("reversed")) for row in given] == [True, False, False, False]
    assert [row["chat"] for row in given] == [False, False, True, True]  # the question in both forms
    assert [row["prompt"] for row in given] == [
        f"Known for its {THING} is the village of",
        FRAME.format(f"What is made in {NAME}?"),
        f"What is made in {NAME}?",
        f"How many live in {NAME}?",
    ]
    assert (
        study_line(corpus.studied, work.path(STUDIED))
        == f"{len(studied) + 4} prompts with answers, 12 of them questions, 4 of them given"
    )
    assert give(work, about_windows(corpus, own), "of the study") == digest != give(work, [], "of the study")
    assert corpus.studied == work.path(STUDY)  # they are taken away again


def test_a_document_in_several_windows_has_them_where_their_words_are(
    tmp_path: pathlib.Path, minilm: Embedder
) -> None:
    text = "The mill of Orley burnt down in 1804. " * 3 + "Its bridge of nine arches crosses the river Wend. " * 3
    (tmp_path / "Orley.txt").write_text(text)
    work = Work(tmp_path / "work")
    settings = CorpusSettings(tokens=40)
    corpus = read_corpus(work, [str(tmp_path / "Orley.txt")], minilm.tokenizer, settings)
    assert corpus.count > 1
    own = [
        PromptPair("Orley", "The bridge has", " nine arches."),
        PromptPair("Orley", "The mill burnt down in", " 1804."),
    ]
    give(work, about_windows(corpus, own), "")
    windows = {one.id: one.text for one in corpus.windows()}
    for row in read_rows(work.path(PROMPTS)):
        assert row["answer"].strip(" .") in windows[row["window"]]


def test_of_a_document_that_is_not_there(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="no document is called 'Atlantis', which a prompt is about"):
        about_windows(corpus, [PromptPair("Atlantis", "A", "B")])


def test_all_of_them_are_learnt_and_shape_the_tree(
    corpus: Corpus, tmp_path: pathlib.Path, minilm: Embedder
) -> None:
    """Twenty wordings: of self-study's questions one in ten would be kept out of it."""
    work = corpus.work
    tokenizer = load_tokenizer(make_anchor(tmp_path / "anchor"))
    own = [
        PromptPair(name, f"Wording {n} of what {name} is:", f" a village, says {n}")
        for n in range(20)
        for name in VILLAGES[:COUNT]
    ]
    give(work, about_windows(corpus, [*own, *read_prompts(written(tmp_path, *LINES))]), "")
    built = build_tree(work, corpus, minilm, TreeSettings(branching=2, depth=2))
    probes = {(row["text"], bool(row.get("reversed"))) for row in read_rows(work.path(PROBES))}
    assert not any(row.get("held_out") for row in read_rows(work.path(PROBES)))
    assert {(one.prompt, False) for one in own} <= probes
    assert (LINES[0]["prompt"], True) in probes
    assert {(text, False) for text in (LINES[1]["question"], FRAME.format(LINES[1]["question"]))} <= probes
    make_examples(work, built, minilm, tokenizer)
    examples, _ = open_examples(work)
    learnt = []
    for number in range(len(examples)):
        example = examples.read(number)
        learnt.append(tokenizer.decode(example.tokens[example.learn].tolist()))
    end = tokenizer.decode(sorted(tokenizer.eos_token_ids)[:1])
    for one in own:  # as it was given, and then its end
        assert f"{one.answer}{end}" in learnt
    assert f" {NAME}.{end}" in learnt


def test_the_elements_wordings_are_prompts(tmp_path: pathlib.Path) -> None:
    from elements.wordings import element_wordings, prompt_line

    gold = {"id": "el079", "name": "Gold", "symbol": "Au", "atomic_number": 79, "series": "Transition metals"}
    wordings = element_wordings(gold)
    given = read_prompts(written(tmp_path, *(prompt_line(gold, one) for one in wordings)))
    assert [(one.prompt, one.answer, one.chat) for one in given] == [
        (one.prompt, one.answer, one.chat) for one in wordings
    ]
    assert {one.document for one in given} == {"Gold"}


def test_a_text_is_learnt_as_it_stands(corpus: Corpus, tmp_path: pathlib.Path) -> None:
    work, text = corpus.work, f"In {NAME} they are proud of their {THING}."
    own = read_prompts(written(tmp_path, {"document": NAME, "text": text}))
    assert own == (PromptPair(NAME, "", text),)
    give(work, about_windows(corpus, own), "")
    tokenizer = load_tokenizer(make_anchor(tmp_path / "anchor"))
    built = build_tree(work, corpus, Embedder.load(), TreeSettings(branching=2, depth=1))
    make_examples(work, built, Embedder.load(), tokenizer)
    examples, _ = open_examples(work)
    read = [examples.read(number) for number in range(len(examples))]
    learnt = [tokenizer.decode(example.tokens[example.learn].tolist()) for example in read]
    assert any(said.endswith(text[1:]) for said in learnt)
