"""The trainer's parts, each against its definition: sets, losses, AdamW, schedules, stored blocks."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import LEAVES, QUICK, example, full_disk, make_set
from tiny import make_anchor

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.config import GENERIC_NODE, MemoryConfig, Path
from mlx_hiermem.errors import HierMemError, OutputError
from mlx_hiermem.learn.settings import TrainingSettings
from mlx_hiermem.learn.train import dataset as dataset_module
from mlx_hiermem.learn.train.activations import HiddenStates
from mlx_hiermem.learn.train.blocks import TrainedBlock, TrainedBlocks
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.schedule import Job, Schedule, jobs_of_rank, list_jobs, nodes_with_block
from mlx_hiermem.learn.train.start import new_block
from mlx_hiermem.learn.train.step import divergence, next_token, rate_factor, update
from mlx_hiermem.memory.design import default_size, memory_layers
from mlx_hiermem.partial import PartialAnchor

CONFIG = MemoryConfig("ffn", 2, (4, 2), (2, 3), 32, dtype="float32", ffn_width=64, q_width=32, kv_width=16)


# Sets of examples


def test_a_set_is_what_was_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "CHUNK", 7)  # so that the sort goes over several
    rng, wanted, texts = np.random.default_rng(0), dict[Path, list[int]](), []
    with TrainingSetWriter(tmp_path / "set") as out:
        for number in range(50):
            text = example(int(rng.integers(2, 9)), window=number)
            if number % 3 == 0:
                text = dataclasses.replace(text, teacher=np.concatenate([text.tokens, text.tokens]))
            texts.append(text)
            for leaf in (leaves := [LEAVES[i] for i in rng.choice(4, 1 + number % 3, replace=False)]):
                wanted.setdefault(leaf, []).append(number)
            assert out.add(text, leaves) == number
    found = TrainingSet.open(tmp_path / "set")
    assert {leaf: found.ids(leaf).tolist() for leaf in found.leaves} == wanted
    assert list(found.leaves) == sorted(wanted)
    assert found.ids(Path((9, 9))).tolist() == []
    assert found.lengths.tolist() == [len(text.tokens) for text in texts]
    assert found.learnts.tolist() == [1] * 50
    for number, text in enumerate(texts):
        read = found.read(number)
        assert np.array_equal(read.tokens, text.tokens)
        assert np.array_equal(read.learn, text.learn)
        assert read.window == text.window
        assert (read.teacher is None) == (text.teacher is None)
        assert text.teacher is None or np.array_equal(read.teacher, text.teacher)


def test_a_broken_set_is_not_there(tmp_path: pathlib.Path) -> None:
    def write() -> None:
        with TrainingSetWriter(tmp_path / "set") as out:
            out.add(example(3), LEAVES[:1])
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HierMemError, match="no whole set"):
        TrainingSet.open(tmp_path / "set")


def test_bad_examples_are_refused() -> None:
    tokens = np.arange(4, dtype=np.int32)
    for learn in ([0, 0, 0, 0], [1, 1, 0, 0]):
        with pytest.raises(HierMemError):
            TrainingExample(tokens, np.array(learn, bool))
    with pytest.raises(HierMemError, match="teacher"):
        TrainingExample(tokens, np.array([0, 0, 1, 1], bool), teacher=np.array([0, 1, 3, 2], np.int32))


def test_beginnings_are_told_apart(tmp_path: pathlib.Path) -> None:
    rows = [[*range(20), 5, 6], [*range(20), 7], [*range(1, 21), 7], list(range(12)), list(range(20))]
    with TrainingSetWriter(tmp_path / "set") as out:
        for number, row in enumerate(rows):
            learn = np.arange(len(row)) >= (len(row) - 1 if number < 4 else 3)
            out.add(TrainingExample(np.array(row, np.int32), learn), [Path((0,))])
    first, second, other, short, learnt = TrainingSet.open(tmp_path / "set").beginnings.tolist()
    assert first == second != other
    assert (short, learnt) == (0, 0)


# Losses


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_losses_are_torchs(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits, teacher = (rng.standard_normal((2, 7, 50)) * scale).astype(np.float32)
    targets, weights = rng.integers(0, 50, 7), rng.random(7).astype(np.float32)

    def ours(kind: str, x: mx.array) -> mx.array:
        losses = next_token(x, mx.array(targets)) if kind == "next" else divergence(x, mx.array(teacher))
        return (losses * mx.array(weights)).sum()

    for kind in ("next", "teacher"):
        x = torch.tensor(logits, requires_grad=True)
        if kind == "next":
            each = F.cross_entropy(x, torch.tensor(targets), reduction="none")
        else:
            p, q = torch.tensor(teacher).log_softmax(-1), x.log_softmax(-1)
            each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        (expected := (each * torch.tensor(weights)).sum()).backward()
        value, gradient = mx.value_and_grad(lambda a, kind=kind: ours(kind, a))(mx.array(logits))
        assert float(value) == pytest.approx(expected.item(), rel=1e-5)
        assert np.abs(np.array(gradient) - x.grad.numpy()).max() < 1e-6


# AdamW


def test_adamw_is_torchs_and_counts_block_by_block() -> None:
    """Two blocks, of which one is fetched every second step only."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2)]
    ours = [TrainedBlock.fresh({"gate": mx.array(s)}) for s in start]
    theirs = [torch.tensor(s, requires_grad=True) for s in start]
    optimisers = [torch.optim.AdamW([t], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2) for t in theirs]
    for step in range(6):
        fetched = [0, 1] if step % 2 else [0]
        gradients = {i: rng.standard_normal((2, 3, 4)).astype(np.float32) for i in fetched}
        for i in fetched:
            theirs[i].grad = torch.tensor(gradients[i])
        expected = torch.nn.utils.clip_grad_norm_([theirs[i] for i in fetched], 1.0)
        found = [{"gate": mx.array(gradients[i])} for i in fetched]
        norm = update([ours[i] for i in fetched], found, 0.1, 0.2, 1.0)
        assert norm == pytest.approx(float(expected), rel=1e-5)
        for i in fetched:
            optimisers[i].step()
    assert [block.updates for block in ours] == [6, 3]
    for block, tensor in zip(ours, theirs, strict=True):
        assert np.abs(np.array(block.weights["gate"]) - tensor.detach().numpy()).max() < 1e-5


def test_the_rate_warms_up_and_falls() -> None:
    settings = TrainingSettings(warm_up=0.1, final_rate=0.05)
    rates = [rate_factor(i / 100, settings) for i in range(101)]
    assert rates[0] < 0.01
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 + 0.05) / 2)
    assert rates[100] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)


# Schedules


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return make_set(tmp_path_factory.mktemp("examples") / "set", 200)


def test_an_epoch_has_every_example_once_in_each_of_its_leaves(training_set: TrainingSet) -> None:
    found: dict[Path, list[int]] = {}
    for job in list_jobs(training_set, CONFIG, QUICK):
        plan = Schedule(job, training_set, CONFIG, QUICK, lambda node: 1)
        for epoch in range(2):
            steps = plan.steps(epoch)
            again = plan.steps(epoch)
            assert [g.examples.tolist() for s in steps for g in s] == [
                g.examples.tolist() for s in again for g in s
            ]
            assert all(1 <= len(step) <= QUICK.groups for step in steps)
        for group in (group for step in steps for group in step):
            found.setdefault(group.leaf, []).extend(group.examples.tolist())
    generic = found.pop(GENERIC_NODE)
    assert {leaf: sorted(numbers) for leaf, numbers in found.items()} == {
        leaf: training_set.ids(leaf).tolist() for leaf in training_set.leaves
    }
    total = sum(map(len, found.values()))
    assert len(generic) / (total + len(generic)) == pytest.approx(1 / (CONFIG.branching + 1), abs=0.01)


def test_a_bank_larger_than_memory_is_learnt_set_by_set(training_set: TrainingSet) -> None:
    """With room for one path, all groups of a leaf follow each other; with room for all, leaves are mixed."""
    job = list_jobs(training_set, CONFIG, QUICK)[0]

    def switches(room: int) -> int:
        settings = dataclasses.replace(QUICK, blocks_bytes=room)
        steps = Schedule(job, training_set, CONFIG, settings, lambda node: 10).steps(0)
        leaves = [group.leaf for step in steps for group in step]
        return sum(a != b for a, b in itertools.pairwise(leaves))

    assert switches(20) == 1
    assert switches(30) > 5


def test_ranks_share_the_jobs(training_set: TrainingSet) -> None:
    every = list_jobs(training_set, CONFIG, QUICK)
    assert [job.name for job in every] == ["0", "1", "generic"]
    for ranks in (1, 2, 3, 5):
        by_rank = [jobs_of_rank(every, lambda job: len(job.leaves), rank, ranks) for rank in range(ranks)]
        assert sorted(job.name for mine in by_rank for job in mine) == ["0", "1", "generic"]
    assert [job.name for job in list_jobs(training_set, CONFIG, dataclasses.replace(QUICK, generic=False))] == [
        "0",
        "1",
    ]


@pytest.mark.parametrize("names", ["01234", "0123456789abcdefgh"])
def test_ranks_are_done_at_about_the_same_time(names: str) -> None:
    """Few jobs are shared as well as they can be: 8 + 7 and 6 + 5 + 4; of many, the largest go first."""
    work = {name: 8 - number % 5 for number, name in enumerate(names)}
    every = [Job(name, ()) for name in names]
    by_rank = [jobs_of_rank(every, lambda job: work[job.name], rank, 2) for rank in range(2)]
    assert sorted(job.name for mine in by_rank for job in mine) == sorted(names)
    loads = [sum(work[job.name] for job in mine) for mine in by_rank]
    assert max(loads) - min(loads) <= sum(work.values()) % 2


def test_levels_without_memory_have_no_block() -> None:
    config = dataclasses.replace(CONFIG, block_sizes=(0, 2))
    assert nodes_with_block(config, Path((1, 0))) == [Path((1, 0))]
    assert nodes_with_block(config, Path((1,))) == []


def test_placements() -> None:
    assert memory_layers("uniform", 30) == tuple(range(30))
    assert memory_layers("late", 30) == tuple(range(20, 30))
    assert memory_layers("early", 30) == tuple(range(10))
    assert memory_layers("middle", 30) == tuple(range(10, 20))
    assert memory_layers([3, 5], 30) == (3, 5)
    with pytest.raises(HierMemError, match="placement"):
        memory_layers("top", 30)


def test_a_memory_is_equally_large_wherever_it_lies() -> None:
    assert default_size("uniform", 30) * 30 == default_size("late", 30) * 10 == 330
    assert default_size([3, 5], 30) * 2 == 330
    assert default_size("uniform", 1000) == 1


# Stored blocks


def test_only_what_was_committed_stays(tmp_path: pathlib.Path) -> None:
    size = new_nbytes = TrainedBlock.fresh(new_block(CONFIG, Path((0,)), 0)).nbytes
    kept = TrainedBlocks(tmp_path, size, lambda node: new_block(CONFIG, node, 0))
    nodes = [Path((0,)), Path((1,)), Path((0, 1))]
    for round_ in range(2):
        for node in nodes:  # the budget holds one, so each drives the one before out
            kept.use(frozenset([node]))
            kept[node].weights["down"] = kept[node].weights["down"] + 1
            kept[node].updates += 1
            kept.touch(node)
        if not round_:
            kept.commit({"step": 7})
    assert len(list(tmp_path.glob("*.safetensors"))) == 5  # three committed, and two that were driven out since
    again = TrainedBlocks(tmp_path, new_nbytes, lambda node: new_block(CONFIG, node, 0))
    assert again.progress == {"step": 7}
    assert again.nodes == sorted(nodes)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for node in nodes:
        block = again.read(node)
        assert block.updates == 1
        assert float(block.weights["down"].max()) == 1.0
        assert block.moments.keys() == {"gate", "up", "down"}


def test_a_full_disk_is_said(tmp_path: pathlib.Path) -> None:
    kept = TrainedBlocks(tmp_path, 0, lambda node: new_block(CONFIG, node, 0))
    kept.use(frozenset(LEAVES[:1]))
    kept.touch(LEAVES[0])

    with full_disk(), pytest.raises(OutputError, match="Unable to write"):
        kept.commit({})


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_states_come_back_to_the_bit(dtype: mx.Dtype, training_set: TrainingSet, tmp_path: pathlib.Path) -> None:
    """Written, cut off in the middle as a kill would, completed, and read one by one."""
    anchor = PartialAnchor(load_anchor(make_anchor(tmp_path / "anchor"), dtype)[0])
    numbers = np.arange(0, 200, 3)
    kept = HiddenStates(tmp_path / "states", anchor, training_set, numbers, 1 << 30, 2)
    kept.complete()
    first = kept.file.read_bytes()
    assert len(first) == kept.nbytes
    with kept.file.open("r+b") as file:
        file.truncate(len(first) // 2 + 3)
    kept.complete()
    assert kept.file.read_bytes() == first
    for number in numbers:
        example = training_set.read(int(number))
        place = kept.find(int(number))
        assert place is not None
        found = kept.array(kept.read(place))
        alone = anchor.states(mx.array(example.tokens[None, :-1]), 2)[0]
        assert found.dtype == dtype
        assert mx.allclose(
            found, alone, 1e-5 if dtype == mx.float32 else 5e-2, 1e-5 if dtype == mx.float32 else 5e-2
        )
    assert kept.find(1) is None
    small = HiddenStates(tmp_path / "some", anchor, training_set, numbers, kept.nbytes // 3, 2)
    assert 0 < small.nbytes <= kept.nbytes // 3
