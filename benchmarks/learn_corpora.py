"""What `hiermem learn` makes of a corpus: accuracy and perplexity with and without memory, sizes, times.

    python benchmarks/learn_corpora.py elements.jsonl --questions elements_qa.jsonl --config elements.toml
    python benchmarks/learn_corpora.py countries.jsonl --questions countries --documents 8 --ways study plain both
    python benchmarks/learn_corpora.py countries.jsonl --questions countries --epochs 2 --config late.toml
    python benchmarks/learn_corpora.py wordnet_topics.jsonl --questions wordnet_isa_qa.jsonl --documents 60 --asked

A corpus is a JSONL file with an `id` a line; `--documents` takes so many of them, spread evenly. Questions are a
file in the form that `hiermem eval` reads, those about other documents left out; `countries` asks for capitals,
years of independence, and the country of a capital, as the countries' fields and texts have them.
`--config` is for `hiermem learn`, and so is what follows `--`. Ways: `study` is the default; `plain` has no
self-study; `both` also distils the anchor that has the window before it. A later way gets the training time of the
first, by the number of its epochs: one epoch of it is timed before.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, dataclass, replace
from typing import Any

import common  # noqa: F401  # before MLX, for which it picks the BLAS
import mlx.core as mx
import numpy as np

from mlx_hiermem import load
from mlx_hiermem.learn.settings import LearnSettings, read_settings, write_settings
from mlx_hiermem.learn.train.dataset import TrainingSet

import mlx.nn as nn  # isort: skip

RESULTS = pathlib.Path(__file__).parent / "results"
HIERMEM = [sys.executable, "-c", "from mlx_hiermem.apps.cli.main import main; main()"]
WAYS = ("study", "plain", "both")
MEMORIES = ("none", "generic", "fetched")
INDEPENDENCE = re.compile(r"Independence: [^()]*?\b(\d{4})\b")
COUNTRIES = {  # what is asked of a country: (the prompt, held-out wordings)
    "capital": (
        "The capital of {} is",
        "Question: What is the capital of {}?\nAnswer:",
        "Question: In which city does the government of {} sit?\nAnswer:",
        "The seat of government of {} is in",
    ),
    "independence": (
        "The year in which {} became independent is",
        "Question: In which year did {} gain its independence?\nAnswer:",
        "{} has been independent since the year",
    ),
    "country_of_capital": (
        "The country whose capital is {} is",
        "Question: Which country is governed from {}?\nAnswer:",
    ),
}


def rows(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: pathlib.Path, found: list[dict[str, Any]]) -> pathlib.Path:
    """Where it is as it should be it keeps its time, by which `hiermem learn` knows it again."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def of_countries(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions from the countries' own fields, where their text has the answer too."""
    found = []
    for row in documents:
        year, name, capital = INDEPENDENCE.search(row["text"]), row["name"], row.get("capital_factbook")
        asked = {
            "capital": (name, capital),
            "independence": (name, year and year[1]),
            "country_of_capital": (capital, name),
        }
        for relation, (subject, answer) in asked.items():
            if not subject or not answer or subject not in row["text"] or answer not in row["text"]:
                continue
            prompt, *heldout = (wording.format(subject) for wording in COUNTRIES[relation])
            found.append(
                {
                    "id": f"{row['id']}-{relation}",
                    "doc": row["id"],
                    "relation": relation,
                    "subject": subject,
                    "answer": answer,
                    "aliases": [answer],
                    "prompt": prompt,
                    "heldout_prompts": heldout,
                }
            )
    return found


@dataclass(frozen=True)
class Trained:
    """What a training took, over all jobs: tokens, seconds, and of these what came before the first epoch."""

    tokens: int
    seconds: float
    before: float

    @classmethod
    def of(cls, model: pathlib.Path) -> Trained:
        """By the log. A job's seconds a token are those after its first line."""
        jobs: dict[str, list[dict[str, Any]]] = {}
        for row in rows(model / "learning" / "log.jsonl"):
            if "loss" in row:
                jobs.setdefault(row["job"], []).append(row)
        tokens, seconds, learning = 0, 0.0, 0.0
        for own in jobs.values():
            first, last = own[0] if len(own) > 1 else {"tokens": 0, "seconds": 0.0}, own[-1]
            tokens, seconds = tokens + last["tokens"], seconds + last["seconds"]
            rate = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
            learning += rate * last["tokens"]
        return cls(tokens, seconds, seconds - learning)

    def epochs_for(self, seconds: float) -> int:
        """How many epochs take so long, if this was one."""
        return max(1, round((seconds - self.before) / (self.seconds - self.before)))


def like(studied: pathlib.Path, work: pathlib.Path) -> None:
    """Gives a way the same questions, in its own work folder."""
    source, target = (folder.with_name(f"{folder.name}.learn") for folder in (studied, work))
    if source.exists() and not target.exists():
        shutil.copytree(source, target, symlinks=True)
        shutil.rmtree(target / "training", ignore_errors=True)


def learn(corpus: pathlib.Path, out: pathlib.Path, options: list[str]) -> dict[str, Any]:
    """Learns, unless `out` is there, and returns its report."""
    if not out.exists():
        subprocess.run([*HIERMEM, "learn", str(corpus), str(out), "--keep", *options], check=True)
    return json.loads((out / "learning" / "report.json").read_text(encoding="utf-8"))


def settings_of(way: str, config: pathlib.Path | None, work: pathlib.Path) -> pathlib.Path:
    """Writes the settings of a way."""
    settings = read_settings(config) if config else LearnSettings()
    if way == "plain":
        settings = replace(settings, self_study=False)
    if way == "both":
        settings = replace(settings, training=replace(settings.training, objective="distillation"))
    write_settings(work / f"{way}.toml", settings)
    return work / f"{way}.toml"


def of_windows(model: pathlib.Path) -> dict[str, float]:
    """Perplexity by memory, of the held-out windows alone; fetched is that of the leaf which its text reaches.

    Nothing where no windows are held out, but only questions.
    """
    if not tomllib.loads(model.with_name(f"{model.name}.toml").read_text(encoding="utf-8"))["heldout"]:
        return {}
    held, opened = TrainingSet.open(model.with_name(f"{model.name}.learn") / "heldout"), load(model)
    losses = dict.fromkeys(MEMORIES, 0.0)
    tokens = 0
    for number, (leaf,) in enumerate(held.leaves_of()):
        example = held.read(number)
        if not example.learn[1:].all():  # a question
            continue
        tokens += len(example.tokens) - 1
        for memory in MEMORIES:
            opened.select(str(leaf) if memory == "fetched" else memory, "")
            logits = opened.anchor(mx.array(example.tokens[None, :-1]))[0]
            losses[memory] += float(nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]), reduction="sum"))
    return {memory: float(np.exp(loss / tokens)) for memory, loss in losses.items()} if tokens else {}


def ask(model: pathlib.Path, questions: pathlib.Path) -> dict[str, dict[str, float]]:
    """Share of right answers by memory, and by relation and wording."""
    command = [*HIERMEM, "eval", str(model), "--tasks", str(questions), "--json", "--out", f"{model}.eval"]
    for memory in MEMORIES:
        command += ["--memory", memory]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, float]] = {}
    for run in json.loads(done.stdout)["runs"]:
        found[run["memory"]] = {
            f"{part} {metric}".strip(): figure["value"]
            for part, row in run["figures"].items()
            for metric, figure in row.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("--questions", required=True, help="a file, or countries")
    parser.add_argument("--documents", type=int, default=0, help="how many; default: all")
    parser.add_argument("--asked", action="store_true", help="take only documents that questions are about")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["study"])
    parser.add_argument("--config", type=pathlib.Path, help="settings of hiermem learn")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/learn"))
    parser.add_argument("--epochs", type=int, default=0, help="default: as hiermem learn chooses")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, of_learn = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]

    documents, countries = rows(options.corpus), options.questions == "countries"
    if options.asked:
        every = of_countries(documents) if countries else rows(pathlib.Path(options.questions))
        asked_about = {row["doc"] for row in every}
        documents = [row for row in documents if row["id"] in asked_about]
    count = options.documents or len(documents)
    documents = [documents[i * len(documents) // count] for i in range(count)]
    work = options.work / f"{options.corpus.stem}-{count}"
    work.mkdir(parents=True, exist_ok=True)
    corpus = write(work / f"{options.corpus.stem}.jsonl", documents)
    asked = of_countries(documents) if countries else rows(pathlib.Path(options.questions))
    sources = {row["id"]: f"{corpus.name}:{n}" for n, row in enumerate(documents, 1)}  # as the bank names them
    asked = [{**row, "doc": sources[row["doc"]]} for row in asked if row["doc"] in sources]
    questions = write(work / "questions.jsonl", asked)

    result: dict[str, Any] = {"corpus": options.corpus.stem, "documents": count, "ways": {}}
    time = 0.0
    for way in options.ways:
        out, epochs, command = (
            work / way,
            options.epochs,
            [*of_learn, "--config", str(settings_of(way, options.config, work))],
        )
        if way == "both":
            like(work / "study", work / "both-once")
        if time:
            once = work / f"{way}-once"
            learn(corpus, once, [*command, "--epochs", "1"])
            epochs = Trained.of(once).epochs_for(time)
            like(once, out)
        report, trained = learn(corpus, out, [*command, "--epochs", str(epochs)]), Trained.of(work / way)
        time = time or trained.seconds
        result["ways"][way] = {
            "epochs": epochs,
            "trained": asdict(trained),
            "bank_bytes": sum(file.stat().st_size for file in (out / "bank").rglob("*") if file.is_file()),
            "report": report,
            "perplexity_of_windows": of_windows(out),
            "right": ask(out, questions),
        }
        print(json.dumps(result["ways"][way]), flush=True)
    file = RESULTS / f"learn_{options.corpus.stem}_{options.documents or 'whole'}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
