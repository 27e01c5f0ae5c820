"""Freed memory stays with the process: an array as large as one before it causes no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
if sys.argv[1] == "ours":
    from mlx_hiermem import cpu
    cpu.enable()
import mlx.core as mx

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        mx.eval(mx.ones((8, 1024, 1024)))  # 32 MB, 8 192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mx.set_default_device(mx.cpu)
faults(4)
print(faults(8))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has another malloc")
def test_freed_memory_is_kept() -> None:
    def run(whose: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, whose], capture_output=True, check=True).stdout)

    assert run("ours") < 2_000 < 32_000 < run("plain")
