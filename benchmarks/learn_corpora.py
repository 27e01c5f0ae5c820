"""What `hiermem learn` makes of a corpus: accuracy and perplexity with and without memory, sizes, times.

    python benchmarks/learn_corpora.py elements.jsonl --questions elements_qa.jsonl -- --branching 4 --sizes 24,8
    python benchmarks/learn_corpora.py countries.jsonl --questions countries --documents 8 --ways study plain both
    python benchmarks/learn_corpora.py wordnet_topics.jsonl --questions wordnet_isa_qa.jsonl --documents 100

A corpus is a JSONL file with an `id` a line; `--documents` takes so many of them, spread evenly. Questions are a
file in the form that `hiermem eval` reads, those about other documents left out; `countries` asks for capitals and
years of independence, as the countries' fields and texts have them. What follows `--` is for `hiermem learn`.
Ways: `study` is the default; `plain` has no self-study, and where it comes after `study` learns as many tokens by
learning each text more often; `both` also distils the anchor that has the window before it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
HIERMEM = [sys.executable, "-c", "from mlx_hiermem.apps.cli.main import main; main()"]
WAYS: dict[str, list[str]] = {"study": [], "plain": ["--no-self-study"], "both": ["--objective", "distillation"]}
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
}


def rows(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: pathlib.Path, found: list[dict[str, Any]]) -> pathlib.Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return file


def of_countries(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions from the countries' own fields, where their text has the answer too."""
    found = []
    for row in documents:
        year = INDEPENDENCE.search(row["text"])
        answers = {"capital": row.get("capital_factbook"), "independence": year and year[1]}
        for relation, (prompt, *heldout) in COUNTRIES.items():
            if not answers[relation] or answers[relation] not in row["text"]:
                continue
            found.append(
                {
                    "id": f"{row['id']}-{relation}",
                    "doc": row["id"],
                    "relation": relation,
                    "subject": row["name"],
                    "answer": answers[relation],
                    "aliases": [answers[relation]],
                    "prompt": prompt.format(row["name"]),
                    "heldout_prompts": [wording.format(row["name"]) for wording in heldout],
                }
            )
    return found


def tokens_learnt(model: pathlib.Path) -> int:
    """Over all epochs and leaves."""
    last: dict[str, int] = {}
    for row in rows(model / "learning" / "log.jsonl"):
        last[row["job"]] = max(row["tokens"], last.get(row["job"], 0))
    return sum(last.values())


def learn(corpus: pathlib.Path, out: pathlib.Path, options: list[str]) -> dict[str, Any]:
    """Learns, unless `out` is there, and returns its report."""
    if not out.exists():
        subprocess.run([*HIERMEM, "learn", str(corpus), str(out), "--keep", *options], check=True)
    return json.loads((out / "learning" / "report.json").read_text(encoding="utf-8"))


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
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["study"])
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/learn"))
    parser.add_argument("--epochs", type=int, default=0, help="default: as hiermem learn chooses")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, of_learn = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]

    documents = rows(options.corpus)
    count = options.documents or len(documents)
    documents = [documents[i * len(documents) // count] for i in range(count)]
    work = options.work / f"{options.corpus.stem}-{count}"
    work.mkdir(parents=True, exist_ok=True)
    corpus = write(work / f"{options.corpus.stem}.jsonl", documents)
    asked = of_countries(documents) if options.questions == "countries" else rows(pathlib.Path(options.questions))
    sources = {row["id"]: f"{corpus.name}:{n}" for n, row in enumerate(documents, 1)}  # as the bank names them
    asked = [{**row, "doc": sources[row["doc"]]} for row in asked if row["doc"] in sources]
    questions = write(work / "questions.jsonl", asked)

    result: dict[str, Any] = {"corpus": options.corpus.stem, "documents": count, "ways": {}}
    learnt = 0
    for way in options.ways:
        out, epochs = work / way, options.epochs
        if way == "plain" and learnt:
            learn(corpus, work / "once", [*of_learn, *WAYS[way], "--epochs", "1"])
            epochs = max(epochs, round(learnt / tokens_learnt(work / "once")))
        studied = work / "study.learn"
        if way == "both" and studied.exists() and not (work / "both.learn").exists():
            shutil.copytree(studied, work / "both.learn")  # the same questions
            shutil.rmtree(work / "both.learn" / "training", ignore_errors=True)
        report = learn(corpus, out, [*of_learn, *WAYS[way], "--epochs", str(epochs)])
        learnt = learnt or tokens_learnt(out)
        result["ways"][way] = {
            "epochs": epochs,
            "tokens": tokens_learnt(out),
            "bank_bytes": sum(file.stat().st_size for file in (out / "bank").rglob("*") if file.is_file()),
            "report": report,
            "right": ask(out, questions),
        }
        print(json.dumps(result["ways"][way]), flush=True)
    file = RESULTS / f"learn_{options.corpus.stem}.json"
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
