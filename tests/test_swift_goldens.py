"""The goldens that the Swift tests read are what Python makes of their inputs today."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import pytest
from swift_goldens import FIXTURES, write_goldens


def files(folder: pathlib.Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def same(a: object, b: object) -> bool:
    """Equal, but for the last digits of numbers, which differ between BLAS libraries."""
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    return a == b


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """All goldens, made anew."""
    folder = tmp_path_factory.mktemp("swift")
    shutil.copytree(FIXTURES / "inputs", folder / "inputs")
    write_goldens(folder)
    return folder


@pytest.mark.slow
def test_the_goldens_are_up_to_date(made: pathlib.Path) -> None:
    hint = "run: python tests/swift_goldens.py"
    assert files(made) == files(FIXTURES), hint
    for name in sorted(files(made)):
        new, old = made / name, FIXTURES / name
        if name.endswith(".json"):
            equal = same(json.loads(new.read_text("utf-8")), json.loads(old.read_text("utf-8")))
        else:
            equal = new.read_bytes() == old.read_bytes()
        assert equal, f"{name} is stale, {hint}"


@pytest.mark.slow
def test_a_change_would_be_seen(made: pathlib.Path) -> None:
    golden = json.loads((made / "routes.json").read_text())
    other = json.loads((made / "routes.json").read_text())
    assert same(golden, other)
    other["elements"]["distances"][7][1] += 1e-4
    assert not same(golden, other)
    other = golden | {"parent": golden["parent"] | {"paths": ["0", *golden["parent"]["paths"][1:]]}}
    assert not same(golden, other)


def test_there_is_little_of_them() -> None:
    """They are part of the repository."""
    assert len(files(FIXTURES)) <= 32
    assert sum((FIXTURES / name).stat().st_size for name in files(FIXTURES)) < 500_000
