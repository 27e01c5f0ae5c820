"""Running tasks: everything is read and checked first, then each example is scored under its memory.

evaluation = Evaluation.of(folder, out)
prepared = [evaluation.prepare(task, ("none", "fetched")) for task in tasks]   # raises, before anything runs
runs = [evaluation.run(one, memory, limit) for one in prepared for memory in ("none", "fetched")]
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlx_hiermem.anchor import identify
from mlx_hiermem.bank.bank import MANIFEST
from mlx_hiermem.errors import TaskError
from mlx_hiermem.evaluate.answers import is_decided, rule_for
from mlx_hiermem.evaluate.encoding import NUMBER_ROOM, EncodedPrompt, Prompter
from mlx_hiermem.evaluate.examples import ROLLING_WINDOW, Example, read_documents, read_examples, rolling_windows
from mlx_hiermem.evaluate.generation import Asked, drafted, replies
from mlx_hiermem.evaluate.results import FIFTHS, FORMAT, VERSION, ResultFile, Run, rows_in
from mlx_hiermem.evaluate.routes import Placed, attach, by_memory, check, place
from mlx_hiermem.evaluate.scoring import Score, Scorer
from mlx_hiermem.evaluate.statistics import Row
from mlx_hiermem.evaluate.tasks import Task, refuse
from mlx_hiermem.files import file_digest
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.model_folder import load
from mlx_hiermem.progress import Progress
from mlx_hiermem.share.resolve import resolve
from mlx_hiermem.source_search import before

GENERATED = ("generation", "questions")  # kinds of tasks that a model replies to
ORDER_SEED = 0  # of the order in which rows are asked


@dataclass(frozen=True)
class Prepared:
    """A task whose rows are read and checked. Those to be asked are tokenised: `prompts` by number of the example,
    in the order in which they are asked. `bad` rows were left out, so many prompts `cut` on the left."""

    task: Task
    digest: str  # of the file
    examples: list[Example]
    prompts: dict[int, EncodedPrompt]
    bad: list[str]
    cut: int


class Evaluation:
    """One model's tests; results go to files in `out`, and what is there already is not asked again."""

    def __init__(self, model: MemoryModel, name: str, identity: Mapping[str, str], out: pathlib.Path) -> None:
        """`identity` has digests of the anchor, and of the bank and the generic block where there are."""
        self.model, self.name, self.identity, self.out = model, name, identity, out
        self.prompter, self.scorer = Prompter(model), Scorer(model)

    @classmethod
    def of(cls, folder: str | pathlib.Path, out: pathlib.Path) -> Evaluation:
        """Opens a model by folder or hub id; raises as `model.load` does."""
        place = resolve(folder)
        model = load(place)
        anchor = identify(place / "anchor" if (place / "anchor").is_dir() else place)
        identity = {"anchor": f"{anchor.config_digest} {anchor.weights_digest}"}
        if model.bank:
            policy = json.dumps(model.bank.policy.to_json())
            identity["bank"] = f"{file_digest(model.bank.root / MANIFEST)} {policy}"
            identity["generic"] = model.bank.manifest.generic.sha256 if model.bank.manifest.generic else ""
        return cls(model, pathlib.Path(folder).resolve().name, identity, out)

    def prepare(
        self,
        task: Task,
        memories: Sequence[str],
        limit: int | None = None,
        skip_bad: bool = False,
        truncate: bool = False,
        frequencies: Mapping[str, float] | None = None,
    ) -> Prepared:
        """Reads and checks a task, all of its rows, and of so many of them that their examples have these memories
        and fit the model.

        Raises TaskError that names bad rows by file and line, and those that are longer than the model's context
        unless they are to be truncated; BankError or TaskError where there is no such memory.
        """
        bad: list[str] = []
        if task.kind == "perplexity":
            examples, make = read_documents(task.file, skip_bad), self._windows
        else:
            read = read_examples(task, skip_bad)
            examples, bad = read.examples, read.bad
            reply = self.prompter.longest(examples)
            reply += NUMBER_ROOM * (task.kind == "questions")
            make = partial(self.prompter.prompt, reply=reply)
        twice = _said_before(examples)
        refuse(task.file, list(twice.values()), skip_bad, "Give each row an `id` of its own, or leave `id` out.")
        examples, bad = [one for one in examples if one.line not in twice], [*bad, *twice.values()]
        if frequencies and task.kind == "questions":
            examples = _in_fifths(examples, frequencies)
        prompts = {n: make(examples[n]) for n in sample(examples, limit)}
        if task.kind == "perplexity" and (wanted := [name for name in memories if name.endswith("source")]):
            raise TaskError(f"{task.name} is a text, which asks for no passage", f"Leave memory {wanted[0]} out.")
        for memory in memories:
            check(self.model, [examples[n] for n in prompts], memory)
        room = self._room(task)
        long = [n for n, prompt in prompts.items() if room and prompt.length > room]
        if room and long and truncate:
            prompts |= {n: prompts[n].cut(room) for n in long}
        elif task.kind != "perplexity":
            found = [
                f"line {examples[n].line} has {prompts[n].length} tokens, the model takes {self.model.context}"
                for n in long
            ]
            refuse(task.file, found, skip_bad, "Cut them with --truncate, or leave them out with --skip-bad.")
            prompts, bad = {n: prompt for n, prompt in prompts.items() if n not in long}, bad + found
        if not prompts:
            raise TaskError(f"no row of {task.file} is left to be asked", *bad[:1])
        return Prepared(task, file_digest(task.file), examples, prompts, bad, len(long) if truncate else 0)

    def run(self, prepared: Prepared, memory: str, progress: Progress | None = None) -> Run:
        """Raises OutputError where results cannot be written, or another process does; those that were are kept."""
        asked = [prepared.examples[n] for n in prepared.prompts]
        with self._results(prepared, memory) as file:
            missing = [n for n in prepared.prompts if prepared.examples[n].id not in file.done]
            done = len(asked) - len(missing)
            if progress:
                progress(done, len(asked))
            for rows in self._rows(prepared, memory, missing):
                file.add(rows)
                done += len(rows)
                if progress:
                    progress(done, len(asked))
        return Run(file.head, [{**file.done[example.id], **example.tags} for example in asked])

    def _file(self, prepared: Prepared, memory: str) -> pathlib.Path:
        return self.out / f"{prepared.task.name}.{memory}.{self._fingerprint(prepared, memory)[:12]}.jsonl"

    def _results(self, prepared: Prepared, memory: str) -> ResultFile:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.name,
            "memory": memory,
            "task": prepared.task.to_json(),
            "examples": len(prepared.examples),
            "file_sha256": prepared.digest,
            "fingerprint": self._fingerprint(prepared, memory),
        }
        return ResultFile(self._file(prepared, memory), head)

    def _rows(self, prepared: Prepared, memory: str, numbers: Sequence[int]) -> Iterator[list[Row]]:
        """Rows of these examples, batch by batch. Each has its share of the batch's cost, and of the routing's."""
        begun = time.perf_counter()
        placed = dict(zip(numbers, place(self.model, [prepared.examples[n] for n in numbers], memory), strict=True))
        routing = (time.perf_counter() - begun) / max(1, len(numbers))
        # What gets no memory is the anchor's, and need not be computed once more.
        known = rows_in(self._file(prepared, "none")) if self._file(prepared, "none").is_file() else {}
        same = {n for n, one in placed.items() if one.key == "none" and prepared.examples[n].id in known}
        yield [
            self._row(prepared, placed[n], n, known[prepared.examples[n].id], routing) for n in placed if n in same
        ]
        placed = {n: one for n, one in placed.items() if n not in same}
        room = self._room(prepared.task)
        with_passage = {n: self._behind(prepared.prompts[n], one, room) for n, one in placed.items()}
        prepared = replace(prepared, prompts=prepared.prompts | with_passage)
        generated = prepared.task.kind in GENERATED
        begun, read = time.perf_counter(), self._bytes_read()
        for batch in (self._generate if generated else self._score)(prepared, placed):
            now, computed, read_now = time.perf_counter(), self.scorer.computed, self._bytes_read()
            cost = {
                "seconds": (now - begun) / len(batch),
                "tokens": round(computed / len(batch), 2),
                "bytes_read": (read_now - read) / len(batch),
            }
            begun, read, self.scorer.computed = now, read_now, 0
            yield [self._row(prepared, placed[n], n, found | {"cost": cost}, routing) for n, found in batch]

    def _score(
        self, prepared: Prepared, placed: Mapping[int, Placed]
    ) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        for group in by_memory(placed).values():
            attach(self.model, placed[group[0]])
            for batch in self.scorer.score([prepared.prompts[n].pairs for n in group]):
                yield [
                    (group[i], judge(prepared.task.kind, prepared.examples[group[i]], scores))
                    for i, scores in batch
                ]

    def _generate(
        self, prepared: Prepared, placed: Mapping[int, Placed]
    ) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        asked = {n: self._asked(prepared, n, placed[n]) for n in placed}
        if prepared.task.kind == "questions":  # few-shot prompts are too long to be computed twice
            for group in by_memory(placed).values():
                attach(self.model, placed[group[0]])
                for decided in self._draft(prepared, group, asked):
                    yield [(n, _judged(prepared, n, reply)) for n, reply in decided]
        order = sorted(asked, key=lambda n: (placed[n].chosen.path, prepared.prompts[n].length))
        for i, reply in replies(self.model, [asked[n] for n in order], self.prompter.decode):
            self.scorer.computed += len(asked[order[i]].tokens)
            yield [(order[i], _judged(prepared, order[i], reply))]

    def _draft(
        self, prepared: Prepared, group: Sequence[int], asked: dict[int, Asked]
    ) -> Iterator[list[tuple[int, str]]]:
        """Replies that one pass decides, see `generation`; they leave `asked`, where the others' beginnings go."""
        drafts = [self.prompter.continuation(prepared.examples[n].answers[0]) for n in group]
        pairs = [[(asked[n].tokens, [*draft, 0])] for n, draft in zip(group, drafts, strict=True)]
        for batch in self.scorer.score(pairs):
            decided = []
            for i, (score,) in batch:
                said = drafted(drafts[i], score.likeliest)
                asked[group[i]] = one = replace(asked[group[i]], said=tuple(said))
                reply = self.prompter.decode(said)
                if said[-1] in self.prompter.ends or len(said) >= one.max_tokens or one.done(reply):
                    decided.append((group[i], reply))
                    del asked[group[i]]
            if decided:
                yield decided

    def _asked(self, prepared: Prepared, number: int, placed: Placed) -> Asked:
        names, prompt = prepared.examples[number].answers, prepared.prompts[number]
        decided = partial(is_decided, rule=rule_for(prepared.task.kind, names[0]), names=names)
        return Asked(prompt.pairs[0][0], placed.chosen, prompt.reply, decided)

    def _room(self, task: Task) -> int:
        """The most tokens of a row, its reply included; 0 where the model has no bound.

        A text's last token is scored and never read; a reply must fit as it does where it is generated.
        """
        return self.model.context + (task.kind not in GENERATED) if self.model.context else 0

    def _behind(self, prompt: EncodedPrompt, placed: Placed, room: int) -> EncodedPrompt:
        """A prompt with its passage, where it has one; the oldest of what does not fit goes."""
        if placed.chosen.passage is None:
            return prompt
        longer = prompt.behind(self.prompter.plain(before(placed.chosen.passage)))
        return longer.cut(room) if room else longer

    def _row(
        self, prepared: Prepared, placed: Placed, number: int, found: Mapping[str, Any], routing: float
    ) -> dict[str, Any]:
        example = prepared.examples[number]
        row = {"id": example.id, "line": example.line, "path": str(placed.chosen.path), "memory": placed.key}
        if "#" in example.id or prepared.task.kind == "questions":
            row["question"] = example.id.partition("#")[0]
        if placed.agrees is not None:
            row["routing"] = placed.agrees
        cost = found["cost"]
        tags = {name: tag for name, tag in example.tags.items() if name != "bucket"}  # that is of --frequencies
        return row | tags | dict(found) | {"cost": cost | {"seconds": round(cost["seconds"] + routing, 6)}}

    def _windows(self, document: Example) -> EncodedPrompt:
        tokens, first = self.prompter.plain(document.continuations[0]), self.prompter.first
        size = min(ROLLING_WINDOW, self.model.context or ROLLING_WINDOW)
        return EncodedPrompt(tuple(rolling_windows(tokens, first, size)))

    def digest(self, memory: str) -> str:
        """Of the model under a memory: results of another one are none of it."""
        needed = {"none": ("anchor",), "generic": ("anchor", "generic")}.get(memory, ("anchor", "bank"))
        parts = [VERSION, memory, *(self.identity[name] for name in needed)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _fingerprint(self, prepared: Prepared, memory: str) -> str:
        """Of all that a result depends on."""
        parts = [self.digest(memory), prepared.digest, prepared.task.to_json()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _bytes_read(self) -> int:
        return self.model.cache.stats.bytes_read if self.model.cache else 0


def sample(examples: Sequence[Example], limit: int | None) -> list[int]:
    """Numbers of the examples of so many rows of their file, in the order in which they are asked.

    A limit takes the first rows of a random order, so that a larger one adds to what a smaller one has taken.
    """
    lines = sorted({example.line for example in examples})
    random.Random(ORDER_SEED).shuffle(lines)
    rank = {line: number for number, line in enumerate(lines[:limit])}
    chosen = [n for n, example in enumerate(examples) if example.line in rank]
    return sorted(chosen, key=lambda n: (rank[examples[n].line], n))


def _said_before(examples: Sequence[Example]) -> dict[int, str]:
    """By line: rows with the id of an earlier one. Results are kept by id, so one would be taken for the other."""
    first, found = dict[str, int](), dict[int, str]()
    for one in examples:
        if (line := first.setdefault(one.id, one.line)) != one.line:
            found[one.line] = f"line {one.line} has the id of line {line}, {one.id}"
    return found


def _judged(prepared: Prepared, number: int, reply: str) -> dict[str, Any]:
    names = prepared.examples[number].answers
    return {"accuracy": float(rule_for(prepared.task.kind, names[0])(reply, names)), "reply": reply}


def judge(kind: str, example: Example, scores: Sequence[Score]) -> dict[str, Any]:
    """An example's metrics. `accuracy` is LLM-Foundry's: the lowest mean cross-entropy per token; of a language
    modelling task, every token likeliest. `acc` and `acc_norm` are lm-evaluation-harness's: the highest log
    likelihood, and that per character."""
    nll = [score.nll for score in scores]
    if kind == "perplexity":
        text = example.continuations[0]
        counts = {"tokens": sum(score.tokens for score in scores), "words": len(text.split())}
        return {"nll": sum(nll), **counts, "bytes": len(text.encode())}
    if kind == "language_modeling":
        return {"accuracy": float(scores[0].greedy), "nll": nll[0], "tokens": scores[0].tokens}
    found = {
        "accuracy": float(int(np.argmin([score.mean for score in scores])) == example.gold),
        "acc": float(int(np.argmin(nll)) == example.gold),
    }
    if kind == "multiple_choice":
        per_character = [n / len(text) for n, text in zip(nll, example.continuations, strict=True)]
        found["acc_norm"] = float(int(np.argmin(per_character)) == example.gold)
    return found | {"scores": [[round(score.nll, 5), score.tokens] for score in scores]}


def _in_fifths(examples: Sequence[Example], frequencies: Mapping[str, float]) -> list[Example]:
    """Tags the questions of each subject with the fifth in which its frequency is (arXiv:2510.02375, Fig. 1)."""
    subjects = sorted({example.tags.get("subject", "") for example in examples} & frequencies.keys())
    subjects.sort(key=lambda subject: frequencies[subject])
    fifth = {subject: FIFTHS[5 * rank // len(subjects)] for rank, subject in enumerate(subjects)}
    return [
        replace(example, tags=example.tags | {"bucket": fifth[example.tags["subject"]]})
        if example.tags.get("subject") in fifth
        else example
        for example in examples
    ]
