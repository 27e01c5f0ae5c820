"""The decode loop: with a memory attached it reads nothing and waits for nothing that it does not without one."""

from __future__ import annotations

import pathlib
import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from tiny import make_model

import mlx_hiermem
from mlx_hiermem.batch import MemoryBatch
from mlx_hiermem.model import MemoryModel
from mlx_hiermem.sampling import Sampling

WAITS = ("eval", "async_eval", "synchronize")
CONVERSIONS = ("item", "tolist", "__array__", "__int__", "__float__", "__bool__", "__iter__")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MemoryModel:
    return mlx_hiermem.load(make_model(tmp_path_factory.mktemp("decode") / "model"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often MLX was asked to compute, or a value was taken out of an array."""
    found: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in WAITS:
        counting(mx, name)
    for name in CONVERSIONS:
        if hasattr(mx.array, name):
            counting(mx.array, name)
    return found


def reads() -> int:
    """Read calls of this process; where the system does not count them, reads from the disk."""
    file = pathlib.Path("/proc/self/io")
    if file.exists():
        return int(file.read_text().split("syscr:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def steps(model: MemoryModel, memory: str, tokens: int) -> Iterator[None]:
    """One decode step after another, behind the prompt and the first token."""
    model.select(memory, "")
    replies = model.responses(model.tokens("a prompt of some tokens"), Sampling(tokens))
    next(replies)
    yield
    for _ in replies:
        yield


def batch_steps(model: MemoryModel, memory: str, tokens: int) -> Iterator[None]:
    batch = MemoryBatch(model)
    for prompt in ("a prompt", "another"):
        batch.add(model.tokens(prompt), batch.model.choose(memory, []), Sampling(max_tokens=tokens))
    while not batch.step():
        pass
    yield
    while batch.step():
        yield
    batch.close()


@pytest.mark.parametrize("decode", [steps, batch_steps])
def test_a_memory_adds_no_reads_and_no_waiting(model: MemoryModel, decode: Any, counted: Counter[str]) -> None:
    model.tokenizer._eos_token_ids = set()  # so that every reply has its full length
    found = {}
    for memory in ("none", "0.1", "none", "0.1"):  # the first round warms up
        run = decode(model, memory, 24)
        next(run)
        counted.clear()
        before, count = reads(), sum(1 for _ in run)
        found[memory] = (count, dict(counted), reads() - before)
    assert found["none"] == found["0.1"]
    count, waits, _ = found["none"]
    assert count >= 20
    assert sum(waits.values()) >= count  # they were counted at all


def test_reads_and_waits_would_be_seen(model: MemoryModel, counted: Counter[str]) -> None:
    assert model.bank
    before = reads()
    block = model.bank.read(model.bank.tree.nodes(1)[0])
    assert block.values("gate").sum().item() != 0
    assert reads() > before
    assert counted["item"] == 1
    assert counted["eval"] == 1
