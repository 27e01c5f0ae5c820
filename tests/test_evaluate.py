"""Scores and replies equal what the same model gives alone and whole; routes, results and runs that go on."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from evaluating import evaluation, named_model, task_files
from tiny import HashEmbedder, give_sources, make_model

from mlx_hiermem.bank.edit import add
from mlx_hiermem.config import Path
from mlx_hiermem.errors import BankError, HierMemError, TaskError
from mlx_hiermem.evaluate import runner
from mlx_hiermem.evaluate.answers import is_decided, rule_for
from mlx_hiermem.evaluate.compare import columns, compare, draw
from mlx_hiermem.evaluate.examples import Example
from mlx_hiermem.evaluate.results import MEMORIES
from mlx_hiermem.evaluate.routes import Placed, place
from mlx_hiermem.evaluate.runner import Evaluation, Prepared
from mlx_hiermem.evaluate.tasks import Task, find_tasks, read_tasks
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling
from mlx_hiermem.selection import Selection

Tasks = dict[str, Task]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return named_model(tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    return read_tasks(task_files(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module")
def tested(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return evaluation(model, tmp_path_factory.mktemp("results"))


def hugging_face(model: pathlib.Path) -> object:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model / "anchor", dtype="float32").eval()


@pytest.mark.parametrize("name", ["cloze", "choice", "schema", "wiki"])
@pytest.mark.slow
def test_scores_are_those_of_transformers(tested: Evaluation, tasks: Tasks, model: pathlib.Path, name: str) -> None:
    import torch

    reference = hugging_face(model)
    prepared = tested.prepare(tasks[name], ("none",))
    run = tested.run(prepared, "none")
    for row, number in zip(run.rows, prepared.prompts, strict=True):
        expected = []
        for context, continuation in prepared.prompts[number].pairs:
            with torch.no_grad():
                logits = reference(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(continuation), reduction="none")
            expected.append(
                (
                    float(losses.sum()),
                    len(continuation),
                    bool((logits.argmax(-1) == torch.tensor(continuation)).all()),
                )
            )
        if name in ("cloze", "wiki"):
            assert row["nll"] == pytest.approx(sum(nll for nll, _, _ in expected), abs=1e-3)
            assert row["tokens"] == sum(tokens for _, tokens, _ in expected)
        if name == "cloze":
            assert row["accuracy"] == expected[0][2]
        if name in ("choice", "schema"):
            assert [nll for nll, _ in row["scores"]] == pytest.approx([nll for nll, _, _ in expected], abs=1e-3)
            means = [nll / tokens for nll, tokens, _ in expected]
            gold = prepared.examples[number].gold
            assert row["accuracy"] == (means.index(min(means)) == gold)
            assert row["acc"] == (min(range(len(expected)), key=lambda i: expected[i][0]) == gold)


@pytest.mark.parametrize("memory", ["generic", "fetched", "blocked"])
@pytest.mark.parametrize("name", ["cloze", "choice", "schema"])
def test_scores_under_a_memory_are_those_of_whole_sequences(
    tested: Evaluation, tasks: Tasks, name: str, memory: str
) -> None:
    prepared = tested.prepare(tasks[name], (memory,))
    run = tested.run(prepared, memory)
    for row, number in zip(run.rows, prepared.prompts, strict=True):
        tested.model.select(row["path"] or memory, "")
        for i, (context, continuation) in enumerate(prepared.prompts[number].pairs):
            logits = tested.model.anchor(mx.array([context + continuation]))[0, len(context) - 1 : -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            nll = -float(mx.take_along_axis(logprobs, mx.array(continuation)[:, None], axis=-1).sum())
            assert (row["nll"] if name == "cloze" else row["scores"][i][0]) == pytest.approx(nll, abs=1e-3)


def test_what_is_shared_is_computed_once(tested: Evaluation, tasks: Tasks) -> None:
    """Fewer tokens go through the model than the pairs have together; batches do not change the scores."""
    prepared = tested.prepare(tasks["choice"], ("none",))
    pairs = [prompt.pairs for prompt in prepared.prompts.values()]
    tested.scorer.computed = 0
    together = dict(one for batch in tested.scorer.score(pairs) for one in batch)
    computed = tested.scorer.computed
    assert 0 < computed < 0.6 * sum(len(c) + len(t) for example in pairs for c, t in example)
    alone = [next(tested.scorer.score([example]))[0][1] for example in pairs]
    for number, scores in together.items():
        assert [s.nll for s in scores] == pytest.approx([s.nll for s in alone[number]], abs=1e-3)
    tested.scorer.computed = 0


@pytest.mark.parametrize("name", ["reply", "asked"])
@pytest.mark.parametrize("memory", ["none", "fetched"])
def test_replies_are_beginnings_of_what_generate_says(
    tested: Evaluation, tasks: Tasks, name: str, memory: str
) -> None:
    prepared = tested.prepare(tasks[name], (memory,))
    run = tested.run(prepared, memory)
    for row, number in list(zip(run.rows, prepared.prompts, strict=True))[:6]:
        example, prompt = prepared.examples[number], prepared.prompts[number]
        tested.model.select(row["path"] or "none", "")
        whole = "".join(r.text for r in tested.model.responses(prompt.pairs[0][0], Sampling(prompt.reply)))
        assert whole.startswith(row["reply"].rstrip("\ufffd"))
        rule = rule_for(tasks[name].kind, example.answers[0])
        assert row["accuracy"] == rule(whole, example.answers)


@pytest.mark.parametrize("kind", ["generation", "questions"])
@pytest.mark.parametrize("answers", [("the oak", "yew tree"), ("12",), ("H",), ("-12", ".a")])
def test_what_is_decided_stays_so(kind: str, answers: tuple[str, ...]) -> None:
    rng, rule = np.random.default_rng(0), rule_for(kind, answers[0])
    pieces = ["the ", "oak", "oaks", " ", "\n", "yew", " tree", "1", "2", "12", ".", "H", "a", "n ", "-", "_"]
    decided = 0
    for _ in range(2000):
        reply = "".join(rng.choice(pieces, 7))
        for end in range(len(reply)):
            if is_decided(reply[:end], rule, answers):
                decided += 1
                assert rule(reply[:end], answers) == rule(reply, answers), (reply[:end], reply)
                break
    assert decided > 500


def test_a_route_is_the_examples_own(tested: Evaluation, tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    embed = HashEmbedder.embed
    monkeypatch.setattr(
        HashEmbedder, "embed", lambda self, texts, *a: (seen.extend(texts), embed(self, texts, *a))[1]
    )
    for name in ("choice", "schema", "reply"):
        prepared = tested.prepare(tasks[name], ("fetched",))
        seen.clear()
        place(tested.model, prepared.examples, "fetched")
        assert all(example.shots and example.shots not in example.route for example in prepared.examples)
        assert seen == [example.route for example in prepared.examples]
    row = json.loads(tasks["schema"].file.read_text().splitlines()[0])
    common = row["context_options"][0].rsplit(" ", 1)[0]
    assert seen
    assert tested.prepare(tasks["schema"], ()).examples[0].route == f"{common} {row['continuation']}"


def test_memories_of_examples(tested: Evaluation, tasks: Tasks) -> None:
    memories = [memory for memory in MEMORIES if not memory.endswith("source")]  # this bank keeps none
    examples = tested.prepare(tasks["asked"], memories).examples
    placed = {memory: place(tested.model, examples, memory) for memory in memories}
    assert {one.key for one in placed["none"]} == {"none"}
    assert len({one.key for one in placed["generic"]}) == 1
    for number, example in enumerate(examples):
        fetched, blocked, oracle = (placed[m][number] for m in ("fetched", "blocked", "oracle"))
        assert fetched.chosen.path == tested.model.router.route(example.route).path
        assert blocked.chosen.path[0] != fetched.chosen.path[0]
        entry = tested.model.bank.manifest.blocks[oracle.chosen.path]  # type: ignore[union-attr]
        assert example.tags["doc"] in entry.sources
        assert oracle.agrees
        assert fetched.agrees == (fetched.chosen.path == oracle.chosen.path)
    with pytest.raises(HierMemError, match="unknown memory"):
        place(tested.model, examples, "lots")


@pytest.mark.slow
def test_passages_stand_before_what_is_asked(tasks: Tasks, tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model")
    leaves = [f"{a}.{b}" for a in range(3) for b in range(3)]
    texts = {leaf: [("", f"Of {leaf} this is said.")] for leaf in leaves}
    give_sources(folder / "bank", texts, HashEmbedder().embed)
    tested = evaluation(folder, tmp_path / "results")
    prepared = tested.prepare(tasks["choice"], ("fetched+source", "source"))
    scores = {}
    for memory in ("source", "fetched+source"):
        run = tested.run(prepared, memory)
        scores[memory] = [row["scores"] for row in run.rows]
        for row, number in zip(run.rows, prepared.prompts, strict=True):
            blocks = row["path"] if memory == "fetched+source" else "none"
            tested.model.select(blocks, "")
            told = tested.prompter.plain(f"Of {row['path']} this is said.\n\n")
            example = prepared.examples[number]
            shots = tested.prompter.special(example.shots)
            for i, (context, continuation) in enumerate(prepared.prompts[number].pairs):
                assert context[: len(shots)] == shots
                whole = [*shots, *told, *context[len(shots) :], *continuation]
                logits = tested.model.anchor(mx.array([whole]))[0, -len(continuation) - 1 : -1]
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                nll = -float(mx.take_along_axis(logprobs, mx.array(continuation)[:, None], axis=-1).sum())
                assert row["scores"][i][0] == pytest.approx(nll, abs=1e-3)
    assert scores["source"] != scores["fetched+source"]
    replies = tested.run(tested.prepare(tasks["reply"], ("source",), limit=2), "source")
    assert all("+" in row["memory"] for row in replies.rows)
    with pytest.raises(TaskError, match="asks for no passage"):
        tested.prepare(tasks["wiki"], ("source",))


def test_oracle_needs_documents_that_the_bank_names(tested: Evaluation, tasks: Tasks) -> None:
    with pytest.raises(TaskError, match="line 1 has no document"):
        tested.prepare(tasks["choice"], ("oracle",))


def test_a_model_without_a_bank_has_no_memory(model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path) -> None:
    plain = Evaluation.of(model / "anchor", tmp_path)
    plain.prepare(tasks["choice"], ("none",))
    with pytest.raises(BankError, match="no bank"):
        plain.prepare(tasks["choice"], ("fetched",))


def test_a_task_of_which_nothing_is_left(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": 3}\n')
    (task,) = find_tasks([str(file)], None)
    with pytest.raises(TaskError, match=r"no row of .*questions\.jsonl is left"):
        evaluation(model, tmp_path / "out").prepare(task, ("none",), skip_bad=True)


def test_what_gets_no_memory_is_the_anchors(
    model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "place", half_beyond_reach)
    alone = evaluation(model, tmp_path / "alone")
    expected = alone.run(alone.prepare(tasks["choice"], ("fetched",)), "fetched")
    after = evaluation(model, tmp_path / "after")
    prepared = after.prepare(tasks["choice"], ("none", "fetched"))
    after.run(prepared, "none")
    asked: list[int] = []
    score = after.scorer.score
    monkeypatch.setattr(after.scorer, "score", lambda pairs: (asked.append(len(pairs)), score(pairs))[1])
    run = after.run(prepared, "fetched")
    assert sum(asked) == 6, "the other six are those of the run without memory"
    for row, other in zip(run.rows, expected.rows, strict=True):
        assert {name: row[name] for name in ("id", "path", "memory")} == {
            name: other[name] for name in ("id", "path", "memory")
        }
        assert np.array(row["scores"]) == pytest.approx(np.array(other["scores"]), abs=1e-3)
        assert row["cost"]["seconds"] > 0
        assert (row["path"] == "") == (row["memory"] == "none")


def half_beyond_reach(model: MemoryModel, examples: Sequence[Example], memory: str) -> list[Placed]:
    """As `place`, but of a bank that every second line is too far from."""
    found = place(model, examples, memory)
    return [
        Placed(Selection(), "none") if example.line % 2 else one
        for example, one in zip(examples, found, strict=True)
    ]


def test_an_edited_block_changes_only_questions_of_its_leaf(
    model: pathlib.Path, tasks: Tasks, tmp_path: pathlib.Path
) -> None:
    edited = shutil.copytree(model, tmp_path / "edited")
    leaf = Path((1, 2))
    add(edited / "bank", model / "bank" / "blocks" / "0" / "1.safetensors", leaf, replacing=True)
    runs = []
    for folder in (model, edited):
        tested = evaluation(folder, tmp_path / "out")
        for name in ("choice", "asked"):
            runs.append((folder.name, tested.run(tested.prepare(tasks[name], ("fetched",)), "fetched")))
    found = compare(columns(runs))
    for one, run in zip(found.locality, (run for _, run in runs[:2]), strict=True):
        inside = [row for row in run.rows if row["path"] == str(leaf)]
        assert inside, "the test needs a question of that leaf"
        assert one.other_memory == len(inside)
        assert (one.changed_with_same_memory, one.changed_with_other_memory > 0) == (0, True)
    assert [c.label for c in columns(runs)] == ["model, fetched", "edited, fetched"]
    files = draw(found, tmp_path / "plot.png")
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[1].read_text()


def test_perplexity_is_of_every_token_once(tested: Evaluation, tasks: Tasks) -> None:
    prepared = tested.prepare(tasks["wiki"], ("fetched",))
    run = tested.run(prepared, "fetched")
    text = tasks["wiki"].file.read_text()
    assert [row["id"] for row in sorted(run.rows, key=lambda row: row["line"])] == [
        f"{n} Title {n - 1}" for n in range(1, 5)
    ]
    assert sum(row["bytes"] for row in run.rows) == len(text.encode())
    loss = sum(row["nll"] for row in run.rows)
    figures = run.figures()[""]
    assert figures["perplexity"].value == pytest.approx(math.exp(loss / sum(row["tokens"] for row in run.rows)))
    assert figures["bits_per_byte"].value == pytest.approx(loss / len(text.encode()) / math.log(2))


def test_fifths_of_frequency(tested: Evaluation, tasks: Tasks) -> None:
    from evaluating import WORDS

    prepared: Prepared = tested.prepare(tasks["asked"], (), frequencies={w: n for n, w in enumerate(WORDS[:10])})
    buckets = {example.tags["subject"]: example.tags.get("bucket") for example in prepared.examples}
    assert buckets[WORDS[0]] == buckets[WORDS[1]] == "rarest fifth"
    assert buckets[WORDS[9]] == "commonest fifth"
    assert buckets[WORDS[10]] is None
    parts = tested.run(prepared, "none").parts()
    assert {"name canonical", "name paraphrased", "number canonical, rarest fifth"} <= parts.keys()
