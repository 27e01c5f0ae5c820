"""Hostile files in little: every reader on some hundred of them, and on all that have ever made one fail.

The campaigns are in tests/torture/; `make torture` runs them, docs/reliability.md has what came of it.
"""

from __future__ import annotations

import functools
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torture.fuzz import SEEDS, verdict
from torture.mutate import mutated
from torture.readers import BY_NAME, READERS, Reader

QUICK = [reader.name for reader in READERS if reader.speed >= 200]
JSON = [reader.name for reader in READERS if reader.kind == "json" and reader.speed >= 200]
SLOW = [reader.name for reader in READERS if reader.speed < 200]
PATIENT = 10.0  # seconds: a machine that is busy with other tests is no fault of a reader
SEEN = [file.relative_to(SEEDS) for file in SEEDS.rglob("*") if file.is_file()]
KEPT = sorted(file.as_posix() for file in SEEN if file.parts[0] in BY_NAME)  # the others are Swift's alone
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@functools.cache
def good(name: str) -> tuple[Reader, pathlib.Path, bytes]:
    """A reader, its good file, and what that holds."""
    reader = BY_NAME[name]
    file = reader.make(pathlib.Path(tempfile.mkdtemp(prefix="torture-")))
    return reader, file, file.read_bytes()


def assert_typed(name: str, data: bytes) -> None:
    reader, file, _ = good(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    assert verdict(reader, file, PATIENT) in ("read", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
@few
@given(rng=st.randoms(use_true_random=False))
def test_changed_files_are_read_or_refused(name: str, rng: random.Random) -> None:
    reader, _, data = good(name)
    assert_typed(name, mutated(data, reader.kind, rng))


@pytest.mark.slow
@pytest.mark.parametrize("name", JSON)
@few
@given(value=values)
def test_any_json_is_read_or_refused(name: str, value: object) -> None:
    assert_typed(name, json.dumps(value).encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slower_readers_on_a_few_files(name: str) -> None:
    reader, _, data = good(name)
    for number in range(8):
        assert_typed(name, mutated(data, reader.kind, random.Random(number)))


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT)
def test_what_once_failed_is_refused(kept: str) -> None:
    assert_typed(kept.split("/")[0], (SEEDS / kept).read_bytes())


@pytest.mark.slow
def test_processes_that_die_and_disks_that_fill_up() -> None:
    command = [sys.executable, str(SEEDS.parent / "processes.py"), "--trials", "15"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
