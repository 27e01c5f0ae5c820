"""Loss and gradients of a group: against PyTorch, from kept states, and with a beginning that is read once."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import LEAVES, QUICK, group_inputs, tiny_config
from sources import make_hf

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.bank.block import FetchedMemory, MemoryBlock
from mlx_hiermem.config import KINDS, Path
from mlx_hiermem.convert import parity, reference_memory
from mlx_hiermem.convert.anchors.huggingface import convert_huggingface
from mlx_hiermem.convert.source import find_source
from mlx_hiermem.learn.train.batches import collate
from mlx_hiermem.learn.train.blocks import Tensors
from mlx_hiermem.learn.train.dataset import TrainingExample, TrainingSet, TrainingSetWriter
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.start import new_block
from mlx_hiermem.learn.train.step import Inputs, MemoryLoss
from mlx_hiermem.progress import unheard

PATH = [Path((0,)), Path((0, 1))]


def random_blocks(loss: MemoryLoss, nodes: Sequence[Path] = PATH) -> list[Tensors]:
    """Blocks that do something, so that every gradient is there."""
    rng = np.random.default_rng(1)
    sizes = [loss.config.shapes(loss.config.block_sizes[len(node) - 1]) for node in nodes]
    return [
        {name: mx.array((rng.standard_normal(shape) * 0.3).astype(np.float32)) for name, shape in shapes.items()}
        for shapes in sizes
    ]


def texts(count: int, seed: int = 0, longest: int = 20) -> list[TrainingExample]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest, count)
    return [
        TrainingExample(rng.integers(0, 256, n).astype(np.int32), np.arange(n) >= max(1, n // 2))
        for n in map(int, lengths)
    ]


def assert_close(a: Sequence[Tensors], b: Sequence[Tensors], tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(a, b, strict=True):
        for name, value in ours.items():
            scale = float(mx.abs(theirs[name]).max())
            assert float(mx.abs(value - theirs[name]).max()) <= tolerance * scale, name


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, torch.nn.Module]:
    """One llama in both libraries."""
    folder = tmp_path_factory.mktemp("twins")
    source = make_hf(folder / "source", "llama")
    convert_huggingface(source, folder / "anchor")
    return folder / "anchor", parity.load_source(find_source(str(source)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pytorchs(kind: str, twins: tuple[pathlib.Path, torch.nn.Module]) -> None:
    """Texts packed and predicted in part on our side, one after the other and whole on PyTorch's."""
    folder, theirs = twins
    model = load_anchor(folder, mx.float32)[0]
    loss = MemoryLoss(model, tiny_config(model, kind), None)
    blocks, examples = random_blocks(loss), texts(5)
    values, _, found = loss.gradients(blocks, Inputs(collate(examples)), 0.1)

    leaves = [{n: torch.tensor(np.array(w), requires_grad=True) for n, w in block.items()} for block in blocks]
    attachment = reference_memory.attach(theirs, loss.config)
    total = torch.zeros(())
    for example in examples:
        attachment.set(reference_memory.join(loss.config, leaves))
        logits = theirs(torch.tensor(example.tokens[None].astype(np.int64))).logits[0, :-1]
        losses = F.cross_entropy(logits, torch.tensor(example.tokens[1:].astype(np.int64)), reduction="none")
        total = total + losses[torch.tensor(example.learn[1:])].sum()
    (total * 0.1).backward()
    attachment.detach()
    assert values.sum() == pytest.approx(total.item(), rel=1e-5)
    expected = [
        {name: mx.array(t.grad.numpy()) for name, t in block.items() if t.grad is not None} for block in leaves
    ]
    assert_close(found, expected, 1e-4)


def chats(count: int) -> list[TrainingExample]:
    """Texts that begin alike, by more than is worth sharing."""
    head = np.random.default_rng(7).integers(0, 256, 19)
    return [
        TrainingExample(np.concatenate([head, one.tokens]).astype(np.int32), np.concatenate([head < 0, one.learn]))
        for one in texts(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [False, True])
def test_a_shared_beginning_changes_nothing(
    kind: str, kept: bool, bare_anchor: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Loss and gradients of texts that begin alike, against each text by itself; with the states on disk too."""
    with TrainingSetWriter(tmp_path / "set") as out:
        for example in chats(5):
            out.add(example, LEAVES[:1])
    examples, model = TrainingSet.open(tmp_path / "set"), load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model, kind), examples, QUICK)
    job_trainer = trainer.job_trainer(trainer.jobs[0])
    if kept:
        job_trainer.prepare(unheard)
    numbers, blocks = examples.ids(LEAVES[0]), random_blocks(trainer.loss)
    inputs = group_inputs(job_trainer, numbers)
    assert len(inputs.batch.beginning) == 19
    assert (inputs.begun is not None) == kept
    values, said, found = trainer.loss.gradients(blocks, inputs, 0.1)
    plain = Inputs(collate([examples.read(int(n)) for n in numbers], share=False))
    assert plain.batch.packed
    expected, likeliest, whole = trainer.loss.gradients(blocks, plain, 0.1)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(said, likeliest)
    assert_close(found, whole, 1e-4)


@pytest.mark.parametrize("kind", ["ffn", "kv", "lora-qk"])
def test_kept_states_equal_the_whole_model(
    kind: str, bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path
) -> None:
    """Loss and gradients from the states on disk, against the whole model, text by text and packed."""
    model = load_anchor(bare_anchor, mx.float32)[0]
    trainer = Trainer(tmp_path / "work", model, tiny_config(model, kind), lesson_set, QUICK)
    job_trainer = trainer.job_trainer(trainer.jobs[0])
    job_trainer.prepare(unheard)
    numbers = lesson_set.ids(LEAVES[0])[:6]
    inputs = group_inputs(job_trainer, numbers)
    assert inputs.states is not None
    assert inputs.batch.packed
    blocks = random_blocks(trainer.loss)
    values, _, found = trainer.loss.gradients(blocks, inputs, 0.1)
    expected, _, plain = trainer.loss.gradients(blocks, Inputs(inputs.batch), 0.1)
    assert values.sum() == pytest.approx(expected.sum(), rel=1e-6)
    assert_close(found, plain)
    alone = [trainer.loss.gradients(blocks, Inputs(collate([lesson_set.read(int(n))])), 0.1) for n in numbers]
    assert values.sum() == pytest.approx(sum(one[0].sum() for one in alone), rel=1e-5)
    for i, block in enumerate(found):
        summed = {name: sum((one[2][i][name] for one in alone), mx.array(0.0)) for name in block}
        assert_close([block], [summed], 1e-4)


def test_a_block_at_the_start_is_the_one_that_is_trained(bare_anchor: pathlib.Path) -> None:
    """A fresh memory changes nothing: the loss under it is the loss without."""
    model = load_anchor(bare_anchor, mx.float32)[0]
    loss = MemoryLoss(model, tiny_config(model))
    inputs = Inputs(collate(texts(4)))
    fresh = [new_block(loss.config, node, 0) for node in PATH]
    assert np.array_equal(loss.per_token(fresh, inputs), loss.per_token([], inputs))
    joined = FetchedMemory.join(loss.config, [MemoryBlock(block, 0) for block in random_blocks(loss)])
    loss.attachment.set(joined)
    attached = loss.anchor.logits(mx.array(inputs.batch.tokens), mx.arange(4), mx.array(inputs.batch.documents))
    loss.attachment.clear()
    without = loss.anchor.logits(mx.array(inputs.batch.tokens), mx.arange(4), mx.array(inputs.batch.documents))
    assert float(mx.abs(attached - without).max()) > 1e-3
