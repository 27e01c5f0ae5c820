"""`hiermem eval` beside Hugging Face transformers, example by example: the same anchor, the same rows, other code.

    python benchmarks/evaluation_equality.py MODEL DATA [--count 100] [--kinds multiple_choice,schema]

The other side is written from LLM-Foundry's rules alone: it reads the task files, builds each prompt, computes
every pair of context and continuation whole, one at a time, with PyTorch, and generates without stopping early.
DATA has the task files (lambada_openai, piqa, winograd, triviaqa_sm_sub, wikitext2_raw_test) and questions
(elements_qa.jsonl).
Writes benchmarks/results/evaluation_equality.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common  # noqa: F401  # before MLX, for which it picks the BLAS

from mlx_hiermem.evaluate.runner import Evaluation
from mlx_hiermem.evaluate.tasks import Task, find_tasks

RESULTS = pathlib.Path(__file__).parent / "results" / "evaluation_equality.json"
Found = dict[str, Any]


class Reference:
    """transformers, one sequence at a time."""

    def __init__(self, anchor: pathlib.Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(anchor, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(anchor)

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def losses(self, context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
        """Per token of the continuation; and whether each is the likeliest."""
        with self.torch.no_grad():
            logits = self.model(self.torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        wanted = self.torch.tensor(continuation)
        found = self.torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return found.tolist(), bool((logits.argmax(-1) == wanted).all())

    def reply(self, context: list[int], length: int) -> str:
        inputs = self.torch.tensor([context])
        out = self.model.generate(inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)
        return self.tokenizer.decode(out[0, len(context) :], skip_special_tokens=True)


def shots(rows: list[Found], count: int, show: Callable[[Found], str]) -> list[str]:
    """LLM-Foundry's few-shot prompts of all rows, in order."""
    rng, found = random.Random(1234), []
    for index in range(len(rows)):
        drawn = set(rng.sample(range(len(rows)), count))
        if index in drawn:
            drawn.remove(index)
            other = rng.choice(range(len(rows)))
            while other in drawn or other == index:
                other = rng.choice(range(len(rows)))
            drawn.add(other)
        found.append("\n".join(show(rows[i]) for i in drawn))
    return found


def language_modeling(ref: Reference, row: Found, _: str) -> Found:
    losses, greedy = ref.losses(ref.tokens(row["context"].strip()), ref.tokens(" " + row["continuation"].strip()))
    return {"accuracy": float(greedy), "nll": sum(losses)}


def multiple_choice(ref: Reference, row: Found, _: str) -> Found:
    context = ref.tokens(f"{row['query'].strip()}\nAnswer:")
    losses = [ref.losses(context, ref.tokens(f" {choice}"))[0] for choice in row["choices"]]
    return _chosen(losses, row["gold"])


def schema(ref: Reference, row: Found, before: str) -> Found:
    preamble, continuation = ref.tokens(before), ref.tokens(f" {row['continuation'].strip()}")
    contexts = [preamble + ref.tokens(f"\n{context}") for context in row["context_options"]]
    return _chosen([ref.losses(context, continuation)[0] for context in contexts], row["gold"])


def _chosen(losses: list[list[float]], gold: int) -> Found:
    means = [sum(one) / len(one) for one in losses]
    return {"accuracy": float(means.index(min(means)) == gold), "scores": [sum(one) for one in losses]}


def plain(text: str) -> str:
    """LLM-Foundry's normalisation."""
    text = re.sub(r"[!-/:-@[-`{-~‘’´]", " ", text.replace("_", " ").lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def generation(ref: Reference, row: Found, before: str) -> Found:
    reply = ref.reply(ref.tokens(before) + ref.tokens(f"\n{row['context'].strip()}"), 24)
    names = [plain(name) for name in (row["answer"], *row["aliases"])]
    return {"accuracy": float(plain(reply).startswith(tuple(names)))}


def questions(ref: Reference, row: Found, _: str) -> Found:
    reply = ref.reply(ref.tokens(row["prompt"]), 16)
    if row["answer"].isdecimal():
        number = re.search(r"\d+", reply)
        return {"accuracy": float(number is not None and number.group() == row["answer"])}
    names = [row["answer"], *row["aliases"]]
    return {"accuracy": float(any(re.match(rf"\W*{re.escape(n)}(?!\w)", reply, re.I) for n in names))}


def perplexity(ref: Reference, row: Found, _: str) -> Found:
    losses, _ = ref.losses([ref.tokenizer.bos_token_id], ref.tokens(row["text"]))
    return {"nll": sum(losses)}


KINDS = {
    "language_modeling": ("lambada_openai.jsonl", language_modeling),
    "multiple_choice": ("piqa.jsonl", multiple_choice),
    "schema": ("winograd.jsonl", schema),
    "generation": ("triviaqa_sm_sub.jsonl", generation),
    "questions": ("elements_qa.jsonl", questions),
    "perplexity": ("paragraphs.jsonl", perplexity),
}


def paragraphs(text: pathlib.Path, out: pathlib.Path) -> None:
    """WikiText's paragraphs of 200 to 500 letters, a line each."""
    found = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if 200 < len(line) < 500]
    out.write_text("".join(json.dumps({"text": line}) + "\n" for line in found[:400]), encoding="utf-8")


def answerable(rows: pathlib.Path, out: pathlib.Path) -> None:
    """Without the row whose alias is empty once normalised: any reply begins with that."""
    with rows.open(encoding="utf-8") as lines:
        kept = [line for line in lines if all(map(plain, json.loads(line)["aliases"]))]
    out.write_text("".join(kept), encoding="utf-8")


def measure(model: pathlib.Path, data: pathlib.Path, kind: str, count: int, folder: pathlib.Path) -> Found:
    """Both sides of one kind."""
    name, score = KINDS[kind]
    file = next(data.rglob(name), folder / name)
    if kind == "perplexity":
        paragraphs(next(data.rglob("wikitext2_raw_test.txt")), file)
    if kind == "generation":
        answerable(file, file := folder / name)
    known = {task.file.name: task for task in find_tasks(["all"], file.parent)} if kind in _PAPERS else {}
    task = known.get(name) or Task(kind, kind, file)
    start = time.process_time()
    evaluation = Evaluation.of(model, folder / "results")
    run = evaluation.run(evaluation.prepare(task, ("none",), count), "none")
    ours_seconds = time.process_time() - start
    start = time.process_time()
    ref = Reference(model / "anchor" if (model / "anchor").is_dir() else model)
    with file.open(encoding="utf-8") as lines:  # text may have other marks that end lines
        rows = [json.loads(line) for line in lines]
    before = [""] * len(rows)
    if kind == "schema":
        before = shots(rows, 3, lambda row: f"{row['context_options'][row['gold']]} {row['continuation'].strip()}")
    if kind == "generation":
        before = shots(rows, 3, lambda row: f"{row['context'].strip()} {row['answer'].strip()}")
    differ, worst, asked = 0, 0.0, [row for row in run.rows if "#" not in row["id"]]
    for ours in asked:
        theirs = score(ref, rows[ours["line"] - 1], before[ours["line"] - 1])
        differ += ours.get("accuracy") != theirs.get("accuracy")
        mine = [nll for nll, _ in ours["scores"]] if "scores" in ours else [ours.get("nll", 0.0)]
        yours = theirs.get("scores", [theirs.get("nll", 0.0)])
        worst = max([worst, *(abs(a - b) for a, b in zip(mine, yours, strict=True))])
    seconds = {"ours": round(ours_seconds, 1), "transformers": round(time.process_time() - start, 1)}
    counts = {"examples": len(asked), "judged otherwise": differ, "largest difference, nats": worst}
    return counts | {"cpu seconds": seconds}


_PAPERS = ("language_modeling", "multiple_choice", "schema", "generation")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = measure(options.model, options.data, kind, options.count, pathlib.Path(folder))
        print(kind, found[kind], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
