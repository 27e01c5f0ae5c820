"""Training a bank: what is learnt, by every kind of memory, within a budget, and from a teacher."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import LEAVES, QUICK, Bank, group_inputs, make_set, tiny_config, trained
from mlx_lm.models.cache import KVCache

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.config import KINDS, Path
from mlx_hiermem.errors import HierMemError
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train import activations
from mlx_hiermem.learn.train import blocks as blocks_module
from mlx_hiermem.learn.train.activations import TeacherStates
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.monitor import HeldOut, read_log
from mlx_hiermem.partial import PartialAnchor, prefill
from mlx_hiermem.progress import unheard

PATH = [Path((0,)), Path((0, 1))]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return make_set(tmp_path_factory.mktemp("heldout") / "set", 12)


# What is learnt


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_its_texts(
    kind: str, bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    """Measured on the training texts themselves: what is learnt by heart."""
    settings = dataclasses.replace(QUICK, epochs=6, rate=2e-2)
    model = load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model, kind), lesson_set, settings, lesson_set)
    seen: list[str] = []
    perplexity = trainer.run(lambda progress: seen.append(f"{progress.doing} {progress.job}"))
    assert perplexity["fetched"] < (0.9 if kind in ("ffn", "lora-ffn") else 0.97) * perplexity["none"]
    assert perplexity["generic"] < perplexity["none"]
    assert perplexity["fetched"] <= perplexity["level 1"] < perplexity["none"]
    assert "learning generic" in seen
    assert (tmp_path / "work" / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = list(read_log(tmp_path / "work" / "log.jsonl"))
    assert {row["job"] for row in rows} == {"0", "1", "generic"}
    first, last = ([row["loss"] for row in rows if row["job"] == "0" and "loss" in row][i] for i in (0, -1))
    assert last < first


@pytest.mark.parametrize("placement", ["uniform", "early", "middle"])
def test_every_placement_trains(
    placement: str, bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    bank = trained(tmp_path / "work", bare_anchor, lesson_set, placement=placement)
    for node, block in bank.items():
        assert all(np.abs(part).max() > 0 for part in block["down"]), f"a layer of {node} learnt nothing"


def test_held_out_texts_are_measured_as_the_blocks_are_now(
    bare_anchor: pathlib.Path,
    lesson_set: TrainingSet,
    heldout: TrainingSet,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was computed the first time is not stale: a fresh measurement finds the same."""
    model = load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model), lesson_set, QUICK)
    job_trainer = trainer.job_trainer(trainer.jobs[0])
    alone: list[int] = []
    per_token = trainer.loss.per_token
    monkeypatch.setattr(
        trainer.loss, "per_token", lambda blocks, inputs: (alone.append(not blocks), per_token(blocks, inputs))[1]
    )

    def held_out() -> HeldOut:
        return HeldOut(heldout, job_trainer.job, job_trainer.blocks, trainer.loss, lesson_set.leaves)

    texts = held_out()
    before, without = texts.measure(), sum(alone)
    for step in job_trainer.schedule.steps(0):
        job_trainer.take(step)
    after = texts.measure()
    assert after["fetched"] != before["fetched"]
    assert after["none"] == before["none"]
    assert sum(alone) == without  # what no block changes is computed once
    for name, (loss, tokens) in held_out().measure().items():
        assert after[name] == (pytest.approx(loss), tokens)


def test_only_fetched_blocks_move(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    """One step on one leaf: its path's blocks count one update, and no other block comes into being."""
    model = load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model), lesson_set, QUICK)
    job_trainer = trainer.job_trainer(trainer.jobs[0])
    group = next(g for step in job_trainer.schedule.steps(0) for g in step if g.leaf == LEAVES[1])
    job_trainer.take([group])
    job_trainer.blocks.commit({})
    assert job_trainer.blocks.nodes == [Path((0,)), Path((0, 1))]
    assert [job_trainer.blocks.read(node).updates for node in job_trainer.blocks.nodes] == [1, 1]


def test_a_bank_larger_than_memory(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    """With room for one path, what is held never exceeds it, and each epoch reads a leaf's block once."""
    model = load_anchor(bare_anchor, mx.float32)[0]
    config = tiny_config(model)
    room = (config.parameters(4) + config.parameters(2)) * 12
    settings = dataclasses.replace(QUICK, blocks_bytes=room, groups=1)
    trainer = Trainer(tmp_path / "work", model, config, lesson_set, settings)
    held: list[int] = []
    trainer.run(lambda progress: held.extend(map(_held_bytes, _alive)))
    assert 0 < max(held) <= room
    assert all(np.array(weights["down"]).any() for _, weights in trainer.blocks())


_alive: list[blocks_module.TrainedBlocks] = []


@pytest.fixture(autouse=True)
def _watch_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _alive.clear()
    own = blocks_module.TrainedBlocks.use

    def use(self: blocks_module.TrainedBlocks, nodes: frozenset[Path]) -> None:
        own(self, nodes)
        _alive[:] = [self]

    monkeypatch.setattr(blocks_module.TrainedBlocks, "use", use)


def _held_bytes(blocks: blocks_module.TrainedBlocks) -> int:
    return sum(block.nbytes for block in blocks._held.values())


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_what_teachers_have_in_common_is_read_once(
    budget: int, bare_anchor: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three windows of 30 tokens, each with five prompts, two of which begin otherwise."""
    rng = np.random.default_rng(0)
    with TrainingSetWriter(tmp_path / "set") as out:
        for window in range(3):
            before = rng.integers(0, 64, 30)
            for row in range(5):
                tokens = rng.integers(0, 64, 4 + row).astype(np.int32)
                ahead = before if row < 3 else np.append(rng.integers(0, 64, 3) if row == 3 else 7, before)
                learn = np.arange(len(tokens)) >= 2
                out.add(
                    TrainingExample(tokens, learn, window, np.append(ahead, tokens).astype(np.int32)), [PATH[1]]
                )
    examples, read = TrainingSet.open(tmp_path / "set"), []

    def noted(model: nn.Module, tokens: Sequence[int]) -> list[KVCache] | None:
        read.append(len(tokens))
        return prefill(model, tokens)

    monkeypatch.setattr(activations, "prefill", noted)
    part, numbers = PartialAnchor(load_anchor(bare_anchor, mx.float32)[0]), np.arange(15)
    last = len(part.layers)
    states = TeacherStates(tmp_path / "states", part, examples, numbers, budget, last)
    states.complete()
    found = states.of(numbers, [examples.read(int(n)) for n in numbers])
    assert read == [30, 30, 30]
    for number, own in zip(numbers, found, strict=True):
        example = examples.read(int(number))
        assert example.teacher is not None
        alone = part.states(mx.array(example.teacher[None]), last)[0]
        wanted = alone[-int(example.learn.sum()) - 1 : -1]
        assert float(mx.abs(own - wanted).max()) < 1e-5 * float(mx.abs(wanted).max())


@pytest.mark.slow
def test_distillation_brings_the_student_to_the_teacher(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    """Where there is a teacher the loss is a divergence, elsewhere of the next token."""
    settings = dataclasses.replace(QUICK, objective="distillation", epochs=8, rate=2e-2)
    model = load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model), lesson_set, settings)
    job_trainer = trainer.job_trainer(trainer.jobs[0])
    job_trainer.prepare(unheard)
    numbers = lesson_set.ids(LEAVES[0])[:6]
    inputs = group_inputs(job_trainer, numbers)
    losses = trainer.loss.per_token([], inputs)
    start = 0
    for number in numbers:
        example = lesson_set.read(int(number))
        logits = model(mx.array(example.tokens[None]))[0][mx.array(np.flatnonzero(example.learn) - 1)]
        expected = torch.tensor(np.array(logits)).log_softmax(-1)
        if example.teacher is None:
            targets = torch.tensor(example.tokens[example.learn].astype(np.int64))
            wanted = F.nll_loss(expected, targets, reduction="none")
        else:
            whole = model(mx.array(example.teacher[None]))[0][-len(logits) - 1 : -1]
            sure = torch.tensor(np.array(whole)).log_softmax(-1)
            wanted = F.kl_div(expected, sure, reduction="none", log_target=True).sum(-1)
        assert np.abs(losses[start : start + len(wanted)] - wanted.numpy()).max() < 1e-4
        start += len(wanted)
    trainer.run()
    rows = [row for row in read_log(tmp_path / "work" / "log.jsonl") if row["job"] == "0" and "loss" in row]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]


@pytest.mark.slow
def test_old_blocks_stay_as_they_are(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, lesson_bank: Bank, tmp_path: pathlib.Path
) -> None:
    """New documents in an old bank: leaves go on from their weights, level 1 helps and does not move."""
    model = load_anchor(bare_anchor, mx.float32)[0]

    def start(node: Path) -> Tensors | None:
        return {name: mx.array(values) for name, values in lesson_bank[node].items()}

    trainer = Trainer(
        tmp_path / "work",
        model,
        tiny_config(model),
        lesson_set,
        dataclasses.replace(QUICK, generic=False, epochs=1),
        start=start,
        learns=lambda node: len(node) == 2,
    )
    trainer.run()
    found = dict(trainer.blocks())
    assert sorted(found) == LEAVES
    for node, weights in found.items():
        difference = np.abs(np.array(weights["down"]) - lesson_bank[node]["down"]).max()
        assert 0 < difference < 0.5


def test_bad_settings() -> None:
    for wrong in ({"objective": "guess"}, {"groups": 0}, {"epochs": -1}):
        with pytest.raises(HierMemError):
            TrainingSettings(**wrong)
