"""`cpu.enable`: what it does to a process, and the line where a BLAS is missing."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import mlx.core as mx
import pytest
from tiny import make_model

from mlx_hiermem import cpu

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="for Linux")
COMMAND = "from mlx_hiermem.apps.cli.main import main; main()"
MISSING = "from mlx_hiermem import cpu; cpu.NAMES = ('libnone.so',); "
LOADED = "maps = open('/proc/self/maps').read(); print('libopenblas.so' in maps or 'openblas-pthread' in maps)"
INSTALLED = "from mlx_hiermem import cpu; print(cpu.enable(), cpu.enable())"


def run(code: str, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


@linux
def test_importing_the_package_leaves_the_process_alone() -> None:
    assert run(f"import mlx_hiermem, mlx_hiermem.model; {LOADED}").stdout == "False\n"


@linux
def test_enable_is_done_once_and_before_mlx() -> None:
    first, second = run(INSTALLED).stdout.split()
    assert first == second
    assert run(f"import mlx.core; {INSTALLED}").stdout == "None None\n"
    if first != "None":
        assert run(f"from mlx_hiermem import cpu; cpu.enable(); {LOADED}").stdout == "True\n"


@linux
def test_the_command_says_once_that_the_blas_is_missing(tmp_path: pathlib.Path) -> None:
    model = make_model(tmp_path / "model")
    done = run(MISSING + COMMAND, "generate", model, "Neon is", "-n", "2")
    assert done.stderr.count("libopenblas0-pthread") == 1
    assert [line.startswith("hiermem: ") for line in done.stderr.splitlines() if "OpenBLAS" in line] == [True]
    assert run(MISSING + COMMAND, "--help").stderr == ""  # which computes nothing


@linux
@pytest.mark.skipif(run(INSTALLED).stdout.startswith("None"), reason="OpenBLAS is not installed")
def test_the_command_is_quiet_with_a_blas(tmp_path: pathlib.Path) -> None:
    model = make_model(tmp_path / "model")
    assert "OpenBLAS" not in run(COMMAND, "generate", model, "Neon is", "-n", "2").stderr


@pytest.mark.parametrize(
    ("platform", "device", "said"), [("linux", mx.cpu, 1), ("linux", mx.gpu, 0), ("darwin", mx.cpu, 0)]
)
def test_where_there_is_something_to_say(
    monkeypatch: pytest.MonkeyPatch, platform: str, device: mx.DeviceType, said: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(cpu, "_say", None)
    monkeypatch.setattr(cpu, "_blas", None)
    monkeypatch.setattr(cpu, "NAMES", ())
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    cpu.report_slow_blas()  # a program that did not call `enable` is told nothing
    assert cpu.enable(lines.append) is None
    cpu.report_slow_blas()
    cpu.report_slow_blas()
    assert lines == [cpu.MISSING] * said
