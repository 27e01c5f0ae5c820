"""`hiermem learn` with what one may choose, on a tiny model: self-study, data sets of the hub, other memories."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import hub_server
import pytest
from books import COUNT, VILLAGES, fact, text, write_library
from test_learn_command import digests

from mlx_hiermem.bank.bank import MemoryBank
from mlx_hiermem.learn.stages import read_status
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.work import read_rows

pytestmark = pytest.mark.real  # the sentence embedder


def command(source: pathlib.Path | str, out: pathlib.Path, anchor: pathlib.Path, *options: str) -> list[str]:
    script = str(pathlib.Path(sys.executable).with_name("hiermem"))
    return [script, "learn", str(source), str(out), "--anchor", str(anchor), "--epochs", "2", *options]


def learn(
    source: pathlib.Path | str, out: pathlib.Path, anchor: pathlib.Path, *options: str, **more: str
) -> dict[str, Any]:
    """The report of a run."""
    call = command(source, out, anchor, "--json", *options)
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=os.environ | more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_self_study_by_the_command_and_killed_in_the_middle(anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A random model finds no wording that it could answer; each fact is then learnt in the text's own words."""
    library = write_library(tmp_path / "books")
    whole, other = tmp_path / "whole", tmp_path / "other"
    learn(library, whole, anchor, "--keep")
    assert read_status(whole)["state"] == "done"
    rows = list(read_rows(tmp_path / "whole.learn" / "study.jsonl"))
    assert {row["window"] for row in rows} == set(range(COUNT))
    for number in range(COUNT):
        name, _, people = fact(number)
        own = [row for row in rows if row["answer"] == people]
        assert own
        assert all(name in row["prompt"] or row["prompt"] == "There are" for row in own)
    notes = tmp_path / "other.learn" / "study.parts"
    with subprocess.Popen(command(library, other, anchor), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if any(file.stat().st_size for file in notes.glob("*.replies")):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not other.exists()
    stopped = read_status(other)
    assert (stopped["state"], stopped["stage"]) == ("stopped", "study")
    learn(library, other, anchor)
    assert digests(other) == digests(whole)


def test_a_data_set_of_the_hub(anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = [{"name": VILLAGES[number], "body": text(number)} for number in range(COUNT)]
    data = "".join(json.dumps(row) + "\n" for row in [*rows, {"name": "Nowhere", "body": ""}])
    with hub_server.serving() as hub:
        hub.repo("datasets/ada/villages").commit({"data.jsonl": data.encode()})
        reached = hub_server.environment(hub.url, tmp_path)
        del reached["HIERMEM_CACHE"]  # the embedder is not on this hub
        out = tmp_path / "model"
        report = learn("hf://ada/villages", out, anchor, "--no-self-study", "--field", "body", **reached)
        assert (report["documents"], report["skipped"]) == (COUNT, 1)
        skipped = list(read_rows(out / "learning" / "skipped.jsonl"))
        assert skipped == [{"what": "hf://ada/villages:13", "why": "no text in 'body'"}]
        call = command("hf://ada/villagers", tmp_path / "none", anchor)
        done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=os.environ | reached)
    assert done.returncode == 1
    assert "cannot read the data set hf://ada/villagers" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_another_memory_distilled_with_windows_held_out(anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "model"
    config = tmp_path / "learn.toml"
    config.write_text(
        "heldout = 0.3\n"
        '[memory]\nkind = "lora-qk"\nplacement = "uniform"\nsizes = [6, 3]\n'
        '[training]\nrate = 0.02\nobjective = "distillation"\n'
    )
    library = write_library(tmp_path / "books")
    report = learn(library, out, anchor, "--config", str(config), "--kind", "kv")  # the line comes before the file
    assert report["perplexity_of"] == "held-out texts"
    assert {"none", "generic", "level 1", "fetched"} == report["perplexity"].keys()
    bank = MemoryBank.open(out / "bank")
    assert (bank.config.kind, bank.config.layers, bank.config.block_sizes) == ("kv", (0, 1, 2, 3), (6, 3))
    assert bank.manifest.recipe["settings"]["training"]["objective"] == "distillation"


def test_prompts_of_ones_own(anchor: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Learnt by `learn` and by `bank add`; what is about no document is told before anything is learnt."""
    library, out, file = write_library(tmp_path / "books"), tmp_path / "model", tmp_path / "own.jsonl"
    own = [{"document": name, "question": f"Whose is {name}?", "answer": "Nobody's"} for name in VILLAGES[:COUNT]]
    file.write_text("".join(json.dumps(row) + "\n" for row in own))
    learn(library, out, anchor, "--no-self-study", "--prompts", str(file))
    assert MemoryBank.open(out / "bank").manifest.recipe["prompts"] == COUNT
    learnt = len(TrainingSet.open(out / "learning" / "examples"))
    assert learnt == 3 * COUNT  # each question framed and in chat, and each document
    more = write_library(tmp_path / "more", 2, first=COUNT)
    file.write_text(json.dumps({"document": VILLAGES[COUNT], "prompt": "The mayor is", "completion": " Ann."}))
    script = command(library, out, anchor)[0]
    call = [script, "bank", "add", str(out), str(more), "--no-self-study", "--epochs", "1", "--prompts", str(file)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(TrainingSet.open(out / "learning" / "examples")) == learnt + 3
    done = subprocess.run(
        command(library, tmp_path / "other", anchor, "--prompts", str(file)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f"no document is called '{VILLAGES[COUNT]}', which a prompt is about" in done.stderr
    assert not (tmp_path / "other.learn" / "study.parts").exists()
