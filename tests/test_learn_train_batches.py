"""Groups of texts, and rows of a batch: who is learnt with whom, what is read once, and how full rows are."""

from __future__ import annotations

import numpy as np
from lessons import example

from mlx_hiermem.learn.train.batches import collate, first_fit_decreasing, group_by_length, pack, row_length
from mlx_hiermem.learn.train.dataset import TrainingExample


def test_groups_hold_every_example_once() -> None:
    rng = np.random.default_rng(0)
    numbers, lengths = np.arange(100, 400), rng.integers(2, 60, 300)
    groups = group_by_length(numbers, lengths, 128, rng)
    assert sorted(np.concatenate(groups).tolist()) == numbers.tolist()
    assert max(lengths[group - 100].sum() for group in groups) <= 128
    assert group_by_length(numbers[:0], lengths[:0], 128, rng) == []
    assert [len(group) for group in group_by_length(numbers[:2], np.array([500, 600]), 128, rng)] == [1, 1]


def test_texts_that_begin_alike_are_grouped_together() -> None:
    rng = np.random.default_rng(0)
    numbers, lengths = np.arange(300), rng.integers(20, 60, 300)
    beginnings = np.where(numbers % 3 == 0, 17, np.where(numbers == 1, 5, 0)).astype(np.uint64)
    groups = group_by_length(numbers, lengths, 128, rng, beginnings)
    assert sorted(np.concatenate(groups).tolist()) == numbers.tolist()
    assert {len({n % 3 == 0 for n in group.tolist()}) for group in groups} == {1}
    assert [1] not in [group.tolist() for group in groups]  # the only one of its kind is not by itself


def test_a_shared_beginning_is_read_once() -> None:
    head = np.arange(500, 520)

    def chat(length: int, learnt: int) -> TrainingExample:
        tokens = np.concatenate([head, np.arange(length)]).astype(np.int32)
        return TrainingExample(tokens, np.arange(len(tokens)) >= len(tokens) - learnt)

    texts = [chat(9, 3), chat(12, 1)]
    made = collate(texts)
    assert made.beginning.tolist() == [*head.tolist(), *range(5)]  # a row has what predicts its first answer
    assert made.tokens.shape == (2, 8)
    assert not made.packed
    assert made.tokens[0].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert made.targets[made.weights > 0].tolist() == [6, 7, 8, 11]
    assert made.tokens.reshape(-1)[made.positions[made.weights > 0]].tolist() == [5, 6, 7, 10]
    assert len(collate(texts, share=False).beginning) == 0
    assert len(collate(texts[:1]).beginning) == 0
    assert len(collate([texts[0], example(30, 4)]).beginning) == 0
    early = [TrainingExample(text.tokens, np.arange(len(text.tokens)) >= 12) for text in texts]
    assert len(collate(early).beginning) == 0  # what is learnt is not shared
    uneven = [*[texts[0]] * 4, chat(200, 3)]
    assert len(collate(uneven).beginning) == 0  # rows of one length would be emptier than it saves


def test_rows_do_not_overlap_and_are_well_filled() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 64, 200).tolist()
    row = row_length(max(lengths))
    assert row == 64
    used = np.zeros((200, row), int)
    for (r, start), length in zip(first_fit_decreasing(lengths, row), lengths, strict=True):
        assert start + length <= row
        used[r, start : start + length] += 1
    assert used.max() == 1
    rows = used.any(1).sum()
    assert used[:rows].mean() > 0.9
    assert all(longest <= row_length(longest) <= longest * 1.25 + 15 for longest in range(1, 4000))


def test_rows_are_as_long_as_fills_them_best() -> None:
    row, places = pack([18] * 14)  # in rows of 32 nearly half would be empty
    assert row * len({r for r, _ in places}) == 256
    assert pack([200])[0] == row_length(200)


def test_a_batch_predicts_the_learnt_tokens() -> None:
    texts = [example(9, 3), example(4, 1), example(20, 7), example(5, 4)]
    made = collate(texts)
    assert made.tokens.shape == (1, 48)
    assert made.packed
    read = made.tokens.reshape(-1)[made.positions]
    real = made.weights > 0
    assert real.sum() == 3 + 1 + 7 + 4
    assert len(real) == 32
    assert np.array_equal(read[real] + 1, made.targets[real])  # the texts count upwards
    assert sorted(made.targets[real].tolist()) == sorted(
        t for text in texts for t in text.tokens[text.learn].tolist()
    )
