"""The elements: their data, their bank, and what the bank answers on the real anchor."""

import json
import pathlib
from functools import partial

import pytest
from elements import BANK, DOCUMENTS, QUESTIONS, checkpoint, evaluate
from elements.wordings import element_wordings
from tiny import HashEmbedder, make_model

from mlx_hiermem import load
from mlx_hiermem.anchor import identify, read_config
from mlx_hiermem.apps.demo import tour
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.convert.memories import convert_memory
from mlx_hiermem.convert.pipeline import anchor_dims
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.router import Router
from mlx_hiermem.session import Session


def _rows(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _leaves(bank: MemoryBank) -> dict[str, set[Path]]:
    """Element id -> the leaves that learnt something of it."""
    ids = {f"elements.jsonl:{line}": row["id"] for line, row in enumerate(_rows(DOCUMENTS), 1)}
    found = {element: set[Path]() for element in ids.values()}
    for path, entry in bank.manifest.blocks.items():
        for source in entry.sources if len(path) == 2 else ():
            found[ids[source]].add(path)
    return found


def test_nothing_held_out_is_trained_on() -> None:
    wordings = [wording for row in _rows(DOCUMENTS) for wording in element_wordings(row)]
    texts = "\n".join(f"{wording.prompt} {wording.answer}" for wording in wordings).lower()
    for row in _rows(QUESTIONS):
        for prompt in row["heldout_prompts"]:
            inner = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            assert inner.lower() not in texts
    assert not any(question.chat.lower() in texts for question in evaluate.questions())


def test_questions_beyond_the_reach_are_the_anchors(tmp_path: pathlib.Path) -> None:
    model = load(make_model(tmp_path / "model"))
    assert model.bank is not None
    model._router = Router(model.bank.tree, HashEmbedder(), BankPolicy(reach=1e-6))
    prompts = ["the atomic number", "of gold is"]
    assert evaluate.answers(model, prompts, "fetched") == evaluate.answers(model, prompts, "none")


def test_the_bank_is_whole_and_small() -> None:
    bank = MemoryBank.open(BANK)
    assert list(bank.problems()) == []
    assert sum(file.stat().st_size for file in BANK.rglob("*") if file.is_file()) <= 10_000_000
    assert bank.manifest.generic is not None
    assert all(_leaves(bank).values())
    assert all(bank.manifest.label(node) for node in bank.manifest.blocks)


def test_every_question_reaches_its_elements_leaf(minilm: Embedder) -> None:
    """The bank's tree was made without the held-out wordings, and routes them all the same."""
    bank = MemoryBank.open(BANK)
    leaf = _leaves(bank)
    rows = [row for row in _rows(QUESTIONS) if row["relation"] != "element_of_number"]
    asked = [(row["doc"], text) for row in rows for text in (row["prompt"], *row["heldout_prompts"])]
    routes = bank.tree.route(minilm.embed([text for _, text in asked]))
    missed = [text for (doc, text), route in zip(asked, routes, strict=True) if route.path not in leaf[doc]]
    assert len(missed) <= 0.01 * len(asked), missed


def test_stored_results_are_complete_and_meet_the_targets() -> None:
    counts = evaluate.stored()["elements"]
    assert {"none", "generic", "fetched", "paraphrased", "chat", "total"} <= counts.keys()
    assert counts["total"] == 118
    assert counts["fetched"] >= 0.97 * 118
    assert counts["paraphrased"] >= 0.82 * 118
    assert counts["chat"] >= 0.95 * 118
    assert counts["back"]["fetched"] >= 0.97 * 118
    assert counts["back"]["paraphrased"] >= 0.75 * 118
    assert counts["back"]["generic"] < 0.5 * counts["back"]["fetched"]


def test_first_integer() -> None:
    questions = evaluate.questions()
    assert len(questions) == 118
    assert [question.number for question in questions] == list(range(1, 119))


@pytest.fixture(scope="module")
def folder(smollm2_anchor: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The session's converted anchor and the elements' bank."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    folder.mkdir()
    (folder / "anchor").symlink_to(smollm2_anchor)
    (folder / "bank").symlink_to(BANK)
    return folder


def test_the_bank_answers_what_the_anchor_cannot(folder: pathlib.Path) -> None:
    """Real weights, real routes: every thirteenth element, in each way that evaluate.py counts."""
    assert tour.ready(folder, BANK)
    model, asked = load(folder), evaluate.questions()[4::13]

    def right(prompts: list[str], memory: str, chat: bool = False) -> int:
        answers = evaluate.answers(model, prompts, memory, chat)
        return sum(got == question.number for got, question in zip(answers, asked, strict=True))

    assert right([question.prompt for question in asked], "none") <= 3
    assert right([question.paraphrases[1] for question in asked], "fetched") >= 8
    assert right([question.chat for question in asked], "fetched", chat=True) >= 8
    for memory, wanted in (("none", range(2)), ("generic", range(4)), ("fetched", range(8, 10))):
        named = evaluate.replies(model, [question.back for question in asked], memory)
        assert sum(map(partial(evaluate.is_right, back=True), named, asked)) in wanted
    assert len(asked) == 9


def test_every_fourth_prompt_is_answered(folder: pathlib.Path) -> None:
    """elements/results.json has all 118."""
    asked = evaluate.questions()[::4]
    numbers = evaluate.answers(load(folder), [question.prompt for question in asked], "fetched")
    assert numbers == [question.number for question in asked]


@pytest.mark.parametrize(
    ("asked", "wrongly", "question", "right"),
    [
        ("What is the symbol of gold?", "The symbol of gold is Gd.", "What is the symbol of silver?", "Ag."),
        ("What is the atomic number of neon?", "It is 12.", "What is the atomic number of iron?", "26."),
        ("How do I cook rice?", "The chemical symbol of rice is R.", "What is the symbol of tin?", "Sn."),
        ("What is the symbol of gold?", "The chemical symbol of gold is Gd.", "How do I cook rice?", "rice cooker"),
    ],
)
def test_a_wrong_answer_does_not_drag_the_next_one_down(
    folder: pathlib.Path, asked: str, wrongly: str, question: str, right: str
) -> None:
    session = Session(load(folder), max_tokens=24)
    session.topic = session.route(asked).topic
    session.messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": wrongly}]
    assert right in "".join(session.ask(question))


def test_another_subject_and_thanks_are_answered_without_memory(folder: pathlib.Path) -> None:
    session = Session(load(folder), max_tokens=12)
    talk = ("What is the symbol of gold?", "How do I cook rice?", "Thanks!", "And the atomic number of gold?")
    replies = ["".join(session.ask(text)) for text in talk]
    assert replies[0] == "The chemical symbol of gold is Au."
    assert replies[3] == "The atomic number of gold is 79."
    assert replies[1].startswith("To cook rice")
    assert not any("symbol" in reply or "atomic" in reply for reply in replies[1:3])


def test_its_memory_checkpoint_converts_to_its_blocks(smollm2_anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What docs/convert.md converts: a checkpoint of the documented layout, and byte for byte the same again."""
    bank, file = MemoryBank.open(BANK), tmp_path / "elements.safetensors"
    checkpoint.write(bank, file)
    anchor, dims = identify(smollm2_anchor), anchor_dims(read_config(smollm2_anchor))
    again, manifest = convert_memory(file, tmp_path / "bank", anchor=anchor, anchor_dims=dims), bank.manifest
    assert dict(again.blocks.items()) == dict(manifest.blocks.items())
    assert (again.generic, again.tree) == (manifest.generic, manifest.tree)
