"""A training that is stopped goes on: killed, on a full disk, with less room for states, shared among ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from lessons import QUICK, Bank, blocks_in, command, full_disk, make_set, tiny_config, trained

from mlx_hiermem.anchor import load_anchor
from mlx_hiermem.errors import HierMemError, OutputError
from mlx_hiermem.learn.train import jobs
from mlx_hiermem.learn.train.dataset import TrainingSet
from mlx_hiermem.learn.train.jobs import Trainer
from mlx_hiermem.learn.train.monitor import TrainingProgress, read_log


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return make_set(tmp_path_factory.mktemp("heldout") / "set", 12)


def assert_same(a: Bank, b: Bank) -> None:
    """Block for block, bit for bit."""
    assert a.keys() == b.keys()
    for node in a:
        for name, weights in a[node].items():
            assert np.array_equal(weights, b[node][name]), f"{name} of block {node} differs"


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bank(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, lesson_bank: Bank, tmp_path: pathlib.Path
) -> None:
    """Killed again and again, each time some steps further on; commits are after every step."""
    work, kills = tmp_path / "work", 0
    for lines in (3, 12):
        run = subprocess.Popen(
            command(work, bare_anchor, lesson_set), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert run.stdout
        for _ in range(lines):
            if not run.stdout.readline():
                break
        kills += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    assert kills == 2
    assert list(work.glob("*/blocks/blocks.json")), "nothing to go on from"
    assert not (work / "log.jsonl").exists()
    done = subprocess.run(command(work, bare_anchor, lesson_set), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(blocks_in(work, bare_anchor, lesson_set), lesson_bank)
    rows = list(read_log(work / "log.jsonl"))
    steps = [(row["job"], row["epoch"], row["step"]) for row in rows]
    assert len(set(steps)) == len(steps), "a step is in the log twice"


def test_two_ranks_make_the_bank_of_one(
    bare_anchor: pathlib.Path,
    lesson_set: TrainingSet,
    lesson_bank: Bank,
    tmp_path: pathlib.Path,
    two_ranks: list[str],
) -> None:
    done = subprocess.run(
        [*two_ranks, *command(tmp_path / "work", bare_anchor, lesson_set)[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert_same(blocks_in(tmp_path / "work", bare_anchor, lesson_set), lesson_bank)


def test_a_full_disk_loses_nothing(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = trained(tmp_path / "unbroken", bare_anchor, lesson_set)
    for name in ("COMMIT_SECONDS", "COMMIT_FACTOR"):
        monkeypatch.setattr(jobs, name, 0.0)
    model, steps = load_anchor(bare_anchor, mx.float32)[0], list[str]()
    trainer = Trainer(tmp_path / "work", model, tiny_config(model), lesson_set, QUICK)
    stack = contextlib.ExitStack()

    def fill_up(progress: TrainingProgress) -> None:
        steps.append(progress.job)
        if len(steps) == 8:
            stack.enter_context(full_disk())

    with stack, pytest.raises(OutputError, match="cannot write"):
        trainer.run(fill_up)
    assert len(steps) == 8
    assert_same(trained(tmp_path / "work", bare_anchor, lesson_set), unbroken)


def test_other_settings_do_not_go_on(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, heldout: TrainingSet, tmp_path: pathlib.Path
) -> None:
    model = load_anchor(bare_anchor, mx.float32)[0]
    Trainer(tmp_path / "work", model, tiny_config(model), lesson_set, QUICK)
    for settings, examples in ((dataclasses.replace(QUICK, rate=1e-3), lesson_set), (QUICK, heldout)):
        model = load_anchor(bare_anchor, mx.float32)[0]
        with pytest.raises(HierMemError, match="another corpus"):
            Trainer(tmp_path / "work", model, tiny_config(model), examples, settings)


@pytest.mark.slow
def test_states_that_exceed_the_budget_are_computed_each_time(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, lesson_bank: Bank, tmp_path: pathlib.Path
) -> None:
    none = trained(tmp_path / "a", bare_anchor, lesson_set, dataclasses.replace(QUICK, states_bytes=0))
    some = trained(tmp_path / "b", bare_anchor, lesson_set, dataclasses.replace(QUICK, states_bytes=10_000))
    for found in (none, some):
        for node in lesson_bank:
            for name, weights in lesson_bank[node].items():
                assert np.abs(found[node][name] - weights).max() < 1e-3 * np.abs(weights).max()
    assert list(tmp_path.rglob("*.states")) == []  # a job that is done needs none


@pytest.mark.slow
def test_a_run_goes_on_with_less_disk_for_states(
    bare_anchor: pathlib.Path, lesson_set: TrainingSet, lesson_bank: Bank, tmp_path: pathlib.Path
) -> None:
    class StoppedError(Exception):
        pass

    def stop(progress: TrainingProgress) -> None:
        if progress.doing == "learning" and progress.tokens > 0.3 * progress.total:
            raise StoppedError

    model = load_anchor(bare_anchor, mx.float32)[0]
    with pytest.raises(StoppedError):
        Trainer(tmp_path, model, tiny_config(model), lesson_set, QUICK).run(stop)
    less = dataclasses.replace(QUICK, states_bytes=10_000)
    assert max(file.stat().st_size for file in tmp_path.rglob("*.states")) > less.states_bytes
    found = trained(tmp_path, bare_anchor, lesson_set, less)
    for node in lesson_bank:
        for name, weights in lesson_bank[node].items():
            assert np.abs(found[node][name] - weights).max() < 1e-3 * np.abs(weights).max()
    with pytest.raises(HierMemError, match="other settings"):
        Trainer(tmp_path, model, tiny_config(model), lesson_set, dataclasses.replace(less, epochs=9))
