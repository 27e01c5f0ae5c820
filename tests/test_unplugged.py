"""A file system that is unmounted, and whose device is dead, under a chat and a server: see torture/unplug.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from torture.fuzz import SEEDS

MOUNTS = sys.platform.startswith("linux") and os.geteuid() == 0


@pytest.mark.slow
@pytest.mark.skipif(not MOUNTS, reason="only root on Linux can mount a file system")
@pytest.mark.skipif(not shutil.which("mkfs.ext4") or not shutil.which("unshare"), reason="needs mkfs.ext4")
def test_a_drive_that_dies_is_let_go_and_comes_back() -> None:
    possible = subprocess.run(["unshare", "--mount", "losetup", "--find"], capture_output=True)
    if possible.returncode:
        pytest.skip("no loop device may be had here")
    result = subprocess.run([sys.executable, str(SEEDS.parent / "unplug.py")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
