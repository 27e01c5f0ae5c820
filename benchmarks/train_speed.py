"""Training speed beside `mlx_lm lora`: the same documents, batch, length and number of trainable parameters.

    python benchmarks/train_speed.py                 # SmolLM2-135M, a few minutes on an idle machine

Three sides take turns in one run, each with its whole step, optimiser included: mlx-lm's own training loop for LoRA
in all layers (`mlx_lm.tuner.trainer.train`, rank 8, its default), a memory in all layers, and a memory in the last
third with kept states, whose making is timed apart. All see rows of one length. In `text` every token is learnt, in
`answers` the second half. A side's speed is that of its median step, by the wall clock and by CPU time. In `chats`
our trainer alone learns questions of the demo's stored study in chat, and a group reads the template's beginning
once, or once for each text.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
from elements import DOCUMENTS

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.apps.demo.tour import model_folder
from mlx_hiermem.config import Path
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train import batches
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.encoding import Encoder
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.schedule import Group
from mlx_hiermem.memory.design import memory_config, memory_layers
from mlx_hiermem.progress import unheard

STUDY = pathlib.Path(__file__).parents[1] / "apps" / "demo" / "vital" / "study.jsonl.gz"
RESULTS = pathlib.Path(__file__).parent / "results" / "train_speed.json"
LEAF = Path((0, 0))
RANK = 8
CHATS = 400  # questions of the study


@dataclass
class Times:
    """Of each step: seconds, seconds of CPU time, and bytes at its peak beyond what was there before."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def of(self, step: Callable[[], None]) -> None:
        import mlx.core as mx

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        self.peak.append(mx.get_peak_memory() - before)

    def medians(self, tokens: int) -> dict[str, float]:
        """Tokens a second and a CPU second, and MB; the first step, which warms up, is left out."""
        wall, cpu, peak = (statistics.median(values[1:]) for values in (self.wall, self.cpu, self.peak))
        return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu, "peak_mb": peak / 1e6}


class Lora:
    """mlx-lm's loop on LoRA layers; `step` runs one iteration of it."""

    def __init__(self, folder: pathlib.Path, rows: list[TrainingExample]) -> None:
        import mlx.optimizers as optim
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.utils import linear_to_lora_layers

        self.model, _, _ = load_anchor(folder)
        self.model.freeze()
        linear_to_lora_layers(self.model, len(self.model.layers), {"rank": RANK, "scale": 20.0, "dropout": 0.0})
        self.parameters = sum(value.size for _, value in tree_flatten(self.model.trainable_parameters()))
        self.optimizer = optim.AdamW(1e-4)
        self.rows = [(row.tokens.tolist(), int(row.learn.argmax())) for row in rows]
        self.times = Times()

    def steps(self, count: int) -> None:
        """Each call compiles the loop's step anew: one more than `count` are run, and the first is left out."""
        import mlx.core as mx
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import TrainingArgs, train

        times, marks = self.times, [(time.perf_counter(), time.process_time())]
        before = mx.get_active_memory()

        class Clock(TrainingCallback):
            def on_train_loss_report(self, info: dict[str, Any]) -> None:
                marks.append((time.perf_counter(), time.process_time()))
                times.peak.append(mx.get_peak_memory() - before)
                mx.reset_peak_memory()

        mx.reset_peak_memory()
        args = TrainingArgs(
            batch_size=len(self.rows),
            iters=count + 1,
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=len(self.rows[0][0]),
            adapter_file=os.devnull,
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(RuntimeError):
            train(self.model, self.optimizer, self.rows, None, args, training_callback=Clock())
        for a, b in itertools.pairwise(marks[1:]):
            times.wall.append(b[0] - a[0])
            times.cpu.append(b[1] - a[1])
        del times.peak[-count - 1]


class Memory:
    """This project's trainer, one group a step."""

    def __init__(
        self, folder: pathlib.Path, work: pathlib.Path, examples: TrainingSet, placement: str, parameters: int
    ) -> None:
        self.model, _, _ = load_anchor(folder)
        layers, hidden = memory_layers(placement, len(self.model.layers)), self.model.args.hidden_size
        units = round(parameters / (3 * hidden * len(layers)))
        config = memory_config(self.model, "ffn", 4, (units - units // 4, units // 4), placement)
        settings = TrainingSettings(generic=False, epochs=3)
        trainer = Trainer(work, self.model, config, examples, settings)
        self.trainer, self.parameters = trainer.job_trainer(trainer.jobs[0]), config.fetched_parameters
        start = time.perf_counter(), time.process_time()
        self.trainer.prepare(unheard)
        self.preparation = time.perf_counter() - start[0], time.process_time() - start[1]
        self.group = Group(LEAF, examples.ids(LEAF))
        self.times = Times()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.times.of(self._step)

    def _step(self) -> None:
        self.trainer.take([self.group])


def documents(folder: pathlib.Path, batch: int, length: int, kind: str) -> list[TrainingExample]:
    """Rows of `length` predictions from the elements' texts."""
    _, tokenizer, _ = load_anchor(folder)
    text = "\n".join(json.loads(line)["text"] for line in DOCUMENTS.read_text(encoding="utf-8").splitlines())
    tokens = np.array(tokenizer.encode(text[: 8 * batch * (length + 1)])[: batch * (length + 1)], np.int32).reshape(
        batch, -1
    )
    first = 1 if kind == "text" else (length + 1) // 2
    return [TrainingExample(row, np.arange(length + 1) >= first) for row in tokens]


def compare(folder: pathlib.Path, options: argparse.Namespace, kind: str, work: pathlib.Path) -> dict[str, Any]:
    """All sides on one kind of learning; prints and returns their figures."""
    rows = documents(folder, options.batch, options.length, kind)
    with TrainingSetWriter(work / kind) as out:
        for row in rows:
            out.add(row, [LEAF])
    examples = TrainingSet.open(work / kind)
    lora = Lora(folder, rows)
    sides = {
        "mlx_lm lora": lora,
        "uniform": Memory(folder, work / f"{kind}-uniform", examples, "uniform", lora.parameters),
        "late, kept states": Memory(folder, work / f"{kind}-late", examples, "late", lora.parameters),
    }
    for _ in range(options.rounds):
        for side in sides.values():
            side.steps(options.steps)
    tokens = options.batch * options.length
    found: dict[str, Any] = {}
    for name, side in sides.items():
        found[name] = {"parameters": side.parameters} | side.times.medians(tokens)
        for speed in ("tokens_per_second", "tokens_per_cpu_second"):
            found[name][speed.replace("tokens", "ratio")] = found[name][speed] / found["mlx_lm lora"][speed]
        if name.startswith("late"):
            found[name]["states_seconds"], found[name]["states_cpu_seconds"] = side.preparation
        print(kind, name, json.dumps(found[name]), flush=True)
    return found


class Chats:
    """This project's trainer on questions in chat; without `once` each text brings the template's beginning."""

    def __init__(self, folder: pathlib.Path, work: pathlib.Path, examples: TrainingSet, once: bool) -> None:
        model, _, _ = load_anchor(folder)
        trainer = Trainer(
            work,
            model,
            memory_config(model, "ffn", 4, (11, 11)),
            examples,
            TrainingSettings(generic=False, epochs=2),
        )
        self.trainer = trainer.job_trainer(trainer.jobs[0])
        self.groups, self.shared = iter(self.trainer.steps()), batches.SHARED if once else 1 << 30
        self.times, self.tokens = Times(), list[int]()

    def steps(self, count: int) -> None:
        own, batches.SHARED = batches.SHARED, self.shared
        for groups in itertools.islice(self.groups, count):
            self.times.of(lambda groups=groups: self.tokens.append(self.trainer.take(groups).tokens))
        batches.SHARED = own

    def result(self) -> dict[str, float]:
        """Tokens a second and a CPU second over all steps but the first; both sides take the same steps."""
        tokens = sum(self.tokens[1:])
        wall, cpu = sum(self.times.wall[1:]), sum(self.times.cpu[1:])
        return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def compare_chats(folder: pathlib.Path, options: argparse.Namespace, work: pathlib.Path) -> dict[str, Any]:
    """A beginning read once for a group, against once for each text."""
    encoder = Encoder(load_anchor(folder)[1])
    rows = map(json.loads, gzip.decompress(STUDY.read_bytes()).splitlines())
    with TrainingSetWriter(work / "chats") as out:
        for row in itertools.islice((row for row in rows if "question" in row), CHATS):
            asked = encoder.prompt(row["question"], True)
            tokens = np.array(asked + encoder.answer(row["question"], row["answer"], True, True), np.int32)
            out.add(TrainingExample(tokens, np.arange(len(tokens)) >= len(asked)), [LEAF])
    examples = TrainingSet.open(work / "chats")
    sides = {name: Chats(folder, work / name, examples, name == "once") for name in ("once", "for each text")}
    for _ in range(options.rounds):
        for side in sides.values():
            side.steps(2 * options.steps)
    found: dict[str, Any] = {name: side.result() for name, side in sides.items()}
    for speed in ("tokens_per_second", "tokens_per_cpu_second"):
        found["once"][speed.replace("tokens", "ratio")] = found["once"][speed] / found["for each text"][speed]
    print("chats", json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, help="anchor folder; default: the demo's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of a side, before the next one's turn")
    options = parser.parse_args()
    folder = options.model or model_folder() / "anchor"
    result: dict[str, Any] = {
        "machine": common.machine(),
        "load_before": os.getloadavg()[0],
        "batch": options.batch,
        "length": options.length,
    }
    with tempfile.TemporaryDirectory() as work:
        for kind in ("text", "answers"):
            result[kind] = compare(folder, options, kind, pathlib.Path(work))
        result["chats"] = compare_chats(folder, options, pathlib.Path(work))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result | {"load_after": os.getloadavg()[0]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
