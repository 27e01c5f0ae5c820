"""The elements demo: its data, its recipe, the bundled bank, and what the bank answers on the real anchor."""

import json
import pathlib

import numpy as np
import pytest
import torch
from tiny import HashEmbedder, make_model

from mlx_hiermem import load
from mlx_hiermem.apps.demo import evaluate, tour
from mlx_hiermem.apps.demo.anchor import load_anchor, run_layers
from mlx_hiermem.apps.demo.train import Bank, Progress, Settings, run_trunk, train
from mlx_hiermem.apps.demo.wordings import element_wordings, training_texts
from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.bank.policy import BankPolicy
from mlx_hiermem.config import Path
from mlx_hiermem.embedder import Embedder
from mlx_hiermem.router import Router

HERE = pathlib.Path(tour.__file__).parent


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def _leaves(bank: MemoryBank) -> dict[str, Path]:
    """Element id -> the leaf that learnt it."""
    leaves = [(path, entry) for path, entry in bank.manifest.blocks.items() if len(path) == 2]
    return {source: path for path, entry in leaves for source in entry.sources}


def test_nothing_held_out_is_trained_on() -> None:
    texts = "\n".join(training_texts(_rows("elements.jsonl"))).lower()
    for row in _rows("elements_qa.jsonl"):
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


def test_bundled_bank_is_whole_and_small() -> None:
    bank = MemoryBank.open(tour.BANK)
    assert list(bank.problems()) == []
    assert sum(file.stat().st_size for file in tour.BANK.rglob("*") if file.is_file()) <= 10_000_000
    assert bank.manifest.generic is not None
    assert sorted(_leaves(bank)) == [row["id"] for row in _rows("elements.jsonl")]
    assert all(bank.manifest.label(node) for node in bank.manifest.blocks)


def test_every_question_reaches_its_elements_leaf() -> None:
    """The bank's tree was made without the held-out wordings, and routes them all the same."""
    bank = MemoryBank.open(tour.BANK)
    leaf = _leaves(bank)
    rows = [row for row in _rows("elements_qa.jsonl") if row["relation"] != "element_of_number"]
    asked = [(row["doc"], text) for row in rows for text in (row["prompt"], *row["heldout_prompts"])]
    routes = bank.tree.route(Embedder.load().embed([text for _, text in asked]))
    missed = [text for (doc, text), route in zip(asked, routes, strict=True) if route.path != leaf[doc]]
    assert len(missed) <= 0.01 * len(asked), missed


def test_stored_results_are_complete_and_meet_the_targets() -> None:
    counts = evaluate.stored()["elements"]
    assert {"none", "generic", "fetched", "paraphrased", "chat", "total"} <= counts.keys()
    assert counts["total"] == 118
    assert counts["fetched"] >= 0.97 * 118
    assert counts["paraphrased"] >= 0.82 * 118
    assert counts["chat"] >= 0.95 * 118
    assert counts["generic"] < 0.5 * counts["fetched"]


def test_first_integer() -> None:
    questions = evaluate.questions()
    assert len(questions) == 118
    assert [question.number for question in questions] == list(range(1, 119))


@pytest.fixture(scope="module")
def folder(smollm2_anchor: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The demo's model from the session's converted anchor and the bundled bank."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    folder.mkdir()
    (folder / "anchor").symlink_to(smollm2_anchor)
    (folder / "bank").symlink_to(tour.BANK)
    return folder


def test_the_bank_answers_what_the_anchor_cannot(folder: pathlib.Path) -> None:
    """Real weights, real routes: every thirteenth element, in each way that `hiermem demo --full` counts."""
    assert tour.ready(folder)
    model, asked = load(folder), evaluate.questions()[4::13]

    def right(prompts: list[str], memory: str, chat: bool = False) -> int:
        answers = [evaluate.answer(model, prompt, memory, chat)[0] for prompt in prompts]
        return sum(got == question.number for got, question in zip(answers, asked, strict=True))

    plain = [question.prompt for question in asked]
    assert right(plain, "none") <= 3
    assert right(plain, "generic") <= 6
    assert right(plain, "fetched") >= 8
    assert right([question.paraphrases[1] for question in asked], "fetched") >= 8
    assert right([question.chat for question in asked], "fetched", chat=True) >= 8
    assert len(asked) == 9


def test_recipe_resumes_to_the_same_bank(
    smollm2_anchor: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted training goes on where it stopped, and ends with the blocks of an unbroken one."""
    monkeypatch.setattr("mlx_hiermem.apps.demo.train.SAVE_EVERY", 4)
    anchor = load_anchor(smollm2_anchor)
    wordings = [w for w in element_wordings(_rows("elements.jsonl")[9]) if w.relation == "number" and not w.chat]
    settings = Settings(
        branching=2, block_sizes=(2, 1), first_layer=28, epochs=1, groups=2, group_size=4, warm_up=2
    )
    texts, prefix = run_trunk(anchor, wordings, settings.first_layer, lambda done: None)
    where = {wordings[0].subject: [0, 1, 2, 3]}

    class StoppedError(Exception):
        pass

    def run(file: pathlib.Path, stop: int | None = None) -> tuple[Bank, Progress]:
        def tick(state: Progress) -> None:
            if state.step == stop:
                raise StoppedError

        bank = Bank(settings, anchor.layers - settings.first_layer, anchor.hidden)
        return bank, train(anchor, bank, texts, prefix, where, file, "test", tick)

    whole, state = run(tmp_path / "whole.pt")
    assert state.steps > 8
    with pytest.raises(StoppedError):
        run(tmp_path / "broken.pt", stop=state.steps - 1)
    resumed, _ = run(tmp_path / "broken.pt")
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor.detach(), resumed.tensors[name].detach())


def test_the_recipes_forward_pass_is_the_anchors(smollm2_anchor: pathlib.Path) -> None:
    """Its plain functions over the weights give what mlx-lm's model gives."""
    import mlx.core as mx

    anchor = load_anchor(smollm2_anchor)
    ids = anchor.tokenizer.encode("The atomic number of neon is 10, of argon 18.")
    with torch.no_grad():
        hidden, _ = run_layers(anchor, anchor.embed(torch.tensor([ids])), range(anchor.layers))
        theirs = anchor.logits(hidden)[0].numpy()
    ours = np.array(load(smollm2_anchor).anchor(mx.array([ids]))[0])
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
