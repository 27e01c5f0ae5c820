"""`hiermem export` that is told to stop: a SIGTERM leaves nothing half made behind."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tiny import make_model

from mlx_hiermem.apps.cli.display import staged_progress

MAIN = "from mlx_hiermem.apps.cli.main import main; main()"
SOON = 300.0  # seconds; on a busy machine torch and coremltools alone take minutes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Do not write into it."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "written"), [("coreml", "bank"), ("coreai", "anchor.aimodel")])
def test_a_sigterm_leaves_nothing(kind: str, written: str, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    if kind == "coreai":
        pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    target, scratch = tmp_path / "apps", tmp_path / "scratch"
    target.mkdir()
    scratch.mkdir()
    partial = target / "Model.partial"
    command = [sys.executable, "-c", MAIN, "export", kind, str(model), str(target / "Model"), "--context", "32"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for_files(partial / written, process)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SOON)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert not list(target.iterdir())
    left = {file.name.partition("_")[0] for file in scratch.iterdir()}
    assert left <= {"mlx", "torchinductor"}  # where MLX and PyTorch keep the kernels that they have compiled


def wait_for_files(folder: pathlib.Path, process: subprocess.Popen[str]) -> None:
    """Returns once the export has written something."""
    until = time.monotonic() + SOON
    while not (folder.is_dir() and any(folder.iterdir())):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it has written nothing yet"
        time.sleep(0.01)


def persist() -> None:
    """As Core AI's writer does: it calls back into Python, and says of any exception that it could not write."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except SystemExit:
        raise RuntimeError("failed to persist") from None


def test_a_sigterm_that_a_library_makes_an_error_of_ends_it_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended, staged_progress("writing", show=False):
            persist()
        assert ended.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_without_a_sigterm_stays_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="full"), staged_progress("writing", show=False):
            raise RuntimeError("the disk is full")
    finally:
        signal.signal(signal.SIGTERM, before)
