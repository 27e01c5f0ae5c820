"""What `learn_settings.py` learns and asks: passages of vital480, lines of its stored study, questions of its exam.

Replay is general text that is learnt with the memory attached. Distractors are questions that the bank knows
nothing of, learnt as the anchor answers them, in the leaf to which they are misrouted. Both need other data: a
folder with `evals/`, `qa/` and `corpus/`.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import pathlib
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

from harm import drawn, other_questions
from knowledge import Row, read_exam

from mlx_hiermem.model import MemoryModel

DEVELOPMENT, REPORT = (0, 240), (240, 960)  # rows of the exam: to choose settings by, and to report
REPLY = 96  # tokens of the anchor's own reply to a distractor; one that does not end in them is not learnt
MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": ".", " ,": ",", " .": ".", " 's": "'s"}  # of WikiText's tokens


@dataclass(frozen=True)
class Setting:
    """One way to learn, and to ask."""

    passages: int = 60
    first: int = 0  # of the passages
    study: float = 5.0  # characters of study for each of a passage, at most
    writers: int = 1  # of the study: 2 add what was written a second time, which asks and tells otherwise
    kind: str = "ffn"
    sizes: tuple[int, ...] = (32, 32)
    layers: str = "late"
    branching: int = 3
    epochs: int = 4
    rate: float = 1.2e-2
    replay: float = 0.0  # general text, as a share of the study
    distractors: int = 0  # foreign questions for each passage, learnt as the anchor answers them
    seed: int = 0
    forms: tuple[
        str, ...
    ] = ()  # of the study, as many characters of each: question, text (retellings); (): all alike
    amplitude: float = field(default=1.0, metadata={"asked": True})  # of a block, when it is asked
    rows: tuple[int, int] = field(default=DEVELOPMENT, metadata={"asked": True})  # of the exam

    @property
    def name(self) -> str:
        """Of the folder in which it is learnt. Without forms it is as it was before there were any."""
        learnt = {one.name: getattr(self, one.name) for one in fields(self) if not one.metadata.get("asked")}
        if not self.forms:
            del learnt["forms"]
        return hashlib.sha256(json.dumps(learnt).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Material:
    """vital480 as the repository has it, and what other data there is for replay and distractors."""

    passages: list[Row]
    study: dict[str, list[Row]]  # by title
    exam: list[Row]
    second: dict[str, list[Row]] = field(default_factory=dict)  # study again, by another writer
    data: pathlib.Path | None = None

    @classmethod
    def read(cls, folder: pathlib.Path, data: pathlib.Path | None = None) -> Material:
        study, second = read_study(folder / "study.jsonl.gz"), read_study(folder / "study2.jsonl.gz")
        passages = [json.loads(line) for line in (folder / "documents.jsonl").read_text("utf-8").splitlines()]
        exam = read_exam(folder / "exam.jsonl.gz", f"0-{REPORT[1]}")
        return cls(passages, study, exam, second, data)

    def titles(self, setting: Setting) -> list[str]:
        return [row["title"] for row in self.of(setting)]

    def of(self, setting: Setting) -> list[Row]:
        """The passages that are learnt."""
        return self.passages[setting.first : setting.first + setting.passages]

    def asked(self, setting: Setting) -> list[Row]:
        """The exam's questions about the passages."""
        titles, (start, end) = set(self.titles(setting)), setting.rows
        return [row for row in self.exam[start:end] if row["doc"] in titles]

    def learnt(self, setting: Setting) -> list[Row]:
        """A question of each passage as it was learnt, in the exam's form."""
        found = []
        for title in self.titles(setting):
            own = [row for row in self.chosen(title, setting) if "question" in row]
            found += [{"id": f"learnt {title}", "doc": title, "aliases": [], **row} for row in own[:1]]
        return found

    def chosen(self, title: str, setting: Setting) -> list[Row]:
        """A passage's lines of study, drawn from all forms alike or from some, until there are enough."""
        text = next(row["text"] for row in self.passages if row["title"] == title)
        rows = self.study[title] + (self.second[title] if setting.writers == 2 else [])
        random.Random(f"{setting.seed} {title}").shuffle(rows)
        if not setting.forms:
            return until(rows, setting.study * len(text))
        most = setting.study * len(text) / len(setting.forms)
        return [row for form in setting.forms for row in until([one for one in rows if form in one], most)]

    def general(self, setting: Setting) -> list[Row]:
        """Replay: paragraphs of general text, one passage's after another's."""
        if not setting.replay:
            return []
        paragraphs = general_texts(self._needed / "evals" / "wikitext2_raw_test.txt")
        wanted = sum(characters(row) for title in self.titles(setting) for row in self.chosen(title, setting))
        found, length, titles = list[Row](), 0.0, self.titles(setting)
        for number, text in enumerate(paragraphs):
            if length >= setting.replay * wanted:
                break
            length += len(text)
            found.append({"document": titles[number % len(titles)], "text": text})
        return found

    def foreign(self, corpus: str, count: int) -> list[Row]:
        return drawn(other_questions(self._needed, corpus), count)

    @property
    def _needed(self) -> pathlib.Path:
        if self.data is None:
            raise SystemExit("this plan needs --data: a folder with evals/, qa/ and corpus/")
        return self.data


def read_study(file: pathlib.Path) -> dict[str, list[Row]]:
    """Lines of study by the passage that they are about."""
    study = defaultdict[str, list[Row]](list)
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        row = json.loads(line)
        study[row["document"]].append(row)
    return dict(study)


def characters(row: Row) -> int:
    """Of what a line of study says."""
    said = [row[name] for name in ("question", "answer", "prompt", "completion", "text") if name in row]
    return sum(map(len, said + [turn["content"] for turn in row.get("messages", [])]))


def until(rows: Sequence[Row], most: float) -> list[Row]:
    """The first lines of study that have so many characters, and one at least."""
    sums = itertools.accumulate(map(characters, rows))
    return [
        row for number, (row, length) in enumerate(zip(rows, sums, strict=True)) if not number or length <= most
    ]


def general_texts(file: pathlib.Path) -> Iterator[str]:
    """Paragraphs of WikiText of a passage's length, without its marks of tokenisation."""
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        for mark, plain in MARKS.items():
            text = text.replace(mark, plain)
        if 200 <= len(text) <= 900 and not text.startswith("="):
            yield text


def distractors(model: MemoryModel, material: Material, setting: Setting, file: pathlib.Path) -> list[Row]:
    """Questions about words, learnt as the anchor answers them. They go to the leaf that they are misrouted to."""
    if not setting.distractors:
        return []
    titles, count = material.titles(setting), setting.distractors * setting.passages
    if not file.is_file():
        asked = [row["question"] for row in material.foreign("wordnet", count)]
        replies = model.batch(asked, memory="none", chat=True, max_tokens=REPLY)
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
            for question, reply in zip(asked, replies, strict=True)
            if reply.finish_reason == "stop" and reply.text.strip()
        ]
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(one) + "\n" for one in turns), encoding="utf-8")
        os.replace(part, file)
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{"document": titles[n % len(titles)], "messages": json.loads(line)} for n, line in enumerate(lines)]
