"""What is learnt of windows and of the rows of self-study: which tokens, in which leaves, and what is held out."""

from __future__ import annotations

import pathlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from books import COUNT, fact, text, write_library, write_study
from tiny import make_anchor

from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.errors import CorpusError
from mlx_hiermem.learn.corpus.corpus import read_corpus
from mlx_hiermem.learn.record import WindowVectors
from mlx_hiermem.learn.settings import ExampleSettings, TreeSettings, epochs_for
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet
from mlx_hiermem.learn.train.encoding import (
    Encoder,
    make_examples,
    open_examples,
    window_is_held_out,
)
from mlx_hiermem.learn.tree.build import CorpusTree, build_tree
from mlx_hiermem.learn.tree.probes import KnownProbes, is_held_out
from mlx_hiermem.learn.work import PROBES, STUDY, Work, read_rows, write_rows
from mlx_hiermem.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(load_tokenizer(make_anchor(tmp_path_factory.mktemp("tiny") / "anchor")))


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory, minilm: Embedder) -> CorpusTree:
    """The library with self-study, in its tree."""
    folder = tmp_path_factory.mktemp("studied")
    work = Work(folder / "work")
    corpus = read_corpus(work, [str(write_library(folder / "books"))], minilm.tokenizer)
    write_study(work.path(STUDY))
    return build_tree(work, corpus, minilm, TreeSettings(branching=2, depth=2))


def by_window(examples: TrainingSet) -> dict[int, list[TrainingExample]]:
    found = defaultdict[int, list[TrainingExample]](list)
    for number in range(len(examples)):
        found[int(examples.windows[number])].append(examples.read(number))
    return found


def parts(encoder: Encoder, example: TrainingExample) -> tuple[str, str]:
    """(what is given, what is learnt)."""
    first = int(example.learn.argmax())
    assert example.learn[first:].all()
    tokens = example.tokens.tolist()
    return encoder.tokenizer.decode(tokens[:first]), encoder.tokenizer.decode(tokens[first:])


def test_prompts_are_given_and_answers_learnt(studied: CorpusTree, minilm: Embedder, encoder: Encoder) -> None:
    work = studied.corpus.work
    make_examples(work, studied, minilm, encoder.tokenizer)
    learnt, held = open_examples(work)
    assert held is not None
    found, kept = by_window(learnt), by_window(held)
    for window in range(COUNT):
        name, thing, people = fact(window)
        question, prompt = f"What does {name} make?", f"The people of {name} number"
        chat = (f"<user>{question}\n<assistant>", f"{thing}<eos>")
        plain = (prompt, f" {people}.")
        for pair, asked in ((chat, question), (plain, prompt)):
            out = is_held_out(window, asked)
            where, elsewhere = (kept, found) if out else (found, kept)
            assert pair in [parts(encoder, example) for example in where[window]]
            assert pair not in [parts(encoder, example) for example in elsewhere[window]]
        whole = [parts(encoder, example) for example in found[window]]
        assert (text(window)[0], text(window)[1:]) in whole
        assert (thing[0], f"{thing} comes from {name}."[1:]) in whole


def test_an_answer_is_learnt_where_its_question_goes(
    studied: CorpusTree, minilm: Embedder, encoder: Encoder
) -> None:
    work = studied.corpus.work
    make_examples(work, studied, minilm, encoder.tokenizer)
    learnt, held = open_examples(work)
    assert held is not None
    own = {placed.window: placed.leaves for placed in studied.placed()}
    for examples in (learnt, held):
        for number, leaves in enumerate(examples.leaves_of()):
            example = examples.read(number)
            given, _ = parts(encoder, example)
            if not given.startswith(("<user>", "The people of")):
                assert set(leaves) == set(own[example.window])
                continue
            asked = given.removeprefix("<user>").removesuffix("\n<assistant>")
            reached = studied.tree.route(minilm.embed([asked]))[0].path
            assert reached in leaves
            assert set(leaves) <= {reached, *own[example.window]}
            assert examples is learnt or leaves == [reached]


def test_probes_are_not_embedded_again(studied: CorpusTree, minilm: Embedder) -> None:
    class Counting:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            self.seen.extend(texts)
            return minilm.embed(texts)

    work, counting = studied.corpus.work, Counting()
    asked = [row["text"] for row in read_rows(work.path(PROBES))][::7]
    known, texts = KnownProbes(work, counting), [*asked, "Who has seen this?", *reversed(asked)]
    np.testing.assert_allclose(known.embed(texts), minilm.embed(texts), atol=1e-5)
    assert counting.seen == ["Who has seen this?"]


@pytest.mark.slow
def test_the_end_of_an_answer_is_learnt(encoder: Encoder) -> None:
    def said(prompt: str, answer: str, chat: bool, question: bool) -> str:
        return encoder.tokenizer.decode(encoder.answer(prompt, answer, chat, question))

    assert said("The number is", "34", False, False) == " 34."
    assert said("It lies in the", "U.S.", False, False) == " U.S."
    assert said("Question: Which number?\nAnswer:", "34", False, True) == " 34<eos>"
    assert said("Which number?", "It is 34.", True, True) == "It is 34.<eos>"


def test_a_teacher_reads_the_window_first(studied: CorpusTree, minilm: Embedder, encoder: Encoder) -> None:
    work = studied.corpus.work
    make_examples(work, studied, minilm, encoder.tokenizer, ExampleSettings(teachers=True))
    learnt, _ = open_examples(work)
    for window, examples in by_window(learnt).items():
        for example in examples:
            given, answer = parts(encoder, example)
            if given.startswith(("<user>", "The people of")):
                assert example.teacher is not None
                read = encoder.tokenizer.decode(example.teacher.tolist())
                before = given.removeprefix("<user>")
                assert read.endswith(f"{text(window)}\n\n{before}{answer}")
            else:
                assert example.teacher is None


def test_windows_are_held_out(studied: CorpusTree, minilm: Embedder, encoder: Encoder) -> None:
    work = studied.corpus.work
    make_examples(work, studied, minilm, encoder.tokenizer, ExampleSettings(heldout=0.3))
    learnt, held = open_examples(work)
    out = {window.id for window in studied.corpus.windows() if window_is_held_out(window, 0.3)}
    assert 0 < len(out) < COUNT / 2
    assert held is not None
    assert out.isdisjoint(np.unique(learnt.windows).tolist())
    assert out <= set(np.unique(held.windows).tolist())


def test_rows_that_do_not_go_window_by_window_are_refused(
    studied: CorpusTree, minilm: Embedder, encoder: Encoder, tmp_path: pathlib.Path
) -> None:
    work = Work(tmp_path / "work")
    corpus = read_corpus(work, [str(write_library(tmp_path / "books"))], minilm.tokenizer)
    write_rows(work.path(STUDY), [{"window": n, "question": "Why?", "answer": "So."} for n in (1, 0)])
    with pytest.raises(CorpusError, match="does not go window by window"):
        build_tree(work, corpus, minilm)


def test_a_small_corpus_is_learnt_more_often() -> None:
    assert [epochs_for(tokens) for tokens in (1, 10_000, 25_000, 10_000_000)] == [16, 10, 4, 4]


@pytest.mark.parametrize("by_passages", [False, True])
def test_held_out_questions_lie_where_the_bank_will_take_them(
    studied: CorpusTree, minilm: Embedder, encoder: Encoder, by_passages: bool
) -> None:
    make_examples(studied.corpus.work, studied, minilm, encoder.tokenizer, ExampleSettings(by_passages=by_passages))
    _, held = open_examples(studied.corpus.work)
    assert held is not None
    tree, windows, own = studied.tree, WindowVectors(studied), [placed.leaves for placed in studied.placed()]
    for number, leaves in enumerate(held.leaves_of()):
        example = held.read(number)
        asked, _ = parts(encoder, example)
        question = asked.removeprefix("<user>").removesuffix("\n<assistant>")
        vector = minilm.embed([question])[0]
        near = max(tree.nodes(tree.depth), key=lambda leaf: _likest(windows, leaf, vector))
        assert leaves == [near if by_passages else tree.route(vector)[0].path]
        assert not by_passages or near in own[example.window]


def _likest(windows: WindowVectors, leaf: Path, vector: np.ndarray) -> float:
    vectors = windows.vectors(leaf)
    return float((vectors @ vector).max()) if vectors is not None else -1.0
