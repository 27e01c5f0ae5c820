"""Task files: LLM-Foundry's prompts, bad rows by file and line, documents of a text, figures and their errors."""

from __future__ import annotations

import json
import math
import pathlib
import random
from typing import Any

import numpy as np
import pytest
from evaluating import task_files, write
from tiny import make_model

from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.answers import begins_with, is_number, is_only, mentions, normalise, starts_with
from mlx_hiermem.evaluate.examples import read_documents, read_examples, rolling_windows
from mlx_hiermem.evaluate.statistics import difference, figure, mcnemar, share_interval
from mlx_hiermem.evaluate.tasks import PAPER, Task, find_tasks, read_tasks


def test_the_papers_tasks_are_those_of_its_protocol() -> None:
    """Shots and delimiters as in arXiv:2510.02375, App. B, and LLM-Foundry v0.9."""
    found = {name: (task.kind, task.shots, task.delimiter) for name, task in read_tasks(PAPER).items()}
    answer = "\nAnswer: "
    assert found == {
        "lambada_openai": ("language_modeling", 0, " "),
        "boolq": ("multiple_choice", 0, answer),
        "winograd": ("schema", 3, " "),
        "hellaswag": ("multiple_choice", 0, " "),
        "arc_easy": ("multiple_choice", 3, answer),
        "arc_challenge": ("multiple_choice", 3, answer),
        "piqa": ("multiple_choice", 0, answer),
        "openbook_qa": ("multiple_choice", 10, " "),
        "triviaqa": ("generation", 3, " "),
        "wikitext": ("perplexity", 0, " "),
    }


def test_prompts_are_llm_foundrys(tmp_path: pathlib.Path) -> None:
    rows = [{"query": f" Q{n} ", "choices": [f"a{n}", f"b{n}"], "gold": n % 2} for n in range(5)]
    file = write(tmp_path / "t.jsonl", rows)
    examples = read_examples(Task("t", "multiple_choice", file, 2, "\nAnswer: ")).examples
    rng = random.Random(1234)
    for number, example in enumerate(examples):
        drawn = set(rng.sample(range(5), 2))
        if number in drawn:
            drawn.remove(number)
            other = rng.choice(range(5))
            while other in drawn or other == number:
                other = rng.choice(range(5))
            drawn.add(other)
        shown = [f"Q{n}\nAnswer: {'ab'[n % 2]}{n}" for n in drawn]
        assert example.shots == "\n".join(shown)
        assert example.contexts == (f"\nQ{number}\nAnswer:",) * 2
        assert example.continuations == (f"a{number}", f"b{number}")
        assert example.route == f"Q{number}"


def test_a_schema_shows_its_right_context(tmp_path: pathlib.Path) -> None:
    rows = [
        {"context_options": [f"It {n} so x", f"It {n} so y"], "continuation": "ends.", "gold": 1} for n in range(3)
    ]
    task = Task("t", "schema", write(tmp_path / "t.jsonl", rows), 1)
    example = read_examples(task).examples[0]
    assert example.shots in ("It 1 so y ends.", "It 2 so y ends.")
    assert example.contexts == ("\nIt 0 so x", "\nIt 0 so y")
    assert example.route == "It 0 so ends."


GOOD: dict[str, Any] = {
    "language_modeling": {"context": "a", "continuation": "b"},
    "multiple_choice": {"query": "a", "choices": ["b", "c"], "gold": 0},
    "schema": {"context_options": ["b", "c"], "continuation": "a", "gold": 1},
    "generation": {"context": "a", "answer": "b", "aliases": []},
    "questions": {"prompt": "a", "answer": "b"},
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("language_modeling", {"continuation": None}, "no text in 'continuation'"),
        ("language_modeling", {"context": "  "}, "no text in 'context'"),
        ("multiple_choice", {"gold": 2}, "gold 2, there are 2 choices"),
        ("multiple_choice", {"gold": -1}, "gold -1"),
        ("multiple_choice", {"gold": True}, "gold True"),
        ("multiple_choice", {"choices": ["b"]}, "needs 2 or more texts in 'choices'"),
        ("multiple_choice", {"choices": ["b", " "]}, "empty text in 'choices'"),
        ("schema", {"gold": 9}, "gold 9"),
        ("schema", {"context_options": "ab"}, "needs 2 or more texts"),
        ("generation", {"aliases": ["ok", "The"]}, "alias that is empty once normalised: 'The'"),
        ("generation", {"answer": "..."}, "alias that is empty"),
        ("questions", {"aliases": [""]}, "empty text in 'aliases'"),
        ("questions", {"heldout_prompts": "x"}, "'heldout_prompts'"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: pathlib.Path, kind: str, change: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "bad.jsonl", [GOOD[kind], GOOD[kind], GOOD[kind] | change])
    with pytest.raises(TaskError) as caught:
        read_examples(Task("t", kind, file))
    assert "bad.jsonl: line 3 has" in str(caught.value) or "bad.jsonl: line 3 needs" in str(caught.value)
    assert message in str(caught.value)
    read = read_examples(Task("t", kind, file), skip_bad=True)
    assert len(read.examples) == 2
    assert len(read.bad) == 1


@pytest.mark.parametrize("kind", GOOD)
def test_missing_fields_are_named(tmp_path: pathlib.Path, kind: str) -> None:
    for name in GOOD[kind]:
        row = {key: value for key, value in GOOD[kind].items() if key != name}
        with pytest.raises(TaskError, match=f"line 2 has no '{name}'"):
            read_examples(Task("t", kind, write(tmp_path / "t.jsonl", [GOOD[kind], row])))


def test_files_that_are_no_task_files(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n\nnonsense\n[1]\n')
    with pytest.raises(TaskError, match="line 3 is not JSON; line 4 is no JSON object"):
        read_examples(Task("t", "questions", file))
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(TaskError, match="not UTF-8"):
        read_examples(Task("t", "questions", file))
    write(file, [GOOD["multiple_choice"]] * 3)
    with pytest.raises(TaskError, match="has 3 examples; task t shows 5"):
        read_examples(Task("t", "multiple_choice", file, shots=5))
    (tmp_path / "t.toml").write_text('[x]\nkind = "multiple_choice"\nfile = "t.jsonl"\nshot = 2\n')
    with pytest.raises(TaskError, match=r"\[x\] needs kind and file"):
        read_tasks(tmp_path / "t.toml")


def test_contexts_longer_than_the_models_are_named(tmp_path: pathlib.Path) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "anchor" / "config.json").read_text()) | {"max_position_embeddings": 64}
    (model / "anchor" / "config.json").write_text(json.dumps(config))
    tested = evaluation_of_anchor(model / "anchor", tmp_path)
    file = write(
        tmp_path / "t.jsonl", [GOOD["language_modeling"], {"context": "x" * 90 + "z", "continuation": "b"}]
    )
    task = Task("t", "language_modeling", file)
    with pytest.raises(TaskError, match=r"t\.jsonl: line 2 has 92 tokens, the model takes 64.*--truncate"):
        tested.prepare(task, ("none",))
    assert list(tested.prepare(task, ("none",), skip_bad=True).prompts) == [0]
    cut = tested.prepare(task, ("none",), truncate=True)
    context, continuation = cut.prompts[1].pairs[0]
    assert cut.cut == 1
    assert len(context) + len(continuation) == 65, "the last token is predicted, never read"
    assert bytes(context)[-1] == tested.prompter.plain("z")[0], "the beginning was cut"
    assert len(tested.run(cut, "none").rows) == 2
    asked = Task("asked", "questions", write(tmp_path / "a.jsonl", [{"prompt": "x" * 90, "answer": "b"}]))
    cut = tested.prepare(asked, ("none",), truncate=True)
    assert cut.prompts[0].length == 64, "each token of a reply but the last is read"
    assert len(tested.run(cut, "none").rows) == 1


def evaluation_of_anchor(folder: pathlib.Path, out: pathlib.Path) -> Any:
    from mlx_hiermem.evaluate.runner import Evaluation

    return Evaluation.of(folder, out / "results")


def test_tasks_are_found_by_name_and_file(tmp_path: pathlib.Path) -> None:
    toml = task_files(tmp_path)
    assert [task.name for task in find_tasks([str(toml)], None)] == [
        "cloze",
        "choice",
        "schema",
        "reply",
        "asked",
        "wiki",
    ]
    kinds = [task.kind for task in find_tasks([str(tmp_path / "asked.jsonl"), str(tmp_path / "wiki.txt")], None)]
    assert kinds == ["questions", "perplexity"]
    (tmp_path / "piqa.jsonl").write_text("")
    assert [task.name for task in find_tasks(["all"], tmp_path, shots=4)] == ["piqa"]
    assert find_tasks(["piqa"], tmp_path, shots=4)[0].shots == 4
    for names, data, message in (
        (["piqa"], None, "--data"),
        (["nothing"], tmp_path, "no task nothing"),
        (["boolq"], tmp_path, "no file"),
        ([str(toml), str(tmp_path / "asked.jsonl")], None, "two tasks are called asked"),
    ):
        with pytest.raises(TaskError, match=message):
            find_tasks(names, data)


def test_documents_of_a_text(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("Before.\n = One = \n\n Text. \n = = Part = = \n = Two = \nMore.\n")
    assert [(d.id, d.line) for d in read_documents(file)] == [("1 Before.", 1), ("2 One", 2), ("3 Two", 6)]
    assert "".join(d.continuations[0] for d in read_documents(file)) == file.read_text()
    file.write_text("No title here.\nNone at all.")
    assert [d.id for d in read_documents(file)] == ["1 No title here."]
    rows = write(tmp_path / "t.jsonl", [{"id": "x", "text": "One."}, {"text": ""}])
    with pytest.raises(TaskError, match=r"t\.jsonl: line 2 has no text"):
        read_documents(rows)
    assert [d.id for d in read_documents(rows, skip_bad=True)] == ["x"]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 30])
def test_windows_are_the_harnesss(length: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(100, 100 + length))
    expected = map(make_disjoint_window, get_rolling_token_windows(tokens, 7, 8, 1))
    assert rolling_windows(tokens, 7, 8) == [(list(context), list(rest)) for context, rest in expected]


def test_rules() -> None:
    assert normalise(" The  non-stop_train's A ") == "non stop train s"
    assert starts_with("The Onions, of course", ["onion"])
    assert not starts_with("Red onion", ["onion"])
    assert begins_with(' "H" is it', ["H"])
    assert begins_with("h.", ["H"])
    assert not begins_with("Helium", ["H"])
    assert is_number(" is 26, not 27", ["26"])
    assert not is_number(" 126", ["26"])
    assert not is_number(" none", ["26"])


def test_rules_of_an_exam() -> None:
    assert mentions("It was made by the coil method, by hand.", ["Coiling", "the coil method"])
    assert not mentions("Recoiling", ["coil", "the"])
    assert is_only("1,200 km.", ["1200 km"])
    assert not is_only("It is 1200 km", ["1200 km"])
    assert not is_only("", ["the"])


def test_interval_of_a_share() -> None:
    assert share_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert share_interval(540, 720) == pytest.approx((0.7171, 0.7803), abs=1e-4)


def test_standard_errors() -> None:
    rows = [{"id": str(n), "accuracy": float(n < 3)} for n in range(12)]
    found = figure(rows, "accuracy")
    assert (found.value, found.n) == (0.25, 12)
    assert found.error == pytest.approx(math.sqrt(0.25 * 0.75 / 11))
    assert figure(rows[:1], "accuracy").error is None
    wordings = [row | {"id": f"{row['id']}#{w}", "question": row["id"]} for row in rows for w in range(4)]
    assert figure(wordings, "accuracy").error == pytest.approx(found.error), "wordings are no samples of their own"


def test_perplexity_error_is_that_of_documents() -> None:
    """Against the spread of many samples of as many documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 400, 4000)
    nll = tokens * rng.normal(3.0, 0.5, 4000)
    rows = [
        {"id": str(i), "nll": float(n), "tokens": int(t)} for i, (n, t) in enumerate(zip(nll, tokens, strict=True))
    ]
    samples = [figure(rows[i : i + 40], "perplexity") for i in range(0, 4000, 40)]
    spread = float(np.std([one.value for one in samples]))
    assert float(np.mean([one.error or 0 for one in samples])) == pytest.approx(spread, rel=0.2)


def test_paired_differences() -> None:
    first = [{"id": str(n), "accuracy": float(n < 60)} for n in range(100)]
    second = [{"id": str(n), "accuracy": float(n < 58 or n > 89)} for n in range(100)]
    found = difference(first, second, "accuracy")
    assert (found.gained, found.lost) == (10, 2)
    assert found.value == pytest.approx(0.08)
    error = np.std([1] * 10 + [-1] * 2 + [0] * 88, ddof=1) / 10
    assert (found.low, found.high) == pytest.approx((0.08 - 1.96 * error, 0.08 + 1.96 * error))
    assert found.p == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    texts = [{"id": str(n), "nll": 100.0 + n, "tokens": 50} for n in range(20)]
    worse = [row | {"nll": row["nll"] + 0.5} for row in texts]
    found = difference(texts, worse, "perplexity")
    assert (found.value, found.low, found.high) == pytest.approx((math.expm1(0.01),) * 3)
