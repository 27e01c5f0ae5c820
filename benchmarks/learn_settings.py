"""What a setting of learning is worth: the first passages of vital480, learnt one way and another, and asked.

    python benchmarks/learn_settings.py kinds --anchor MODEL            # a finding of the paper: see plans.py
    python benchmarks/learn_settings.py kinds --anchor MODEL --time     # a few steps of each: how long it will take
    python benchmarks/learn_settings.py kinds --anchor MODEL --add slow rate=0.003   # and a setting of your own

Start it once for each core: a setting that another process is at is passed over. A stopped run goes on, and the
last one prints the table when it is started again. What is learnt are lines of the stored study in apps/demo/vital,
by `mlx_hiermem.learn`. What is asked, in chat, are the exam's questions about the same passages and a learnt
question of each. They are among those that settings may be chosen by, except in the plan `whole`. Settings that
differ only in how they are asked are learnt once. Writes results/learn_settings.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import common
import mlx.core as mx
from harm import without_reach
from knowledge import Exam, Kept, Row
from material import Material, Setting, distractors
from plans import HARMED, PLANS

from mlx_hiermem import load
from mlx_hiermem.cache import BlockCache, Fetch
from mlx_hiermem.evaluate.statistics import share_interval
from mlx_hiermem.learn import LearnSettings, learn
from mlx_hiermem.learn.settings import MemorySettings, PromptPair, TrainingSettings, TreeSettings
from mlx_hiermem.learn.stages import Silent
from mlx_hiermem.learn.study.prompts import prompt_of
from mlx_hiermem.learn.train.monitor import TrainingProgress
from mlx_hiermem.learn.work import work_folder
from mlx_hiermem.locks import try_lock

VITAL = pathlib.Path(__file__).parents[1] / "apps" / "demo" / "vital"
FOREIGN = 60  # questions about countries, asked with whatever memory is nearest
PACE = 60.0  # seconds between two lines of the log
TIMED = 30.0  # seconds of steps by which the rest is estimated
PARTS = {"ffn": ("down",), "kv": ("v",), "lora-qk": ("q.b", "k.b"), "lora-vo": ("v.b", "o.b")}
PARTS["lora-ffn"] = ("gate.b", "up.b", "down.b")  # what a kind's output is proportional to


def with_changes(setting: Setting, changes: Sequence[str]) -> Setting:
    """`key=value` as --add has them."""
    types, found = typing.get_type_hints(Setting), dict[str, Any]()
    for name, value in (change.split("=", 1) for change in changes):
        if types[name] in (int, float, str):
            found[name] = types[name](value)
        else:
            parts = value.split(",")
            found[name] = tuple(parts) if types[name] == tuple[str, ...] else tuple(map(int, parts))
    return replace(setting, **found)


class Told(Silent):
    """A line for each stage, and one a minute of the training; if `timed`, ends it once its time is known."""

    def __init__(self, name: str, timed: bool) -> None:
        self.name, self.timed, self.stage = name, timed, ""
        self._said = self._states = self._steps = 0.0  # when the last line was said, hidden states and steps began

    def begin(self, stage: str) -> None:
        self.stage = stage

    def end(self, line: str) -> None:
        self.say(f"{self.stage}: {line}")

    def training(self, progress: TrainingProgress) -> None:
        now = time.monotonic()
        if progress.doing == "hidden states":
            self._states = self._states or now
        if progress.doing == "learning":
            self._steps = self._steps or now
            if self.timed and now - self._steps > TIMED and progress.seconds_left:
                raise TimeIsKnownError(progress.seconds_left, self._steps - (self._states or self._steps))
        if now - self._said > PACE:
            self._said = now
            left = f", {progress.seconds_left / 60:.0f} min left" if progress.seconds_left else ""
            loss = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
            self.say(f"{progress.doing}, {progress.tokens:,} of {progress.total:,} tokens{loss}{left}")

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {self.name}: {line}", flush=True)


class TimeIsKnownError(Exception):
    """Ends a training of which the steps take `steps` seconds more, and a subtree's hidden states took `states`."""

    def __init__(self, steps: float, states: float) -> None:
        super().__init__(f"{steps:.0f} s of steps, {states:.0f} s of hidden states")
        self.steps, self.states = steps, states


def learn_settings(setting: Setting, prompts: tuple[PromptPair, ...]) -> LearnSettings:
    """The same as `hiermem learn` has them."""
    return LearnSettings(
        tree=TreeSettings(branching=setting.branching, depth=len(setting.sizes), leaves=1, seed=setting.seed),
        memory=MemorySettings(setting.kind, setting.sizes, setting.layers),
        training=TrainingSettings(epochs=setting.epochs, rate=setting.rate, generic=False, seed=setting.seed),
        self_study=False,
        prompts=prompts,
        keep=True,
    )


def like(earlier: pathlib.Path, out: pathlib.Path) -> None:
    """Gives a setting the stages before the training of one that is done. Those that differ are made again."""
    target = work_folder(out)
    if earlier.is_dir() and not target.exists():
        left_out = shutil.ignore_patterns("training", "model", "status.json", "times.json")
        shutil.copytree(work_folder(earlier), target, ignore=left_out, copy_function=_link_weights)


def _link_weights(source: str, target: str) -> None:
    """Copies a file; an anchor's weights, which nobody writes into, are linked."""
    (os.link if source.endswith("model.safetensors") else shutil.copy2)(source, target)


class Runner:
    """Learns and asks settings, each in a folder of its own in `work`."""

    def __init__(self, work: pathlib.Path, anchor: pathlib.Path, material: Material, harmed: bool) -> None:
        self.work, self.anchor, self.material, self.harmed = work, anchor, material, harmed
        work.mkdir(parents=True, exist_ok=True)

    def learn(self, name: str, setting: Setting, timed: bool = False) -> pathlib.Path:
        """The model folder. Raises `TimeIsKnownError` where only the time is asked for."""
        out, titles = self.work / setting.name, self.material.titles(setting)
        if out.exists():
            return out
        rows = [row for title in titles for row in self.material.chosen(title, setting)]
        rows += self.material.general(setting)
        if setting.distractors:
            file = self.work / f"distractors-{setting.distractors * setting.passages}.jsonl"
            rows += distractors(load(self.anchor), self.material, setting, file)
        for earlier in sorted(self.work.glob("*.learn")):
            like(earlier.with_suffix(""), out)
        settings = learn_settings(setting, tuple(map(prompt_of, rows)))
        learn([str(self._corpus(setting))], out, self.anchor, settings, Told(name, timed))
        return out

    def _corpus(self, setting: Setting) -> pathlib.Path:
        """The file of the passages. It is written once: learning knows it again by its time."""
        file = self.work / f"vital{setting.first}-{setting.first + setting.passages}.jsonl"
        part = file.with_suffix(f".{os.getpid()}")
        rows = self.material.of(setting)
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
        part.unlink()
        return file

    def ask(self, setting: Setting, out: pathlib.Path) -> Row:
        """What it answers."""
        model = load(out)
        if setting.amplitude != 1:
            assert model.bank is not None
            model.cache = Amplified(model.bank, setting.amplitude)
        exam, kept = Exam(model), kept_of(self.work, setting)
        memories = ["fetched", "blocked"] if self.harmed else ["fetched"]
        asked, learnt = self.material.asked(setting), self.material.learnt(setting)
        exam.ask_all(asked, memories, kept)
        have = exam.ask_all(learnt, ["fetched"], kept)
        alone = exam.ask_all(asked, ["none"], self.work / "none.jsonl")
        found = {"none": shares(alone, "none", asked), "learnt": shares(have, "fetched", learnt)}
        found |= {memory: shares(have, memory, asked) for memory in memories}
        if self.harmed:
            foreign = self.material.foreign("countries", FOREIGN)
            with without_reach(model):
                have = exam.ask_all(foreign, ["fetched"], kept)
            alone = exam.ask_all(foreign, ["none"], self.work / "none.jsonl")
            found["foreign, none"] = shares(alone, "none", foreign)
            found["foreign, nearest memory"] = shares(have, "fetched", foreign)
        return found

    def run(self, name: str, setting: Setting) -> Row | None:
        """What came of a setting; None where another process is at it."""
        with try_lock(self.work / f"{setting.name}.lock") as mine:
            if not mine:
                return None
            out = self.learn(name, setting)
            report = json.loads((out / "learning" / "report.json").read_text(encoding="utf-8"))
            found = {"setting": asdict(setting), "fetched_parameters": report["totals"]["fetched_parameters"]}
            found |= {"seconds": report["seconds"], "perplexity": report["perplexity"]}
            return found | {"right": self.ask(setting, out)}

    def time(self, name: str, setting: Setting) -> float:
        """Minutes that its training takes, by its first steps."""
        try:
            self.learn(name, setting, timed=True)
        except TimeIsKnownError as known:
            return (known.steps + known.states * setting.branching) / 60
        return 0.0


class Amplified(BlockCache):
    """A cache whose memories say what they say more loudly, or more softly."""

    def __init__(self, bank: Any, amplitude: float) -> None:
        super().__init__(bank)
        self.amplitude = amplitude

    def fetch(self, path: Any) -> Fetch:
        found = super().fetch(path)
        if found.memory is None:
            return found
        outputs = PARTS[found.memory.config.kind]
        tensors = {
            name: tensor.astype(mx.float32) * self.amplitude if name in outputs else tensor
            for name, tensor in found.memory.tensors.items()
        }
        return replace(found, memory=replace(found.memory, tensors=tensors))


def kept_of(work: pathlib.Path, setting: Setting) -> pathlib.Path:
    """Where the replies to a setting's questions are."""
    return work / f"{setting.name}.{setting.amplitude}.replies.jsonl"


def shares(have: Kept, memory: str, rows: Sequence[Row]) -> Row:
    """How many of the rows were right, leniently and to the letter."""
    found: Row = {"of": len(rows)}
    for name in ("lenient", "strict"):
        right = sum(have[memory, row["id"]][name] for row in rows)
        found[name] = {"right": right, "interval": share_interval(right, len(rows))}
    return found


def save(plan: str, found: dict[str, Row], asked: argparse.Namespace, before: float) -> None:
    """Into the file of all plans, beside what other processes have put there."""
    folder = common.RESULTS / "quick" if asked.quick else common.RESULTS
    file = folder / f"{pathlib.Path(__file__).stem}.json"
    plans = json.loads(file.read_text(encoding="utf-8"))["plans"] if file.is_file() else {}
    plans[plan] = plans.get(plan, {}) | found
    common.save(__file__, {"plans": plans}, asked, before)


def main() -> None:
    parser = common.options(__doc__, runs=1)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--anchor", type=pathlib.Path, required=True, help="a model folder; its anchor learns")
    parser.add_argument("--data", type=pathlib.Path, help="for the plan harm: a folder with evals/, qa/, corpus/")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/learn_settings"))
    parser.add_argument("--time", action="store_true", help="only tell how long each setting's training takes")
    parser.add_argument("--only", nargs="+", default=[], help="settings of the plan, by name")
    parser.add_argument(
        "--add", nargs="+", metavar=("NAME", "KEY=VALUE"), help="one more: the first, but for these"
    )
    asked, before = common.parsed(parser), os.getloadavg()[0]
    plan = {name: one for name, one in PLANS[asked.plan].items() if not asked.only or name in asked.only}
    if asked.add:
        plan[asked.add[0]] = with_changes(next(iter(PLANS[asked.plan].values())), asked.add[1:])
    material = Material.read(VITAL, asked.data)
    runner = Runner(asked.work, asked.anchor, material, asked.plan in HARMED)
    if asked.time:
        for name, setting in plan.items():
            print(f"{name}: {runner.time(name, setting):.0f} minutes of training", flush=True)
        return
    found = dict[str, Row]()
    for name, setting in plan.items():
        one = runner.run(name, setting)
        if one is None:
            print(f"{name}: another process is at it", flush=True)
            continue
        found[name] = one
        save(asked.plan, found, asked, before)
    common.table(("", "fetched, M", *_columns(found)), _cells(found))


def _columns(found: dict[str, Row]) -> list[str]:
    return list(next(iter(found.values()))["right"]) if found else []


def _cells(found: dict[str, Row]) -> Iterator[list[str]]:
    for name, one in found.items():
        cells = [name, f"{one['fetched_parameters'] / 1e6:.2f}"]
        for part in one["right"].values():
            low, high = part["lenient"]["interval"]
            share = part["lenient"]["right"] / part["of"]
            cells.append(f"{share:.0%} ({max(low, 0):.0%}–{high:.0%})")
        yield cells


if __name__ == "__main__":
    main()
