"""`hiermem eval` as its user meets it, and lm-evaluation-harness with a memory for each example."""

from __future__ import annotations

import json
import pathlib
import shutil
from dataclasses import replace

import pytest
from click.testing import Result
from evaluating import evaluation, name_sources, task_files, write
from test_cli import run
from tiny import HashEmbedder, make_model
from typer.testing import CliRunner

from mlx_hiermem.apps.cli.main import app
from mlx_hiermem.bank.edit import remove
from mlx_hiermem.config import Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.evaluate.tasks import read_tasks
from mlx_hiermem.sampling import Sampling

HARNESS_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {shots}
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
HARNESS_REPLY = """
task: tiny_reply
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = make_model(tmp_path_factory.mktemp("evaluate-cli") / "model")
    name_sources(folder / "bank")
    return folder


def call(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.mark.slow
def test_tables_files_and_comparison(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tasks, out = task_files(tmp_path), tmp_path / "out"
    arguments = [model, "--tasks", tasks, "--out", out, "--limit", "6"]
    result = run("eval", *arguments, "--plot", tmp_path / "plot.png")
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("choice acc_norm 6 ") for line in lines)
    assert any(line.startswith("asked: name canonical accuracy 3 ") for line in lines)
    assert any(line.startswith("common knowledge: mean of 2 tasks ") for line in lines)
    assert "fetched minus none" in result.stdout
    assert len(list(out.glob("*.jsonl"))) == 12
    assert (tmp_path / "plot.svg").is_file()
    assert (tmp_path / "plot.png").is_file()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    again = json.loads(call(*arguments, "--json").stdout)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before, "nothing is asked twice"
    assert {(one["task"]["name"], one["memory"]) for one in again["runs"]} == {
        (task, memory) for task in read_tasks(tasks) for memory in ("none", "fetched")
    }
    assert {one["n"] for one in again["runs"]} == {4, 6, 12}  # documents, rows, and their two wordings
    compared = json.loads(call("--compare", out, "--json").stdout)
    assert compared["comparison"]["columns"] == ["none", "fetched"]
    one = call("--compare", out, "--memory", "none")
    assert (one.exit_code, "minus" in one.stdout) == (0, False)
    assert "no task in common" in str(
        call("--compare", next(out.glob("wiki*")), next(out.glob("cloze*"))).exception
    )


def test_two_banks_are_compared(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders of one name, of which the second has lost a leaf."""
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(model, tmp_path / "other" / "model")
    remove(other / "bank", [Path((1, 2))])
    asked = write(tmp_path / "asked.jsonl", [{"prompt": f"Question {n}:", "answer": "x"} for n in range(6)])
    result = json.loads(call("--compare", model, other, "--tasks", asked, "--json").stdout)["comparison"]
    assert result["columns"] == [f"{model}, fetched", f"{other}, fetched"]
    (locality,) = result["locality"]
    assert locality["same_memory"] + locality["other_memory"] == 6
    assert locality["changed_with_same_memory"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "bad.jsonl"], "bad.jsonl: line 2 has no text in 'answer'"),
        (["--tasks", "piqa"], "--data FOLDER"),
        (["--tasks", "good.jsonl", "--memory", "lots"], "unknown memory 'lots'"),
        (["--tasks", "good.jsonl", "--memory", "oracle"], "has no document"),
        (["--tasks", "good.jsonl", "--frequencies", "good.jsonl"], "Give one JSON object of numbers"),
        pytest.param(
            ["--tasks", "nowhere.yaml"],
            "lm-evaluation-harness has no task nowhere.yaml",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_named_and_nothing_runs(
    model: pathlib.Path, tmp_path: pathlib.Path, arguments: list[str], message: str
) -> None:
    write(tmp_path / "good.jsonl", [{"prompt": "a", "answer": "b"}])
    write(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": ""}])
    named = [str(tmp_path / word) if word.endswith("jsonl") else word for word in arguments]
    error = call(model, *named, "--out", tmp_path / "out").exception
    assert isinstance(error, HierMemError)
    assert message in str(error)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_several_models_are_for_compare(model: pathlib.Path) -> None:
    assert call(model, model, "--tasks", "x").exit_code == 2


def local_data(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    """Keeps the harness's data library from the network and from the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")


def test_the_harness_gives_what_our_tasks_give(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """acc and acc_norm over the same rows, without few-shot examples; with them, routed by the question alone."""
    from mlx_hiermem.evaluate.harness import run_harness

    local_data(monkeypatch, tmp_path)
    task_files(tmp_path)
    tasks = read_tasks(tmp_path / "tasks.toml")
    tested = evaluation(model, tmp_path / "out")
    # A byte tokenizer has no tokens with a space before them, so that we add none; the harness has its delimiter.
    prepared = tested.prepare(replace(tasks["choice"], shots=0, delimiter="\nAnswer:"), ("none",))
    ours = tested.run(prepared, "none").figures()[""]
    yaml = tmp_path / "tiny_choice.yaml"
    yaml.write_text(HARNESS_TASK.format(file=tmp_path / "choice.jsonl", shots=0))
    theirs = run_harness(tested.model, "none", [str(yaml)])["results"]["tiny_choice"]
    for metric in ("acc", "acc_norm"):
        assert theirs[f"{metric},none"] == pytest.approx(ours[metric].value)
        assert theirs[f"{metric}_stderr,none"] == pytest.approx(ours[metric].error)

    seen: list[str] = []
    embed = HashEmbedder.embed

    def note(self: HashEmbedder, texts: list[str]) -> object:
        seen.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(HashEmbedder, "embed", note)
    yaml.write_text(HARNESS_TASK.format(file=tmp_path / "choice.jsonl", shots=2))
    run_harness(tested.model, "fetched", [str(yaml)], limit=3)
    queries = [json.loads(line)["query"] for line in (tmp_path / "choice.jsonl").read_text().splitlines()[:3]]
    assert sorted(set(seen)) == sorted(f"{query}\nAnswer:" for query in queries)


def test_the_harness_stops_replies(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_hiermem.evaluate.harness import run_harness

    local_data(monkeypatch, tmp_path)
    task_files(tmp_path)
    tested = evaluation(model, tmp_path / "out")
    yaml = tmp_path / "tiny_reply.yaml"
    yaml.write_text(HARNESS_REPLY.format(file=tmp_path / "reply.jsonl"))
    found = run_harness(tested.model, "fetched", [str(yaml)], limit=3)
    for sample in found["samples"]["tiny_reply"]:
        context = sample["doc"]["context"]
        tested.model.select("fetched", context)
        whole = "".join(r.text for r in tested.model.responses(tested.model.tokens(context), Sampling(6)))
        assert sample["resps"][0][0] == whole.partition("\n")[0]
